// Chunked attention, backward, on the CPU. Probabilities are recomputed from the scores and the log-sum-exp.
//
//   P_ij = exp(scale q_i . k_j - lse_i);  delta_i = do_i . o_i;  dS_ij = P_ij (do_i . v_j - delta_i)
//   dv_j = sum_i P_ij do_i;  dk_j = scale sum_i dS_ij q_i;  dq_i = scale sum_j dS_ij k_j
//
// A chunk is cut into blocks of kBlock rows. A job owns one pair (query block i, key block j, j <= i if causal) of one
// head and computes each product of the pair once, 3 K + 2 V multiplications per score (operand A: gemm.h):
//   1. S^T = scale K Q^T and dP^T = V dO^T, which become P^T and dS^T
//   2. dV_j += P^T dO   and  dK_j += dS^T Q     (A = P^T and dS^T)
//   3. dQ_i += dS K                             (A = (dS^T)^T), with AMX dQ_i^T += K^T dS^T
// Keys that no query of a tile sees are skipped. The jobs add to the chunk's sums dQ, dK and dV without locks: the job
// of (i, j) waits for (i, j + 1), which adds to dQ_i, and for (i - 1, j), which adds to dK_j and dV_j. So the terms of
// a sum are added by ascending i - j, for any number of threads. Jobs start in this order and seldom wait.
//
// In 2 and 3, all rows of a tile have the same depth: P and dS are 0 for keys that a query does not see. If a q, k or
// do of the chunk is not finite, 0 times it would be NaN. Then the product of a tile has only the depth that all its
// rows see, and the rest is added row by row. If a query's log-sum-exp is NaN, its P is NaN or, for unseen keys, 0.
//
// In a chunk of one block, delta_i comes from P and dP, without the rounding of o.
// Operands are packed once per chunk: K by columns, K by rows, V by columns, Q^T, Q by rows, dO^T, dO by rows.
// Scratch, in elements: per active chunk C (5 K + 4 V), plus C K if units are pairs (K by rows); per thread P^T and
// dS^T, 2 kBlock^2. Queries are numbered like keys, from the chunk's start; the queries of cached rows are zero.

#include "chunked_attention.h"

#include <algorithm>
#include <cmath>

#include "finite.h"
#include "quantized_cache.h"
#include "relay.h"
#include "vector_math.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int64_t kBlock = 192;

template <class T>
class ChunkBackward {
  using U = Unit<T>;
  using R = Compute<T>;
  static constexpr int64_t kColumns = kTileColumns<R>;
  static constexpr bool kPaired = kUnitDepth<U> == 2;
  static constexpr bool kAmx = kUsesAmx<U>;
  static_assert(kBlock % kColumns == 0 && kBlock % kRowPadding == 0 && kBlock % kLeftColumns<U> == 0);

 public:
  // max_keys is a multiple of kRowPadding.
  ChunkBackward(const ChunkedAttentionBwdParams& params, int64_t max_keys, int threads)
      : p_(params),
        drop_(params),
        k_columns_(max_keys, params.key_dim),
        v_columns_(max_keys, params.value_dim),
        k_rows_(kAmx ? params.key_dim : kPaired ? max_keys : 0, kAmx ? max_keys : params.key_dim),
        q_transposed_(params.key_dim, max_keys),
        q_rows_(max_keys, params.key_dim),
        do_transposed_(params.value_dim, max_keys),
        do_rows_(max_keys, params.value_dim),
        dq_(kAmx ? params.key_dim : max_keys, kAmx ? max_keys : params.key_dim),
        dk_(max_keys, params.key_dim),
        dv_(max_keys, params.value_dim),
        lse_(max_keys + kColumns),
        delta_(max_keys + kColumns),
        done_(ceil_div(max_keys, kBlock) * ceil_div(max_keys, kBlock)),
        scratch_(threads, params) {
    pairs_.reserve(static_cast<size_t>(ceil_div(max_keys, kBlock) * ceil_div(max_keys, kBlock)));
  }

  void operator()(const Chunk& chunk, int64_t head) {
    finite_ = true;
    const int64_t blocks = ceil_div(chunk.keys, kBlock);
    const double work = static_cast<double>(chunk.keys * (p_.key_dim + p_.value_dim));
    const auto for_each = [&](int64_t jobs, double total, auto&& body) {
      parallel_jobs<FlushDenormals, TileRegisters>(jobs, scratch_.threads() == 1 ? 0 : total, [&] { return body; });
    };
    for_each(blocks, work, [&](int64_t block) { pack(chunk, head, block); });
    pairs_.clear();
    for (int64_t distance = chunk.causal ? 0 : 1 - blocks; distance < blocks; ++distance)
      for (int64_t key = std::max<int64_t>(0, chunk.cached / kBlock - distance);
           key < std::min(blocks, blocks - distance); ++key)
        pairs_.push_back({key + distance, key});
    done_.forget(blocks * blocks);
    for_each(static_cast<int64_t>(pairs_.size()), work * static_cast<double>(chunk.keys), [&](int64_t job) {
      const auto [query, key] = pairs_[static_cast<size_t>(job)];
      if (key < last_key_block(chunk, query)) done_.wait(query * blocks + key + 1);
      if (query > first_query_block(chunk, key)) done_.wait((query - 1) * blocks + key);
      multiply_pair(chunk, head, query, key);
      done_.publish(query * blocks + key);
    });
    for_each(blocks, work, [&](int64_t block) { unpack(chunk, head, block); });
  }

 private:
  struct Pair { int64_t query, key; };
  struct PairScratch {
    explicit PairScratch(const ChunkedAttentionParams&)
        : s(kBlock, kBlock),
          dp(kBlock, kBlock),
          p(kPaired ? kBlock : 0, kBlock),
          ds(kPaired ? kBlock : 0, kBlock),
          ds_rows(kPaired ? kBlock : 0, kBlock) {}
    PackedMatrix<R> s, dp;      // S^T and dP^T; later, without pairs, P^T and dS^T
    PackedLeftMatrix<U> p, ds;  // P^T and dS^T by columns
    PackedMatrix<U> ds_rows;    // dS^T by rows
  };

  // Returns `pairs` if units (gemm.h) are pairs, else `elements`.
  template <class Pairs, class Elements>
  static const auto& units(const Pairs& pairs, const Elements& elements) {
    if constexpr (kPaired) return pairs;
    else return elements;
  }

  ChunkRows<T> key_rows(const Chunk& chunk, int64_t head) const {
    return chunk_rows<T>(p_, chunk, head, p_.cache_k, p_.k, p_.key_dim);
  }
  ChunkRows<T> query_rows(const Chunk& chunk, int64_t head, const void* tokens, int64_t width) const {
    return chunk_rows<T>(p_, chunk, head, nullptr, tokens, width);
  }

  // The first query block that sees a key block, and the last key block that a query block sees.
  static int64_t first_query_block(const Chunk& chunk, int64_t key_block) {
    const int64_t cached = chunk.cached / kBlock;
    return chunk.causal ? std::max(key_block, cached) : cached;
  }
  static int64_t last_key_block(const Chunk& chunk, int64_t query_block) {
    return chunk.causal ? query_block : ceil_div(chunk.keys, kBlock) - 1;
  }

  // The row at index 0 of the arrays of queries: the start of the first block with queries.
  static int64_t first_row(const Chunk& chunk) { return chunk.cached / kBlock * kBlock; }

  void pack(const Chunk& chunk, int64_t head, int64_t block) {
    const int64_t begin = block * kBlock, end = std::min(begin + kBlock, round_up(chunk.keys, kRowPadding));
    const auto k = key_rows(chunk, head), v = chunk_rows<T>(p_, chunk, head, p_.cache_v, p_.v, p_.value_dim);
    Finiteness<T> finite;
    if constexpr (kPaired) pack_by_columns<T>(begin, end, p_.key_dim, k, k_columns_);
    else pack_by_columns<T>(begin, end, p_.key_dim, k, k_columns_, finite);
    if constexpr (kAmx) pack_transposed_left<T>(begin, end, p_.key_dim, k, k_rows_, finite);
    else if constexpr (kPaired) pack_by_rows<T>(begin, end, p_.key_dim, k, k_rows_, finite);
    pack_by_columns<T>(begin, end, p_.value_dim, v, v_columns_);
    const auto record_finiteness = [&] {
      if (!finite.holds()) __atomic_store_n(&finite_, false, __ATOMIC_RELAXED);
    };

    const int64_t base = first_row(chunk);
    if (begin < base) return record_finiteness();
    const auto q = query_rows(chunk, head, p_.q, p_.key_dim), o = query_rows(chunk, head, p_.o, p_.value_dim);
    const auto d_o = query_rows(chunk, head, p_.d_o, p_.value_dim);
    const auto q_row = [&](int64_t row) { return q(base + row); };
    const auto do_row = [&](int64_t row) { return d_o(base + row); };
    pack_transposed<T>(begin - base, end - base, p_.key_dim, q_row, q_transposed_);
    pack_by_rows<T>(begin - base, end - base, p_.key_dim, q_row, q_rows_, finite);
    pack_transposed<T>(begin - base, end - base, p_.value_dim, do_row, do_transposed_);
    pack_by_rows<T>(begin - base, end - base, p_.value_dim, do_row, do_rows_, finite);
    record_finiteness();

    for (int64_t row = begin; row < round_up(end, kColumns); ++row) {
      R lse = 0, delta = 0;
      if (row >= chunk.cached && row < chunk.keys) {
        lse = static_cast<const R*>(p_.lse)[(chunk.token + row - chunk.cached) * p_.heads + head];
        // If every score of the row was dropped: exp(-inf - 0) is zero; exp(-inf - lse) would be NaN.
        if (lse == -std::numeric_limits<R>::infinity()) lse = 0;
        Vec<R> sum = zeros<R>();
        for (int64_t c = 0; c < p_.value_dim; c += kLanes<R>)
          sum += load_first(d_o(row) + c, p_.value_dim - c) * load_first(o(row) + c, p_.value_dim - c);
        delta = sum_lanes<R>(sum);
      }
      lse_[row - base] = lse;
      delta_[row - base] = delta;
    }
  }

  void multiply_pair(const Chunk& chunk, int64_t head, int64_t query_block, int64_t key_block) {
    const PairScratch& scratch = scratch_.get();
    const int64_t base = first_row(chunk);
    const int64_t query = query_block * kBlock, queries = std::min(kBlock, chunk.keys - query);
    const int64_t key = key_block * kBlock, key_end = std::min(key + kBlock, chunk.keys);
    constexpr int kRows = kTileRows<U>;
    const int64_t columns = round_up(queries, kDepthStep<U>), first_panel = (query - base) / kColumns;
    // Keys that some queries of a panel see, in whole tiles.
    const auto visible = [&](int64_t at) {
      return round_up(std::min(key_end, chunk.seen_by(query + at + kColumns - 1)) - key,
                      std::max(kRows, kDepthStep<U>));
    };
    // Multiplies in blocks of the depth, so that a block of B stays in the L1 for all keys, and a block of A in the L2
    // for all queries. With AMX, multiply_rows cuts the depth.
    const auto multiply = [&](const PackedLeft<U>& a, const Packed<U>& b, int64_t depth, R gain, const Packed<R>& c) {
      const int64_t block = kAmx ? depth : std::min(kBlock, depth);
      int64_t d = 0;
      do {  // also once for a depth of 0, which gives zeros
        for (int64_t at = 0; at < columns; at += kColumns) {
          const int64_t panel = at / kColumns, part = std::min(block, depth - d);
          const bool last = at + kColumns >= columns;
          const Ahead<U> ahead{last ? b.at(first_panel, d + block) : b.at(first_panel + panel + 1, d), part};
          multiply_rows(vectors_in_panel<U>(columns, panel), visible(at), part, a.at(d / kLeftColumns<U>, key),
                        a.panel_units(), b.at(first_panel + panel, d), gain, d > 0, c.at(panel, 0), ahead);
        }
        d += block;
      } while (d < depth);
    };
    multiply(k_columns_, q_transposed_, p_.key_dim, static_cast<R>(p_.scale), scratch.s);
    multiply(v_columns_, do_transposed_, p_.value_dim, R{1}, scratch.dp);
    for (int64_t at = 0; at < columns; at += kColumns) {
      const int64_t panel = at / kColumns, rows = visible(at);
      R* s = scratch.s.at(panel, 0);
      if (key + rows > chunk.seen_by(query + at)) mask_unseen(s, key, rows, query + at, chunk);
      if (drop_) drop_.apply(s, key, rows, query + at, chunk, head);
      const int vectors = vectors_in_panel<U>(columns, panel);
      if (chunk.keys <= kBlock) differentiate<true>(vectors, panel, rows, query - base + at, scratch);
      else differentiate<false>(vectors, panel, rows, query - base + at, scratch);
    }

    // Keys of the cache get no gradient.
    const bool starts_key_sums = query_block == first_query_block(chunk, key_block);
    const auto add_to_keys = [&](const PackedLeft<U>& a, const Packed<U>& b, const ChunkRows<T>& b_rows, int64_t width,
                                 const Packed<R>& sums) {
      for (int64_t column = 0; column < panels<U>(width); ++column) {
        const int vectors = vectors_in_panel<U>(width, column);
        const Ahead<U> ahead{b.at(column + 1, query - base), kBlock};
        int64_t tile = 0, rows;
        // If causal, P^T of a panel of queries ends at the panel's last row: no tile may cross the end of a panel.
        constexpr int64_t kStart = kAmx ? kRows : kTallRows<U>;
        static_assert(kColumns % kStart == 0 && kBlock % kStart == 0);
        for (int64_t row = std::max(key, chunk.cached / kStart * kStart); row < key_end; row += rows, ++tile) {
          rows = kAmx ? kRows : tile_rows<U>(vectors, key_end - row);
          const int64_t seen_by_some =
              std::max<int64_t>(chunk.first_to_see(row) - query, 0) / kLeftColumns<U> * kLeftColumns<U>;
          const int64_t seen_by_all = std::max<int64_t>(chunk.first_to_see(row + rows - 1) - query, 0);
          // `at` is the first query of the product; queries from seen_by_some to `at` are added row by row.
          const bool shared = finite_ || seen_by_all <= seen_by_some;
          const int64_t at = shared ? seen_by_some : std::min(round_up(seen_by_all, kLeftColumns<U>), columns);
          multiply_rows(vectors, rows, std::max<int64_t>(queries - at, 0), a.at(at / kLeftColumns<U>, row - key),
                        a.panel_units(), b.at(column, query - base + at), R{1}, !starts_key_sums, sums.at(column, row),
                        ahead, tile);
          for (int64_t r = row; at > seen_by_some && r < std::min(row + rows, key_end); ++r)
            for (int64_t i = std::max(seen_by_some, chunk.first_to_see(r) - query); i < std::min(at, queries); ++i)
              if (const T* from = b_rows(query + i))
                add_to_row<T>(sums, column, r, element_by_columns<U>(a, r - key, i), from, width);
        }
      }
    };
    const auto d_o = query_rows(chunk, head, p_.d_o, p_.value_dim), q = query_rows(chunk, head, p_.q, p_.key_dim);
    add_to_keys(units(scratch.p, scratch.s), do_rows_, d_o, p_.value_dim, dv_);
    add_to_keys(units(scratch.ds, scratch.dp), q_rows_, q, p_.key_dim, dk_);

    const bool starts_query_sums = key_block == last_key_block(chunk, query_block);
    const ChunkRows<T> k = key_rows(chunk, head);
    // Returns the number of keys in the product of a tile: `depth` or fewer. Queries from `at` on see `depth` keys.
    const auto shared_depth = [&](int64_t depth, int64_t at) {
      const int64_t first_depth = std::max<int64_t>(chunk.seen_by(query + at) - key, 0);
      return finite_ || first_depth >= depth ? depth : first_depth / kDepthStep<U> * kDepthStep<U>;
    };
    if constexpr (kAmx) {
      for (int64_t at = 0; at < queries; at += kColumns) {
        const int64_t panel = at / kColumns;
        const int64_t depth = std::min(key_end, chunk.seen_by(query + at + kColumns - 1)) - key;
        const int64_t shared = shared_depth(depth, at);
        multiply_rows(vectors_in_panel<U>(queries, panel), p_.key_dim, shared, k_rows_.at(key / kLeftColumns<U>, 0),
                      k_rows_.panel_units(), scratch.ds_rows.at(panel, 0), R{1}, !starts_query_sums,
                      dq_.at(first_panel + panel, 0));
        for (int64_t i = at; shared < depth && i < std::min(at + kColumns, queries); ++i)
          for (int64_t j = shared; j < std::min(key_end, chunk.seen_by(query + i)) - key; ++j)
            if (const T* from = k(key + j))
              add_to_column<T>(dq_, query - base + i, element_by_rows<U>(scratch.ds_rows, j, i), from, p_.key_dim);
      }
    } else {
      const Packed<U>& ds_rows = units(scratch.ds_rows, scratch.dp);
      const Packed<U>& k_rows = kPaired ? k_rows_ : k_columns_;
      for (int64_t column = 0; column < panels<U>(p_.key_dim); ++column) {
        const int vectors = vectors_in_panel<U>(p_.key_dim, column);
        const Ahead<U> ahead{k_rows.at(column + 1, key), kBlock};
        int64_t rows;
        for (int64_t at = 0, tile = 0; at < queries; at += rows, ++tile) {
          rows = tile_rows<U>(vectors, queries - at);
          const int64_t depth = std::min(key_end, chunk.seen_by(query + at + rows - 1)) - key;
          const int64_t shared = shared_depth(depth, at);
          const U* ds = ds_rows.at(at / kColumns, 0) + at % kColumns;
          multiply_tile<true>(vectors, rows, shared, ds, 0, k_rows.at(column, key), R{1},
                              starts_query_sums ? nullptr : kOnes<R>, dq_.at(column, query - base + at),
                              ahead.part(tile));
          for (int64_t i = at; shared < depth && i < std::min(at + rows, queries); ++i)
            for (int64_t j = shared; j < std::min(key_end, chunk.seen_by(query + i)) - key; ++j)
              if (const T* from = k(key + j))
                add_to_row<T>(dq_, column, query - base + i, element_by_rows<U>(ds_rows, j, i), from, p_.key_dim);
        }
      }
    }
  }

  // For queries whose log-sum-exp is not finite, sets the scores of keys that they see to NaN; other scores stay -inf.
  // Returns the log-sum-exps, with 0 instead of NaN.
  static Vec<R> spread_nan(R* scores, int64_t rows, Vec<R> lse) {
    for (R* at = scores; at < scores + rows * kColumns; at += kColumns) {
      const Vec<R> s = load(static_cast<const R*>(at));
      store(at, s == -std::numeric_limits<R>::infinity() ? s : s + (lse - lse));
    }
    return lse == lse ? lse : zeros<R>();
  }

  // Turns S^T and dP^T of `rows` keys into P^T and dS^T. With kWholeRows, the queries see no other keys.
  template <bool kWholeRows>
  void differentiate(int vectors, int64_t panel, int64_t rows, int64_t query, const PairScratch& scratch) const {
    for (int64_t c = 0; c < vectors * kLanes<R>; c += kLanes<R>) {
      R *p = scratch.s.at(panel, 0) + c, *dp = scratch.dp.at(panel, 0) + c;
      Vec<R> lse = load(&lse_[query + c]);
      if (!is_finite<R>(lse)) lse = spread_nan(p, rows, lse);
      const auto exponential = [&](int64_t r) {
        return softmax_exp(load(static_cast<const R*>(p) + r * kColumns) - lse);
      };
      Vec<R> gain = splat(R{1}), delta = load(&delta_[query + c]);
      if constexpr (kWholeRows) {  // recomputes both sums, without the rounding of lse and o
        Vec<R> total = zeros<R>(), product = zeros<R>();
        for (int64_t r = 0; r < rows; ++r) {
          const Vec<R> prob = exponential(r);
          store(p + r * kColumns, prob);
          total += prob;
          product += prob * load(static_cast<const R*>(dp) + r * kColumns);
        }
        // A masked score may have a dP that is not finite.
        if (!is_finite<R>(product)) {
          product = zeros<R>();
          for (int64_t r = 0; r < rows; ++r) {
            const Vec<R> prob = load(static_cast<const R*>(p) + r * kColumns);
            product += prob == 0 ? zeros<R>() : prob * load(static_cast<const R*>(dp) + r * kColumns);
          }
        }
        // With every score dropped, P stays 0. With NaN, P stays 0 for keys that the query does not see.
        gain = total == 0 || total != total ? splat(R{1}) : 1 / total;
        delta = product * gain;
      }
      const auto probability = [&](int64_t r) {
        if constexpr (kWholeRows) return gain * load(static_cast<const R*>(p) + r * kColumns);
        else return exponential(r);
      };
      const auto gradient = [&](int64_t r, Vec<R> prob) {
        const Vec<R> ds = prob * (load(static_cast<const R*>(dp) + r * kColumns) - delta);
        return prob == 0 ? zeros<R>() : ds;
      };
      for (int64_t r = 0; r < rows; r += kUnitDepth<U>) {
        const Vec<R> prob = probability(r), ds = gradient(r, prob);
        if constexpr (!kPaired) {
          store(p + r * kColumns, prob);
          store(dp + r * kColumns, ds);
        } else {
          const Vec<R> next_prob = probability(r + 1), next_ds = gradient(r + 1, next_prob);
          const int64_t column = panel * kColumns + c, left = column / kLeftColumns<U>;
          const int64_t unit = column % kLeftColumns<U> / 2;
          store_raw(scratch.p.at(left, r) + unit, round_bf16(prob));
          store_raw(scratch.p.at(left, r + 1) + unit, round_bf16(next_prob));
          store_raw(scratch.ds.at(left, r) + unit, round_bf16(ds));
          store_raw(scratch.ds.at(left, r + 1) + unit, round_bf16(next_ds));
          store_raw(scratch.ds_rows.at(panel, r) + c, pair_units(ds, next_ds));
        }
      }
    }
  }

  void unpack(const Chunk& chunk, int64_t head, int64_t block) const {
    const R scale = static_cast<R>(p_.scale);
    const int64_t base = first_row(chunk), end = std::min((block + 1) * kBlock, chunk.keys);
    for (int64_t row = std::max(block * kBlock, chunk.cached); row < end; ++row) {
      const int64_t out = (chunk.token + row - chunk.cached) * p_.heads + head;
      if constexpr (!kAmx)
        unpack_row<T>(dq_, row - base, p_.key_dim, scale, static_cast<T*>(p_.dq) + out * p_.key_dim);
      unpack_row<T>(dk_, row, p_.key_dim, scale, static_cast<T*>(p_.dk) + out * p_.key_dim);
      unpack_row<T>(dv_, row, p_.value_dim, R{1}, static_cast<T*>(p_.dv) + out * p_.value_dim);
    }
    if constexpr (kAmx)
      for (int64_t row = block * kBlock; row < end; row += kLanes<R>) {
        if (row + kLanes<R> <= chunk.cached) continue;
        const auto dq_row = [&](int64_t i) {
          const int64_t token = chunk.token + row + i - chunk.cached;
          return row + i < chunk.cached ? nullptr : static_cast<T*>(p_.dq) + (token * p_.heads + head) * p_.key_dim;
        };
        unpack_columns<T>(dq_, row - base, std::min<int64_t>(end - row, kLanes<R>), p_.key_dim, splat(scale), dq_row);
      }
  }

  const ChunkedAttentionBwdParams& p_;
  DropKey drop_;
  PackedLeftMatrix<U> k_columns_, v_columns_;
  std::conditional_t<kAmx, PackedLeftMatrix<U>, PackedMatrix<U>> k_rows_;  // with AMX K^T
  PackedMatrix<U> q_transposed_, q_rows_, do_transposed_, do_rows_;
  PackedMatrix<R> dq_, dk_, dv_;
  Scratch<R> lse_, delta_;
  Milestones done_;  // one place per pair
  std::vector<Pair> pairs_;
  PerThread<PairScratch> scratch_;
  bool finite_ = true;  // true if all q, k and do of the chunk are finite
};

template <class T>
void backward(const ChunkedAttentionBwdParams& p) {
  const int64_t row = p.heads * static_cast<int64_t>(sizeof(T));
  zero_padding(p.sequences, p.dq, row * p.key_dim);
  zero_padding(p.sequences, p.dk, row * p.key_dim);
  zero_padding(p.sequences, p.dv, row * p.value_dim);
  const std::vector<Chunk> chunks = list_chunks(p);
  int64_t max_keys = 0;
  for (const Chunk& chunk : chunks) max_keys = std::max(max_keys, round_up(chunk.keys, kRowPadding));
  ChunkedAttentionBwdParams wide_params = p;
  const WideCache<T> cache(wide_params, chunks);
  const auto work = [&](const Chunk& chunk) {
    return static_cast<double>(chunk.keys * chunk.queries()) * static_cast<double>(p.key_dim + p.value_dim);
  };
  for_each_chunk(chunks, p.heads, kBlock, work, [&](int threads) {
    return ChunkBackward<T>(wide_params, max_keys, threads);
  });
}

}  // namespace

void chunked_attention_bwd_cpu(const ChunkedAttentionBwdParams& params) {
  if (params.sequences.tokens == 0 || params.heads == 0) return;
  dispatch_dtype(params.dtype, [&](auto element) { backward<decltype(element)>(params); });
}

}  // namespace megalodon::MEGALODON_ISA

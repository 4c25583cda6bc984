// Chunked attention, forward and state, on the CPU.
//
//   s_ij = scale q_i . k_j (j <= i if causal, in one chunk);  lse_i = log sum_j exp(s_ij)
//   o_i = sum_j exp(s_ij - lse_i) v_j
//
// A job owns kQueryBlock queries of one head of one chunk and visits the keys in blocks of kKeyBlock (A, B: gemm.h):
//   1. S^T = scale K Q^T (keys, queries): each lane computes the softmax of its own query           (A = K, B = Q^T)
//   2. online softmax: m' = max(m, max_j s), P = exp(S - m'), f = exp(m - m'), l = f l + sum_j P   (P replaces S)
//   3. O = diag(f) O + P V                                                                         (A = (P^T)^T, B = V)
//      with AMX O^T = O^T diag(f) + V^T P^T                                                        (A = V^T, B = P^T)
// The job ends with o = O / l, lse = m + log l. The products skip keys that none of their queries sees: step 1 for each
// panel of queries, step 3 for each tile of queries. K and V of a chunk are packed once. Several threads pack them
// before the jobs start. A single thread packs rows when a job first needs them; the previous job prefetches them.
// Every job packs its Q^T. Chunks with a cache and few queries, as in decoding, are left to few_query_attention.h.
//
// All rows of a tile of O are multiplied with the same keys: a row has probability 0 for keys that it does not see. If
// a value of the chunk is not finite, 0 times the value would be NaN. Then the product of a tile has only the keys that
// all its rows see, and the other keys are added row by row.
//
// Scratch: packed K and V of the active chunks; per thread S (kKeyBlock x kQueryBlock) and O (kQueryBlock x V).
// Results depend on shapes alone, not on the number of threads.
//
// Example with C = 3, V = 1, scores of row 2 = (0, ln 2, ln 4), v = (1, 2, 3): m = ln 4, P = (1/4, 1/2, 1), l = 7/4,
// O = 1/4 + 2/2 + 3 = 17/4, o = 17/7, lse = ln 7.

#include "chunked_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_chunks.h"
#include "few_query_attention.h"
#include "vector_math.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int64_t kQueryBlock = 96;
constexpr int64_t kKeyBlock = 256;

// Turns one panel of S^T into P^T. Updates each query's `max` and `sum`; sets `factor` to f, which scales earlier sums.
template <class U>
void softmax_panel(SumOf<U>* scores, int64_t keys, int vectors, SumOf<U>* max, SumOf<U>* sum, SumOf<U>* factor) {
  using R = SumOf<U>;
  constexpr int64_t kRow = kTileColumns<R>;
  constexpr R kInfinity = std::numeric_limits<R>::infinity();
  // Padding keys, up to a multiple of kDepthStep, get the score -inf.
  for (int64_t at = keys * kRow; at < round_up(keys, kDepthStep<U>) * kRow; at += kLanes<R>)
    store(scores + at, splat(-kInfinity));
  // One loop for all columns, since each maximum of a column waits for the previous one. The maxima of the vectors from
  // `vectors` on are not used.
  Vec<R> maxima[kTileVectors];
  for (int j = 0; j < kTileVectors; ++j) maxima[j] = load(static_cast<const R*>(max) + j * kLanes<R>);
  for (const R* at = scores; at < scores + keys * kRow; at += kRow)
#pragma GCC unroll 3
    for (int j = 0; j < kTileVectors; ++j) {
      const Vec<R> value = load(at + j * kLanes<R>);
      maxima[j] = value > maxima[j] ? value : maxima[j];
    }
  for (int j = 0; j < vectors; ++j, scores += kLanes<R>, max += kLanes<R>, sum += kLanes<R>, factor += kLanes<R>) {
    const R* s = scores;
    const Vec<R> max_before = load(static_cast<const R*>(max)), max_now = maxima[j];
    // If every score so far was dropped, the maximum is -inf: exp(s - 0) is zero; exp(s - m) would be NaN.
    const Vec<R> shift = max_now == -kInfinity ? zeros<R>() : max_now;
    Vec<R> total = zeros<R>();
    for (int64_t key = 0; key < round_up(keys, kDepthStep<U>); key += kUnitDepth<U>) {
      const Vec<R> p = softmax_exp(load(s + key * kRow) - shift);
      total += p;
      if constexpr (kUnitDepth<U> == 1) {
        store(scores + key * kRow, p);
      } else {
        const Vec<R> next = softmax_exp(load(s + (key + 1) * kRow) - shift);
        total += next;
        store_raw(scores + key / 2 * kRow, pair_units(p, next));
      }
    }
    const Vec<R> shrink = softmax_exp(max_before - shift);
    store(max, max_now);
    store(sum, load(static_cast<const R*>(sum)) * shrink + total);
    store(factor, shrink);
  }
}

// Forward of one head of one chunk.
template <class T>
class ChunkForward {
 public:
  using U = Unit<T>;
  using R = Compute<T>;

  ChunkForward(const ChunkedAttentionFwdParams& params, int64_t max_keys, int threads)
      : p_(params),
        drop_(params),
        keys_(max_keys, params.key_dim),
        values_(kUsesAmx<U> ? params.value_dim : max_keys, kUsesAmx<U> ? max_keys : params.value_dim),
        scratch_(threads, params) {}

  void operator()(const Chunk& chunk, int64_t head) {
    finite_ = true;
    const int64_t blocks = ceil_div(chunk.queries(), kQueryBlock);
    const auto first_row = [&](int64_t block) { return std::min(chunk.cached + block * kQueryBlock, chunk.keys); };
    const auto packed_end = [&](int64_t end) { return round_up(std::min(end, chunk.keys), kRowPadding); };
    if (num_threads() == 1 || scratch_.threads() == 1) {
      const FlushDenormals flush;
      const TileRegisters tiles;
      int64_t packed = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = first_row(block), end = first_row(block + 1), seen = packed_end(chunk.seen_by(end - 1));
        pack(chunk, head, packed, seen);
        packed = seen;
        attend(chunk, head, first, end, scratch_.get(), rows_ahead(chunk, head, first, end));
      }
      return;
    }
    const double pack_work = static_cast<double>(chunk.keys * (p_.key_dim + p_.value_dim));
    parallel_jobs(ceil_div(chunk.keys, kKeyBlock), pack_work, [&] {
      return [&](int64_t job) { pack(chunk, head, job * kKeyBlock, packed_end((job + 1) * kKeyBlock)); };
    });
    parallel_jobs<FlushDenormals, TileRegisters>(blocks, pack_work * static_cast<double>(chunk.queries()), [&] {
      return [&](int64_t job) {
        // The last block first: it may see the most keys. This order balances the threads.
        const int64_t block = blocks - 1 - job;
        attend(chunk, head, first_row(block), first_row(block + 1), scratch_.get(), {});
      };
    });
  }

 private:
  struct BlockScratch {
    explicit BlockScratch(const ChunkedAttentionParams& p)
        : queries(p.key_dim, kQueryBlock),
          output(kUsesAmx<U> ? p.value_dim : kQueryBlock, kUsesAmx<U> ? kQueryBlock : p.value_dim),
          scores(kKeyBlock, kQueryBlock),
          max(kQueryBlock), sum(kQueryBlock), factor(kQueryBlock) {}
    PackedMatrix<U> queries;         // Q^T
    PackedMatrix<R> output, scores;  // O, with AMX O^T; S^T
    Scratch<R> max, sum, factor;
  };

  void pack(const Chunk& chunk, int64_t head, int64_t begin, int64_t end) {
    pack_by_columns<T>(begin, end, p_.key_dim, chunk_rows<T>(p_, chunk, head, p_.cache_k, p_.k, p_.key_dim), keys_);
    const ChunkRows<T> v = value_rows(chunk, head);
    Finiteness<T> finite;
    if constexpr (kUsesAmx<U>) pack_transposed_left<T>(begin, end, p_.value_dim, v, values_, finite);
    else pack_by_rows<T>(begin, end, p_.value_dim, v, values_, finite);
    if (!finite.holds()) __atomic_store_n(&finite_, false, __ATOMIC_RELAXED);
  }

  ChunkRows<T> value_rows(const Chunk& chunk, int64_t head) const {
    return chunk_rows<T>(p_, chunk, head, p_.cache_v, p_.v, p_.value_dim);
  }

  // Rows that the next block of queries, after [first, end), reads and writes.
  RowsAhead rows_ahead(const Chunk& chunk, int64_t head, int64_t first, int64_t end) const {
    RowsAhead ahead;
    const auto add = [&](const void* tokens, int64_t width) {
      ahead.add(chunk_rows<T>(p_, chunk, head, nullptr, tokens, width), width, end, end + kQueryBlock);
    };
    add(p_.o, p_.value_dim);
    add(p_.q, p_.key_dim);
    add(p_.v, p_.value_dim);
    add(p_.k, p_.key_dim);
    ahead.pace(ceil_div(end, kTileRows<U>) * ceil_div(end - first, kTileColumns<R>));  // tiles of S^T
    return ahead;
  }

  // Attention of rows [first, end) of the chunk.
  void attend(const Chunk& chunk, int64_t head, int64_t first, int64_t end, const BlockScratch& scratch,
              RowsAhead rows_ahead) const {
    constexpr int64_t kColumns = kTileColumns<R>;
    static_assert(kQueryBlock % kColumns == 0 && kKeyBlock % kRowPadding == 0);
    const int64_t queries = end - first;
    const R scale = static_cast<R>(p_.scale);
    const ChunkRows<T> q = chunk_rows<T>(p_, chunk, head, nullptr, p_.q, p_.key_dim);
    pack_transposed<T>(0, queries, p_.key_dim, [&](int64_t row) { return q(first + row); }, scratch.queries);
    for (int64_t i = 0; i < kQueryBlock; ++i) {
      scratch.max[i] = -std::numeric_limits<R>::infinity();
      scratch.sum[i] = 0;
    }

    for (int64_t key = 0; key < chunk.seen_by(end - 1); key += kKeyBlock) {
      for (int64_t at = 0; at < queries; at += kColumns) {
        const int64_t panel = at / kColumns, last = std::min(first + at + kColumns, end) - 1;
        const int64_t count = std::min(key + kKeyBlock, chunk.seen_by(last)) - key;
        if (count <= 0) continue;
        const int vectors = vectors_in_panel<U>(queries, panel);
        R* scores = scratch.scores.at(panel, 0);
        const U* q_panel = scratch.queries.at(panel, 0);
        multiply_rows(vectors, count, p_.key_dim, keys_.at(0, key), keys_.panel_units(), q_panel, scale,
                      /*add=*/false, scores, Ahead<U>{q_panel, p_.key_dim}, /*tile=*/0, /*between=*/rows_ahead);
        if (key + count > chunk.seen_by(first + at)) mask_unseen(scores, key, count, first + at, chunk);
        if (drop_) drop_.apply(scores, key, count, first + at, chunk, head);
        softmax_panel<U>(scores, count, vectors, &scratch.max[at], &scratch.sum[at], &scratch.factor[at]);
      }
      const ChunkRows<T> v = value_rows(chunk, head);
      if constexpr (kUsesAmx<U>) add_values_transposed(chunk, v, key, first, queries, scratch);
      else add_values(chunk, v, key, first, queries, scratch);
    }

    T* o = static_cast<T*>(p_.o);
    R* lse = static_cast<R*>(p_.lse);
    const auto row = [&](int64_t i) { return (chunk.token + first - chunk.cached + i) * p_.heads + head; };
    for (int64_t i = 0; i < queries; ++i) {
      const R sum = scratch.sum[i];
      lse[row(i)] = scratch.max[i] + std::log(sum);
      scratch.sum[i] = sum == 0 ? R{0} : 1 / sum;
      if constexpr (!kUsesAmx<U>)
        unpack_row<T>(scratch.output, i, p_.value_dim, scratch.sum[i], o + row(i) * p_.value_dim);
    }
    if constexpr (kUsesAmx<U>)
      for (int64_t i = 0; i < queries; i += kLanes<R>)
        unpack_columns<T>(scratch.output, i, std::min<int64_t>(queries - i, kLanes<R>), p_.value_dim,
                          load(&scratch.sum[i]), [&](int64_t j) { return o + row(i + j) * p_.value_dim; });
  }

  // Returns the number of keys in the product of a tile whose rows together see `depth` keys: all if values are finite,
  // else those that the first row sees, in whole depth steps.
  int64_t shared_depth(int64_t depth, int64_t first_row_depth) const {
    if (finite_ || first_row_depth >= depth) return depth;
    return std::max<int64_t>(first_row_depth, 0) / kDepthStep<U> * kDepthStep<U>;
  }

  // Element of P.
  R probability(const BlockScratch& scratch, int64_t key, int64_t query) const {
    U* const probabilities = reinterpret_cast<U*>(scratch.scores.at(0, 0));
    return element_by_rows(Packed<U>{probabilities, scratch.scores.rows * kUnitDepth<U>}, key, query);
  }

  // O = diag(f) O + P V for the block of keys from `key` on.
  void add_values(const Chunk& chunk, const ChunkRows<T>& v, int64_t key, int64_t first, int64_t queries,
                  const BlockScratch& scratch) const {
    constexpr int64_t kColumns = kTileColumns<R>;
    const int64_t block = std::min(kKeyBlock, chunk.seen_by(first + queries - 1) - key);
    const int64_t columns = panels<U>(p_.value_dim);
    for (int64_t column = 0; column < columns; ++column) {
      const int vectors = vectors_in_panel<U>(p_.value_dim, column);
      const Ahead<U> ahead{column + 1 < columns ? values_.at(column + 1, key) : values_.at(0, key + block), block};
      int64_t rows;
      for (int64_t at = 0, tile = 0; at < queries; at += rows, ++tile) {
        rows = tile_rows<U>(vectors, queries - at);
        const int64_t depth = std::min(block, chunk.seen_by(first + at + rows - 1) - key);
        if (depth <= 0) continue;
        const int64_t shared = shared_depth(depth, chunk.seen_by(first + at) - key);
        const U* p = reinterpret_cast<const U*>(scratch.scores.at(at / kColumns, 0)) + at % kColumns;
        multiply_tile<true>(vectors, rows, shared, p, 0, values_.at(column, key), R{1},
                            key ? &scratch.factor[at] : nullptr, scratch.output.at(column, at), ahead.part(tile));
        for (int64_t i = at; shared < depth && i < std::min(at + rows, queries); ++i)
          for (int64_t j = shared; j < std::min(block, chunk.seen_by(first + i) - key); ++j)
            add_to_row<T>(scratch.output, column, i, probability(scratch, j, i), v(key + j), p_.value_dim);
      }
    }
  }

  // O^T = O^T diag(f) + V^T P^T.
  void add_values_transposed(const Chunk& chunk, const ChunkRows<T>& v, int64_t key, int64_t first, int64_t queries,
                             const BlockScratch& scratch) const {
    constexpr int64_t kColumns = kTileColumns<R>;
    const int64_t values = round_up(p_.value_dim, kTileRows<U>);
    for (int64_t at = 0; at < queries; at += kColumns) {
      const int64_t panel = at / kColumns, end = std::min(at + kColumns, queries);
      const int64_t depth = std::min(kKeyBlock, chunk.seen_by(first + end - 1) - key);
      if (depth <= 0) continue;
      const int vectors = vectors_in_panel<U>(queries, panel);
      R* output = scratch.output.at(panel, 0);
      if (key) scale_columns(vectors, values, &scratch.factor[at], output);
      const int64_t shared = shared_depth(depth, chunk.seen_by(first + at) - key);
      multiply_rows(vectors, values, shared, values_.at(key / kLeftColumns<U>, 0), values_.panel_units(),
                    reinterpret_cast<const U*>(scratch.scores.at(panel, 0)), R{1}, key > 0, output);
      for (int64_t i = at; shared < depth && i < end; ++i)
        for (int64_t j = shared; j < std::min(kKeyBlock, chunk.seen_by(first + i) - key); ++j)
          add_to_column<T>(scratch.output, i, probability(scratch, j, i), v(key + j), p_.value_dim);
    }
  }

  // Skips vectors of columns whose factors are all 1: in most blocks the maximum does not change.
  static void scale_columns(int vectors, int64_t rows, const R* factors, R* matrix) {
    for (int j = 0; j < vectors; ++j) {
      const Vec<R> factor = load(factors + j * kLanes<R>);
      bool all_ones = true;
      for (int i = 0; i < kLanes<R>; ++i) all_ones = all_ones && factor[i] == 1;
      if (all_ones) continue;
      for (R* at = matrix + j * kLanes<R>; at < matrix + rows * kTileColumns<R>; at += kTileColumns<R>)
        store(at, factor * load(static_cast<const R*>(at)));
    }
  }

  const ChunkedAttentionFwdParams& p_;
  DropKey drop_;
  PackedLeftMatrix<U> keys_;
  std::conditional_t<kUsesAmx<U>, PackedLeftMatrix<U>, PackedMatrix<U>> values_;  // with AMX V^T
  PerThread<BlockScratch> scratch_;
  bool finite_ = true;  // true if all values packed so far are finite
};

template <class T>
void forward(const ChunkedAttentionFwdParams& p) {
  using R = Compute<T>;
  zero_padding(p.sequences, p.o, p.heads * p.value_dim * static_cast<int64_t>(sizeof(T)));
  zero_padding(p.sequences, p.lse, p.heads * static_cast<int64_t>(sizeof(R)));
  std::vector<Chunk> few_query_chunks, other_chunks;
  int64_t max_keys = 0;
  for (const Chunk& chunk : list_chunks(p)) {
    if (chunk.queries() <= kFewQueries && chunk.cached > 0) {
      few_query_chunks.push_back(chunk);
    } else {
      other_chunks.push_back(chunk);
      max_keys = std::max(max_keys, chunk.keys);
    }
  }
  few_query_attention<T>(p, few_query_chunks);
  if (other_chunks.empty()) return;
  ChunkedAttentionFwdParams wide_params = p;
  const WideCache<T> cache(wide_params, other_chunks);
  const auto work = [&](const Chunk& chunk) {
    return static_cast<double>(chunk.keys * chunk.queries()) * static_cast<double>(p.key_dim + p.value_dim);
  };
  for_each_chunk(other_chunks, p.heads, kQueryBlock, work, [&](int threads) {
    return ChunkForward<T>(wide_params, max_keys, threads);
  });
}

}  // namespace

void chunked_attention_fwd_cpu(const ChunkedAttentionFwdParams& params) {
  if (params.sequences.tokens == 0 || params.heads == 0) return;
  dispatch_dtype(params.dtype, [&](auto element) { forward<decltype(element)>(params); });
}

void chunked_attention_state_cpu(const ChunkedAttentionStateParams& p) {
  const int64_t element_bytes = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
  const int64_t chunk_bytes = p.chunk_size * p.heads * (p.key_dim + p.value_dim) * element_bytes;
  const auto append = [&](const char* rows, int64_t count, int64_t width, char* to) {
    if (!p.quantized_cache) {
      std::memcpy(to, rows, static_cast<size_t>(count * width * element_bytes));
      return;
    }
    dispatch_dtype(p.dtype, [&](auto type) {
      using T = decltype(type);
      if constexpr (!std::is_same_v<T, double>)
        quantize_rows(reinterpret_cast<const T*>(rows), count, width, reinterpret_cast<int8_t*>(to));
    });
  };
  parallel_jobs(p.sequences.count, static_cast<double>(p.sequences.count * chunk_bytes), [&] {
    return [&](int64_t s) {
      const int64_t position = p.position ? p.position[s] : 0, end = position + p.sequences.length(s);
      const int64_t start = end - end % p.chunk_size;
      const int64_t num_kept = start == 0 ? position : 0, num_new = end - start - num_kept;
      const auto copy = [&](int64_t width, const void* cache, const void* tokens, void* cache_out) {
        const int64_t token_bytes = p.heads * width * element_bytes;
        const int64_t row_bytes = p.quantized_cache ? p.heads * (width + kScaleElements<int8_t>) : token_bytes;
        char* out = static_cast<char*>(cache_out) + s * p.chunk_size * row_bytes;
        const char* from = static_cast<const char*>(tokens) + (p.sequences.end(s) - num_new) * token_bytes;
        const bool in_place = cache == cache_out;
        if (num_kept > 0 && !in_place)
          std::memcpy(out, static_cast<const char*>(cache) + s * p.chunk_size * row_bytes,
                      static_cast<size_t>(num_kept * row_bytes));
        if (num_new > 0) append(from, num_new * p.heads, width, out + num_kept * row_bytes);
        if (!in_place)
          std::memset(out + (num_kept + num_new) * row_bytes, 0,
                      static_cast<size_t>((p.chunk_size - num_kept - num_new) * row_bytes));
      };
      copy(p.key_dim, p.cache_k, p.k, p.cache_k_out);
      copy(p.value_dim, p.cache_v, p.v, p.cache_v_out);
      p.position_out[s] = end % p.chunk_size;
    };
  });
}

}  // namespace megalodon::MEGALODON_ISA

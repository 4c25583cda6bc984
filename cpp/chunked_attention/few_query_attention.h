// Attention of a few queries over many keys, as in decoding, for chunked_attention_cpu.cpp: each key and value is read
// once, in place.
//
//   s_ij = scale q_i . k_j;  lse_i = log sum_j exp(s_ij);  o_i = sum_j exp(s_ij - lse_i) v_j
//
// A job owns one chunk or, if there are few chunks, one segment of a chunk's keys. It computes all heads, so that it
// reads contiguous memory. It processes tiles of kKeyTile keys: scores of kVector keys at a time, online softmax,
// O += p_j v_j. Its result is a partial: max, sum and O. The partials of a chunk's segments are merged in their order.
// 8-bit rows are converted to float in registers.
#pragma once

#include <algorithm>
#include <cmath>

#include "quantized_cache.h"
#include "vector_math.h"

namespace megalodon::MEGALODON_ISA {

inline constexpr int64_t kFewQueries = 4;     // most queries per chunk
inline constexpr int64_t kMostSegments = 64;  // per chunk

template <class T>
class FewQueries {
  using R = Compute<T>;
  static constexpr int64_t kVector = kLanes<R>;
  static constexpr int64_t kKeyTile = 128;
  static constexpr int64_t kOutput = round_up(2 * kFewQueries, kVector);  // start of O in a partial
  static constexpr int kRows = 8;  // values that one pass adds to O

 public:
  // Number of elements of a partial, of one head and segment: max (kFewQueries), sum (kFewQueries) and, from kOutput
  // on, O (kFewQueries, V in whole vectors).
  static int64_t partial_size(const ChunkedAttentionParams& p) {
    return kOutput + kFewQueries * round_up(p.value_dim, kVector);
  }

  explicit FewQueries(const ChunkedAttentionFwdParams& params)
      : p_(params),
        drop_(params),
        key_width_(round_up(params.key_dim, kVector)),
        value_width_(round_up(params.value_dim, kVector)),
        queries_(params.heads * kFewQueries * key_width_),
        sums_(params.heads * kFewQueries * kVector * kVector),
        scores_(params.heads * kFewQueries * kKeyTile) {}

  // Attends to keys [begin, end) of the chunk; writes the partials of all heads.
  void attend(const Chunk& chunk, int64_t begin, int64_t end, R* partials) {
    const int64_t count = chunk.queries(), size = partial_size(p_);
    const auto q = chunk_rows<T>(p_, chunk, 0, nullptr, p_.q, p_.key_dim);
    const Rows k(p_, chunk, p_.cache_k, p_.k, p_.key_dim), v(p_, chunk, p_.cache_v, p_.v, p_.value_dim);
    for (int64_t head = 0; head < p_.heads; ++head) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < p_.key_dim; c += kVector)
          store(query(head, i) + c, load_first(q(chunk.cached + i) + head * p_.key_dim + c, p_.key_dim - c));
      R* max = partials + head * size;
      std::fill(max, max + count, -std::numeric_limits<R>::infinity());
      std::fill(max + kFewQueries, max + kFewQueries + count, R{0});
      std::fill(max + kOutput, max + kOutput + count * value_width_, R{0});
    }
    for (int64_t key = begin; key < end; key += kKeyTile) {
      const int64_t keys = std::min(kKeyTile, end - key);
      for (int64_t at = 0; at < keys; at += kVector) dot_products(k, key + at, std::min(kVector, keys - at), count, at);
      for (int64_t head = 0; head < p_.heads; ++head)
        for (int64_t i = 0; i < count; ++i) weigh(chunk, head, i, key, keys, partials + head * size);
      // Every query sees the tile's first `seen` keys. Queries that do not see a later key skip its value: the value
      // may be NaN, and 0 times NaN is NaN.
      const int64_t seen = std::min(keys, chunk.cached + 1 - key);
      const auto add = [&](const auto& rows, int64_t at, int64_t stop) {
        for (; at + kRows <= std::min(seen, stop); at += kRows) add_values<kRows>(rows, key, at, 0, count, partials);
        for (; at < stop; ++at)
          add_values<1>(rows, key, at, std::max<int64_t>(0, key + at - chunk.cached), count, partials);
      };
      const int64_t quantized = std::clamp<int64_t>(v.quantized.keys - key, 0, keys);
      if constexpr (kMayQuantize) add(v.quantized, 0, quantized);
      add(v.plain, quantized, keys);
    }
  }

  // Merges the head's partials of `segments` segments into o and lse.
  void finish(const Chunk& chunk, int64_t head, const R* partial, int64_t segments) const {
    const int64_t size = p_.heads * partial_size(p_);
    partial += head * partial_size(p_);
    for (int64_t i = 0; i < chunk.queries(); ++i) {
      R max = -std::numeric_limits<R>::infinity(), sum = 0;
      for (int64_t g = 0; g < segments; ++g) max = std::max(max, partial[g * size + i]);
      R factors[kMostSegments];
      for (int64_t g = 0; g < segments; ++g) {
        const R m = partial[g * size + i];
        factors[g] = m == max ? R{1} : std::exp(m - max);
        sum += factors[g] * partial[g * size + kFewQueries + i];
      }
      const int64_t row = (chunk.token + i) * p_.heads + head;
      static_cast<R*>(p_.lse)[row] = max + std::log(sum);
      const R inverse = sum == 0 ? R{0} : 1 / sum;
      T* o = static_cast<T*>(p_.o) + row * p_.value_dim;
      for (int64_t c = 0; c < p_.value_dim; c += kVector) {
        Vec<R> total = zeros<R>();
        for (int64_t g = 0; g < segments; ++g)
          total += factors[g] * load(partial + g * size + kOutput + i * value_width_ + c);
        store_first(o + c, inverse * total, p_.value_dim - c);
      }
    }
  }

 private:
  static constexpr bool kMayQuantize = !std::is_same_v<T, double>;

  // Rows of a chunk, of all heads. `quantized`: the cached rows, if the cache is an 8-bit one. `plain`: all other rows.
  struct Rows {
    Rows(const ChunkedAttentionParams& p, const Chunk& chunk, const void* cache, const void* tokens, int64_t width)
        : plain(chunk_rows<T>(p, chunk, 0, p.quantized_cache ? nullptr : cache, tokens, width)),
          quantized(quantized_rows(p, chunk, cache, width)) {}
    ChunkRows<T> plain;
    ChunkRows<int8_t> quantized;
  };

  R* query(int64_t head, int64_t i) const { return &queries_[(head * kFewQueries + i) * key_width_]; }
  R* sums(int64_t head, int64_t i) const { return &sums_[(head * kFewQueries + i) * kVector * kVector]; }
  R* scores(int64_t head, int64_t i) const { return &scores_[(head * kFewQueries + i) * kKeyTile]; }

  // Computes the scores of the keys [key, key + keys), at most kVector, which have numbers from `at` on in the tile.
  // First it stores a vector of partial sums for each key, head and query, then it adds up the lanes of each vector.
  void dot_products(const Rows& k, int64_t key, int64_t keys, int64_t queries, int64_t at) const {
    const int64_t quantized = std::clamp<int64_t>(k.quantized.keys - key, 0, keys);
    if constexpr (kMayQuantize)
      for (int64_t r = 0; r < quantized; ++r) multiply_row(k.quantized, key + r, queries, r);
    for (int64_t r = quantized; r < keys; ++r) multiply_row(k.plain, key + r, queries, r);
    for (int64_t head = 0; head < p_.heads; ++head)
      for (int64_t i = 0; i < queries; ++i) {
        Vec<R> row[kVector];
        for (int64_t r = 0; r < kVector; ++r)
          row[r] = r < keys ? load(static_cast<const R*>(sums(head, i)) + r * kVector) : zeros<R>();
        store(scores(head, i) + at, static_cast<R>(p_.scale) * sum_rows<R>(row));
      }
  }

  // Stores the partial sums of the dot products of one key as vector r of sums(head, i).
  template <class E>
  void multiply_row(const ChunkRows<E>& rows, int64_t key, int64_t queries, int64_t r) const {
    const int64_t width = p_.key_dim, ahead = kVector * rows.stride;  // prefetches the rows of the next kVector keys
    const E* row = rows(key);
    for (int64_t head = 0; head < p_.heads; ++head, row += width + kScaleElements<E>)
      for (int64_t i = 0; i < queries; ++i) {
        const R* q = query(head, i);
        Vec<R> sum = zeros<R>();
        int64_t c = 0;
        for (; c + kVector <= width; c += kVector) {
          __builtin_prefetch(row + c + ahead, 0, 2);
          sum += load(q + c) * load(row + c);
        }
        if (c < width) sum += load(q + c) * load_first(row + c, width - c);
        store(sums(head, i) + r * kVector, scale_of_row(row, width) * sum);
      }
  }

  // Turns the tile's scores of query i into weights exp(s - max); scales the earlier sum and O to the new maximum.
  void weigh(const Chunk& chunk, int64_t head, int64_t i, int64_t key, int64_t keys, R* partial) const {
    R *s = scores(head, i), *output = partial + kOutput + i * value_width_;
    const int64_t visible = std::min(keys, chunk.cached + i + 1 - key), padded = round_up(keys, kVector);
    for (int64_t r = std::max<int64_t>(visible, 0); r < padded; ++r) s[r] = -std::numeric_limits<R>::infinity();
    if (drop_) drop_.apply_to_row(s, key, keys, chunk.cached + i, chunk, head);
    const R shrink = softmax_row(s, padded, partial[i], partial[kFewQueries + i]);
    if (shrink != 1)
      for (int64_t c = 0; c < value_width_; c += kVector)
        store(output + c, shrink * load(static_cast<const R*>(output) + c));
  }

  // Turns scores into exp(s - max). Updates max and sum, and returns the factor by which earlier sums are multiplied.
  static R softmax_row(R* s, int64_t padded, R& max, R& sum) {
    Vec<R> maxima = splat(max);
    for (int64_t r = 0; r < padded; r += kVector) {
      const Vec<R> value = load(static_cast<const R*>(s) + r);
      maxima = value > maxima ? value : maxima;
    }
    R new_max = max;
    for (int lane = 0; lane < kVector; ++lane) new_max = std::max(new_max, maxima[lane]);
    const R shift = new_max == -std::numeric_limits<R>::infinity() ? R{0} : new_max;
    Vec<R> total = zeros<R>();
    for (int64_t r = 0; r < padded; r += kVector) {
      const Vec<R> p = exp(load(static_cast<const R*>(s) + r) - shift);
      store(s + r, p);
      total += p;
    }
    const R shrink = max == new_max ? R{1} : std::exp(max - shift);
    sum = sum * shrink + sum_lanes<R>(total);
    max = new_max;
    return shrink;
  }

  // O += p v for the tile's keys [at, at + kKeys), all heads, and the queries [first, queries).
  template <int kKeys, class E>
  void add_values(const ChunkRows<E>& rows, int64_t key, int64_t at, int64_t first, int64_t queries,
                  R* partials) const {
    const int64_t width = p_.value_dim, ahead = kRows * rows.stride, size = partial_size(p_);
    for (int64_t head = 0; head < p_.heads; ++head) {
      const E* v[kKeys];
      for (int r = 0; r < kKeys; ++r) v[r] = rows(key + at + r) + head * (width + kScaleElements<E>);
      for (int64_t i = first; i < queries; ++i) {
        R p[kKeys];
        for (int r = 0; r < kKeys; ++r) p[r] = scale_of_row(v[r], width) * scores(head, i)[at + r];
        R* o = partials + head * size + kOutput + i * value_width_;
        int64_t c = 0;
        for (; c + kVector <= width; c += kVector) {
          Vec<R> sum = load(static_cast<const R*>(o) + c);
#pragma GCC unroll 8
          for (int r = 0; r < kKeys; ++r) {
            __builtin_prefetch(v[r] + c + ahead, 0, 2);
            sum += p[r] * load(v[r] + c);
          }
          store(o + c, sum);
        }
        if (c < width) {
          Vec<R> sum = load(static_cast<const R*>(o) + c);
          for (int r = 0; r < kKeys; ++r) sum += p[r] * load_first(v[r] + c, width - c);
          store(o + c, sum);
        }
      }
    }
  }

  const ChunkedAttentionFwdParams& p_;
  DropKey drop_;
  int64_t key_width_, value_width_;
  Scratch<R> queries_, sums_, scores_;  // (H, kFewQueries, n); n: K in whole vectors; kVector^2; kKeyTile
};

// Attention of chunks of at most kFewQueries queries.
template <class T>
void few_query_attention(const ChunkedAttentionFwdParams& p, const std::vector<Chunk>& chunks) {
  using R = Compute<T>;
  // Segments per chunk: one for each kSegment keys, so that partials are small beside keys and values. Chunks of fewer
  // than 4 kSegment keys have 4, 2 or 1; two threads share 4 or 2 evenly. The number depends on the chunks alone.
  constexpr int64_t kSegment = 256, kShortSegment = 64;
  if (chunks.empty()) return;
  const auto count = static_cast<int64_t>(chunks.size());
  int64_t max_keys = 0, num_scores = 0;
  for (const Chunk& chunk : chunks) {
    max_keys = std::max(max_keys, chunk.keys);
    num_scores += chunk.keys * chunk.queries();
  }
  const int64_t min_segments = max_keys >= kSegment ? 4 : max_keys >= kShortSegment ? 2 : 1;
  const int64_t wanted_segments = std::max(max_keys / kSegment, min_segments);
  const int64_t segments = std::clamp<int64_t>(wanted_segments, 1, std::max<int64_t>(1, kMostSegments / count));
  const int64_t segment_keys = ceil_div(max_keys, segments), size = p.heads * FewQueries<T>::partial_size(p);
  const double work = static_cast<double>(num_scores * p.heads * (p.key_dim + p.value_dim));
  const auto finish = [&](const FewQueries<T>& body, const Chunk& chunk, const R* partials) {
    for (int64_t head = 0; head < p.heads; ++head) body.finish(chunk, head, partials, segments);
  };
  if (segments == 1) {
    parallel_jobs<FlushDenormals>(count, work, [&] {
      return [&, body = FewQueries<T>(p), partials = Scratch<R>(size)](int64_t job) mutable {
        const Chunk& chunk = chunks[static_cast<size_t>(job)];
        body.attend(chunk, 0, chunk.keys, partials.get());
        finish(body, chunk, partials.get());
      };
    });
    return;
  }
  const Scratch<R> partials(count * segments * size);
  parallel_jobs<FlushDenormals>(count * segments, work, [&] {
    return [&, body = FewQueries<T>(p)](int64_t job) mutable {
      const Chunk& chunk = chunks[static_cast<size_t>(job / segments)];
      const int64_t begin = job % segments * segment_keys;
      body.attend(chunk, begin, std::min(begin + segment_keys, chunk.keys), partials.get() + job * size);
    };
  }, Order::shares);
  parallel_jobs<FlushDenormals>(count, static_cast<double>(count * segments * size), [&] {
    return [&, body = FewQueries<T>(p)](int64_t job) {
      finish(body, chunks[static_cast<size_t>(job)], partials.get() + job * segments * size);
    };
  });
}

}  // namespace megalodon::MEGALODON_ISA

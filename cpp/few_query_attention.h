// Attention of a few queries over many keys, as in decoding: each key and value is read once, where it lies.
//
//   s_ij = scale q_i . k_j;  lse_i = log sum_j exp(s_ij);  o_i = sum_j exp(s_ij - lse_i) v_j
//
// A job owns one head of one chunk, or where those are few, a segment of its keys; the segments' (max, sum, O) are
// merged in order. In a segment, for each kStrip keys: dot products of one vector of keys at once, online softmax, O
// += p_j v_j.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention_chunks.h"
#include "vector_math.h"

namespace megalodon::MEGALODON_ISA {

inline constexpr int64_t kFewQueries = 4;

template <class T>
class FewQueries {
  using R = Compute<T>;
  static constexpr int64_t kLane = kLanes<R>;
  static constexpr int64_t kStrip = 128;

 public:
  // Of one head and segment: for each query max, sum, and O (V, padded to vectors).
  static int64_t partial_size(const ChunkedAttentionParams& p) {
    return kFewQueries * (2 + round_up(p.value_dim, kLane));
  }

  explicit FewQueries(const ChunkedAttentionFwdParams& params)
      : p_(params),
        drop_(params),
        key_width_(round_up(params.key_dim, kLane)),
        queries_(kFewQueries * key_width_),
        scores_(kFewQueries * kStrip) {}

  // Keys [begin, end) of the chunk into `partial`.
  void attend(const Chunk& chunk, int64_t head, int64_t begin, int64_t end, R* partial) {
    const int64_t count = chunk.queries(), value_width = round_up(p_.value_dim, kLane);
    const auto q = chunk_rows<T>(p_, chunk, head, nullptr, p_.q, p_.key_dim);
    const auto k = chunk_rows<T>(p_, chunk, head, p_.cache_k, p_.k, p_.key_dim);
    const auto v = chunk_rows<T>(p_, chunk, head, p_.cache_v, p_.v, p_.value_dim);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < p_.key_dim; c += kLane)
        store(&queries_[i * key_width_ + c], load_first(q(chunk.cached + i) + c, p_.key_dim - c));
    R *max = partial, *sum = partial + kFewQueries, *output = partial + 2 * kFewQueries;
    std::fill(max, max + count, -std::numeric_limits<R>::infinity());
    std::fill(sum, sum + count, R{0});
    std::fill(output, output + count * value_width, R{0});

    for (int64_t key = begin; key < end; key += kStrip) {
      const int64_t keys = std::min(kStrip, end - key);
      for (int64_t at = 0; at < keys; at += kLane) {
        for (int64_t r = 0; r < kLane; ++r) prefetch(k, key + at + kLane + r, p_.key_dim);
        dot_products(k, key + at, std::min(kLane, keys - at), count, at);
      }
      for (int64_t i = 0; i < count; ++i) {
        R* s = &scores_[i * kStrip];
        const int64_t visible = std::min(keys, chunk.cached + i + 1 - key), padded = round_up(keys, kLane);
        for (int64_t r = std::max<int64_t>(visible, 0); r < padded; ++r) s[r] = -std::numeric_limits<R>::infinity();
        if (drop_) drop_.apply_to_row(s, key, keys, chunk.cached + i, chunk, head);
        const R shrink = softmax_row(s, padded, max[i], sum[i]);
        if (shrink != 1)
          for (int64_t c = 0; c < value_width; c += kLane)
            store(output + i * value_width + c, shrink * load(output + i * value_width + c));
      }
      int64_t row = 0;
      for (; row + 4 <= keys; row += 4) {
        for (int64_t r = 8; r < 12; ++r) prefetch(v, key + row + r, p_.value_dim);
        add_values<4>(v, key + row, row, count, output);
      }
      for (; row < keys; ++row) add_values<1>(v, key + row, row, count, output);
    }
  }

  // Merges the partials of `segments` segments into o and lse.
  void finish(const Chunk& chunk, int64_t head, const R* partial, int64_t segments) const {
    const int64_t value_width = round_up(p_.value_dim, kLane), size = partial_size(p_);
    for (int64_t i = 0; i < chunk.queries(); ++i) {
      R max = -std::numeric_limits<R>::infinity(), sum = 0;
      for (int64_t g = 0; g < segments; ++g) max = std::max(max, partial[g * size + i]);
      const auto factor = [&](int64_t g) {
        const R m = partial[g * size + i];
        return m == max ? R{1} : std::exp(m - max);
      };
      for (int64_t g = 0; g < segments; ++g) sum += factor(g) * partial[g * size + kFewQueries + i];
      const int64_t row = (chunk.token + i) * p_.heads + head;
      static_cast<R*>(p_.lse)[row] = max + std::log(sum);
      const R inverse = sum == 0 ? R{0} : 1 / sum;
      T* o = static_cast<T*>(p_.o) + row * p_.value_dim;
      for (int64_t c = 0; c < p_.value_dim; c += kLane) {
        Vec<R> total = zeros<R>();
        for (int64_t g = 0; g < segments; ++g)
          total += factor(g) * load(partial + g * size + 2 * kFewQueries + i * value_width + c);
        store_first(o + c, inverse * total, p_.value_dim - c);
      }
    }
  }

 private:
  // Rows of several heads lie apart, where no hardware prefetcher looks; it takes over in longer rows.
  static MEGALODON_INLINE void prefetch(const ChunkRows<T>& rows, int64_t row, int64_t width) {
    constexpr int64_t kLine = 64 / sizeof(T), kMost = 8 * kLine;
    const T* at = rows(row);
    for (int64_t c = 0; at && c < std::min(width, kMost); c += kLine) __builtin_prefetch(at + c);
  }

  // Scores of up to a vector of keys. A lane's dot product is the sum over a row of its sums, which a transpose lays
  // out.
  void dot_products(const ChunkRows<T>& k, int64_t key, int64_t keys, int64_t queries, int64_t at) {
    const T* row[kLane];
    for (int64_t r = 0; r < kLane; ++r) row[r] = k(key + std::min(r, keys - 1));
    for (int64_t i = 0; i < queries; ++i) {
      const R* q = &queries_[i * key_width_];
      Vec<R> sums[kLane] = {};
      int64_t c = 0;
      for (; c + kLane <= p_.key_dim; c += kLane) {
        const Vec<R> factor = load(q + c);
#pragma GCC unroll 16
        for (int64_t r = 0; r < kLane; ++r) sums[r] += factor * load(row[r] + c);
      }
      if (c < p_.key_dim) {
        const Vec<R> factor = load(q + c);
        for (int64_t r = 0; r < kLane; ++r) sums[r] += factor * load_first(row[r] + c, p_.key_dim - c);
      }
      transpose<R>(sums);
      for (int64_t width = kLane / 2; width > 0; width /= 2)
        for (int64_t r = 0; r < width; ++r) sums[r] += sums[r + width];
      store(&scores_[i * kStrip + at], static_cast<R>(p_.scale) * sums[0]);
    }
  }

  // Scores become exp(s - max). Updates max and sum, and returns by how much earlier sums shrink.
  static R softmax_row(R* s, int64_t padded, R& max, R& sum) {
    Vec<R> most = splat(max);
    for (int64_t r = 0; r < padded; r += kLane) {
      const Vec<R> value = load(static_cast<const R*>(s) + r);
      most = value > most ? value : most;
    }
    R now = max;
    for (int lane = 0; lane < kLane; ++lane) now = std::max(now, most[lane]);
    const R shift = now == -std::numeric_limits<R>::infinity() ? R{0} : now;
    Vec<R> total = zeros<R>();
    for (int64_t r = 0; r < padded; r += kLane) {
      const Vec<R> p = exp(load(static_cast<const R*>(s) + r) - shift);
      store(s + r, p);
      total += p;
    }
    const R shrink = max == now ? R{1} : std::exp(max - shift);
    sum = sum * shrink + sum_lanes<R>(total);
    max = now;
    return shrink;
  }

  // O += p v for `rows` neighbouring keys.
  template <int rows>
  void add_values(const ChunkRows<T>& v, int64_t key, int64_t at, int64_t queries, R* output) const {
    const T* row[rows];
    for (int r = 0; r < rows; ++r) row[r] = v(key + r);
    const int64_t value_width = round_up(p_.value_dim, kLane);
    for (int64_t i = 0; i < queries; ++i) {
      const R* p = &scores_[i * kStrip + at];
      R* o = output + i * value_width;
      int64_t c = 0;
      for (; c + kLane <= p_.value_dim; c += kLane) {
        Vec<R> total = load(static_cast<const R*>(o) + c);
        for (int r = 0; r < rows; ++r) total += p[r] * load(row[r] + c);
        store(o + c, total);
      }
      if (c == p_.value_dim) continue;
      Vec<R> total = load(static_cast<const R*>(o) + c);
      for (int r = 0; r < rows; ++r) total += p[r] * load_first(row[r] + c, p_.value_dim - c);
      store(o + c, total);
    }
  }

  const ChunkedAttentionFwdParams& p_;
  DropKey drop_;
  int64_t key_width_;
  Scratch<R> queries_, scores_;
};

// Chunks of at most kFewQueries queries.
template <class T>
void few_query_attention(const ChunkedAttentionFwdParams& p, const std::vector<Chunk>& chunks) {
  using R = Compute<T>;
  // Enough jobs for many threads, yet partials that stay small beside the keys and values. Both depend on shapes alone.
  constexpr int64_t kJobs = 64, kMinSegment = 256;
  const int64_t pairs = static_cast<int64_t>(chunks.size()) * p.heads;
  if (pairs == 0) return;
  int64_t keys = 0, total = 0;
  for (const Chunk& chunk : chunks) {
    keys = std::max(keys, chunk.keys);
    total += chunk.keys * chunk.queries();
  }
  const int64_t segments = std::clamp<int64_t>(ceil_div(keys, kMinSegment), 1, std::max<int64_t>(1, kJobs / pairs));
  const int64_t segment = ceil_div(keys, segments), size = FewQueries<T>::partial_size(p);
  const double work = static_cast<double>(total * p.heads * (p.key_dim + p.value_dim));
  if (segments == 1) {
    parallel_jobs(pairs, work, [&] {
      return [&, body = FewQueries<T>(p), partial = Scratch<R>(size), flush = FlushDenormals()](int64_t job) mutable {
        const Chunk& chunk = chunks[static_cast<size_t>(job / p.heads)];
        body.attend(chunk, job % p.heads, 0, chunk.keys, partial.get());
        body.finish(chunk, job % p.heads, partial.get(), 1);
      };
    });
    return;
  }
  const Scratch<R> partials(pairs * segments * size);
  parallel_jobs(pairs * segments, work, [&] {
    return [&, body = FewQueries<T>(p), flush = FlushDenormals()](int64_t job) mutable {
      const int64_t pair = job / segments, begin = job % segments * segment;
      const Chunk& chunk = chunks[static_cast<size_t>(pair / p.heads)];
      body.attend(chunk, pair % p.heads, begin, std::min(begin + segment, chunk.keys), partials.get() + job * size);
    };
  });
  parallel_jobs(pairs, static_cast<double>(pairs * segments * size), [&] {
    return [&, body = FewQueries<T>(p), flush = FlushDenormals()](int64_t pair) {
      const Chunk& chunk = chunks[static_cast<size_t>(pair / p.heads)];
      body.finish(chunk, pair % p.heads, partials.get() + pair * segments * size, segments);
    };
  });
}

}  // namespace megalodon::MEGALODON_ISA

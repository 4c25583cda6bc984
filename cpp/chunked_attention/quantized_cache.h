// Keys and values of a state in 8 bits, for the CPU's kernels. A row of numbers x_i is stored as one int8 q_i for each,
// then a float scale s.
//
//   s = max(max_i |x_i| / 127, smallest normal float), NaN if an x_i is not finite;  q_i = round(x_i / s);  x_i ~ s q_i
//
// A row is quantized when it is added to the state. few_query_attention.h reads these rows in place: it multiplies a
// key's score and a value's weight by s. Other kernels read a copy (WideCache).
#pragma once

#include <cfloat>
#include <cmath>
#include <vector>

#include "attention_chunks.h"

namespace megalodon::MEGALODON_ISA {

// Number of elements of type E that the scale of a row takes.
template <class E> inline constexpr int64_t kScaleElements = std::is_same_v<E, int8_t> ? sizeof(float) : 0;

// Returns the rows, of all heads, of a chunk in an 8-bit cache; no rows if the cache is not an 8-bit one.
inline ChunkRows<int8_t> quantized_rows(const ChunkedAttentionParams& p, const Chunk& chunk, const void* cache,
                                        int64_t width) {
  if (!p.quantized_cache) return {};
  const int64_t stride = p.heads * (width + kScaleElements<int8_t>);
  const auto* rows = static_cast<const int8_t*>(cache) + chunk.sequence * p.chunk_size * stride;
  return {/*cache=*/rows, /*tokens=*/nullptr, chunk.cached, /*keys=*/chunk.cached, stride};
}

// Scale of a row: 1 unless its elements are int8.
template <class T>
MEGALODON_INLINE Compute<T> scale_of_row(const T*, int64_t) { return 1; }
MEGALODON_INLINE float scale_of_row(const int8_t* row, int64_t width) {
  float scale;
  std::memcpy(&scale, row + width, sizeof scale);
  return scale;
}

// Quantizes rows (count, width) to rows (count, width + kScaleElements).
template <class T>
void quantize_rows(const T* from, int64_t count, int64_t width, int8_t* to) {
  using Ints = typename VecOf<int32_t, kLanes<float>>::type;
  using Bytes = typename VecOf<int8_t, kLanes<float>>::type;
  constexpr float kRounding = 0x1.8p23f;  // the low bits of x + kRounding are x as an integer, ties to even
  for (; count > 0; --count, from += width, to += width + kScaleElements<int8_t>) {
    Ints largest{};  // bits of absolute values; for infinity and NaN they are the largest
    for_each_vector<float>(width, [&](int64_t i, int64_t n) {
      const Ints bits = bit_cast<Ints>(load_first(from + i, n)) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    });
    int32_t max_bits = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) max_bits = std::max(max_bits, largest[lane]);
    const float max = bit_cast<float>(max_bits), scale = max <= FLT_MAX ? std::max(max / 127, FLT_MIN) : NAN;
    for_each_vector<float>(width, [&](int64_t i, int64_t n) {
      const Ints rounded = bit_cast<Ints>(load_first(from + i, n) / scale + kRounding);
      const Bytes numbers = __builtin_convertvector(rounded, Bytes);
      std::memcpy(to + i, &numbers, static_cast<size_t>(n));
    });
    std::memcpy(to + width, &scale, sizeof scale);
  }
}

// Copy, in type T, of the rows of an 8-bit cache that the chunks read.
template <class T>
class WideCache {
 public:
  // Makes `p` read the copy, which lives as long as this object. Without an 8-bit cache, does nothing.
  WideCache(ChunkedAttentionParams& p, const std::vector<Chunk>& chunks)
      : k_(num_rows(p) * p.key_dim), v_(num_rows(p) * p.value_dim) {
    if (!p.quantized_cache) return;
    const auto count = static_cast<int64_t>(chunks.size());
    const auto work = static_cast<double>(count * p.chunk_size * p.heads * (p.key_dim + p.value_dim));
    const auto widen_chunk = [&](int64_t job) {
      widen(p, chunks[static_cast<size_t>(job)], p.cache_k, p.key_dim, k_.get());
      widen(p, chunks[static_cast<size_t>(job)], p.cache_v, p.value_dim, v_.get());
    };
    parallel_jobs(count, work, [&] { return widen_chunk; });  // each thread has a copy of the body
    p.cache_k = k_.get();
    p.cache_v = v_.get();
    p.quantized_cache = false;
  }

 private:
  // Number of rows of the copy, as many as of the cache. Those that no chunk reads stay uninitialised.
  static int64_t num_rows(const ChunkedAttentionParams& p) {
    return p.quantized_cache ? p.sequences.count * p.chunk_size * p.heads : 0;
  }
  static void widen(const ChunkedAttentionParams& p, const Chunk& chunk, const void* cache, int64_t width, T* copy) {
    if constexpr (!std::is_same_v<T, double>) {  // the binding refuses an 8-bit cache with float64
      const ChunkRows<int8_t> rows = quantized_rows(p, chunk, cache, width);
      T* to = copy + chunk.sequence * p.chunk_size * p.heads * width;
      for (int64_t row = 0; row < chunk.cached; ++row) {
        const int8_t* from = rows(row);
        for (int64_t head = 0; head < p.heads; ++head, from += width + kScaleElements<int8_t>, to += width) {
          const Vec<float> scale = splat(scale_of_row(from, width));
          for_each_vector<float>(width, [&](int64_t i, int64_t n) {
            store_first(to + i, scale * load_first(from + i, n), n);
          });
        }
      }
    }
  }

  Scratch<T> k_, v_;
};

}  // namespace megalodon::MEGALODON_ISA

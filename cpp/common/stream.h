// Access to memory that is used once: prefetches, and stores that bypass the caches.
#pragma once

#include "simd.h"

namespace megalodon::MEGALODON_ISA {

// Outputs of at least this size bypass the caches: few caches would keep them until they are read, and a plain store
// first reads the line that it overwrites.
constexpr int64_t kStreamedBytes = 32 << 20;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kPageBytes = 4096;
constexpr int64_t kFetchedAhead = 4096;  // elements, several pages: hardware prefetchers stop earlier

// Prefetches the element kFetchedAhead after `from` into the L2, which allows more requests in flight than an L1. The
// row is read in order, or written if kWrite; `index` is the index of `from` in the row.
template <int kWrite = 0, class T>
MEGALODON_INLINE void fetch_ahead(const T* from, int64_t index) {
  constexpr int64_t line = kLineBytes / static_cast<int64_t>(sizeof(T));
  constexpr int64_t bytes = kFetchedAhead * static_cast<int64_t>(sizeof(T));
  if (index % line == 0) __builtin_prefetch(reinterpret_cast<const char*>(from) + bytes, kWrite, 2);
}

template <class V>
MEGALODON_INLINE void stream_raw(void* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(v));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof v == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(v));
  if constexpr (sizeof v == 16) return _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(v));
#endif
  store_raw(to, v);
}
// stream() stores v and bypasses the caches. `to` is aligned to the size of the stored vector.
MEGALODON_INLINE void stream(float* to, Vec<float> v) { stream_raw(to, v); }
MEGALODON_INLINE void stream(double* to, Vec<double> v) { stream_raw(to, v); }
MEGALODON_INLINE void stream(bf16* to, Vec<float> v) { stream_raw(to, narrow_bf16(v)); }
MEGALODON_INLINE void stream(fp16* to, Vec<float> v) { stream_raw(to, narrow_f16(v)); }

// Streams kLanes elements if `streams`, else stores the first n.
template <class T>
MEGALODON_INLINE void stream_or_store(bool streams, T* to, Vec<Compute<T>> v, int64_t n) {
  if (streams) stream(to, v);
  else store_first(to, v, n);
}

// A thread that streams holds a StreamFence: after its destruction, other threads see the thread's stores.
class StreamFence {
 public:
  StreamFence() {}
  StreamFence(const StreamFence&) = delete;
  StreamFence& operator=(const StreamFence&) = delete;
  ~StreamFence() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
  }
};

// Returns true if rows of `columns` elements at `to` can be streamed vector by vector.
template <class T>
bool can_stream(const T* to, int64_t columns) {
  constexpr int64_t lanes = kLanes<Compute<T>>, bytes = lanes * static_cast<int64_t>(sizeof(T));
  return columns % lanes == 0 && reinterpret_cast<uintptr_t>(to) % bytes == 0;
}

// Returns true if a (rows, columns) tensor at `to` should be streamed.
template <class T>
bool worth_streaming(const T* to, int64_t rows, int64_t columns) {
  return rows * columns * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes && can_stream(to, columns);
}

}  // namespace megalodon::MEGALODON_ISA

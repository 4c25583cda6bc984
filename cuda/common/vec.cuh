// Vectors of neighbouring elements, converted to the accumulation type.
#pragma once

#include "convert.cuh"

namespace gpu {

template <class T, int n>
struct alignas(n * sizeof(T)) Pack {
  T element[n];
};

// Number of elements of T in a 128-bit access.
template <class T> constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

// Loads n elements of global memory from `from` on. kWhole: by one access of n * sizeof(T) <= 16 bytes, and `from` must
// be a multiple of that size; else one by one.
template <bool kWhole = true, class T, int n>
GPU_INLINE void load(Compute<T> (&to)[n], const T* from) {
  if constexpr (kWhole) {
    const Pack<T, n> pack = ld<Pack<T, n>>(from);
    GPU_UNROLL
    for (int i = 0; i < n; ++i) to[i] = to_real(pack.element[i]);
  } else {
    GPU_UNROLL
    for (int i = 0; i < n; ++i) to[i] = to_real(from[i]);
  }
}

template <bool kWhole = true, class T, int n>
GPU_INLINE void store(T* to, const Compute<T> (&from)[n]) {
  if constexpr (kWhole) {
    Pack<T, n> pack;
    GPU_UNROLL
    for (int i = 0; i < n; ++i) pack.element[i] = from_real<T>(from[i]);
    st(to, pack);
  } else {
    GPU_UNROLL
    for (int i = 0; i < n; ++i) to[i] = from_real<T>(from[i]);
  }
}

// Loads n elements of shared memory in one access of n * sizeof(T) <= 16 bytes; store_shared stores them so, too.
template <class T, int n>
GPU_INLINE void load_shared(Compute<T> (&to)[n], const T* from) {
  const Pack<T, n> pack = ld_shared<Pack<T, n>>(from);
  GPU_UNROLL
  for (int i = 0; i < n; ++i) to[i] = to_real(pack.element[i]);
}

template <class T, int n>
GPU_INLINE void store_shared(T* to, const Compute<T> (&from)[n]) {
  Pack<T, n> pack;
  GPU_UNROLL
  for (int i = 0; i < n; ++i) pack.element[i] = from_real<T>(from[i]);
  st_shared(to, pack);
}

// Loads n elements of R, such as parameters. kWhole: in accesses of up to 128 bits; else one by one.
template <bool kWhole = true, class R, int n>
GPU_INLINE void load_wide(R (&to)[n], const R* from) {
  constexpr int width = !kWhole ? 1 : n < kVectorWidth<R> ? n : kVectorWidth<R>;
  static_assert(n % width == 0);
  GPU_UNROLL
  for (int i = 0; i < n; i += width) {
    const Pack<R, width> pack = ld<Pack<R, width>>(from + i);
    GPU_UNROLL
    for (int j = 0; j < width; ++j) to[i + j] = pack.element[j];
  }
}

// Stores n elements of R in accesses of up to 128 bits.
template <class R, int n>
GPU_INLINE void store_wide(R* to, const R (&from)[n]) {
  constexpr int width = n < kVectorWidth<R> ? n : kVectorWidth<R>;
  static_assert(n % width == 0);
  GPU_UNROLL
  for (int i = 0; i < n; i += width) {
    Pack<R, width> pack;
    GPU_UNROLL
    for (int j = 0; j < width; ++j) pack.element[j] = from[i + j];
    st(to + i, pack);
  }
}

// Returns true if vectors of n elements can be read at `p`. Launchers choose a kernel's vector width by it.
template <int n, class T>
inline bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (n * sizeof(T)) == 0;
}

}  // namespace gpu

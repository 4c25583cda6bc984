// Gate of the linear layers: silu of one tensor times another. Derivation: ops/gated_silu/gated_silu_reference.py.
//
//   y = x s value,  s = sigmoid(x)
//
// Backward; s is recomputed:
//   dx = dy value s (1 + x (1 - s));  dvalue = dy x s
//
// A job is a run of kBlock elements; each vector stays in registers from loads to stores. Every tensor, outputs
// included, is prefetched kAhead bytes ahead: a vector's arithmetic takes so long that the hardware prefetcher stops.
// Stores of large outputs bypass the caches, except in 16 bits, where arithmetic is the bottleneck. Memory traffic, in
// elements: forward x, value, y; backward dy, x, value, dx, dvalue. Each is read or written once.

#include "gated_silu.h"

#include "parallel.h"
#include "simd.h"
#include "stream.h"
#include "vector_math.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int64_t kBlock = 8192;
constexpr int64_t kAhead = 4096;  // bytes

template <class T>
MEGALODON_INLINE Vec<Compute<T>> read(const T* from, int64_t n) {
  __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead, 0, 2);
  return load_first(from, n);
}
template <class T>
bool should_stream(const T* output, int64_t elements) {
  return sizeof(T) > 2 && worth_streaming(output, 1, elements);
}
template <class T>
MEGALODON_INLINE void write(bool streams, T* to, Vec<Compute<T>> v, int64_t n) {
  if (!streams) __builtin_prefetch(reinterpret_cast<char*>(to) + kAhead, 1, 2);
  stream_or_store(streams, to, v, n);
}

// Calls op(offset, n) for the vectors of all elements; n < kLanes in the last one if it is not full.
template <class R, class Op>
void for_each_vector_in_parallel(int64_t elements, double work, Op&& op) {
  constexpr int64_t lanes = kLanes<R>;
  static_assert(kBlock % lanes == 0);
  parallel_jobs<StreamFence>((elements + kBlock - 1) / kBlock, work * static_cast<double>(elements), [&] {
    return [&](int64_t job) {
      int64_t i = job * kBlock;
      const int64_t end = elements - i < kBlock ? elements : i + kBlock;
      for (; i + lanes <= end; i += lanes) op(i, lanes);
      if (i < end) op(i, end - i);
    };
  }, Order::shares);
}

template <class T, bool gated>
void forward(const GatedSiluFwdParams& p) {
  using R = Compute<T>;
  const T *x = static_cast<const T*>(p.x), *value = static_cast<const T*>(p.value);
  T* y = static_cast<T*>(p.y);
  const bool streams = should_stream(y, p.elements);
  for_each_vector_in_parallel<R>(p.elements, 1, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Vec<R> v = read(x + i, n);
    Vec<R> result = v * sigmoid(v);
    if constexpr (gated) result *= read(value + i, n);
    write(streams, y + i, result, n);
  });
}

template <class T, bool gated>
void backward(const GatedSiluBwdParams& p) {
  using R = Compute<T>;
  const T *x = static_cast<const T*>(p.x), *value = static_cast<const T*>(p.value), *dy = static_cast<const T*>(p.dy);
  T *dx = static_cast<T*>(p.dx), *dvalue = static_cast<T*>(p.dvalue);
  const bool streams = should_stream(dx, p.elements) && should_stream(dvalue, p.elements);
  for_each_vector_in_parallel<R>(p.elements, 2, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Vec<R> v = read(x + i, n), s = sigmoid(v);
    Vec<R> d = read(dy + i, n);
    if constexpr (gated) {
      write(streams, dvalue + i, d * (v * s), n);
      d *= read(value + i, n);
    }
    write(streams, dx + i, d * (s * (v * (1 - s) + 1)), n);
  });
}

}  // namespace

void gated_silu_fwd_cpu(const GatedSiluFwdParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    params.value ? forward<T, true>(params) : forward<T, false>(params);
  });
}

void gated_silu_bwd_cpu(const GatedSiluBwdParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    params.value ? backward<T, true>(params) : backward<T, false>(params);
  });
}

}  // namespace megalodon::MEGALODON_ISA

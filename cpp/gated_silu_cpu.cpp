// Gate of the linear layers: silu of one tensor times another. Derivation: reference/gated_silu.py.
//
//   y = x s value,  s = sigmoid(x)
//
// Backward, which computes s again:
//   dx = dy value s (1 + x (1 - s));  dvalue = dy x s
//
// A job is a run of kBlock elements; a vector of them stays in registers from loads to stores.
// Memory traffic, in elements: forward x, value, y; backward dy, x, value, dx, dvalue. Each is read or written once.

#include "gated_silu.h"

#include "parallel.h"
#include "simd.h"
#include "vector_math.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int64_t kBlock = 8192;

// Calls op(offset, n) for the vectors of all elements; n < kLanes in the last one if it is not full.
template <class R, class Op>
void for_each_vector(int64_t elements, double work, Op&& op) {
  constexpr int64_t lanes = kLanes<R>;
  static_assert(kBlock % lanes == 0);
  parallel_jobs((elements + kBlock - 1) / kBlock, work * static_cast<double>(elements), [&] {
    return [&](int64_t job) {
      int64_t i = job * kBlock;
      const int64_t end = elements - i < kBlock ? elements : i + kBlock;
      for (; i + lanes <= end; i += lanes) op(i, lanes);
      if (i < end) op(i, end - i);
    };
  });
}

template <class T, bool gated>
void forward(const GatedSiluFwdParams& p) {
  using R = Compute<T>;
  const T *x = static_cast<const T*>(p.x), *value = static_cast<const T*>(p.value);
  T* y = static_cast<T*>(p.y);
  for_each_vector<R>(p.elements, 4, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Vec<R> v = load_first(x + i, n);
    Vec<R> result = v * sigmoid(v);
    if constexpr (gated) result *= load_first(value + i, n);
    store_first(y + i, result, n);
  });
}

template <class T, bool gated>
void backward(const GatedSiluBwdParams& p) {
  using R = Compute<T>;
  const T *x = static_cast<const T*>(p.x), *value = static_cast<const T*>(p.value), *dy = static_cast<const T*>(p.dy);
  T *dx = static_cast<T*>(p.dx), *dvalue = static_cast<T*>(p.dvalue);
  for_each_vector<R>(p.elements, 5, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Vec<R> v = load_first(x + i, n), s = sigmoid(v);
    Vec<R> d = load_first(dy + i, n);
    if constexpr (gated) {
      store_first(dvalue + i, d * (v * s), n);
      d *= load_first(value + i, n);
    }
    store_first(dx + i, d * (s * (v * (1 - s) + 1)), n);
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

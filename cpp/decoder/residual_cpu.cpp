// y = x + scale (a + b) of few rows, in one pass over them.

#include "residual.h"

#include <algorithm>

#include "simd.h"

namespace megalodon::MEGALODON_ISA {
namespace {

// v rounded to T.
template <class T>
MEGALODON_INLINE Vec<Compute<T>> rounded(Vec<Compute<T>> v) {
  T held[kLanes<Compute<T>>];
  store(static_cast<T*>(held), v);
  return load(static_cast<const T*>(held));
}

template <class T>
void residual(const ResidualParams& p) {
  using R = Compute<T>;
  const T *x = static_cast<const T*>(p.x), *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
  const R* scale = static_cast<const R*>(p.scale);
  T* y = static_cast<T*>(p.y);
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t d = 0; d < p.channels; d += kLanes<R>) {
      const int64_t at = row * p.channels + d, n = std::min(p.channels - d, int64_t{kLanes<R>});
      Vec<R> sum = load_first(a + at, n);
      if (b) sum = rounded<T>(sum + load_first(b + at, n));
      if (scale) sum = rounded<T>(sum * load_first(scale + d, n));
      store_first(y + at, sum + load_first(x + at, n), n);
    }
  }
}

}  // namespace

void residual_cpu(const ResidualParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) { residual<decltype(type)>(params); });
}

}  // namespace megalodon::MEGALODON_ISA

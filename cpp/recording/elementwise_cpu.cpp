// y = a + b, a - b, a b, a / b or scale a + shift, for few rows.

#include "elementwise.h"

#include "simd.h"

namespace megalodon::MEGALODON_ISA {
namespace {

template <class R>
MEGALODON_INLINE Vec<R> load_as(DType dtype, const void* from, int64_t at, int64_t n) {
  if constexpr (sizeof(R) == sizeof(double)) return load_first(static_cast<const double*>(from) + at, n);
  else if (dtype == DType::f32) return load_first(static_cast<const float*>(from) + at, n);
  else if (dtype == DType::bf16) return load_first(static_cast<const bf16*>(from) + at, n);
  else return load_first(static_cast<const fp16*>(from) + at, n);
}

template <class T>
void elementwise(const ElementwiseParams& p) {
  using R = Compute<T>;
  const Vec<R> scale = splat(static_cast<R>(p.scale)), shift = splat(static_cast<R>(p.shift));
  for (int64_t row = 0; row < p.rows; ++row) {
    T* y = static_cast<T*>(p.y) + row * p.channels;
    for_each_vector<R>(p.channels, [&](int64_t d, int64_t n) {
      const Vec<R> a = load_as<R>(p.a_dtype, p.a, row * p.a_step + d, n);
      const Vec<R> b = p.b ? load_as<R>(p.b_dtype, p.b, row * p.b_step + d, n) : shift;
      switch (p.operation) {
        case Operation::affine: return store_first(y + d, a * scale + shift, n);
        case Operation::add: return store_first(y + d, a + b, n);
        case Operation::subtract: return store_first(y + d, a - b, n);
        case Operation::multiply: return store_first(y + d, a * b, n);
        case Operation::divide: return store_first(y + d, a / b, n);
      }
    });
  }
}

}  // namespace

void elementwise_cpu(const ElementwiseParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) { elementwise<decltype(type)>(params); });
}

}  // namespace megalodon::MEGALODON_ISA

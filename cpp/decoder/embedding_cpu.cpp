// y[t] = scale weight[tokens[t]] of few rows.

#include "embedding.h"

#include <algorithm>

#include "simd.h"

namespace megalodon::MEGALODON_ISA {
namespace {

template <class T>
void embedding(const EmbeddingParams& p) {
  using R = Compute<T>;
  const Vec<R> scale = splat(static_cast<R>(p.scale));
  for (int64_t t = 0; t < p.rows; ++t) {
    const T* row = static_cast<const T*>(p.weight) + p.tokens[t] * p.channels;
    T* y = static_cast<T*>(p.y) + t * p.channels;
    for (int64_t d = 0; d < p.channels; d += kLanes<R>) {
      const int64_t n = std::min(p.channels - d, int64_t{kLanes<R>});
      store_first(y + d, scale * load_first(row + d, n), n);
    }
  }
}

}  // namespace

void embedding_cpu(const EmbeddingParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) { embedding<decltype(type)>(params); });
}

}  // namespace megalodon::MEGALODON_ISA

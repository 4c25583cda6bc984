// Cross-entropy of rows of V logits; the gradient overwrites the logits.
//
//   m = max_v z_v;  s = sum_v exp(z_v - m);  loss = log s - (z_target - m)
//   dz_v = scale exp(z_v - m) / s;  dz_target = scale expm1(-loss), accurate also for a small loss
//
// A job is a row, which is read from memory for m, and from a cache for s and for the gradient. The gradient recomputes
// the exponentials. Memory traffic, in elements: z; with `scales` also dz.

#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.h"
#include "simd.h"
#include "stream.h"
#include "vector_math.h"

namespace megalodon::MEGALODON_ISA {
namespace {

// Calls op(v, offset, chain) for the vectors of a row. Neighbouring vectors belong to different chains, whose sums are
// independent. Lanes beyond the row are -inf.
constexpr int kChains = 4;
template <class T, class Op>
MEGALODON_INLINE void for_each_vector_in_chains(const T* row, int64_t columns, Op&& op) {
  using R = Compute<T>;
  constexpr int64_t lanes = kLanes<R>;
  int64_t i = 0;
  for (; i + kChains * lanes <= columns; i += kChains * lanes)
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) op(load(row + i + chain * lanes), i + chain * lanes, chain);
  for (; i < columns; i += lanes) {
    Vec<R> v = load_first(row + i, columns - i);
    for (int64_t lane = columns - i; lane < lanes; ++lane) v[lane] = -std::numeric_limits<R>::infinity();
    op(v, i, 0);
  }
}

// Returns the loss of a row. If a scale is given, overwrites the row with its gradient.
template <class T>
Compute<T> cross_entropy_of_row(T* row, int64_t columns, int64_t target, const Compute<T>* scale) {
  using R = Compute<T>;
  const R lowest = -std::numeric_limits<R>::infinity();
  Vec<R> maxima[kChains] = {splat(lowest), splat(lowest), splat(lowest), splat(lowest)}, sums[kChains] = {};
  for_each_vector_in_chains(row, columns, [&](Vec<R> v, int64_t i, int chain) {
    fetch_ahead(row + i, i);
    maxima[chain] = v > maxima[chain] ? v : maxima[chain];
  });
  R max = lowest;
  for (const Vec<R>& v : maxima)
    for (int lane = 0; lane < kLanes<R>; ++lane) max = std::max(max, v[lane]);
  for_each_vector_in_chains(row, columns, [&](Vec<R> v, int64_t, int chain) { sums[chain] += softmax_exp(v - max); });
  const R sum = sum_lanes<R>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  const R loss = std::log(sum) - (widen(row[target]) - max);
  if (scale) {
    const R factor = *scale / sum;
    for_each_vector_in_chains(row, columns, [&](Vec<R> v, int64_t i, int) {
      store_first(row + i, softmax_exp(v - max) * factor, columns - i);
    });
    row[target] = narrow<T>(*scale * std::expm1(-loss));
  }
  return loss;
}

}  // namespace

void cross_entropy_cpu(const CrossEntropyParams& p) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    using R = Compute<T>;
    T* logits = static_cast<T*>(p.logits);
    const R* scales = static_cast<const R*>(p.scales);
    constexpr double work = 20;
    parallel_jobs<FlushDenormals>(p.rows, work * static_cast<double>(p.rows * p.classes), [&] {
      return [&](int64_t t) {
        static_cast<R*>(p.losses)[t] =
            cross_entropy_of_row(logits + t * p.classes, p.classes, p.targets[t], scales ? scales + t : nullptr);
      };
    }, Order::shares);
  });
}

}  // namespace megalodon::MEGALODON_ISA

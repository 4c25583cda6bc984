// Tests of whether numbers have left the range of their type.
#pragma once

#include <limits>
#include <type_traits>

#include "simd.h"

namespace megalodon::MEGALODON_ISA {

// Whether all lanes are finite.
template <class R>
MEGALODON_INLINE bool is_finite(Vec<R> v) { return sum_lanes<R>(v - v) == 0; }

// A type that holds squares of any R without overflow, unless long double is no wider than double and R is double.
template <class R> using WideOf = std::conditional_t<sizeof(R) == 4, double, long double>;
// Whether a mean of squares, plus eps, tells that none of the squares overflowed, and none that matters vanished.
template <class R>
MEGALODON_INLINE bool squares_in_range(R mean) {
  constexpr R kLeast = sizeof(R) == 4 ? R(0x1p-80) : R(0x1p-900), kMost = std::numeric_limits<R>::max();
  return mean >= kLeast && mean <= kMost;
}

}  // namespace megalodon::MEGALODON_ISA

// Tests for overflow and other values that are not finite.
#pragma once

#include <limits>
#include <type_traits>

#include "simd.h"

namespace megalodon::MEGALODON_ISA {

// Returns true if all lanes are finite.
template <class R>
MEGALODON_INLINE bool is_finite(Vec<R> v) { return sum_lanes<R>(v - v) == 0; }

// A type that holds squares of any R without overflow, unless long double is no wider than double and R is double.
template <class R> using WideOf = std::conditional_t<sizeof(R) == 4, double, long double>;
// Returns true if a mean of squares, plus eps, proves that no square overflowed and none that matters underflowed.
template <class R>
MEGALODON_INLINE bool squares_in_range(R mean) {
  constexpr R kLeast = sizeof(R) == 4 ? R(0x1p-80) : R(0x1p-900), kMost = std::numeric_limits<R>::max();
  return mean >= kLeast && mean <= kMost;
}

}  // namespace megalodon::MEGALODON_ISA

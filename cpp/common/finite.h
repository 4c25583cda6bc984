// Tests for overflow and other values that are not finite.
#pragma once

#include <limits>
#include <type_traits>

#include "simd.h"

namespace megalodon::MEGALODON_ISA {

// Returns true if all lanes are finite.
template <class R>
MEGALODON_INLINE bool is_finite(Vec<R> v) { return sum_lanes<R>(v - v) == 0; }

// A type in which the square of a finite R does not overflow. For double, this needs a long double wider than double.
template <class R> using WideOf = std::conditional_t<sizeof(R) == 4, double, long double>;
// Takes a mean of squares plus eps. Returns true if it proves that no square overflowed and that those that underflowed
// are negligible.
template <class R>
MEGALODON_INLINE bool squares_in_range(R mean) {
  constexpr R kLeast = sizeof(R) == 4 ? R(0x1p-80) : R(0x1p-900), kMost = std::numeric_limits<R>::max();
  return mean >= kLeast && mean <= kMost;
}

}  // namespace megalodon::MEGALODON_ISA

// Elementary functions of vectors.
#pragma once

#include "simd.h"

namespace megalodon::MEGALODON_ISA {

// exp(x) for x <= 88 (709 for double); larger x is not supported. A result below the smallest normal number is 0,
// exp(-inf) is 0 and a NaN stays one. Error: at most 1.01 ulp for float (every argument tried), 1.04 for double (2e7
// samples).
//   x = n ln 2 + r with |r| <= ln 2 / 2;  exp(x) = 2^n (1 + r + r^2 q(r)),  q the minimax polynomial of relative error.
// Adding kRound leaves the integer n in the low bits of the sum; ln 2 is a sum of two parts, the first so short that n
// times it is exact.
MEGALODON_INLINE Vec<float> exp(Vec<float> x) {
  constexpr float kRound = 0x1.8p23f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  const Vec<float> shifted = x * 0x1.715476p0f + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (x - n * kLn2High) - n * kLn2Low;
  Vec<float> q = r * 0.00138145986467f + 0.00836871687973f;
  q = q * r + 0.0416683880453f;
  q = q * r + 0.166665206317f;
  q = q * r + 0.499999934478f;
  const Vec<float> mantissa = (r * r * q + r) + 1.0f;
  const Vec<float> power = bit_cast<Vec<float>>((bit_cast<Bits>(shifted) << 23) + (127u << 23));
  return x < -0x1.5d589ep6f ? zeros<float>() : mantissa * power;
}

MEGALODON_INLINE Vec<double> exp(Vec<double> x) {
  using Bits64 = VecOf<uint64_t, kLanes<double>>::type;
  constexpr double kRound = 0x1.8p52, kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  const Vec<double> shifted = x * 0x1.71547652b82fep0 + kRound;
  const Vec<double> n = shifted - kRound;
  const Vec<double> r = (x - n * kLn2High) - n * kLn2Low;
  Vec<double> q = r * 0x1.ad7f6f0799ee2p-26 + 0x1.28ad72cc30daap-22;
  q = q * r + 0x1.71df2552390c2p-19;
  q = q * r + 0x1.a0199a0c677acp-16;
  q = q * r + 0x1.a01a012a57b51p-13;
  q = q * r + 0x1.6c16c1842a11dp-10;
  q = q * r + 0x1.1111111127be5p-7;
  q = q * r + 0x1.555555555087cp-5;
  q = q * r + 0x1.55555555554fap-3;
  q = q * r + 0x1.000000000000ap-1;
  const Vec<double> mantissa = (r * r * q + r) + 1.0;
  const Vec<double> power = bit_cast<Vec<double>>((bit_cast<Bits64>(shifted) << 52) + (uint64_t{1023} << 52));
  return x < -0x1.6232bdd7abcd2p9 ? zeros<double>() : mantissa * power;
}

// 1 / (1 + exp(-x)), of vectors of float or double, any x. Where the result is below the smallest normal number it is 0;
// a NaN stays one. Error: at most 2.41 ulp for float (every argument tried), 2.45 for double (2e7 samples).
// The exponential is that of -|x|, which neither overflows nor cancels: e / (1 + e) for x < 0, 1 / (1 + e) otherwise.
template <class V>
MEGALODON_INLINE V sigmoid(V x) {
  const V one = V{} + 1, e = exp(x < V{} ? x : -x);
  return (x < V{} ? e : one) / (one + e);
}

}  // namespace megalodon::MEGALODON_ISA

// Elementary functions of vectors.
#pragma once

#include <type_traits>

#include "simd.h"

namespace megalodon::MEGALODON_ISA {

// exp(x) for x <= 88 (709 for double); larger x is not supported. A result below the smallest normal number is 0,
// exp(-inf) is 0 and NaN gives NaN. Error: at most 1.01 ulp for float (every argument tried), 1.04 for double (2e7
// samples).
//   x = n ln 2 + r with |r| <= ln 2 / 2;  exp(x) = 2^n (1 + r + r^2 q(r)),  q the minimax polynomial of relative error.
// Adding kRound leaves the integer n in the low bits of the sum. ln 2 is split into two parts; the first has so few
// bits that its product with n is exact.
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

// exp(x) for a softmax, where x <= 0 is a score minus the largest score. The error grows with |x|, up to 2 units in the
// last place of exp(max(x, -1)). exp(-inf) is 0. AVX-512 splits x log2 e into integer and fraction in one instruction
// and scales by the power of two in another; 2^fraction is a minimax polynomial in relative error.
#if defined(__AVX512DQ__)
MEGALODON_INLINE Vec<float> softmax_exp(Vec<float> x) {
  constexpr int kFloor = 0x9;  // round down, raise no exceptions
  const Vec<float> t = x * 0x1.715476p0f;
  const Vec<float> r = bit_cast<Vec<float>>(_mm512_reduce_ps(bit_cast<__m512>(t), kFloor));
  Vec<float> p = r * 0x1.c72118p-13f + 0x1.461954p-10f;
  p = p * r + 0x1.3d28p-7f;
  p = p * r + 0x1.c685p-5f;
  p = p * r + 0x1.ebfd9ep-3f;
  p = p * r + 0x1.62e42ap-1f;
  p = p * r + 1.0f;
  return bit_cast<Vec<float>>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(t)));
}
#else
MEGALODON_INLINE Vec<float> softmax_exp(Vec<float> x) { return exp(x); }
#endif
MEGALODON_INLINE Vec<double> softmax_exp(Vec<double> x) { return exp(x); }

// 1 / (1 + exp(-x)), for arbitrary x, float or double. A result below the smallest normal number is 0; NaN gives NaN.
// Error: at most 2.41 ulp for float (every argument tried), 2.45 for double (2e7 samples). With e = exp(-|x|), which
// does not overflow, the result is e / (1 + e) for x < 0, else 1 / (1 + e).
template <class V>
MEGALODON_INLINE V sigmoid(V x) {
  const V one = V{} + 1, e = exp(x < -x ? x : -x);
  return (x < V{} ? e : one) / (one + e);
}

template <class V>
struct SinCos {
  V sin, cos;
};

// Sine and cosine of 2 pi t for |t| <= 2^20; NaN and infinity give NaN. Error: at most 0.99 ulp for float (every t in
// [0, 1] tried), 1.04 for double (2e7 samples); without FMA 1.71 and 1.56.
//   t = k / 4 + r with |r| <= 1 / 8, exactly;
//   sin(2 pi r) = r (2 pi + (low + u p(u))), cos(2 pi r) = 1 + u q(u), u = r^2.
// Adding kRound leaves the integer k in the low bits of the sum; the quarter turn k swaps and negates the results.
template <class R>
MEGALODON_INLINE SinCos<Vec<R>> sincos_of_turns(Vec<R> t) {
  constexpr bool kFloat = sizeof(R) == 4;
  using Ints = typename VecOf<std::conditional_t<kFloat, uint32_t, uint64_t>, kLanes<R>>::type;
  const R round = kFloat ? R(0x1.8p23) : R(0x1.8p52);
  const Vec<R> shifted = t * 4 + round;
  const Vec<R> r = t - (shifted - round) * R(0.25), u = r * r;
  Vec<R> p, q;
  if constexpr (kFloat) {
    p = u * -0x1.2d9304p+6f + 0x1.465e92p+6f;
    p = p * u - 0x1.4abbbap+5f;
    p = p * u - 0x1.a324eap-23f;
    q = u * 0x1.d9c326p+5f - 0x1.55c5e2p+6f;
    q = q * u + 0x1.03c1dep+6f;
    q = q * u - 0x1.3bd3ccp+4f;
  } else {
    p = u * 0x1.e3eed660a99e2p+1 - 0x1.e30063a5b96c5p+3;
    p = p * u + 0x1.50782fca44486p+5;
    p = p * u - 0x1.32d2cce2d548fp+6;
    p = p * u + 0x1.466bc67758701p+6;
    p = p * u - 0x1.4abbce625be41p+5;
    p = p * u + 0x1.02685ad157ef5p-52;
    q = u * -0x1.b264c35241715p+0 + 0x1.f9cc531708b95p+2;
    q = q * u - 0x1.a6d1ecaedbc14p+4;
    q = q * u + 0x1.e1f50683cedabp+5;
    q = q * u - 0x1.55d3c7e3c98cep+6;
    q = q * u + 0x1.03c1f081b5ab4p+6;
    q = q * u - 0x1.3bd3cc9be45dep+4;
  }
  const Vec<R> sin = r * R(6.283185307179586) + r * p, cos = u * q + 1;
  const Ints quarter = bit_cast<Ints>(shifted);
  const auto is_odd = (quarter & 1) != 0;
  constexpr int kSignBit = 8 * sizeof(R) - 1;
  const Ints sin_sign = (quarter & 2) << (kSignBit - 1), cos_sign = ((quarter + 1) & 2) << (kSignBit - 1);
  return {bit_cast<Vec<R>>(bit_cast<Ints>(is_odd ? cos : sin) ^ sin_sign),
          bit_cast<Vec<R>>(bit_cast<Ints>(is_odd ? sin : cos) ^ cos_sign)};
}

}  // namespace megalodon::MEGALODON_ISA

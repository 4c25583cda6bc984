// Conversions between element types and accumulation types. All but to_tf32 round ties to even.
#pragma once

#include "portable.cuh"

namespace gpu {

using megalodon::bf16;
using megalodon::Compute;
using megalodon::fp16;

#if GPU_EMULATED
namespace detail {

inline uint16_t narrow_bf16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline uint16_t narrow_fp16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x), magnitude = u & 0x7fffffff, sign = u >> 16 & 0x8000;
  if (x != x) return 0x7fff;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
  // Below 2^-14 the spacing is 2^-24; adding 0.5 shifts it to the lowest bit.
  if (magnitude < 0x38800000)
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000));
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

inline float widen_fp16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude < 0x400) return bit_cast<float>(bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f) | sign);
  return bit_cast<float>(sign | ((magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u)));
}

}  // namespace detail
#endif

GPU_INLINE float to_real(float x) { return x; }
GPU_INLINE double to_real(double x) { return x; }
GPU_INLINE float to_real(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
GPU_INLINE float to_real(fp16 x) {
#if GPU_EMULATED
  return detail::widen_fp16(x.bits);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

// from_real<T>(x): x as a T.
template <class T> GPU_INLINE T from_real(Compute<T> x) { return x; }
template <> GPU_INLINE bf16 from_real<bf16>(float x) {
#if GPU_EMULATED
  return {detail::narrow_bf16(x)};
#else
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}
template <> GPU_INLINE fp16 from_real<fp16>(float x) {
#if GPU_EMULATED
  return {detail::narrow_fp16(x)};
#else
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

// Two 16-bit values in a register; `low` is in the lower half, which has the lower address in memory.
template <class T> GPU_INLINE uint32_t pack2(float low, float high);
template <> GPU_INLINE uint32_t pack2<bf16>(float low, float high) {
#if GPU_EMULATED
  return detail::narrow_bf16(low) | static_cast<uint32_t>(detail::narrow_bf16(high)) << 16;
#else
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#endif
}
template <> GPU_INLINE uint32_t pack2<fp16>(float low, float high) {
#if GPU_EMULATED
  return detail::narrow_fp16(low) | static_cast<uint32_t>(detail::narrow_fp16(high)) << 16;
#else
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#endif
}

// Joins the lower halves (half = 0) or the upper halves (half = 1) of two registers. The half of `low` becomes the
// lower half of the result.
GPU_INLINE uint32_t join_halves(int half, uint32_t low, uint32_t high) {
#if GPU_EMULATED
  return half == 0 ? (low & 0xffff) | high << 16 : low >> 16 | (high & 0xffff0000);
#else
  return __byte_perm(low, high, half == 0 ? 0x5410 : 0x7632);
#endif
}
template <int half>
GPU_INLINE uint32_t join_halves(uint32_t low, uint32_t high) { return join_halves(half, low, high); }

// The nearest tf32 (8-bit exponent, 10-bit mantissa), ties away from zero, in the bits of a float.
GPU_INLINE uint32_t to_tf32(float x) {
#if GPU_EMULATED
  const uint32_t u = bit_cast<uint32_t>(x);
  return (u & 0x7f800000) == 0x7f800000 ? u & 0xffffe000 : (u + 0x1000) & 0xffffe000;
#else
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#endif
}

}  // namespace gpu

// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include "simd.h"

namespace megalodon::MEGALODON_ISA {

// A 32-bit word of each of kPhiloxStreams independent counters, in the low half of each 64-bit lane.
inline constexpr int kPhiloxStreams = kVectorBytes / 8;
using PhiloxWord = VecOf<uint64_t, kPhiloxStreams>::type;

// 64-bit product of the low halves; the high halves are ignored.
MEGALODON_INLINE PhiloxWord multiply_low_halves(PhiloxWord a, uint32_t b) {
#if defined(__AVX512F__)
  return bit_cast<PhiloxWord>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return bit_cast<PhiloxWord>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__aarch64__)
  return bit_cast<PhiloxWord>(vmull_u32(vmovn_u64(bit_cast<uint64x2_t>(a)), vdup_n_u32(b)));
#else
  return (a & 0xffffffffu) * uint64_t{b};
#endif
}

// Replaces the counters by their random words. Only the low halves of lanes are valid, before and after.
MEGALODON_INLINE void philox(PhiloxWord (&word)[4], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9e3779b9u, key1 += 0xbb67ae85u) {
    const PhiloxWord a = multiply_low_halves(word[0], 0xd2511f53u), b = multiply_low_halves(word[2], 0xcd9e8d57u);
    word[0] = (b >> 32) ^ word[1] ^ key0;
    word[1] = b;
    word[2] = (a >> 32) ^ word[3] ^ key1;
    word[3] = a;
  }
}

}  // namespace megalodon::MEGALODON_ISA

// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include "portable.cuh"

namespace gpu {

// Replaces the four words of a counter by four random words. The key is the lower and the upper half of the seed.
GPU_INLINE void philox(uint32_t (&word)[4], uint64_t seed) {
  uint32_t key_low = static_cast<uint32_t>(seed), key_high = static_cast<uint32_t>(seed >> 32);
  GPU_UNROLL
  for (int round = 0; round < 10; ++round, key_low += 0x9e3779b9u, key_high += 0xbb67ae85u) {
    const uint64_t a = uint64_t{0xd2511f53u} * word[0], b = uint64_t{0xcd9e8d57u} * word[2];
    word[0] = static_cast<uint32_t>(b >> 32) ^ word[1] ^ key_low;
    word[1] = static_cast<uint32_t>(b);
    word[2] = static_cast<uint32_t>(a >> 32) ^ word[3] ^ key_high;
    word[3] = static_cast<uint32_t>(a);
  }
}

}  // namespace gpu

// Reductions over a warp and over a block, in an order fixed by lane numbers, so results repeat bit for bit.
#pragma once

#include <cmath>

#include "portable.cuh"

namespace gpu {

// Every lane gets the sum over the 32 lanes.
template <class R>
GPU_INLINE R warp_sum(R value) {
  GPU_UNROLL
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullMask, value, distance);
  return value;
}

template <class R>
GPU_INLINE R warp_max(R value) {
  GPU_UNROLL
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const R other = __shfl_xor_sync(kFullMask, value, distance);
    value = value < other ? other : value;
  }
  return value;
}

// Every thread of a one-dimensional block of whole warps gets the sum over the block. All threads call it.
template <class R>
GPU_INLINE R block_sum(R value) {
  SMEM_ARRAY(R, partial, kWarp);
  const int warps = static_cast<int>(blockDim.x) / kWarp, lane = threadIdx.x % kWarp;
  value = warp_sum(value);
  if (lane == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = warp_sum(lane < warps ? partial[lane] : R{0});
  __syncthreads();  // the next call may reuse the partial sums
  return value;
}

// Every thread gets the maximum over the block, of numbers that are not negative.
template <class R>
GPU_INLINE R block_max(R value) {
  SMEM_ARRAY(R, partial, kWarp);
  const int warps = static_cast<int>(blockDim.x) / kWarp, lane = threadIdx.x % kWarp;
  value = warp_max(value);
  if (lane == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = warp_max(lane < warps ? partial[lane] : R{0});
  __syncthreads();
  return value;
}

// Returns the factor by which numbers are multiplied before their squares are added. The factor is 1 unless `mean`, which
// is the mean of the squares plus eps, shows an overflow or underflow. With the factor, no square of a normal number
// overflows or underflows.
template <class R>
GPU_INLINE R square_scale(R mean) {
  constexpr bool kFloat = sizeof(R) == 4;
  constexpr R kLeast = static_cast<R>(kFloat ? 0x1p-80 : 0x1p-900);
  if (mean >= kLeast && mean < static_cast<R>(INFINITY)) return 1;
  return static_cast<R>(mean < kLeast ? (kFloat ? 0x1p64 : 0x1p520) : (kFloat ? 0x1p-70 : 0x1p-560));
}

}  // namespace gpu

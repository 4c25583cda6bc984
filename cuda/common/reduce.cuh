// Reductions over a warp and over a block, in an order fixed by lane numbers, so results repeat bit for bit.
#pragma once

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

}  // namespace gpu

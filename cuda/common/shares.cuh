// Gradients of parameters shared by all blocks: each block stores its share, and a kernel adds the shares.
#pragma once

#include "portable.cuh"

namespace gpu {

// first[c] = sum of shares[i][c] over i, second[c] = scale * sum of shares[i][columns + c]
template <class R>
struct Shares {
  const R* shares;  // (count, 2 * columns)
  int64_t count, columns;
  R *first, *second;
  double scale;
};

constexpr int kShareThreads = 1024;

// A block adds 32 columns in double; its warps take shares in turn, and the warps' sums are added in order.
template <class R>
__global__ void __launch_bounds__(kShareThreads) sum_shares_kernel(Shares<R> of) {
  SMEM_ARRAY(double, sums, kShareThreads);
  const int warp = threadIdx.x / kWarp, warps = kShareThreads / kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp;
  const bool exists = column < 2 * of.columns;
  double sum = 0;
  for (int64_t i = warp; exists && i < of.count; i += warps) sum += of.shares[i * 2 * of.columns + column];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || !exists) return;
  for (int i = 1; i < warps; ++i) sum += sums[i * kWarp + threadIdx.x];
  if (column < of.columns) of.first[column] = static_cast<R>(sum);
  else of.second[column - of.columns] = static_cast<R>(sum * of.scale);
}

template <class R>
void sum_shares(const Shares<R>& of, void* stream) {
  const int64_t blocks = (2 * of.columns + kWarp - 1) / kWarp;
  LAUNCH(sum_shares_kernel<R>, static_cast<unsigned>(blocks), kShareThreads, 0, stream, of);
}

}  // namespace gpu

// For backwards: gradients of parameters, to which all blocks contribute. A share is the sums that one block stores;
// sum_shares() launches a kernel that adds the shares.
#pragma once

#include "portable.cuh"

namespace gpu {

// first[c] = sum over i of shares[i][c];  second[c] = scale * sum over i of shares[i][columns + c]
template <class R>
struct Shares {
  const R* shares;  // (count, 2 * columns)
  int64_t count, columns;
  R *first, *second;
  double scale;
};

constexpr int kShareThreads = 1024;

// A block sums 32 columns in double. Its warps take the shares in turn; then the warps' sums are added in order.
template <class R>
__global__ void __launch_bounds__(kShareThreads) sum_shares_kernel(Shares<R> p) {
  SMEM_ARRAY(double, sums, kShareThreads);
  const int warp = threadIdx.x / kWarp, warps = kShareThreads / kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp;
  const bool has_column = column < 2 * p.columns;
  double sum = 0;
  for (int64_t i = warp; has_column && i < p.count; i += warps) sum += p.shares[i * 2 * p.columns + column];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || !has_column) return;
  for (int i = 1; i < warps; ++i) sum += sums[i * kWarp + threadIdx.x];
  if (column < p.columns) p.first[column] = static_cast<R>(sum);
  else p.second[column - p.columns] = static_cast<R>(sum * p.scale);
}

template <class R>
void sum_shares(const Shares<R>& p, void* stream) {
  const int64_t blocks = (2 * p.columns + kWarp - 1) / kWarp;
  LAUNCH(sum_shares_kernel<R>, static_cast<unsigned>(blocks), kShareThreads, 0, stream, p);
}

}  // namespace gpu

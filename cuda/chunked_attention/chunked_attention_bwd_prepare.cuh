// Phase 1 of chunked attention's backward (chunked_attention_bwd.cuh): delta, and zeros in the gradients of padding.
#pragma once

#include "chunked_attention_bwd_blocks.cuh"
#include "reduce.cuh"

namespace megalodon {
namespace chunked_attention {

constexpr int kTokens = 32;  // per block; each lane of a warp looks up the sequence of one of them
constexpr int kPrepareWarps = 8;

template <class Product>
__global__ void __launch_bounds__(kPrepareWarps* gpu::kWarp)
    chunked_attention_bwd_prepare_kernel(ChunkedAttentionBwdParams p, BwdPlan plan) {
  using T = typename Product::T;
  using R = typename Product::R;
  constexpr bool kWhole = Product::kVectors;
  constexpr int width = kWhole ? gpu::kVectorWidth<T> : 1;
  const int lane = threadIdx.x % gpu::kWarp;
  const int64_t first = int64_t{blockIdx.x} * kTokens, left = p.sequences.tokens - first;
  const int tokens = static_cast<int>(left < kTokens ? left : kTokens);
  const bool padding = lane < tokens && find_live_sequence(p, first + lane) < 0;
  const unsigned padding_mask = __ballot_sync(gpu::kFullMask, padding);
  for (int64_t i = threadIdx.x / gpu::kWarp; i < tokens * p.heads; i += kPrepareWarps) {
    const int64_t row = first * p.heads + i;
    if (padding_mask >> (i / p.heads) & 1) {
      const R zeros[width] = {};
      for (int64_t e = lane * width; e < p.key_dim; e += gpu::kWarp * width) {
        gpu::store<kWhole>(typed<T>(p.dq) + row * p.key_dim + e, zeros);
        gpu::store<kWhole>(typed<T>(p.dk) + row * p.key_dim + e, zeros);
      }
      for (int64_t e = lane * width; e < p.value_dim; e += gpu::kWarp * width)
        gpu::store<kWhole>(typed<T>(p.dv) + row * p.value_dim + e, zeros);
    } else if (plan.delta) {
      R sum = 0;
      for (int64_t e = lane * width; e < p.value_dim; e += gpu::kWarp * width) {
        R o[width], d_o[width];
        gpu::load<kWhole>(o, typed<T>(p.o) + row * p.value_dim + e);
        gpu::load<kWhole>(d_o, typed<T>(p.d_o) + row * p.value_dim + e);
        GPU_UNROLL
        for (int j = 0; j < width; ++j) sum += o[j] * d_o[j];
      }
      sum = gpu::warp_sum(sum);
      if (lane == 0) typed<R>(plan.delta)[row] = sum;
    }
  }
}

}  // namespace chunked_attention
}  // namespace megalodon

// Normalized queries and keys, forward: ops/normalized_qk/normalized_qk_reference.py.
//
//   r = 1 / sqrt(mean(z^2) + eps)      u_j = z r (1 + gamma_j) / sqrt(K) + beta_j      q, k = rotate(u_0, u_1)
//
//   z, q, k (T, H, K):       the call's dtype
//   gamma, beta (2, H, K):   R, float or double
//   rotary (rows, K / 2, 2): R, (cos, sin)
//
// Grid: an item is kTokens neighbouring tokens of one head; neighbouring items are the heads of the same tokens.
//   K <= 32 vectors, warp kernel: a warp takes an item, a lane one vector of kWidth elements; a block takes four items.
//   larger K, block kernel:       a block takes an item, a thread the vectors thread, thread + blockDim, ...
// Phases: 1. Lane i finds the row of the rotary table for the item's token i. Then for each token:
//         2. the sum of the squares of z, by shuffles and, in the block kernel, through shared memory;
//         3. scale, shift, rotate and store q and k.
// A lane of the warp kernel keeps its vector's gains and shifts in registers for all tokens of an item. The block
// kernel reads gains, shifts and z again from the cache. Vectors are 16 bytes if alignment and K allow it; otherwise
// they are two elements, which are loaded one by one.
//
// Shared memory: none in the warp kernel; 128 bytes in the block kernel, 256 for double. Registers: at most 80 (sm_80
// to sm_120), no spills.
// Bytes: z is read once, q and k are written once: the minimum. gamma and beta (16 K / kTokens bytes per row) and the
// table come from L2.
// H100, (B 8, L 2048, H 1, K 256) bf16: 25.2 MB + 2.1 MB of table, 8.2 us at 3.35 TB/s.
// Example: K = 256 bf16: lane l holds elements 8 l .. 8 l + 7, which are four rotated pairs.
#pragma once

#include "normalized_qk.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace megalodon {
namespace normalized_qk {

constexpr int kTokens = 8;         // per item
constexpr int kWarpsPerBlock = 4;  // each takes an item
constexpr int kMaxThreads = 256;   // per block of the block kernel
static_assert(kTokens <= gpu::kWarp, "a lane looks up each token");

template <class R, int n>
struct Affine {
  R gain[2][n], shift[2][n];  // index 0: query, index 1: key
};

template <bool kWhole, class R, int n>
GPU_INLINE void load_affine(Affine<R, n>& affine, const NormalizedQkParams& p, int64_t channel) {
  const int64_t channels = p.heads * p.key_dim;
  const R root = sqrt(static_cast<R>(p.key_dim));
  GPU_UNROLL
  for (int j = 0; j < 2; ++j) {
    gpu::load_wide<kWhole>(affine.gain[j], static_cast<const R*>(p.gamma) + j * channels + channel);
    gpu::load_wide<kWhole>(affine.shift[j], static_cast<const R*>(p.beta) + j * channels + channel);
    GPU_UNROLL
    for (int i = 0; i < n; ++i) affine.gain[j][i] = (1 + affine.gain[j][i]) / root;
  }
}

// Stores the vectors of q and k that begin at element `at`; zn is z r.
template <bool kWhole, class T, class R, int n>
GPU_INLINE void store_rotated(const NormalizedQkFwdParams& p, int64_t at, const R (&zn)[n], const Affine<R, n>& affine,
                              const R (&rotary)[n]) {
  GPU_UNROLL
  for (int j = 0; j < 2; ++j) {
    R rotated[n];
    GPU_UNROLL
    for (int i = 0; i < n; i += 2) {
      const R a = zn[i] * affine.gain[j][i] + affine.shift[j][i], c = rotary[i];
      const R b = zn[i + 1] * affine.gain[j][i + 1] + affine.shift[j][i + 1], s = rotary[i + 1];
      rotated[i] = a * c - b * s;
      rotated[i + 1] = a * s + b * c;
    }
    gpu::store<kWhole>(static_cast<T*>(j == 0 ? p.q : p.k) + at, rotated);
  }
}

template <bool kWhole, class T, class R, int n>
GPU_INLINE void store_zeros(const NormalizedQkFwdParams& p, int64_t at) {
  const R zeros[n] = {};
  gpu::store<kWhole>(static_cast<T*>(p.q) + at, zeros);
  gpu::store<kWhole>(static_cast<T*>(p.k) + at, zeros);
}

// A warp takes an item, a lane a vector.
template <class T, int kWidth, bool kWhole>
__global__ void __launch_bounds__(kWarpsPerBlock* gpu::kWarp) normalized_qk_fwd_warp_kernel(NormalizedQkFwdParams p) {
  using R = Compute<T>;
  const int lane = threadIdx.x % gpu::kWarp;
  const int64_t item = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / gpu::kWarp;
  const int64_t first = item / p.heads * kTokens, head = item % p.heads, channel = head * p.key_dim + lane * kWidth;
  const bool active = lane * kWidth < p.key_dim;
  const int64_t my_row = table_row(p, first + lane);
  Affine<R, kWidth> affine;
  if (active) load_affine<kWhole>(affine, p, channel);
  for (int i = 0; i < kTokens && first + i < p.sequences.tokens; ++i) {
    const int64_t row = __shfl_sync(gpu::kFullMask, my_row, i);
    const int64_t at = (first + i) * p.heads * p.key_dim + channel;
    R z[kWidth] = {}, rotary[kWidth] = {}, squares = 0;
    if (active && row >= 0) {
      gpu::load<kWhole>(z, static_cast<const T*>(p.z) + at);
      gpu::load_wide<kWhole>(rotary, static_cast<const R*>(p.rotary) + row * p.key_dim + lane * kWidth);
    }
    GPU_UNROLL
    for (int e = 0; e < kWidth; ++e) squares += z[e] * z[e];
    const R mean = gpu::warp_sum(squares) / static_cast<R>(p.key_dim) + static_cast<R>(p.eps);
    const R scale = gpu::square_scale(mean);
    R r = rsqrt(mean);
    if (scale != 1) {  // the whole warp has one scale
      squares = 0;
      add_squares(squares, z, scale);
      r = inverse_rms(p, gpu::warp_sum(squares), scale);
    }
    GPU_UNROLL
    for (int e = 0; e < kWidth; ++e) z[e] *= r;
    if (!active) continue;
    if (row < 0) store_zeros<kWhole, T, R, kWidth>(p, at);
    else store_rotated<kWhole, T>(p, at, z, affine, rotary);
  }
}

// A block takes an item, with arbitrary K.
template <class T, int kWidth, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads) normalized_qk_fwd_block_kernel(NormalizedQkFwdParams p) {
  using R = Compute<T>;
  const int64_t first = blockIdx.x / p.heads * kTokens, head = blockIdx.x % p.heads;
  const int64_t my_row = table_row(p, first + threadIdx.x % gpu::kWarp);
  const int64_t step = int64_t{blockDim.x} * kWidth, start = int64_t{threadIdx.x} * kWidth;
  for (int i = 0; i < kTokens && first + i < p.sequences.tokens; ++i) {
    const int64_t row = __shfl_sync(gpu::kFullMask, my_row, i);
    const int64_t begin = ((first + i) * p.heads + head) * p.key_dim;
    const T* from = static_cast<const T*>(p.z) + begin;
    R z[kWidth], rotary[kWidth], squares = 0;
    for (int64_t e = start; row >= 0 && e < p.key_dim; e += step) {
      gpu::load<kWhole>(z, from + e);
      GPU_UNROLL
      for (int j = 0; j < kWidth; ++j) squares += z[j] * z[j];
    }
    const R mean = gpu::block_sum(squares) / static_cast<R>(p.key_dim) + static_cast<R>(p.eps);
    const R scale = gpu::square_scale(mean);
    R r = rsqrt(mean);
    if (scale != 1) {  // the whole block has one scale
      squares = 0;
      for (int64_t e = start; row >= 0 && e < p.key_dim; e += step) {
        gpu::load<kWhole>(z, from + e);
        add_squares(squares, z, scale);
      }
      r = inverse_rms(p, gpu::block_sum(squares), scale);
    }
    for (int64_t e = start; e < p.key_dim; e += step) {
      if (row < 0) {
        store_zeros<kWhole, T, R, kWidth>(p, begin + e);
        continue;
      }
      Affine<R, kWidth> affine;
      load_affine<kWhole>(affine, p, head * p.key_dim + e);
      gpu::load_wide<kWhole>(rotary, static_cast<const R*>(p.rotary) + row * p.key_dim + e);
      gpu::load<kWhole>(z, from + e);
      GPU_UNROLL
      for (int j = 0; j < kWidth; ++j) z[j] *= r;
      store_rotated<kWhole, T>(p, begin + e, z, affine, rotary);
    }
  }
}

}  // namespace normalized_qk
}  // namespace megalodon

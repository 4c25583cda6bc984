// Timestep norm, backward of a call that returned only end states: ops/timestep_norm/timestep_norm_reference.py.
//
//   dx = (dmean + 2 dvar (x - mean)) / (n F), with the n tokens of a sequence and the F = D / G channels of a group
//
//   x, dx (T, D):                                  the call's dtype
//   mean, dmean, dvar (S, G); residual (S, 2, G):  R, float or double
//
// Grid: a block takes kTile tokens and 32 vectors of each row; a warp takes kRows rows, a lane one vector of each. A
// lane loads its vectors of all rows while threads look up the rows' sequences. It loads its group's numbers when the
// sequence changes. If F is no multiple of the vector width, or a tensor is misaligned, vectors have one element.
//
// Shared memory: 0.5 KB. Registers: at most 128, two blocks per SM; no spills.
// Bytes: x and dx once, the minimum; and for each warp and lane a few numbers of a group, from L1 or L2.
#pragma once

#include "timestep_norm.cuh"

namespace megalodon {
namespace timestep_norm {

// dx = level + slope (x - mean) in one group of a sequence.
template <class R>
struct EndStateGradient {
  R mean = 0, level = 0, slope = 0;

  EndStateGradient() = default;
  GPU_INLINE EndStateGradient(const TimestepNormEndStateBwdParams& p, int64_t s, int64_t group) {
    const int64_t at = s * p.groups + group, elements = p.sequences.length(s) * (p.channels / p.groups);
    const R per_element = R{1} / static_cast<R>(elements);
    if (p.dmean_out) level = static_cast<const R*>(p.dmean_out)[at] * per_element;
    if (!p.dvar_out) return;
    slope = 2 * (static_cast<const R*>(p.dvar_out)[at] * per_element);
    mean = static_cast<const R*>(p.mean_out)[at];
    level -= slope * static_cast<const R*>(p.residual_out)[at + s * p.groups];
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    timestep_norm_end_state_bwd_kernel(TimestepNormEndStateBwdParams p, unsigned slices) {
  using R = Compute<T>;
  constexpr bool kWhole = kWidth > 1;
  constexpr int kChannels = kWidth * gpu::kWarp;  // per block
  SMEM_ARRAY(int64_t, sequence, kTile);
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const int64_t tokens = p.sequences.tokens, first = int64_t{blockIdx.x / slices} * kTile;
  const int64_t own = int64_t{blockIdx.x % slices} * kChannels + lane * kWidth;
  const int64_t channel = own < p.channels ? own : 0, group = channel / (p.channels / p.groups);
  R x[kRows][kWidth];
  GPU_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + warp * kRows + r, token = row < tokens ? row : tokens - 1;
    gpu::load<kWhole>(x[r], static_cast<const T*>(p.x) + token * p.channels + channel);
  }
  if (threadIdx.x < kTile) {
    const int64_t token = first + threadIdx.x;
    sequence[threadIdx.x] = token < tokens ? gpu::find_sequence(p.sequences, token) : -1;
  }
  __syncthreads();
  if (own >= p.channels) return;

  int64_t current = -1;
  EndStateGradient<R> gradient;
  GPU_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int row = warp * kRows + r;
    if (first + row >= tokens) break;
    const int64_t s = sequence[row];
    if (s >= 0 && s != current) gradient = EndStateGradient<R>(p, s, group);
    current = s;
    R dx[kWidth];
    GPU_UNROLL
    for (int e = 0; e < kWidth; ++e)
      dx[e] = s < 0 ? 0 : gradient.level + gradient.slope * (x[r][e] - gradient.mean);
    gpu::store<kWhole>(static_cast<T*>(p.dx) + (first + row) * p.channels + channel, dx);
  }
}

}  // namespace timestep_norm
}  // namespace megalodon

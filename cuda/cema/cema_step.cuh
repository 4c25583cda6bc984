// CEMA of short sequences, as in decoding, in one launch of cema_fwd.cu and without a workspace. Derivation:
// ops/cema/cema_reference.py.
//
//   h_t = q h_{t-1} + p x_t      y_t = Re(sum_n gamma_n h_t[n]) + omega x_t
//
// Grid: x over channels, y over sequences; a block takes every gridDim.y-th sequence and keeps its coefficients in
// registers. A lane takes a mode of a channel; `lanes` neighbouring lanes, a power of two, take a channel. For each
// sequence:
//   1. load the state
//   2. for each kSteps rows: load x, advance the state, add y over the channel's lanes by shuffles
//   3. store the state
//   4. the channel's first lane zeroes the padding before the sequence and, for the last sequence, the padding after it
//
// Registers: at most 64, no spills. Shared memory: none.
// Bytes: mostly states in and out, 16 N per channel and sequence; coefficients, 20 N per channel, from L2.
// H100, (B 32, L 1, D 4096, N 16): 33.6 MB of states, 10 us at 3.35 TB/s.
// Example: N = 16, D = 1024: a warp has two channels, 64 blocks of 256 threads a sequence.
#pragma once

#include "cema.h"
#include "complex.cuh"
#include "convert.cuh"

namespace megalodon {
namespace cema {

constexpr int kStepThreads = 256;
constexpr int kSteps = 8;  // rows loaded at once

template <class T>
__global__ void __launch_bounds__(kStepThreads) cema_step_kernel(CemaFwdParams p, int lanes) {
  using R = Compute<T>;
  using C = gpu::Complex<R>;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, channel = thread / lanes, n = thread % lanes;
  const bool has_channel = channel < p.channels, has_mode = has_channel && n < p.modes;
  const bool is_first_lane = has_channel && n == 0;
  const int64_t at = channel * p.modes + n, size = p.channels * p.modes;
  const Sequences& sequences = p.sequences;
  C q{0, 0}, gamma{0, 0};
  R drive = 0, omega = 0;  // drive: p
  if (has_mode) {
    q = gpu::ld<C>(static_cast<const C*>(p.q) + at);
    gamma = gpu::ld<C>(static_cast<const C*>(p.gamma) + at);
    drive = static_cast<const R*>(p.p)[at];
    omega = static_cast<const R*>(p.omega)[channel];
  }
  const T* const rows = static_cast<const T*>(p.x) + channel;
  T* const out = static_cast<T*>(p.y) + channel;
  const auto clear = [&](int64_t from, int64_t to) {
    for (int64_t t = from; is_first_lane && t < to; ++t) out[t * p.channels] = gpu::from_real<T>(0);
  };
  for (int64_t s = blockIdx.y; s < sequences.count; s += gridDim.y) {
    C h{0, 0};
    if (has_mode && p.state) h = gpu::ld<C>(static_cast<const C*>(p.state) + s * size + at);
    const int64_t begin = sequences.begin(s), end = sequences.end(s);
    for (int64_t t = begin; t < end; t += kSteps) {
      R x[kSteps];
      GPU_UNROLL
      for (int i = 0; i < kSteps; ++i) x[i] = has_channel && t + i < end ? gpu::to_real(rows[(t + i) * p.channels]) : 0;
      GPU_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        if (t + i >= end) continue;
        h = gpu::fma(q, h, C{drive * x[i], 0});
        R y = gpu::real_of_product(gamma, h);
        for (int apart = lanes / 2; apart > 0; apart /= 2) y += __shfl_xor_sync(gpu::kFullMask, y, apart);
        if (is_first_lane) out[(t + i) * p.channels] = gpu::from_real<T>(y + omega * x[i]);
      }
    }
    if (has_mode && p.state_out) gpu::st(static_cast<C*>(p.state_out) + s * size + at, h);
    clear(sequences.gap_begin(s), begin);
    if (s + 1 == sequences.count) clear(end, sequences.tokens);
  }
}

}  // namespace cema
}  // namespace megalodon

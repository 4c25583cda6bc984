// CEMA of short sequences, as in decoding: ops/cema/cema_reference.py, in one launch and without a workspace.
//
//   h_t = q h_{t-1} + p x_t      y_t = Re(sum_n gamma_n h_t[n]) + omega x_t
//
// Grid: x over channels, y over sequences; a block takes every gridDim.y-th sequence, with its coefficients in
// registers. A lane owns a mode of a channel; `lanes` neighbours, a power of two, own a channel. For each sequence:
//   1. load the state; 2. for each kSteps rows, load x, advance, add y over the lanes by shuffles; 3. store the state.
//   4. The first lane zeroes the rows of padding before the sequence and, for the last sequence, the rows after it.
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
  const bool exists = channel < p.channels, owns = exists && n < p.modes, first = exists && n == 0;
  const int64_t at = channel * p.modes + n, size = p.channels * p.modes;
  const Sequences& sequences = p.sequences;
  C q{0, 0}, gamma{0, 0};
  R drive = 0, omega = 0;
  if (owns) {
    q = gpu::ld<C>(static_cast<const C*>(p.q) + at);
    gamma = gpu::ld<C>(static_cast<const C*>(p.gamma) + at);
    drive = static_cast<const R*>(p.p)[at];
    omega = static_cast<const R*>(p.omega)[channel];
  }
  const T* const rows = static_cast<const T*>(p.x) + channel;
  T* const out = static_cast<T*>(p.y) + channel;
  const auto clear = [&](int64_t from, int64_t to) {
    for (int64_t t = from; first && t < to; ++t) out[t * p.channels] = gpu::from_real<T>(0);
  };
  for (int64_t s = blockIdx.y; s < sequences.count; s += gridDim.y) {
    C h{0, 0};
    if (owns && p.state) h = gpu::ld<C>(static_cast<const C*>(p.state) + s * size + at);
    const int64_t begin = sequences.begin(s), end = sequences.end(s);
    for (int64_t t = begin; t < end; t += kSteps) {
      R x[kSteps];
      GPU_UNROLL
      for (int i = 0; i < kSteps; ++i) x[i] = exists && t + i < end ? gpu::to_real(rows[(t + i) * p.channels]) : 0;
      GPU_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        if (t + i >= end) continue;
        h = gpu::fma(q, h, C{drive * x[i], 0});
        R y = gpu::real_of_product(gamma, h);
        for (int apart = lanes / 2; apart > 0; apart /= 2) y += __shfl_xor_sync(gpu::kFullMask, y, apart);
        if (first) out[(t + i) * p.channels] = gpu::from_real<T>(y + omega * x[i]);
      }
    }
    if (owns && p.state_out) gpu::st(static_cast<C*>(p.state_out) + s * size + at, h);
    clear(sequences.gap_begin(s), begin);
    if (s + 1 == sequences.count) clear(end, sequences.tokens);
  }
}

}  // namespace cema
}  // namespace megalodon

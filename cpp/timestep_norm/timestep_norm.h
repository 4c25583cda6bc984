// Timestep norm, group norm with cumulative statistics along time: parameters of the kernels, which
// timestep_norm_bind.cpp launches. Derivation: ops/timestep_norm/timestep_norm_reference.py.
#pragma once

#include "isa.h"
#include "sequences.h"

namespace megalodon {

// R is float, or double if dtype is f64. All tensors are contiguous. A running mean or variance is a pair (value,
// residual) whose sum has about twice R's digits, so a state carried through millions of calls does not drift. The
// residual of a double is zero.
struct TimestepNormParams {
  DType dtype;           // of x, y, dy, dx
  Sequences sequences;   // S sequences in T tokens
  int64_t channels;      // D
  int64_t groups;        // G, divides D
  double eps;
  const void* x;         // (T, D)
  const void* weight;    // (D) R; the gain is 1 + weight; null with `ends_only`
  const void* bias;      // (D) R; null with `ends_only`
  const int64_t* count;  // (S) number of timesteps before this call, or null for zeros
  const void* mean;      // (S, G) R; null if count is null
  const void* var;       // (S, G) R; null if count is null
  const void* residual;  // (S, 2, G) R: residuals of mean and of var, or null for zeros
  void* workspace;       // scratch memory of a CUDA kernel, 256-byte aligned; null on the CPU
};

struct TimestepNormFwdParams : TimestepNormParams {
  void* y;             // (T, D)
  void* stats;         // (3, T, G) R: mean, its residual, and 1 / sqrt(var + eps), after each timestep; null if not
                       // needed. CUDA kernels leave it unwritten if D = 0
  int64_t* count_out;  // (S); null if the end state is not needed
  void* mean_out;      // (S, G) R
  void* var_out;       // (S, G) R
  void* residual_out;  // (S, 2, G) R
  bool ends_only;      // compute the end states alone; y and stats are null
};

struct TimestepNormBwdParams : TimestepNormParams {
  const void* stats;     // (3, T, G) R, from the forward
  const void* dy;        // (T, D)
  const void* dmean_out;  // (S, G) R, or null for zeros
  const void* dvar_out;   // (S, G) R, or null for zeros
  void* dx;              // (T, D)
  void* dweight;         // (D) R
  void* dbias;           // (D) R
  void* dmean;           // (S, G) R; null if not needed
  void* dvar;            // (S, G) R; null if not needed
};

// Backward of a call that computed the end states alone, of sequences without an initial state.
struct TimestepNormEndStateBwdParams {
  DType dtype;               // of x, dx
  Sequences sequences;       // S sequences in T tokens
  int64_t channels;          // D
  int64_t groups;            // G, divides D
  const void* x;             // (T, D)
  const void* mean_out;      // (S, G) R, from the forward
  const void* residual_out;  // (S, 2, G) R, from the forward
  const void* dmean_out;     // (S, G) R, or null for zeros
  const void* dvar_out;      // (S, G) R, or null for zeros
  void* dx;                  // (T, D)
  void* workspace;           // as in TimestepNormParams
};

MEGALODON_CPU_KERNEL(timestep_norm_fwd_cpu, TimestepNormFwdParams)
MEGALODON_CPU_KERNEL(timestep_norm_bwd_cpu, TimestepNormBwdParams)
MEGALODON_CPU_KERNEL(timestep_norm_end_state_bwd_cpu, TimestepNormEndStateBwdParams)
MEGALODON_CUDA_KERNEL(timestep_norm_fwd_cuda, TimestepNormFwdParams)
MEGALODON_CUDA_KERNEL(timestep_norm_bwd_cuda, TimestepNormBwdParams)
MEGALODON_CUDA_KERNEL(timestep_norm_end_state_bwd_cuda, TimestepNormEndStateBwdParams)

}  // namespace megalodon

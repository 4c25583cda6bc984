// Timestep norm: group norm with cumulative statistics along time. Derivation: ops/timestep_norm/timestep_norm_reference.py.
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
  const void* weight;    // (D) R; the gain is 1 + weight; null if only end states are wanted
  const void* bias;      // (D) R; null as weight
  const int64_t* count;  // (S) timesteps seen, or null: a fresh state
  const void* mean;      // (S, G) R; null if count is null
  const void* var;       // (S, G) R; null if count is null
  const void* residual;  // (S, 2, G) R: of mean, of var; or null: zero
  void* workspace;       // scratch memory of a CUDA kernel, 256-byte aligned; null on the CPU
};

struct TimestepNormFwdParams : TimestepNormParams {
  void* y;             // (T, D)
  void* stats;         // (3, T, G) R: mean, residual of mean, 1 / sqrt(var + eps), after step t; on CUDA unwritten if
                       // D = 0; or null: not wanted
  int64_t* count_out;  // (S), or null: no end state wanted
  void* mean_out;      // (S, G) R
  void* var_out;       // (S, G) R
  void* residual_out;  // (S, 2, G) R
  bool ends_only;      // only the end states are wanted: y and stats are null
};

struct TimestepNormBwdParams : TimestepNormParams {
  const void* stats;     // (3, T, G) R, from the forward
  const void* dy;        // (T, D)
  const void* dmean_out;  // (S, G) R, or null: zero
  const void* dvar_out;   // (S, G) R, or null: zero
  void* dx;              // (T, D)
  void* dweight;         // (D) R
  void* dbias;           // (D) R
  void* dmean;           // (S, G) R, or null: not wanted
  void* dvar;            // (S, G) R, or null: not wanted
};

// Backward of a call that returned only the end states of fresh sequences.
struct TimestepNormEndStateBwdParams {
  DType dtype;               // of x, dx
  Sequences sequences;       // S sequences in T tokens
  int64_t channels;          // D
  int64_t groups;            // G, divides D
  const void* x;             // (T, D)
  const void* mean_out;      // (S, G) R, from the forward
  const void* residual_out;  // (S, 2, G) R, from the forward
  const void* dmean_out;     // (S, G) R, or null: zero
  const void* dvar_out;      // (S, G) R, or null: zero
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

// CEMA: parameters of the kernels, which cema_bind.cpp launches. Derivation: ops/cema/cema_reference.py.
//
//   h_t = q h_{t-1} + p x_t,   y_t = Re(sum_n gamma_n h_t[n]) + omega x_t
#pragma once

#include "isa.h"
#include "sequences.h"

namespace megalodon {

// R is float, or double if dtype is f64. Complex numbers are (re, im) pairs. All tensors are contiguous.
struct CemaParams {
  DType dtype;          // of x, y, dy, dx
  Sequences sequences;  // S sequences in T tokens
  int64_t channels;     // D
  int64_t modes;        // N
  const void* x;        // (T, D)
  const void* p;        // (D, N) R
  const void* q;        // (D, N) complex R
  const void* gamma;    // (D, N) complex R; null if the forward computes end states alone or dy is null
  const void* omega;    // (D) R; null if gamma is null
  const void* state;    // (S, D, N) complex R, or null for zeros
  void* workspace;      // scratch memory of a CUDA kernel, 256-byte aligned; null on the CPU
};

struct CemaFwdParams : CemaParams {
  void* y;          // (T, D)
  void* state_out;  // (S, D, N) complex R; null if the caller does not need it
  bool ends_only;   // compute state_out alone; y is null
};

struct CemaBwdParams : CemaParams {
  const void* dy;          // (T, D), or null for zeros
  const void* dstate_out;  // (S, D, N) complex R, or null for zeros
  void* dx;                // (T, D)
  void* dp;                // (D, N) R
  void* dq;                // (D, N) complex R
  void* dgamma;            // (D, N) complex R; null if dy is null
  void* domega;            // (D) R; null if dy is null
  void* dstate;            // (S, D, N) complex R; null if the caller does not need it
};

MEGALODON_CPU_KERNEL(cema_fwd_cpu, CemaFwdParams)
MEGALODON_CPU_KERNEL(cema_bwd_cpu, CemaBwdParams)
MEGALODON_CUDA_KERNEL(cema_fwd_cuda, CemaFwdParams)
MEGALODON_CUDA_KERNEL(cema_bwd_cuda, CemaBwdParams)

}  // namespace megalodon

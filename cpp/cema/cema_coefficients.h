// CEMA's coefficients from its parameters, on the CPU: parameters of the kernels, which cema_coefficients_bind.cpp
// launches. Derivation: ops/cema/cema_coefficients_reference.py.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace megalodon {

// All tensors are contiguous and of one dtype, float32 or float64. Complex numbers are (re, im) pairs.
struct CemaCoefficientsParams {
  DType dtype;
  int64_t channels, modes;  // D, N
  const void *alpha, *delta;  // (D, N)
  const void* theta;          // (D)
};

struct CemaCoefficientsFwdParams : CemaCoefficientsParams {
  const void* gamma;  // (D, N) complex
  void* p;            // (D, N)
  void* q;            // (D, N) complex
  void* scaled;       // (D, N) complex: gamma / sqrt(N)
};

struct CemaCoefficientsBwdParams : CemaCoefficientsParams {
  const void* dp;         // (D, N)
  const void* dq;         // (D, N) complex
  const void* dscaled;    // (D, N) complex
  void *dalpha, *ddelta;  // (D, N)
  void* dtheta;           // (D)
  void* dgamma;           // (D, N) complex
};

MEGALODON_CPU_KERNEL(cema_coefficients_fwd_cpu, CemaCoefficientsFwdParams)
MEGALODON_CPU_KERNEL(cema_coefficients_bwd_cpu, CemaCoefficientsBwdParams)

}  // namespace megalodon

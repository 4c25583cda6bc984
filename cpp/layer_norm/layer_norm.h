// Layer norm and RMS norm of rows. Parameters of the kernels, which layer_norm_bind.cpp launches. Derivation: ops/layer_norm/layer_norm_reference.py.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace megalodon {

// R is float, or double if dtype is f64. All tensors are contiguous.
struct LayerNormParams {
  DType dtype;         // of x, y and their gradients
  int64_t rows;        // T
  int64_t channels;    // D
  double eps;
  bool is_rms_norm;    // RMS norm: the mean is not subtracted
  const void* x;       // (T, D)
  const void* weight;  // (D) R, or null for zeros; the gain is 1 + weight
  void* workspace;     // scratch memory of a CUDA kernel, 256-byte aligned; null on the CPU
};

struct LayerNormFwdParams : LayerNormParams {
  const void* bias;  // (D) R, or null for zeros
  void* y;           // (T, D)
};

struct LayerNormBwdParams : LayerNormParams {
  const void* dy;  // (T, D)
  void* dx;        // (T, D)
  void* dweight;   // (D) R; null if not needed
  void* dbias;     // (D) R; null if not needed
};

MEGALODON_CPU_KERNEL(layer_norm_fwd_cpu, LayerNormFwdParams)
MEGALODON_CPU_KERNEL(layer_norm_bwd_cpu, LayerNormBwdParams)
MEGALODON_CUDA_KERNEL(layer_norm_fwd_cuda, LayerNormFwdParams)
MEGALODON_CUDA_KERNEL(layer_norm_bwd_cuda, LayerNormBwdParams)

}  // namespace megalodon

// Layer norm and RMS norm of rows on the CPU. Derivation: ops/layer_norm/layer_norm_reference.py.
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
  bool is_rms_norm;    // the mean counts as zero
  const void* x;       // (T, D)
  const void* weight;  // (D) R: offset of the gain, or null: zero
};

struct LayerNormFwdParams : LayerNormParams {
  const void* bias;  // (D) R or null: zero
  void* y;           // (T, D)
};

struct LayerNormBwdParams : LayerNormParams {
  const void* dy;  // (T, D)
  void* dx;        // (T, D)
  void* dweight;   // (D) R or null
  void* dbias;     // (D) R or null
};

MEGALODON_CPU_KERNEL(layer_norm_fwd_cpu, LayerNormFwdParams)
MEGALODON_CPU_KERNEL(layer_norm_bwd_cpu, LayerNormBwdParams)

}  // namespace megalodon

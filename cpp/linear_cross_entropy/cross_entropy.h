// Cross-entropy of logits on the CPU: loss_t = log sum_v exp(logits_tv) - logits_t[target_t].
#pragma once

#include "dtype.h"
#include "isa.h"

namespace megalodon {

// R is float, or double if dtype is f64. All tensors are contiguous.
struct CrossEntropyParams {
  DType dtype;
  int64_t rows;            // T
  int64_t classes;         // V
  void* logits;            // (T, V); with `scales`, overwritten by the gradient of sum_t scales_t losses_t
  const int64_t* targets;  // (T), each in [0, V)
  const void* scales;      // (T) R or null
  void* losses;            // (T) R
};

MEGALODON_CPU_KERNEL(cross_entropy_cpu, CrossEntropyParams)

}  // namespace megalodon

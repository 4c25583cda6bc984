// The sum at the end of a block's halves on the CPU: y = x + scale (a + b), rounded after each operation as in torch.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace megalodon {

// R is float, or double if dtype is f64. All tensors are contiguous.
struct ResidualParams {
  DType dtype;        // of x, a, b, y
  int64_t rows;       // T
  int64_t channels;   // D
  const void* x;      // (T, D)
  const void* a;      // (T, D)
  const void* b;      // (T, D) or null: zero
  const void* scale;  // (D) R or null: one
  void* y;            // (T, D)
};

MEGALODON_CPU_KERNEL(residual_cpu, ResidualParams)

}  // namespace megalodon

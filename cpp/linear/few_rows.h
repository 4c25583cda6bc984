// Products of few rows: parameters of the kernels, which few_rows_bind.cpp launches for ops/linear/linear.py.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace megalodon {

// y = x weight^T + bias. On CUDA y = silu(x weight^T + bias) value + add, rounded once: `silu` only if it is set, `value`
// and `add` only if they are not null. All matrices are contiguous.
struct LinearFewRowsParams {
  DType dtype;         // of all tensors; sums are float, or double if dtype is f64
  int64_t rows;        // T
  int64_t inputs;      // I
  int64_t outputs;     // O
  bool silu;           // on the CPU false
  const void* x;       // (T, I)
  const void* weight;  // (O, I)
  const void* bias;    // (O) or null: zero
  const void* value;   // (T, O) or null; on the CPU null
  const void* add;     // as `value`
  void* y;             // (T, O)
  void* workspace;     // unused
};

MEGALODON_CPU_KERNEL(linear_few_rows_cpu, LinearFewRowsParams)
MEGALODON_CUDA_KERNEL(linear_few_rows_cuda, LinearFewRowsParams)

}  // namespace megalodon

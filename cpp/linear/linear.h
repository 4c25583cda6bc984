// Products of many rows on the CPU, for cases in which torch is slow: parameters of the kernel, which linear_bind.cpp
// launches for ops/linear/linear.py.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace megalodon {

// n products y = x weight^T + bias, each added to y if `add`. All tensors are contiguous.
struct LinearManyRowsParams {
  DType dtype;      // of all tensors: f32, bf16 or f16; with AMX only f32; sums are float
  bool y_is_float;  // independent of dtype
  int64_t count;    // n; with AMX only 1
  int64_t rows;     // T
  int64_t inputs;   // I
  int64_t outputs;  // O
  bool x_transposed, weight_transposed, add;
  const void* x;       // (n, T, I), or (n, I, T) if transposed
  const void* weight;  // (n, O, I), or (n, I, O) if transposed
  const void* bias;    // (O) or null: zero
  void* y;             // (n, T, O)
};

// The AMX kernel of many rows (linear_amx_cpu.cpp) computes only a single product, in float32.
inline bool computes(Isa isa, const LinearManyRowsParams& params) {
#if defined(__x86_64__)
  if (isa == Isa::v4_amx) return params.dtype == DType::f32 && params.count == 1;
#endif
  return computes<LinearManyRowsParams>(isa, params);
}

MEGALODON_CPU_KERNEL(linear_many_rows_cpu, LinearManyRowsParams)

}  // namespace megalodon

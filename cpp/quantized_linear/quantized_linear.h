// Matrix products with weights of 8 or 4 bits on the CPU, and conversion of such weights to floating point. Formats:
// python/megalodon_ops/ops/quantized_linear/quantized_linear.py.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace megalodon {

constexpr int64_t kInt4Block = 128, kInt4Group = 32;  // inputs per block of 64 bytes, and inputs per scale

struct QuantizedWeight {
  bool is_int4;
  int64_t inputs;      // I
  int64_t outputs;     // O
  const void* weight;  // int8: (O, I) int8; int4: (O, Q, 64) bytes, Q = ceil(I / 128)
  const void* scale;   // int8: (O) float; int4: (O, Q, 4) bfloat16
};

// y = x w^T + bias. All matrices are contiguous.
struct QuantizedLinearParams : QuantizedWeight {
  DType dtype;       // of x, bias and y: f32, bf16 or f16; sums are float
  int64_t rows;      // T
  const void* x;     // (T, I)
  const void* bias;  // (O), or null for zeros
  void* y;           // (T, O)
};

// The same product of x rounded to 8 bits: quantized_many_rows_cpu.cpp. Every instruction set computes all dtypes.
struct QuantizedManyRowsParams : QuantizedLinearParams {};

inline bool computes(Isa, const QuantizedManyRowsParams&) { return true; }

// y = w, or some rows of w, rounded to `dtype`.
struct DequantizeParams : QuantizedWeight {
  DType dtype;          // f32, bf16 or f16
  int64_t num_rows;     // T
  const int64_t* rows;  // (T) indices of rows of w, or null for all of them (T = O)
  void* y;              // (T, I)
};

MEGALODON_CPU_KERNEL(quantized_linear_cpu, QuantizedLinearParams)
MEGALODON_CPU_KERNEL(quantized_many_rows_cpu, QuantizedManyRowsParams)
MEGALODON_CPU_KERNEL(dequantize_cpu, DequantizeParams)

}  // namespace megalodon

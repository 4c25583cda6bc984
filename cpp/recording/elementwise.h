// Elementwise arithmetic and dtype conversion on the CPU, with torch's rounding.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace megalodon {

enum class Operation { affine, add, subtract, multiply, divide };

// y = a <operation> b, or y = scale a + shift. Sums are float, or double if dtype is f64. All tensors are contiguous.
struct ElementwiseParams {
  DType dtype;             // of y
  DType a_dtype, b_dtype;  // both f64 if and only if dtype is f64
  Operation operation;
  int64_t rows, channels;  // R, D
  int64_t a_step, b_step;  // between rows of a and of b: D, or 0 if all rows of y use one row
  const void* a;           // (R, D) or (D)
  const void* b;           // (R, D) or (D); null if affine
  double scale, shift;     // of affine only; scale is 1 or shift is -0.0, so there is one rounding
  void* y;                 // (R, D)
};

MEGALODON_CPU_KERNEL(elementwise_cpu, ElementwiseParams)

}  // namespace megalodon

// float32 products of matrices on AMX, which multiplies bfloat16 alone. Used by python/.../linear.py.
#pragma once

#include <cstdint>

namespace megalodon {

// y = x weight^T + bias, or y += that. Each matrix is contiguous.
struct LinearAmxParams {
  int64_t rows;     // T
  int64_t inputs;   // I
  int64_t outputs;  // O
  bool x_transposed, weight_transposed, add;
  const float* x;       // (T, I), or (I, T) where transposed
  const float* weight;  // (O, I), or (I, O) where transposed
  const float* bias;    // (O) or null: zero
  float* y;             // (T, O)
};

namespace v4_amx {  // alone
void linear_amx_cpu(const LinearAmxParams&);
}

}  // namespace megalodon

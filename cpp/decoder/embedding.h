// Rows of an embedding matrix on the CPU: y[t] = scale weight[tokens[t]].
#pragma once

#include "dtype.h"
#include "isa.h"

namespace megalodon {

// All tensors are contiguous.
struct EmbeddingParams {
  DType dtype;            // of weight, y
  int64_t rows;           // T
  int64_t channels;       // D
  const int64_t* tokens;  // (T), each a row of weight
  const void* weight;     // (vocabulary, D)
  double scale;
  void* y;                // (T, D)
};

MEGALODON_CPU_KERNEL(embedding_cpu, EmbeddingParams)

}  // namespace megalodon

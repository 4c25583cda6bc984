// Finding a token's sequence inside a kernel.
#pragma once

#include "portable.cuh"
#include "sequences.h"

namespace gpu {

// The sequence that holds `token`, or -1 for padding.
GPU_INLINE int64_t find_sequence(const megalodon::Sequences& sequences, int64_t token) {
  int64_t s = 0;
  if (!sequences.cu_seqlens) {
    s = token / sequences.row_length;
  } else {
    // The first sequence that ends after the token.
    for (int64_t high = sequences.count; s < high;) {
      const int64_t middle = s + (high - s) / 2;
      if (sequences.end(middle) > token) high = middle;
      else s = middle + 1;
    }
  }
  return s < sequences.count && sequences.begin(s) <= token && token < sequences.end(s) ? s : -1;
}

}  // namespace gpu

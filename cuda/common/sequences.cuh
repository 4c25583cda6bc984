// For kernels of all ops: find a token's sequence, and the position of a sequence's state. The functions are safe for
// arbitrary values in the caller's tensors (cpp/common/sequences.h).
#pragma once

#include "portable.cuh"
#include "sequences.h"

namespace gpu {

// Returns the sequence of `token`, or -1 for padding.
GPU_INLINE int64_t find_sequence(const megalodon::Sequences& sequences, int64_t token) {
  int64_t s = 0;
  if (sequences.by_row) {
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

// Returns the position of sequence s in its chunk: 0 without a state, -1 if position[s] is not in [0, chunk_size). With
// -1 the sequence's tokens count as padding.
GPU_INLINE int64_t find_position(const int64_t* position, int64_t s, int64_t chunk_size) {
  const int64_t found = position ? position[s] : 0;
  return found >= 0 && found < chunk_size ? found : -1;
}

}  // namespace gpu

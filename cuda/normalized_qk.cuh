// What the kernels of normalized_qk share: the row of the rotary table for a token.
#pragma once

#include "normalized_qk.h"
#include "sequences.cuh"

namespace megalodon {
namespace normalized_qk {

// The row of the rotary table for `token`, or -1 for padding and where the position is none.
GPU_INLINE int64_t table_row(const NormalizedQkParams& p, int64_t token) {
  const int64_t s = token < p.sequences.tokens ? gpu::find_sequence(p.sequences, token) : -1;
  const int64_t position = s < 0 ? -1 : gpu::find_position(p.position, s, p.chunk_size);
  return position < 0 ? -1 : (position + token - p.sequences.begin(s)) % p.chunk_size;
}

}  // namespace normalized_qk
}  // namespace megalodon

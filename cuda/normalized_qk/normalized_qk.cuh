// Shared by the kernels of normalized_qk: the row of the rotary table for a token.
#pragma once

#include "normalized_qk.h"
#include "sequences.cuh"

namespace megalodon {
namespace normalized_qk {

// Returns the row of the rotary table for `token`, or -1 for padding and for a position outside [0, chunk_size).
GPU_INLINE int64_t table_row(const NormalizedQkParams& p, int64_t token) {
  const int64_t s = token < p.sequences.tokens ? gpu::find_sequence(p.sequences, token) : -1;
  const int64_t position = s < 0 ? -1 : gpu::find_position(p.position, s, p.chunk_size);
  return position < 0 ? -1 : (position + token - p.sequences.begin(s)) % p.chunk_size;
}

template <class R, int n>
GPU_INLINE void add_squares(R& sum, const R (&z)[n], R scale) {
  GPU_UNROLL
  for (int i = 0; i < n; ++i) sum += (z[i] * scale) * (z[i] * scale);
}
template <class R>
GPU_INLINE R inverse_rms(const NormalizedQkParams& p, R sum, R scale) {
  return scale * rsqrt(sum / static_cast<R>(p.key_dim) + static_cast<R>(p.eps) * scale * scale);
}

}  // namespace normalized_qk
}  // namespace megalodon

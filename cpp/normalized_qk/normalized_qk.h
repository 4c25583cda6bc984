// Normalized queries and keys: RMS norm of a shared z per head, affine, rotary. Parameters of the kernels, which
// normalized_qk_bind.cpp launches. Derivation: ops/normalized_qk/normalized_qk_reference.py.
#pragma once

#include "isa.h"
#include "sequences.h"

namespace megalodon {

// R is float, or double if dtype is f64. All tensors are contiguous. Z = H * K.
struct NormalizedQkParams {
  DType dtype;              // of z, q, k and their gradients
  Sequences sequences;      // S sequences in T tokens
  int64_t heads;            // H
  int64_t key_dim;          // K, even
  int64_t chunk_size;       // C
  double eps;
  const void* z;            // (T, H, K)
  const void* gamma;        // (2, H, K) R, for q and k; the gains are 1 + gamma
  const void* beta;         // (2, H, K) R, for q and k
  const void* rotary;       // (table_rows, K / 2, 2) R: cos, sin of position * base^(-2i/K)
  int64_t table_rows;       // at least C; without `position`, min(C, L) suffice
  const int64_t* position;  // (S) position of each sequence's first token inside its chunk, or null for zeros
  void* workspace;          // scratch memory of a CUDA kernel, 256-byte aligned; null on the CPU
};

struct NormalizedQkFwdParams : NormalizedQkParams {
  void* q;  // (T, H, K)
  void* k;  // (T, H, K)
};

struct NormalizedQkBwdParams : NormalizedQkParams {
  const void* dq;  // (T, H, K)
  const void* dk;  // (T, H, K)
  void* dz;        // (T, H, K)
  void* dgamma;    // (2, H, K) R
  void* dbeta;     // (2, H, K) R
};

MEGALODON_CPU_KERNEL(normalized_qk_fwd_cpu, NormalizedQkFwdParams)
MEGALODON_CPU_KERNEL(normalized_qk_bwd_cpu, NormalizedQkBwdParams)
MEGALODON_CUDA_KERNEL(normalized_qk_fwd_cuda, NormalizedQkFwdParams)
MEGALODON_CUDA_KERNEL(normalized_qk_bwd_cuda, NormalizedQkBwdParams)

}  // namespace megalodon

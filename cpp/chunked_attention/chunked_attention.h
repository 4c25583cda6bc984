// Softmax attention inside chunks of C positions: parameters of the kernels, which chunked_attention_bind.cpp launches.
// Derivation: ops/chunked_attention/chunked_attention_reference.py.
#pragma once

#include "isa.h"
#include "sequences.h"

namespace megalodon {

// R is float, or double if dtype is f64. All tensors are contiguous. Positions of a sequence count from the start of
// the chunk in its state: if the state holds `position` keys, token t has position `position` + t. Chunks start at
// multiples of C.
struct ChunkedAttentionParams {
  DType dtype;              // of q, k, v, o, the cache and their gradients
  bool quantized_cache;     // CPU only: the cache is int8, a row has 4 more elements (quantized_cache.h)
  Sequences sequences;      // S sequences in T tokens
  int64_t heads;            // H
  int64_t key_dim;          // K
  int64_t value_dim;        // V
  int64_t chunk_size;       // C
  bool causal = true;       // a query sees its chunk up to its own position; false: its whole chunk
  double scale;             // factor of q k^T
  double dropkey;           // probability that the score of a visible key becomes -inf; 0: never
  const uint64_t* seed;     // (1) key of the Philox generator; null where dropkey is 0
  const void* q;            // (T, H, K)
  const void* k;            // (T, H, K)
  const void* v;            // (T, H, V)
  const void* cache_k;      // (S, C, H, K), rows [0, position) are valid; null if it has no elements
  const void* cache_v;      // (S, C, H, V)
  const int64_t* position;  // (S), each in [0, C); null: the caches are empty
  void* workspace;          // scratch memory of a CUDA kernel, 256-byte aligned; null on the CPU
};

struct ChunkedAttentionFwdParams : ChunkedAttentionParams {
  void* o;    // (T, H, V)
  void* lse;  // (T, H) R: log of the softmax denominator; -inf where every score was dropped
};

// The cache gets no gradient: its rows are constants.
struct ChunkedAttentionBwdParams : ChunkedAttentionParams {
  const void* o;     // (T, H, V)
  const void* lse;   // (T, H) R
  const void* d_o;   // (T, H, V)
  void* dq;          // (T, H, K)
  void* dk;          // (T, H, K)
  void* dv;          // (T, H, V)
};

// The state after the call: keys and values of the unfinished chunk and the position in it. The outputs may be the
// inputs (decoding in place). Otherwise the rows that stay in the state are copied, and the rest of an output is zero.
struct ChunkedAttentionStateParams : ChunkedAttentionParams {
  void* cache_k_out;      // (S, C, H, K)
  void* cache_v_out;      // (S, C, H, V)
  int64_t* position_out;  // (S)
};

MEGALODON_CPU_KERNEL(chunked_attention_fwd_cpu, ChunkedAttentionFwdParams)
MEGALODON_CPU_KERNEL(chunked_attention_bwd_cpu, ChunkedAttentionBwdParams)
MEGALODON_CPU_KERNEL(chunked_attention_state_cpu, ChunkedAttentionStateParams)
MEGALODON_CUDA_KERNEL(chunked_attention_fwd_cuda, ChunkedAttentionFwdParams)
MEGALODON_CUDA_KERNEL(chunked_attention_bwd_cuda, ChunkedAttentionBwdParams)
MEGALODON_CUDA_KERNEL(chunked_attention_state_cuda, ChunkedAttentionStateParams)

}  // namespace megalodon

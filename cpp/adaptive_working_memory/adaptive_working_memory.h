// Working memory, a matrix per head to which chunks are written: parameters of the kernel, which the binding launches.
// Derivation: ops/adaptive_working_memory/adaptive_working_memory_reference.py.
#pragma once

#include "isa.h"
#include "sequences.h"

namespace megalodon {

// Parameters for a few positions of each sequence, as in decoding. R is float, or double if dtype is f64. All tensors
// are contiguous.
struct WorkingMemoryStepsParams {
  DType dtype;              // of q, k, v, o and the caches
  Sequences sequences;      // S sequences in T tokens
  int64_t heads;            // H
  int64_t key_dim;          // K
  int64_t value_dim;        // V
  int64_t chunk_size;       // C
  int64_t visible;          // n: after chunk c, the chunk c + 1 - n is written to memory
  const void* q;            // (T, H, K)
  const void* k;            // (T, H, K)
  const void* v;            // (T, H, V)
  const void* cache_k;      // (S, n C, H, K) keys of the unfinished chunk and of the n - 1 chunks before it
  const void* cache_v;      // (S, n C, H, V)
  const int64_t* position;  // (S) number of positions of each sequence before this call
  void* memory;             // (S, H, K, V) R, updated
  void* mass;               // (S, H, K) R, updated: log of each row's weight; ignored where position < n C
  void* o;                  // (T, H, V)
};

MEGALODON_CPU_KERNEL(working_memory_steps_cpu, WorkingMemoryStepsParams)

}  // namespace megalodon

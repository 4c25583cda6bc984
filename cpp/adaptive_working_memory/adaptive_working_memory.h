// One matrix per head that holds the chunks before the current one. Derivation: ops/adaptive_working_memory/adaptive_working_memory_reference.py.
#pragma once

#include "isa.h"
#include "sequences.h"

namespace megalodon {

// A few positions of sequences with a state. R is float, or double if dtype is f64. All tensors are contiguous.
struct WorkingMemoryStepsParams {
  DType dtype;              // of q, k, v, o and the caches
  Sequences sequences;      // S sequences in T tokens
  int64_t heads;            // H
  int64_t key_dim;          // K
  int64_t value_dim;        // V
  int64_t chunk_size;       // C
  int64_t visible;          // n: the chunk written is the n-th before that of the next position
  const void* q;            // (T, H, K)
  const void* k;            // (T, H, K)
  const void* v;            // (T, H, V)
  const void* cache_k;      // (S, n C, H, K) keys of the unfinished chunk and of the n - 1 chunks before it
  const void* cache_v;      // (S, n C, H, V)
  const int64_t* position;  // (S) length of each sequence before this call
  void* memory;             // (S, H, K, V) R, updated
  void* mass;               // (S, H, K) R, updated; counts as zero where the position is below n C
  void* o;                  // (T, H, V)
};

MEGALODON_CPU_KERNEL(working_memory_steps_cpu, WorkingMemoryStepsParams)

}  // namespace megalodon

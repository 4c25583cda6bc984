// Gate of the linear layers on the CPU: y = silu(x) value. Derivation: ops/gated_silu/gated_silu_reference.py.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace megalodon {

// All tensors are contiguous and of one dtype.
struct GatedSiluParams {
  DType dtype;
  int64_t elements;
  const void* x;      // (elements)
  const void* value;  // (elements), or null for ones
};

struct GatedSiluFwdParams : GatedSiluParams {
  void* y;  // (elements)
};

struct GatedSiluBwdParams : GatedSiluParams {
  const void* dy;  // (elements)
  void* dx;        // (elements)
  void* dvalue;    // (elements); null if `value` is null
};

MEGALODON_CPU_KERNEL(gated_silu_fwd_cpu, GatedSiluFwdParams)
MEGALODON_CPU_KERNEL(gated_silu_bwd_cpu, GatedSiluBwdParams)

}  // namespace megalodon

// Arithmetic of sizes.
#pragma once

#include "dtype.h"

namespace megalodon {

MEGALODON_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MEGALODON_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Size in bytes of a part of a kernel's workspace, aligned for vector accesses to the next part.
MEGALODON_INLINE constexpr int64_t workspace_part(int64_t bytes) { return round_up(bytes, 256); }

}  // namespace megalodon

// Rows of padding tokens.
#pragma once

#include <cstring>

#include "sequences.h"

namespace megalodon::MEGALODON_ISA {

// Zeroes the row of every token outside the sequences. A row has `row_bytes` bytes.
inline void zero_padding(const Sequences& sequences, void* rows, int64_t row_bytes) {
  if (!sequences.spans) return;
  for (int64_t s = 0; s <= sequences.count; ++s) {
    const int64_t begin = sequences.gap_begin(s), bytes = (sequences.gap_end(s) - begin) * row_bytes;
    if (bytes > 0) std::memset(static_cast<char*>(rows) + begin * row_bytes, 0, static_cast<size_t>(bytes));
  }
}

}  // namespace megalodon::MEGALODON_ISA

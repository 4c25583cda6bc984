// Huge pages for memory that a kernel is about to write.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace megalodon {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages where they are whole, as memory of several megabytes is as a rule new to the process at every
// call: clearing small pages at their first touch takes longer than most kernels. No effect on memory in use, nor where
// Linux never grants them or always does. Static, as every instruction set compiles its own.
static inline void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace megalodon

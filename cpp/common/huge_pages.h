// Huge pages for memory that a kernel is about to write.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace megalodon {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks Linux for as many huge pages as fit into the memory. Allocations of several megabytes are usually
// mapped anew at every call, and clearing small pages at their first touch takes longer than most kernels. The advice
// has no effect on pages in use, or if Linux never or always grants huge pages. The function is static because it is
// compiled for every instruction set.
static inline void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace megalodon

// Memory of the CPU ops' large outputs, kept from one to the next.
//
// A C library gives large blocks back to the system, which clears every page anew for the next tensor: that takes as
// long as many a kernel. Here a block that is no longer in use stays with the process, but Linux may take its pages
// whenever it is short of memory. The pool never maps more than its blocks in use ever took at once, so a process's
// peak is about what it would be without it. Blocks lie in huge pages where the system grants them.
//
// What others allocate cannot make the pool give way, so it leaves them room. Where a limit is set on the process's
// addresses or data (setrlimit), the blocks kept are at most an eighth of what the limit would leave free without them,
// and everywhere at most what cap_kept_memory says. This holds from the time when a block is given back.
#pragma once

#include <cstddef>

namespace megalodon {

struct MemoryBlock {
  void* data;
  size_t bytes;
};

// At least `bytes`, of any content, aligned to a huge page; throws std::bad_alloc. Safe on any thread, as the others.
MemoryBlock take_memory(size_t bytes);
void give_memory(MemoryBlock block);

// Gives all blocks that are not in use back to the system.
void release_memory();

// Keeps at most so many bytes of blocks that are not in use from now on.
void cap_kept_memory(size_t bytes);

}  // namespace megalodon

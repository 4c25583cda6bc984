// cp.async: asynchronous copies from global to shared memory.
//
// After cp_async_commit and cp_async_wait a thread sees its own copies; other threads see them after the next barrier.
#pragma once

#include "portable.cuh"

namespace gpu {

// Copies `valid` bytes from `from` to `to`, and fills the rest of the kBytes at `to` with zeros; valid = 0 reads
// nothing. kBytes is 4, 8 or 16, and both addresses are multiples of kBytes. Copies of 16 bytes bypass L1.
template <int kBytes>
GPU_INLINE void cp_async(void* to, const void* from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if GPU_EMULATED
  emu::cp_async(to, from, kBytes, valid);
#else
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                 "r"(valid)
                 : "memory");
#endif
}

// Closes the group of all copies since the last commit; a group may be empty.
GPU_INLINE void cp_async_commit() {
#if GPU_EMULATED
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the latest kPending groups of this thread are finished.
template <int kPending>
GPU_INLINE void cp_async_wait() {
#if GPU_EMULATED
  emu::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace gpu

// Stacks of CUDA threads and switches between them.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

// True if AddressSanitizer checks the kernels instead of this runtime.
extern const bool kSanitized;

class Fiber {
 public:
  // The next switch to this fiber calls `entry`, which never returns, on `stack`.
  void prepare(char* stack, size_t bytes, void (*entry)());
  // Saves the running context in *this and continues `next`.
  void switch_to(Fiber& next);

 private:
  void start(char* stack, size_t bytes, void (*entry)());
  void swap(Fiber& next);
  static void arrive();

  const void* stack_ = nullptr;
  size_t bytes_ = 0;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace emu

// A stack of its own for each CUDA thread, and the switch from one to another.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

// Whether AddressSanitizer watches the kernels, in place of this runtime.
extern const bool kSanitized;

class Fiber {
 public:
  // Makes the next switch to this fiber call `entry`, which never returns, on `stack`.
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

#include "fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)

// Saves the callee-saved registers on the old stack and loads them from the new one. swapcontext is several times
// slower, as it makes a system call for the signal mask.
extern "C" void emu_switch_stack(void** save, void* next);
asm(R"(
.text
.hidden emu_switch_stack
.globl emu_switch_stack
.type emu_switch_stack, @function
emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stack, .-emu_switch_stack
)");

namespace emu {

void Fiber::start(char* stack, size_t bytes, void (*entry)()) {
  // `entry` starts as if called: a return address that is never used, on a stack aligned to 16 before the call.
  void** top = reinterpret_cast<void**>(stack + bytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::swap(Fiber& next) { emu_switch_stack(&stack_pointer_, next.stack_pointer_); }

}  // namespace emu

#else

namespace emu {

void Fiber::start(char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::swap(Fiber& next) { swapcontext(&context_, &next.context_); }

}  // namespace emu

#endif

namespace emu {

#if defined(__SANITIZE_ADDRESS__)

const bool kSanitized = true;

namespace {

void (*entry_of_fibers)();
Fiber* left = nullptr;  // the fiber that switched to the running one

}  // namespace

// Tells AddressSanitizer which stack is in use, and learns the scheduler's stack, which is the process's first.
void Fiber::arrive() {
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (left->stack_) return;
  left->stack_ = stack;
  left->bytes_ = bytes;
}

void Fiber::prepare(char* stack, size_t bytes, void (*entry)()) {
  stack_ = stack;
  bytes_ = bytes;
  __asan_unpoison_memory_region(stack, bytes);  // after an abandoned thread
  entry_of_fibers = entry;
  start(stack, bytes, [] {
    arrive();
    entry_of_fibers();
  });
}

void Fiber::switch_to(Fiber& next) {
  left = this;
  __sanitizer_start_switch_fiber(nullptr, next.stack_, next.bytes_);
  swap(next);
  arrive();
}

#else

const bool kSanitized = false;

void Fiber::prepare(char* stack, size_t bytes, void (*entry)()) { start(stack, bytes, entry); }
void Fiber::switch_to(Fiber& next) { swap(next); }

#endif

}  // namespace emu

#include "fiber.h"

#if defined(__x86_64__)

// Saves the callee-saved registers on the old stack and takes them from the new one. swapcontext is several times
// slower: it also makes a system call for the signal mask.
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

void Fiber::prepare(char* stack, size_t bytes, void (*entry)()) {
  // `entry` starts as if called: a return address that is never used, on a stack aligned to 16 before the call.
  void** top = reinterpret_cast<void**>(stack + bytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::switch_to(Fiber& next) { emu_switch_stack(&stack_pointer_, next.stack_pointer_); }

}  // namespace emu

#else

namespace emu {

void Fiber::prepare(char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_to(Fiber& next) { swapcontext(&context_, &next.context_); }

}  // namespace emu

#endif

// Functions that code compiled with -fsanitize=thread calls before loads and stores. libtsan is not linked.
#include "state.h"

using emu::Access;

namespace {

template <size_t size>
void aligned_access(const void* p, Access access, const void* address) {
  if (emu::current && reinterpret_cast<uintptr_t>(p) % size)
    emu::report("misaligned", std::string(access == Access::write ? "store" : "load") + " of " + std::to_string(size) +
                                  " bytes at an address that is not a multiple of " + std::to_string(size),
                address);
  emu::access(p, size, access, address);
}

}  // namespace

#define EMU_HOOKS(size)                                                                                            \
  void __tsan_read##size(void* p) { aligned_access<size>(p, Access::read, __builtin_return_address(0)); }          \
  void __tsan_write##size(void* p) { aligned_access<size>(p, Access::write, __builtin_return_address(0)); }        \
  void __tsan_volatile_read##size(void* p) { aligned_access<size>(p, Access::read, __builtin_return_address(0)); }   \
  void __tsan_volatile_write##size(void* p) { aligned_access<size>(p, Access::write, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##size(void* p) { emu::access(p, size, Access::read, __builtin_return_address(0)); }   \
  void __tsan_unaligned_write##size(void* p) { emu::access(p, size, Access::write, __builtin_return_address(0)); }

extern "C" {
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
void __tsan_read_range(void* p, size_t size) { emu::access(p, size, Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t size) { emu::access(p, size, Access::write, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}

// CUDA's built-in names, for kernel files built by the host compiler: portable.cuh includes this without nvcc.
//
// Kernel files are compiled with -fsanitize=thread, which calls a hook at each load and store (tsan_hooks.cpp). The
// functions here are exempt, and not inlined if the runtime needs the caller's address for the line of a report.
#pragma once

#include <math.h>  // not <cmath>: sqrt(float) without std:: must return a float, as in CUDA

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
// The kernel begins with one no-op for each warp that its blocks may have; launch_bound() counts them.
#define __launch_bounds__(...) __attribute__((patchable_function_entry(emu::warps_of(__VA_ARGS__))))
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ shared_memory_is_declared_with_SMEM_ARRAY_or_SMEM_DYN
#define __constant__ constant_memory_is_not_supported
#define EMU_BUILTIN __attribute__((no_sanitize("thread"), noinline))
#define EMU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMU_HERE \
  emu::Place { __builtin_return_address(0), file, line }

namespace emu {
constexpr int warps_of(int threads, int /* blocks */ = 0) { return (threads + 31) / 32; }
}  // namespace emu

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

// A place in a kernel: the address after a call, and the call's source line, if known.
struct Place {
  const void* address;
  const char* file;
  int line;
};

// A thread's coordinates do not change while its kernel runs, hence `const`.
uint3 thread_index() __attribute__((const));
uint3 block_index() __attribute__((const));
uint3 block_size() __attribute__((const));
uint3 grid_size() __attribute__((const));
int lane() __attribute__((const));

bool block_barrier(bool vote, Place place);  // returns true if some thread's vote is true
void named_barrier(int id, int threads);
void warp_barrier(unsigned mask, Place place);

// Every lane of `mask` passes `size` bytes and gets those of all lanes; lane l's bytes are at result + l * kSlotBytes.
constexpr size_t kSlotBytes = 64;
const unsigned char* exchange(unsigned mask, const void* value, size_t size, const char* what, Place place);
unsigned ballot(unsigned mask, bool vote, Place place);
[[noreturn]] void fail(const char* what, Place place);

enum class Space { global, shared };
void load(void* to, const void* from, size_t size, Space space);
void store(void* to, const void* from, size_t size, Space space);
void cp_async(void* to, const void* from, int size, int valid);
void cp_async_commit();
void cp_async_wait(int pending);
enum class Mma { bf16, fp16, tf32 };
void mma(Mma type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void ldmatrix(uint32_t* r, int count, const void* row, bool transposed);
enum class Operand { a, b };
using ElementAt = const void* (*)(const void* functor, int row, int column);
void check_fragment(Operand operand, size_t element_size, const uint32_t* registers, ElementAt element,
                    const void* functor);
template <class Element>
EMU_BUILTIN const void* call_element(const void* functor, int row, int column) {
  return (*static_cast<const Element*>(functor))(row, column);
}

void* shared_array(const void* key, const char* name, size_t bytes);
void* dynamic_shared();
size_t max_shared_bytes();

// Returns the size that a test has set as `name`, or `chosen` (LAUNCH_SIZE of portable.cuh).
int64_t launch_size(const char* name, int64_t chosen);
template <class T>
T launch_size(const char* name, T chosen) {
  return static_cast<T>(launch_size(name, int64_t{chosen}));
}

// Returns the largest number of threads per block by the kernel's __launch_bounds__, or 1024 if it has none.
int launch_bound(const void* kernel);
void record_stream(void* stream);  // with the current device
void run(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared, void (*call)(const void*),
         const void* arguments);

// The nth loop of a kernel file. Bit n of `turns` is set if the loop once had n iterations; bit 3: three or more.
struct Loop {
  const char* file;
  int nth;
  unsigned turns = 0;
  int64_t most = 0;
  Loop* next = nullptr;

  constexpr Loop(const char* file, int nth) : file(file), nth(nth) {}
};
void finish_loop(Loop& loop, int64_t turns) noexcept;

struct Turns {
  Loop& loop;
  int64_t count = 0;

  explicit Turns(Loop& loop) : loop(loop) {}
  ~Turns() { finish_loop(loop, count); }
};

// A kernel and its arguments; every thread gets a copy of these.
template <class... P>
struct Call {
  void (*kernel)(P...);
  std::tuple<P...> arguments;

  static EMU_BUILTIN void make(const void* self) {
    make(*static_cast<const Call*>(self), std::index_sequence_for<P...>{});
  }
  template <size_t... i>
  static EMU_BUILTIN void make(const Call& call, std::index_sequence<i...>) {
    call.kernel(std::get<i>(call.arguments)...);
  }
};

template <class... P, class... A>
EMU_BUILTIN void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, void* stream,
                        A&&... arguments) {
  const Call<P...> call{kernel, {static_cast<P>(arguments)...}};
  record_stream(stream);
  run(name, reinterpret_cast<const void*>(kernel), grid, block, shared, &Call<P...>::make, &call);
}

template <class T>
EMU_BUILTIN T shuffle(const char* what, unsigned mask, T value, int from, Place place) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) >= 4 && sizeof(T) <= 8, "a type that __shfl_sync takes");
  const unsigned char* lanes = exchange(mask, &value, sizeof value, what, place);
  if (!(mask >> from & 1)) fail("a shuffle reads a lane that its mask leaves out", place);
  std::memcpy(&value, lanes + from * kSlotBytes, sizeof value);
  return value;
}

}  // namespace emu

#define threadIdx (::emu::thread_index())
#define blockIdx (::emu::block_index())
#define blockDim (::emu::block_size())
#define gridDim (::emu::grid_size())

EMU_BUILTIN inline void __syncthreads(EMU_CALLER) { emu::block_barrier(false, EMU_HERE); }
EMU_BUILTIN inline int __syncthreads_or(int predicate, EMU_CALLER) {
  return emu::block_barrier(predicate != 0, EMU_HERE);
}
EMU_BUILTIN inline void __syncwarp(unsigned mask = ~0u, EMU_CALLER) { emu::warp_barrier(mask, EMU_HERE); }

template <class T>
EMU_BUILTIN T __shfl_sync(unsigned mask, T value, int from, int width = 32, EMU_CALLER) {
  return emu::shuffle("__shfl_sync", mask, value, (emu::lane() & ~(width - 1)) | (from & (width - 1)), EMU_HERE);
}
template <class T>
EMU_BUILTIN T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, EMU_CALLER) {
  const int lane = emu::lane(), from = lane ^ distance;
  return emu::shuffle("__shfl_xor_sync", mask, value, from > (lane | (width - 1)) ? lane : from, EMU_HERE);
}
template <class T>
EMU_BUILTIN T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, EMU_CALLER) {
  const int lane = emu::lane(), from = lane - static_cast<int>(distance);
  return emu::shuffle("__shfl_up_sync", mask, value, from < (lane & ~(width - 1)) ? lane : from, EMU_HERE);
}
template <class T>
EMU_BUILTIN T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, EMU_CALLER) {
  const int lane = emu::lane(), from = lane + static_cast<int>(distance);
  return emu::shuffle("__shfl_down_sync", mask, value, from > (lane | (width - 1)) ? lane : from, EMU_HERE);
}
EMU_BUILTIN inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_CALLER) {
  return emu::ballot(mask, predicate != 0, EMU_HERE);
}
EMU_BUILTIN inline int __any_sync(unsigned mask, int predicate, EMU_CALLER) {
  return emu::ballot(mask, predicate != 0, EMU_HERE) != 0;
}
EMU_BUILTIN inline int __all_sync(unsigned mask, int predicate, EMU_CALLER) {
  return emu::ballot(mask, predicate != 0, EMU_HERE) == mask;
}

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// Written by reached.py before a loop and before its body, in the form `if (...; false) {} else loop`, so that a loop
// stays one statement. A Turns counts the iterations and records them at the loop's end.
#define EMU_LOOP(file, nth)                                                             \
  if (::emu::Turns emu_turns([]() -> ::emu::Loop& {                                     \
        static ::emu::Loop loop(file, nth);                                             \
        return loop;                                                                    \
      }());                                                                             \
      false) {                                                                          \
  } else
#define EMU_TURN                       \
  if (++emu_turns.count, false) {      \
  } else

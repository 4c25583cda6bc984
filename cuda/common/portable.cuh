// The parts of CUDA that differ between nvcc and the emulator (tests/cuda/emulator): kernel files compile with both.
//
//   SMEM_ARRAY(T, name, n)     T* name: n elements of shared memory, n a constant
//   SMEM_DYN(T, name)          T* name: the launch's dynamic shared memory, one array per kernel
//   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)    launches and checks; throws std::runtime_error.
//                              A kernel with commas in its template arguments goes in parentheses.
//   LAUNCH_SIZE(name, chosen)  `chosen`, a size that a launcher chose, unless an emulator test sets another as `name`
//   GPU_INLINE                 a device function
//   GPU_UNROLL                 unrolls the loop that follows
//   gpu::max_shared_bytes()    shared memory that a block may use on the current device
//   gpu::refuse(message)       throws an error of a launcher, a ValueError in Python
//   gpu::ld<V>, gpu::st<V>     loads or stores a V of up to 16 bytes in global memory, in one access
//   gpu::ld_shared, st_shared  the same in shared memory
//   GPU_EMULATED               1 in the emulator, else 0; only for this folder
//
// threadIdx, __syncthreads, __syncthreads_or, __syncwarp, __shfl_*_sync, __ballot_sync, __any_sync, __all_sync and
// <cmath> are used as in CUDA C++. There are no atomics. Inline PTX, __shared__ and <<<>>> appear only in this folder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dtype.h"
#include "sizes.h"

#if defined(__CUDACC__)

#include "launch.cuh"

#define GPU_EMULATED 0
#define GPU_UNROLL _Pragma("unroll")
#define LAUNCH_SIZE(name, chosen) (chosen)
#define SMEM_ARRAY(T, name, n)                   \
  __shared__ __align__(16) T name##_of_block[n]; \
  T* const name = name##_of_block
#define SMEM_DYN(T, name)                                              \
  extern __shared__ __align__(128) unsigned char gpu_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(gpu_dynamic_shared)

#else

#include "builtins.h"

#define GPU_EMULATED 1
#define GPU_UNROLL _Pragma("GCC unroll 1")
#define LAUNCH_SIZE(name, chosen) emu::launch_size(#name, chosen)
#define SMEM_ARRAY(T, name, n) \
  T* const name = static_cast<T*>(emu::shared_array([] { static char key; return &key; }(), #name, sizeof(T) * (n)))
#define SMEM_DYN(T, name) T* const name = static_cast<T*>(emu::dynamic_shared())

namespace gpu {
using emu::launch;
using emu::max_shared_bytes;
}  // namespace gpu

#endif

#define GPU_INLINE __device__ __forceinline__
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::gpu::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace gpu {

// Refuses a call that the device cannot run: a ValueError in Python.
[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

template <class To, class From>
GPU_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

#if !GPU_EMULATED
// The address of shared memory for PTX instructions.
GPU_INLINE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

namespace detail {

template <size_t n>
struct Words {
  uint32_t word[n / 4];
};

#if !GPU_EMULATED
// Inline PTX, because nvcc splits copies of structs of small elements, and those of a uint4 if it rewrites the address.
#define GPU_DEFINE_ACCESS(space, Address, constraint)                                                                  \
  template <class V>                                                                                                  \
  GPU_INLINE V ld_##space(Address p) {                                                                                \
    if constexpr (sizeof(V) == 2) {                                                                                   \
      uint16_t w;                                                                                                     \
      asm volatile("ld." #space ".b16 %0, [%1];" : "=h"(w) : constraint(p) : "memory");                               \
      return bit_cast<V>(w);                                                                                          \
    } else {                                                                                                          \
      Words<sizeof(V)> w;                                                                                             \
      uint32_t(&r)[sizeof(V) / 4] = w.word;                                                                           \
      if constexpr (sizeof(V) == 4)                                                                                   \
        asm volatile("ld." #space ".b32 %0, [%1];" : "=r"(r[0]) : constraint(p) : "memory");                          \
      else if constexpr (sizeof(V) == 8)                                                                              \
        asm volatile("ld." #space ".v2.b32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : constraint(p) : "memory");      \
      else                                                                                                            \
        asm volatile("ld." #space ".v4.b32 {%0,%1,%2,%3}, [%4];"                                                      \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : constraint(p) : "memory");                    \
      return bit_cast<V>(w);                                                                                          \
    }                                                                                                                 \
  }                                                                                                                   \
  template <class V>                                                                                                  \
  GPU_INLINE void st_##space(Address p, const V& v) {                                                                 \
    if constexpr (sizeof(V) == 2) {                                                                                   \
      asm volatile("st." #space ".b16 [%0], %1;" ::constraint(p), "h"(bit_cast<uint16_t>(v)) : "memory");             \
    } else {                                                                                                          \
      const auto w = bit_cast<Words<sizeof(V)>>(v);                                                                   \
      const uint32_t(&r)[sizeof(V) / 4] = w.word;                                                                     \
      if constexpr (sizeof(V) == 4)                                                                                   \
        asm volatile("st." #space ".b32 [%0], %1;" ::constraint(p), "r"(r[0]) : "memory");                            \
      else if constexpr (sizeof(V) == 8)                                                                              \
        asm volatile("st." #space ".v2.b32 [%0], {%1,%2};" ::constraint(p), "r"(r[0]), "r"(r[1]) : "memory");         \
      else                                                                                                            \
        asm volatile("st." #space ".v4.b32 [%0], {%1,%2,%3,%4};" ::constraint(p), "r"(r[0]), "r"(r[1]), "r"(r[2]),    \
                     "r"(r[3])                                                                                        \
                     : "memory");                                                                                     \
    }                                                                                                                 \
  }
GPU_DEFINE_ACCESS(global, size_t, "l")
GPU_DEFINE_ACCESS(shared, uint32_t, "r")
#undef GPU_DEFINE_ACCESS
#endif

template <class V>
constexpr bool kOneAccess = sizeof(V) >= 2 && sizeof(V) <= 16 && alignof(V) == sizeof(V);

}  // namespace detail

// ld and st access a whole V of 2, 4, 8 or 16 bytes, aligned to its size, in global memory.
template <class V>
GPU_INLINE V ld(const void* from) {
  static_assert(detail::kOneAccess<V>);
#if GPU_EMULATED
  V v;
  emu::load(&v, from, sizeof v, emu::Space::global);
  return v;
#else
  return detail::ld_global<V>(__cvta_generic_to_global(from));
#endif
}

template <class V>
GPU_INLINE void st(void* to, const V& v) {
  static_assert(detail::kOneAccess<V>);
#if GPU_EMULATED
  emu::store(to, &v, sizeof v, emu::Space::global);
#else
  detail::st_global<V>(__cvta_generic_to_global(to), v);
#endif
}

// ld_shared and st_shared do the same in shared memory.
template <class V>
GPU_INLINE V ld_shared(const void* from) {
  static_assert(detail::kOneAccess<V>);
#if GPU_EMULATED
  V v;
  emu::load(&v, from, sizeof v, emu::Space::shared);
  return v;
#else
  return detail::ld_shared<V>(shared_address(from));
#endif
}

template <class V>
GPU_INLINE void st_shared(void* to, const V& v) {
  static_assert(detail::kOneAccess<V>);
#if GPU_EMULATED
  emu::store(to, &v, sizeof v, emu::Space::shared);
#else
  detail::st_shared<V>(shared_address(to), v);
#endif
}

// 2^x within 2 ulp, subnormal results flushed to zero.
GPU_INLINE float exp2_approx(float x) {
#if GPU_EMULATED
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Waits until `threads` threads of the block, in whole warps, are at barrier `id`, 1 to 15. Barrier 0 is __syncthreads.
GPU_INLINE void named_barrier(int id, int threads) {
#if GPU_EMULATED
  emu::named_barrier(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace gpu

// One kernel source, compiled for several instruction sets; the best supported one is chosen at import.
#pragma once

#include "dtype.h"

// Levels of instruction sets; their names are also namespaces.
//   x86-64       v2        SSE4.2
//                v3        v2, AVX2, FMA      v3_vnni    v3, AVX-VNNI
//                v4        v3, AVX-512        v4_vnni    v4, AVX512-VNNI
//                v4_bf16   v4, AVX512-BF16    v4_amx     v4_bf16, AVX512-VNNI, AMX
//   64-bit Arm   generic   NEON               neon_dot   NEON, DotProd
//                neon_i8mm neon_dot, I8MM     neon_bf16  neon_i8mm, BF16
//   others       generic
// Every kernel is compiled for the lowest level and for the other levels that CMakeLists.txt lists for it. Levels above
// MEGALODON_HIGHEST_ISA_FOR_ALL_DTYPES add products of bfloat16 and rounding to bfloat16. Code for these levels is
// compiled for bfloat16 alone, except in linear_amx_cpu.cpp.
#if defined(__x86_64__)
#define MEGALODON_LOWEST_ISA v2
#define MEGALODON_FOR_EACH_HIGHER_ISA(X, ...) \
  X(v3, __VA_ARGS__) X(v3_vnni, __VA_ARGS__) X(v4, __VA_ARGS__) X(v4_vnni, __VA_ARGS__) X(v4_bf16, __VA_ARGS__) \
  X(v4_amx, __VA_ARGS__)
#define MEGALODON_HIGHEST_ISA_FOR_ALL_DTYPES v4_vnni
#else
#define MEGALODON_LOWEST_ISA generic
#if defined(__aarch64__)
#define MEGALODON_FOR_EACH_HIGHER_ISA(X, ...) \
  X(neon_dot, __VA_ARGS__) X(neon_i8mm, __VA_ARGS__) X(neon_bf16, __VA_ARGS__)
#define MEGALODON_HIGHEST_ISA_FOR_ALL_DTYPES neon_i8mm
#else
#define MEGALODON_FOR_EACH_HIGHER_ISA(X, ...)
#define MEGALODON_HIGHEST_ISA_FOR_ALL_DTYPES generic
#endif
#endif

namespace megalodon {

#define MEGALODON_ENUMERATOR_(isa, ...) isa,
enum class Isa { MEGALODON_LOWEST_ISA, MEGALODON_FOR_EACH_HIGHER_ISA(MEGALODON_ENUMERATOR_) };
#undef MEGALODON_ENUMERATOR_

extern Isa active_isa;

// Returns true if code compiled for `isa` supports the parameters' dtype.
template <class Params>
bool computes(Isa isa, const Params& params) {
  return isa <= Isa::MEGALODON_HIGHEST_ISA_FOR_ALL_DTYPES || params.dtype == DType::bf16;
}

}  // namespace megalodon

#define MEGALODON_HIDDEN_ __attribute__((visibility("hidden")))
#define MEGALODON_WEAK_ __attribute__((visibility("hidden"), weak))
#define MEGALODON_DECLARE_IN_(isa, name, Params, linkage) \
  namespace isa {                                         \
  linkage void name(const Params&);                       \
  }
#define MEGALODON_ADDRESS_IN_(isa, name) isa::name,

#if defined(MEGALODON_ISA)
// In a file of kernels: declares `name(const Params&)` in the namespace that is being compiled.
#define MEGALODON_CPU_KERNEL(name, Params) MEGALODON_DECLARE_IN_(MEGALODON_ISA, name, Params, MEGALODON_HIDDEN_)
#else
// In other files: defines launch_<name>(params), which calls the kernel compiled for the active instruction set or, if
// there is none for the parameters' dtype, for the highest lower one that has it. A weak function without a definition
// has the address null; linking fails if the kernel is not defined for the lowest instruction set.
#define MEGALODON_CPU_KERNEL(name, Params)                                                       \
  MEGALODON_DECLARE_IN_(MEGALODON_LOWEST_ISA, name, Params, MEGALODON_HIDDEN_)                   \
  MEGALODON_FOR_EACH_HIGHER_ISA(MEGALODON_DECLARE_IN_, name, Params, MEGALODON_WEAK_)            \
  inline void launch_##name(const Params& params) {                                              \
    void (*const kernels[])(const Params&) = {                                                   \
        MEGALODON_LOWEST_ISA::name, MEGALODON_FOR_EACH_HIGHER_ISA(MEGALODON_ADDRESS_IN_, name)}; \
    int best = static_cast<int>(active_isa);                                                     \
    while (!kernels[best] || !computes(static_cast<Isa>(best), params)) --best;                  \
    kernels[best](params);                                                                       \
  }
#endif

// Declares launch_<name> of a CUDA kernel; `stream` is a cudaStream_t. workspace_<name> returns the size in bytes of
// the scratch memory `params.workspace`, a function of the tensors' sizes alone.
#define MEGALODON_CUDA_KERNEL(name, Params)     \
  void launch_##name(const Params& params, void* stream); \
  int64_t workspace_##name(const Params& params);

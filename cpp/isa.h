// One kernel source, compiled once for each instruction set; the best one is chosen when the module is imported.
#pragma once

// The names double as namespaces. x86-64 levels: v2 = SSE4.2, v3 = AVX2 + FMA, v4 = AVX-512, v4_bf16 adds AVX512-BF16,
// v4_amx adds AMX-BF16 to that.
#if defined(__x86_64__)
#define MEGALODON_FOR_EACH_ISA(X, ...) \
  X(v2, __VA_ARGS__) X(v3, __VA_ARGS__) X(v4, __VA_ARGS__) X(v4_bf16, __VA_ARGS__) \
  X(v4_amx, __VA_ARGS__)
#else
#define MEGALODON_FOR_EACH_ISA(X, ...) X(generic, __VA_ARGS__)
#endif

namespace megalodon {

#define MEGALODON_ENUMERATOR_(isa, ...) isa,
enum class Isa { MEGALODON_FOR_EACH_ISA(MEGALODON_ENUMERATOR_) };
#undef MEGALODON_ENUMERATOR_

extern Isa active_isa;

}  // namespace megalodon

#define MEGALODON_DECLARE_IN_(isa, name, Params) \
  namespace isa {                                \
  void name(const Params&);                      \
  }
#define MEGALODON_CASE_IN_(isa, name) \
  case Isa::isa: return isa::name(params);

// Declares `name(const Params&)` in every instruction set's namespace, and launch_<name>, which calls the active one.
#define MEGALODON_CPU_KERNEL(name, Params)                                  \
  MEGALODON_FOR_EACH_ISA(MEGALODON_DECLARE_IN_, name, Params)               \
  inline void launch_##name(const Params& params) {                         \
    switch (active_isa) { MEGALODON_FOR_EACH_ISA(MEGALODON_CASE_IN_, name) } \
  }

// Declares launch_<name> of a CUDA kernel, where `stream` is a cudaStream_t, and workspace_<name>: how many bytes of
// scratch memory `params.workspace` must have, which depends on sizes alone.
#define MEGALODON_CUDA_KERNEL(name, Params)     \
  void launch_##name(const Params& params, void* stream); \
  int64_t workspace_##name(const Params& params);

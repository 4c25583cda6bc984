// Element types of tensors and accumulation types.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MEGALODON_INLINE __host__ __device__ __forceinline__
#define MEGALODON_NO_EXEC_CHECK _Pragma("nv_exec_check_disable")
#else
#define MEGALODON_INLINE inline __attribute__((always_inline))
#define MEGALODON_NO_EXEC_CHECK
#endif

// Instruction sets that multiply pairs of bfloat16; code for them is compiled for bfloat16 alone (isa.h).
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define MEGALODON_BF16_PAIRS
#endif

namespace megalodon {

enum class DType : int32_t { f32, f64, bf16, f16 };

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// Accumulation type: float for every type but double.
template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };
template <class T> using Compute = typename ComputeOf<T>::type;

// Calls f(T{}) with the C++ type of `dtype`.
MEGALODON_NO_EXEC_CHECK
template <class F>
MEGALODON_INLINE void dispatch_dtype([[maybe_unused]] DType dtype, F&& f) {
#if defined(MEGALODON_ISA) && defined(MEGALODON_BF16_PAIRS)
  f(bf16{});
#else
  switch (dtype) {
    case DType::f32: f(float{}); break;
    case DType::f64: f(double{}); break;
    case DType::bf16: f(bf16{}); break;
    case DType::f16: f(fp16{}); break;
  }
#endif
}

}  // namespace megalodon

// Vectors of the active instruction set: compiler vector types, loads and stores that convert to and from 16-bit types.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dtype.h"

namespace megalodon::MEGALODON_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kRegisters = 16;
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 32;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 16;
#endif

// R is float or double. Vec<R> holds kLanes<R> of them; arithmetic operators work lane by lane, a * b + c fuses.
template <class R> inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(R));
template <class E, int n> struct VecOf { typedef E type __attribute__((vector_size(n * sizeof(E)))); };
template <class R> using Vec = typename VecOf<R, kLanes<R>>::type;

using Bits = VecOf<uint32_t, kLanes<float>>::type;  // the bits of a Vec<float>
using Half = VecOf<uint16_t, kLanes<float>>::type;  // bits of bf16 or fp16 values, one for each lane of a Vec<float>

template <class To, class From>
MEGALODON_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Returns a vector with `value` in all lanes: value - 0 keeps -0.0, which value + 0 would not.
template <class R> MEGALODON_INLINE Vec<R> splat(R value) { return value - Vec<R>{}; }
template <class R> MEGALODON_INLINE Vec<R> zeros() { return Vec<R>{}; }

template <class V> MEGALODON_INLINE V load_raw(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V> MEGALODON_INLINE void store_raw(void* to, V v) { std::memcpy(to, &v, sizeof v); }

// widen_bits() zero-extends 16-bit values. upper_halves() keeps the upper half of each 32-bit value. Intrinsics are
// used because GCC's generic conversions take several instructions.
#if defined(__AVX512BW__)
MEGALODON_INLINE Bits widen_bits(Half h) { return bit_cast<Bits>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(h))); }
MEGALODON_INLINE Half upper_halves(Bits b) {
  constexpr VecOf<uint16_t, 32>::type odd = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i packed = _mm512_permutexvar_epi16(bit_cast<__m512i>(odd), bit_cast<__m512i>(b));
  return bit_cast<Half>(_mm512_castsi512_si256(packed));
}
#elif defined(__AVX2__)
MEGALODON_INLINE Bits widen_bits(Half h) { return bit_cast<Bits>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(h))); }
MEGALODON_INLINE Half upper_halves(Bits b) {
  const __m256i shifted = bit_cast<__m256i>(b >> 16), packed = _mm256_packus_epi32(shifted, shifted);
  return bit_cast<Half>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
#elif defined(__aarch64__)
MEGALODON_INLINE Bits widen_bits(Half h) { return bit_cast<Bits>(vmovl_u16(bit_cast<uint16x4_t>(h))); }
MEGALODON_INLINE Half upper_halves(Bits b) { return bit_cast<Half>(vshrn_n_u32(bit_cast<uint32x4_t>(b), 16)); }
#else
MEGALODON_INLINE Bits widen_bits(Half h) { return __builtin_convertvector(h, Bits); }
MEGALODON_INLINE Half upper_halves(Bits b) { return __builtin_convertvector(b >> 16, Half); }
#endif

MEGALODON_INLINE Vec<float> widen_bf16(Half h) { return bit_cast<Vec<float>>(widen_bits(h) << 16); }

// round_bf16() rounds to nearest, ties to even; on x86 it always flushes denormals to zero.
// load_first_pairs() loads n elements, followed by zeros.
// add_pairs() multiplies a pair of `a` by a pair of `b` and adds both products to `sum`, in each lane. `b` has one pair
// per lane or one for all lanes. Denormals count as zero.
#if defined(__AVX512BF16__)
MEGALODON_INLINE Half round_bf16(Vec<float> v) { return bit_cast<Half>(_mm512_cvtneps_pbh(bit_cast<__m512>(v))); }
MEGALODON_INLINE Bits load_first_pairs(const bf16* from, int64_t n) {
  return n >= 32 ? load_raw<Bits>(from)
                 : bit_cast<Bits>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), from));
}
MEGALODON_INLINE Vec<float> add_pairs(Vec<float> sum, Bits a, Bits b) {
  return bit_cast<Vec<float>>(
      _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
}
MEGALODON_INLINE Vec<float> add_pairs(Vec<float> sum, Bits a, uint32_t b) {
  Bits pairs = Bits{} + b;
#if defined(__clang__) && __clang_major__ < 18
  asm("" : "+v"(pairs));  // clang crashes if it knows that a vector of bf16 repeats one pair
#endif
  return add_pairs(sum, a, pairs);
}
#elif defined(MEGALODON_BF16_PAIRS)
MEGALODON_INLINE Half round_bf16(Vec<float> v) { return bit_cast<Half>(vcvt_bf16_f32(bit_cast<float32x4_t>(v))); }
MEGALODON_INLINE Bits load_first_pairs(const bf16* from, int64_t n) {
  Bits pairs{};
  std::memcpy(&pairs, from, n >= 8 ? sizeof pairs : static_cast<size_t>(n) * sizeof(bf16));
  return pairs;
}
MEGALODON_INLINE Vec<float> add_pairs(Vec<float> sum, Bits a, Bits b) {
  return bit_cast<Vec<float>>(
      vbfdotq_f32(bit_cast<float32x4_t>(sum), bit_cast<bfloat16x8_t>(a), bit_cast<bfloat16x8_t>(b)));
}
MEGALODON_INLINE Vec<float> add_pairs(Vec<float> sum, Bits a, uint32_t b) {
  return bit_cast<Vec<float>>(
      vbfdotq_lane_f32(bit_cast<float32x4_t>(sum), bit_cast<bfloat16x8_t>(a), vcreate_bf16(b), 0));
}
#endif

// Rounds to nearest, ties to even; a NaN stays a (quiet) NaN.
MEGALODON_INLINE Half narrow_bf16(Vec<float> v) {
  const Bits bits = bit_cast<Bits>(v);
#if defined(__AVX512BF16__)
  // If the mode treats denormals as zero, fpclass finds none.
  constexpr int kDenormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(bit_cast<__m512>(v), kDenormal) == 0, 1)) return round_bf16(v);
#elif defined(MEGALODON_BF16_PAIRS)
  return round_bf16(v);
#endif
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | (0x40u << 16);
  return upper_halves(v == v ? rounded : quiet);
}

#if defined(__AVX512F__)
MEGALODON_INLINE Vec<float> widen_f16(Half h) { return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(h))); }
MEGALODON_INLINE Half narrow_f16(Vec<float> v) {
  return bit_cast<Half>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
MEGALODON_INLINE Vec<float> widen_f16(Half h) { return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(h))); }
MEGALODON_INLINE Half narrow_f16(Vec<float> v) {
  return bit_cast<Half>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
MEGALODON_INLINE Vec<float> widen_f16(Half h) { return bit_cast<Vec<float>>(vcvt_f32_f16(bit_cast<float16x4_t>(h))); }
MEGALODON_INLINE Half narrow_f16(Vec<float> v) { return bit_cast<Half>(vcvt_f16_f32(bit_cast<float32x4_t>(v))); }
#else
// Integer arithmetic only, so that the flush-to-zero mode does not affect half-precision denormals.
MEGALODON_INLINE Vec<float> widen_f16(Half h) {
  const Bits w = __builtin_convertvector(h, Bits);
  const Bits sign = (w & 0x8000) << 16, magnitude = w & 0x7fff;
  const Bits normal = (magnitude << 13) + (112u << 23);
  const Bits special = (magnitude << 13) | (255u << 23);
  // A denormal is magnitude * 2^-24, exact in float.
  using Ints = VecOf<int32_t, kLanes<float>>::type;
  const Bits denormal = bit_cast<Bits>(__builtin_convertvector(bit_cast<Ints>(magnitude), Vec<float>) * 0x1p-24f);
  return bit_cast<Vec<float>>(sign | (magnitude >= 0x7c00 ? special : magnitude < 0x400 ? denormal : normal));
}
MEGALODON_INLINE Half narrow_f16(Vec<float> v) {
  const Bits bits = bit_cast<Bits>(v);
  const Bits sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 rounds the value to a multiple of 2^-24, the spacing of half-precision denormals.
  const Bits denormal = bit_cast<Bits>(bit_cast<Vec<float>>(magnitude) + 0.5f) - (126u << 23);
  const Bits special = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
  const Bits finite = magnitude < (113u << 23) ? denormal : normal;
  return __builtin_convertvector(sign | (magnitude >= (143u << 23) ? special : finite), Half);
}
#endif

// Loads kLanes<Compute<T>> elements of T as a vector of the compute type.
MEGALODON_INLINE Vec<float> load(const float* from) { return load_raw<Vec<float>>(from); }
MEGALODON_INLINE Vec<double> load(const double* from) { return load_raw<Vec<double>>(from); }
MEGALODON_INLINE Vec<float> load(const bf16* from) { return widen_bf16(load_raw<Half>(from)); }
MEGALODON_INLINE Vec<float> load(const fp16* from) { return widen_f16(load_raw<Half>(from)); }
MEGALODON_INLINE Vec<float> load(const int8_t* from) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_raw<__m128i>(from))));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(
      _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#else
  return __builtin_convertvector(load_raw<typename VecOf<int8_t, kLanes<float>>::type>(from), Vec<float>);
#endif
}
MEGALODON_INLINE void store(float* to, Vec<float> v) { store_raw(to, v); }
MEGALODON_INLINE void store(double* to, Vec<double> v) { store_raw(to, v); }
MEGALODON_INLINE void store(bf16* to, Vec<float> v) { store_raw(to, narrow_bf16(v)); }
MEGALODON_INLINE void store(fp16* to, Vec<float> v) { store_raw(to, narrow_f16(v)); }

// load_first() loads n elements, n in [0, kLanes], and zeros in the other lanes. store_first() stores the first n
// lanes. In load_some() and store_some(), bit i of `mask` is set if lane i takes part.
#if defined(__AVX512BW__)
MEGALODON_INLINE Vec<float> load_some(const float* from, uint32_t mask) {
  return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from));
}
MEGALODON_INLINE Vec<double> load_some(const double* from, uint32_t mask) {
  return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from));
}
MEGALODON_INLINE Half load_some_bits(const void* from, uint32_t mask) {
  return bit_cast<Half>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from));
}
MEGALODON_INLINE Vec<float> load_some(const bf16* from, uint32_t mask) {
  return widen_bf16(load_some_bits(from, mask));
}
MEGALODON_INLINE Vec<float> load_some(const fp16* from, uint32_t mask) {
  return widen_f16(load_some_bits(from, mask));
}
MEGALODON_INLINE Vec<float> load_some(const int8_t* from, uint32_t mask) {
  const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), from);
  return bit_cast<Vec<float>>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}
MEGALODON_INLINE void store_some(float* to, Vec<float> v, uint32_t mask) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), bit_cast<__m512>(v));
}
MEGALODON_INLINE void store_some(double* to, Vec<double> v, uint32_t mask) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), bit_cast<__m512d>(v));
}
MEGALODON_INLINE void store_some(bf16* to, Vec<float> v, uint32_t mask) {
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), bit_cast<__m256i>(narrow_bf16(v)));
}
MEGALODON_INLINE void store_some(fp16* to, Vec<float> v, uint32_t mask) {
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), bit_cast<__m256i>(narrow_f16(v)));
}
#endif
template <class T>
MEGALODON_INLINE auto load_first(const T* from, int64_t n) {
  constexpr int lanes = kLanes<Compute<T>>;
  if (n >= lanes) return load(from);
#if defined(__AVX512BW__)
  return load_some(from, (1u << n) - 1);
#else
  T buffer[lanes] = {};
  std::memcpy(buffer, from, static_cast<size_t>(n) * sizeof(T));
  return load(static_cast<const T*>(buffer));
#endif
}
template <class T>
MEGALODON_INLINE void store_first(T* to, Vec<Compute<T>> v, int64_t n) {
  constexpr int lanes = kLanes<Compute<T>>;
  if (n >= lanes) return store(to, v);
#if defined(__AVX512BW__)
  store_some(to, v, (1u << n) - 1);
#else
  T buffer[lanes];
  store(static_cast<T*>(buffer), v);
  std::memcpy(to, buffer, static_cast<size_t>(n) * sizeof(T));
#endif
}

// Returns the product, which the compiler then cannot fuse with an addition.
template <class V>
MEGALODON_INLINE V unfused(V product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// Load the elements of two vectors in the cheapest order: bfloat16 is split into even and odd elements.
template <class R> struct TwoVectors { Vec<R> a, b; };
template <class T>
MEGALODON_INLINE TwoVectors<Compute<T>> load_two(const T* from) {
  return {load(from), load(from + kLanes<Compute<T>>)};
}
MEGALODON_INLINE TwoVectors<float> load_two(const bf16* from) {
  const Bits pairs = load_raw<Bits>(from);
  return {bit_cast<Vec<float>>(pairs << 16), bit_cast<Vec<float>>(pairs & 0xffff0000)};
}

// Loads one element into all lanes.
template <class T>
MEGALODON_INLINE Vec<Compute<T>> load_splat(const T* from) { return splat(load_first(from, 1)[0]); }
MEGALODON_INLINE Vec<float> load_splat(const float* from) { return splat(*from); }
MEGALODON_INLINE Vec<double> load_splat(const double* from) { return splat(*from); }
MEGALODON_INLINE Vec<float> load_splat(const bf16* from) {
  return bit_cast<Vec<float>>(Bits{} + (static_cast<uint32_t>(from->bits) << 16));
}

// Converts one element.
template <class T>
MEGALODON_INLINE Compute<T> widen(T value) {
  if constexpr (sizeof(T) >= 4) return value;
  else return load_first(&value, 1)[0];
}
template <class T>
MEGALODON_INLINE T narrow(Compute<T> value) {
  T result;
  store_first(&result, splat(value), 1);
  return result;
}

// Sum of the lanes, the upper half added to the lower until one is left.
template <class R, int width, int... lane>
MEGALODON_INLINE Vec<R> add_upper_half(Vec<R> v, std::integer_sequence<int, lane...>) {
  v += __builtin_shufflevector(v, v, (lane % width + width)...);
  if constexpr (width > 1) return add_upper_half<R, width / 2>(v, std::integer_sequence<int, lane...>{});
  else return v;
}
template <class R>
MEGALODON_INLINE R sum_lanes(Vec<R> v) {
  return add_upper_half<R, kLanes<R> / 2>(v, std::make_integer_sequence<int, kLanes<R>>{})[0];
}

// Calls op(offset, n) for the vectors of `count` neighbouring elements; n < kLanes in the last one if it is not full.
template <class R, class Op>
MEGALODON_INLINE void for_each_vector(int64_t count, Op&& op) {
  constexpr int64_t lanes = kLanes<R>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) op(i, lanes);
  if (i < count) op(i, count - i);
}

}  // namespace megalodon::MEGALODON_ISA

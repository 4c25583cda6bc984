// Matrix products on packed panels: the layout, and a micro-kernel that holds a tile of the result in registers.
//
//   A packed matrix M is cut into panels of kTileColumns columns; a panel holds its rows one after the other, so that
//   it is one stream of memory. The micro-kernel makes a tile of kTileRows x kTileColumns: for each step of the depth
//   it loads one row of B as vectors and multiplies it by kTileRows broadcast elements of A. A broadcast costs the
//   same wherever the element lies, so a packed matrix serves as A either way:
//     A = M     rows of the tile are rows of M, the depth runs along its columns (panel after panel)
//     A = M^T   rows of the tile are columns of M, the depth runs along its rows (within one panel)
//   Tile: 8 rows x 3 vectors with 32 registers (24 sums, 3 of B, the rest for A), 4 x 3 with 16, 4 x 2 with 16 and no
//   FMA. The panel at the right edge uses as many vectors as it needs; rows are padded to kTileRows, the depth to a
//   unit.
//
//   A unit is what one lane multiplies in one step: one element of the compute type, or, where the CPU has AVX512-BF16,
//   a pair of bfloat16 that are neighbours along the depth. So pairs need M in two formats: paired along the columns
//   for A = M, along the rows for A = M^T and B. With one element to a unit the two formats are the same.
#pragma once

#include <type_traits>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace megalodon::MEGALODON_ISA {

// Two bfloat16, the one of the lower depth in the low half.
struct Bf16Pair { uint32_t bits; };

// What elements of T become when packed.
template <class T> struct UnitOf { using type = Compute<T>; };
#if defined(__AVX512BF16__)
template <> struct UnitOf<bf16> { using type = Bf16Pair; };
#endif
template <class T> using Unit = typename UnitOf<T>::type;
template <class U> using SumOf = std::conditional_t<std::is_same_v<U, Bf16Pair>, float, U>;
template <class U> inline constexpr int kUnitDepth = std::is_same_v<U, Bf16Pair> ? 2 : 1;

inline constexpr int kTileRows = kRegisters == 32 ? 8 : 4;
inline constexpr int kTileVectors = kRegisters == 32 || kVectorBytes == 32 ? 3 : 2;
template <class U> inline constexpr int kTileColumns = kTileVectors * kLanes<SumOf<U>>;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
template <class U> constexpr int64_t panels(int64_t columns) { return ceil_div(columns, kTileColumns<U>); }

// How many vectors of a panel hold columns of the matrix.
template <class U>
constexpr int vectors_in_panel(int64_t columns, int64_t panel) {
  const int64_t left = ceil_div(columns - panel * kTileColumns<U>, kLanes<SumOf<U>>);
  return static_cast<int>(left < kTileVectors ? left : kTileVectors);
}

// A packed matrix in memory owned by another. `rows` is a multiple of kTileRows.
template <class U>
struct Packed {
  static_assert(kTileColumns<U> % kTileRows == 0 && kTileRows % kUnitDepth<U> == 0);
  static constexpr int kRowUnits = kTileColumns<U> / kUnitDepth<U>;

  U* data;
  int64_t rows;

  static int64_t size(int64_t rows, int64_t columns) { return rows * panels<U>(columns) * kRowUnits; }
  MEGALODON_INLINE int64_t panel_units() const { return rows * kRowUnits; }
  // Either format; where rows are paired, `row` is even.
  MEGALODON_INLINE U* at(int64_t panel, int64_t row) const { return data + panel * panel_units() + row * kRowUnits; }
};

template <class R>
MEGALODON_INLINE Vec<R> multiply_add(R a, Vec<R> b, Vec<R> sum) { return sum + a * b; }
#if defined(__AVX512BF16__)
MEGALODON_INLINE Vec<float> multiply_add(Bf16Pair a, Vec<float> b, Vec<float> sum) {
  return bit_cast<Vec<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(b),
                                               bit_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a.bits)))));
}
MEGALODON_INLINE Half round_bf16(Vec<float> v) {
  return bit_cast<Half>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
}
// One pair for each lane.
MEGALODON_INLINE Bits pair_units(Vec<float> low, Vec<float> high) {
  return __builtin_convertvector(round_bf16(low), Bits) | __builtin_convertvector(round_bf16(high), Bits) << 16;
}
#endif

// One tile: C = gain A B, or with factors C = diag(factors) C + A B. a_panel is the distance between the panels of A =
// M.
template <bool kTransposeA, int kVectors, class U>
__attribute__((noinline)) void multiply_tile(int64_t depth, const U* a, int64_t a_panel, const U* b, SumOf<U> gain,
                                             const SumOf<U>* factors, SumOf<U>* c) {
  using R = SumOf<U>;
  constexpr int kRowUnits = Packed<U>::kRowUnits;
  if (factors)
    for (int64_t i = 0; i < kTileRows * kTileColumns<U>; i += 64 / sizeof(R)) __builtin_prefetch(c + i, 1);
  Vec<R> sum[kTileRows][kVectors] = {};
  for (int64_t left = ceil_div(depth, kUnitDepth<U>); left > 0;) {
    const int64_t steps = kTransposeA || left < kRowUnits ? left : kRowUnits;
    for (int64_t step = 0; step < steps; ++step, b += kTileColumns<U>) {
      if constexpr (!kTransposeA) __builtin_prefetch(a + a_panel + step * kTileRows);
      Vec<R> row[kVectors];
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) row[j] = load_raw<Vec<R>>(b + j * kLanes<R>);
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
        const U factor = a[kTransposeA ? step * kTileColumns<U> + i : i * kRowUnits + step];
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(factor, row[j], sum[i][j]);
      }
    }
    left -= steps;
    a += a_panel;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
      R* to = c + i * kTileColumns<U> + j * kLanes<R>;
      store(to, factors ? factors[i] * load(static_cast<const R*>(to)) + sum[i][j] : gain * sum[i][j]);
    }
  }
}

template <bool kTransposeA, class U>
MEGALODON_INLINE void multiply_tile(int vectors, int64_t depth, const U* a, int64_t a_panel, const U* b, SumOf<U> gain,
                                    const SumOf<U>* factors, SumOf<U>* c) {
  static_assert(kTileVectors <= 3);
  if (vectors == kTileVectors) multiply_tile<kTransposeA, kTileVectors>(depth, a, a_panel, b, gain, factors, c);
  else if (vectors == 2) multiply_tile<kTransposeA, 2>(depth, a, a_panel, b, gain, factors, c);
  else multiply_tile<kTransposeA, 1>(depth, a, a_panel, b, gain, factors, c);
}

}  // namespace megalodon::MEGALODON_ISA

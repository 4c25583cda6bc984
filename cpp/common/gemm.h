// Matrix products on packed panels: the layout, and a micro-kernel that holds a tile of the result in registers. For
// kernels of attention and linear layers; panels.h packs.
//
//   A panel is kTileColumns consecutive columns of a matrix M, or fewer at its end, packed row after row, so it is one
//   stream of memory. The micro-kernel computes a tile of kTileRows x kTileColumns: for each index of the
//   depth it loads one row of B as vectors and multiplies it by kTileRows broadcast elements of A. A broadcast costs
//   the same wherever the element is, so a packed matrix serves as A in two ways:
//     A = M     rows of the tile are rows of M, the depth runs along its columns (panel after panel)
//     A = M^T   rows of the tile are columns of M, the depth runs along its rows (within one panel)
//   A tile has, in rows x vectors:
//     AVX-512   8 x 3: 24 registers of sums, 3 of B, the rest for A; in the last panel 12 x 2 or 24 x 1 if rows suffice
//     AVX2      4 x 3; without FMA 4 x 2
//     Arm       8 x 2 of float, 4 x 2 of double
//   In the last panel, vectors without columns of the matrix are skipped. Rows are padded to kRowPadding, the depth to
//   a unit.
//
//   A unit is the operand of one lane: one element of the compute type or, if the CPU multiplies pairs, two bfloat16
//   that are neighbours along the depth. So pairs need M in two formats: paired along the columns for A = M, along the
//   rows for A = M^T and B. With one element per unit the two formats are the same.
//
//   With AMX a tile register holds 16 rows of 64 bytes, and one instruction multiplies 16 x 32 by 32 x 16 bfloat16. B
//   has panels of kTileColumns columns; A has panels of 32, so that a tile register is one stream of 1 KiB. A = M^T is
//   not supported: the caller computes the transposed product instead. A tile is 16 rows x 3 registers. Both operands
//   are zero where the depth is padded to 32.
#pragma once

#include <type_traits>

#include "simd.h"
#include "sizes.h"

namespace megalodon::MEGALODON_ISA {

// Two bfloat16; the one with the lower index along the depth is in the low half.
struct Bf16Pair { uint32_t bits; };

// The unit in which elements of T are packed.
template <class T> struct UnitOf { using type = Compute<T>; };
#if defined(MEGALODON_BF16_PAIRS)
template <> struct UnitOf<bf16> { using type = Bf16Pair; };
#endif
template <class T> using Unit = typename UnitOf<T>::type;
template <class U> using SumOf = std::conditional_t<std::is_same_v<U, Bf16Pair>, float, U>;
template <class U> inline constexpr int kUnitDepth = std::is_same_v<U, Bf16Pair> ? 2 : 1;
#if defined(__AMX_BF16__)
template <class U> inline constexpr bool kUsesAmx = std::is_same_v<U, Bf16Pair>;
inline constexpr int kRowPadding = 32;
#else
template <class U> inline constexpr bool kUsesAmx = false;
inline constexpr int kRowPadding = kRegisters == 32 ? 8 : 4;
#endif

inline constexpr bool kWide = kVectorBytes == 64;  // AVX-512; Arm's 32 registers have 16 bytes each
template <class U>
inline constexpr int kTileRows = kUsesAmx<U> ? 16 : kWide || (kRegisters == 32 && sizeof(U) == 4) ? 8 : 4;
inline constexpr int kTileVectors = kVectorBytes >= 32 ? 3 : 2;
template <class U> inline constexpr int kTileColumns = kTileVectors * kLanes<SumOf<U>>;
template <class U> inline constexpr int kLeftColumns = kUsesAmx<U> ? 32 : kTileColumns<U>;  // panel width of A = M
template <class U> inline constexpr int kDepthStep = kUsesAmx<U> ? 32 : kUnitDepth<U>;

template <class U> constexpr int64_t panels(int64_t columns) { return ceil_div(columns, kTileColumns<U>); }

// Number of vectors of a panel's rows that hold columns of the matrix.
template <class U>
constexpr int vectors_in_panel(int64_t columns, int64_t panel) {
  const int64_t left = ceil_div(columns - panel * kTileColumns<U>, kLanes<SumOf<U>>);
  return static_cast<int>(left < kTileVectors ? left : kTileVectors);
}

// A packed matrix in memory owned by the caller. `rows` is a multiple of kRowPadding.
template <class U, int kColumns = kTileColumns<U>>
struct Packed {
  static_assert(kColumns % kTileRows<U> == 0 && kTileRows<U> % kUnitDepth<U> == 0 && kRowPadding % kDepthStep<U> == 0);
  static constexpr int kRowUnits = kColumns / kUnitDepth<U>;

  U* data;
  int64_t rows;

  static int64_t size(int64_t rows, int64_t columns) { return rows * ceil_div(columns, kColumns) * kRowUnits; }
  MEGALODON_INLINE int64_t panel_units() const { return rows * kRowUnits; }
  // Row `row` of a panel, in either format; `row` is even if rows are paired.
  MEGALODON_INLINE U* at(int64_t panel, int64_t row) const { return data + panel * panel_units() + row * kRowUnits; }
};
template <class U> using PackedLeft = Packed<U, kLeftColumns<U>>;  // A = M

template <class R, class V>
MEGALODON_INLINE V multiply_add(R a, V b, V sum) { return sum + a * b; }
#if defined(MEGALODON_BF16_PAIRS)
MEGALODON_INLINE Vec<float> multiply_add(Bf16Pair a, Vec<float> b, Vec<float> sum) {
  return add_pairs(sum, bit_cast<Bits>(b), a.bits);
}
// Rounds `low` and `high` to bfloat16: one pair for each lane.
MEGALODON_INLINE Bits pair_units(Vec<float> low, Vec<float> high) {
  return widen_bits(round_bf16(low)) | widen_bits(round_bf16(high)) << 16;
}
#endif

// The B panel of the next product, which has the same depth. Each tile of the current product prefetches a part of it.
template <class U>
struct Ahead {
  static constexpr int64_t kStepBytes = 16;  // prefetched per unit of the depth

  const U* panel;
  int64_t depth;

  MEGALODON_INLINE const char* part(int64_t tile) const {
    constexpr int64_t kParts = kTileColumns<U> * sizeof(U) / kStepBytes;
    const int64_t bytes = ceil_div(depth, kUnitDepth<U>) * kStepBytes;
    return reinterpret_cast<const char*>(panel) + (tile < kParts ? tile : kParts - 1) * bytes;
  }
};

// One tile: C = gain A B, or with factors C = diag(factors) C + gain A B. a_panel is the distance between the panels of
// A = M. The function prefetches the next panel of A = M, the tile of C, and memory from `ahead` on for later tiles.
// The prefetches are spread over groups of kGroup units, since a burst would delay the loads.
template <bool kTransposeA, int kVectors, int kRows, class U>
__attribute__((noinline)) void multiply_tile(int64_t depth, const U* a, int64_t a_panel, const U* b, SumOf<U> gain,
                                             const SumOf<U>* factors, SumOf<U>* c, const char* ahead) {
  using R = SumOf<U>;
  constexpr int kRowUnits = Packed<U>::kRowUnits;
  constexpr int kGroup = 8, kLine = 64;
  static_assert(kGroup * Ahead<U>::kStepBytes == 2 * kLine);
  const char* next_c = reinterpret_cast<const char*>(c);
  Vec<R> sum[kRows][kVectors] = {};
  for (int64_t left = ceil_div(depth, kUnitDepth<U>); left > 0;) {
    const int64_t steps = kTransposeA || left < kRowUnits ? left : kRowUnits;
    for (int64_t first = 0; first < steps; first += kGroup, next_c += 2 * kLine, ahead += 2 * kLine) {
      __builtin_prefetch(next_c, 1);
      __builtin_prefetch(next_c + kLine, 1);
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + kLine, 0, 2);
      if constexpr (!kTransposeA)
        for (int i = 0; i < kGroup * kRows; i += kLine / sizeof(U)) __builtin_prefetch(a + a_panel + first * kRows + i);
      const int64_t end = first + kGroup < steps ? first + kGroup : steps;
#pragma GCC unroll 2
      for (int64_t step = first; step < end; ++step, b += kTileColumns<U>) {
        Vec<R> row[kVectors];
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) row[j] = load_raw<Vec<R>>(b + j * kLanes<R>);
#pragma GCC unroll 24
        for (int i = 0; i < kRows; ++i) {
          const U factor = a[kTransposeA ? step * kTileColumns<U> + i : i * kRowUnits + step];
#pragma GCC unroll 3
          for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(factor, row[j], sum[i][j]);
        }
      }
    }
    left -= steps;
    a += a_panel;
  }
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
      R* to = c + i * kTileColumns<U> + j * kLanes<R>;
      const Vec<R> product = gain * sum[i][j];
      store(to, factors ? factors[i] * load(static_cast<const R*>(to)) + product : product);
    }
  }
}

// Panels with fewer vectors compute kTallRows rows together: one tile of 24 x 1 or two of 12 x 2. tile_rows() returns
// the number of rows to compute next if `rows` are left. It is a multiple of kTileRows, so no tile passes the padded
// rows.
template <class U> inline constexpr int kTallRows = kTileRows<U> * (kWide ? kTileVectors : 1);
template <class U>
MEGALODON_INLINE int64_t tile_rows(int vectors, int64_t rows) {
  return vectors < kTileVectors && rows >= kTallRows<U> ? kTallRows<U> : kTileRows<U>;
}

// Computes `rows` rows, a number from tile_rows(), with the tile for this number and for `vectors`.
template <bool kTransposeA, class U>
MEGALODON_INLINE void multiply_tile(int vectors, int64_t rows, int64_t depth, const U* a, int64_t a_panel, const U* b,
                                    SumOf<U> gain, const SumOf<U>* factors, SumOf<U>* c, const char* ahead) {
  static_assert(kTileVectors <= 3);
  const auto multiply = [&](auto tile_vectors) {
    constexpr int kVectors = decltype(tile_vectors)::value, kRows = kTileRows<U>, kTall = kTallRows<U> / kVectors;
    constexpr int kRowStride = kTransposeA ? 1 : Packed<U>::kRowUnits;  // units between the rows of A
    if (rows == kRows) {
      multiply_tile<kTransposeA, kVectors, kRows>(depth, a, a_panel, b, gain, factors, c, ahead);
    } else if constexpr (kTallRows<U> > kRows) {
      static_assert(kTall * kVectors == kTallRows<U>);
      for (int r = 0; r < rows; r += kTall)
        multiply_tile<kTransposeA, kVectors, kTall>(depth, a + r * kRowStride, a_panel, b, gain,
                                                    factors ? factors + r : factors, c + r * kTileColumns<U>, ahead);
    }
  };
  if (vectors == kTileVectors) multiply(std::integral_constant<int, kTileVectors>());
  else if (vectors == 2) multiply(std::integral_constant<int, 2>());
  else multiply(std::integral_constant<int, 1>());
}

#if defined(__AMX_BF16__)
// Configures all tile registers of the constructing thread as 16 rows of 64 bytes; the destructor releases them.
class TileRegisters {
 public:
  TileRegisters() {
    // The config is static: the intrinsic does not tell the compiler that all of it is read.
    alignas(64) static constexpr struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // of 8 registers; the other entries are reserved
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};

// One tile: C = A B, or C += A B.
template <int kVectors>
__attribute__((noinline)) void multiply_registers(int64_t depth, const Bf16Pair* a, int64_t a_panel, const Bf16Pair* b,
                                                  bool add, float* c) {
  constexpr int64_t kStride = kTileColumns<Bf16Pair> * sizeof(float);
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
  if (add) {
    _tile_loadd(0, c, kStride);
    if constexpr (kVectors > 1) _tile_loadd(1, c + 16, kStride);
    if constexpr (kVectors > 2) _tile_loadd(2, c + 32, kStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
  }
  for (; depth > 0; depth -= 32, a += a_panel, b += 16 * kTileColumns<Bf16Pair>) {
    _tile_loadd(3, a, 64);
    _tile_loadd(4, b, kStride);
    _tile_dpbf16ps(0, 3, 4);
    if constexpr (kVectors > 1) {
      _tile_loadd(5, b + 16, kStride);
      _tile_dpbf16ps(1, 3, 5);
    }
    if constexpr (kVectors > 2) {
      _tile_loadd(6, b + 32, kStride);
      _tile_dpbf16ps(2, 3, 6);
    }
  }
  _tile_stored(0, c, kStride);
  if constexpr (kVectors > 1) _tile_stored(1, c + 16, kStride);
  if constexpr (kVectors > 2) _tile_stored(2, c + 32, kStride);
}

// multiply_rows() with AMX and a gain of 1. Splits the depth into blocks, so that a block of B stays in the L1 for all
// rows.
template <class Between>
void multiply_rows_amx(int vectors, int64_t rows, int64_t depth, const Bf16Pair* a, int64_t a_panel, const Bf16Pair* b,
                       bool add, float* c, Between&& between) {
  constexpr int64_t kDepthBlock = 256;
  int64_t d = 0;
  do {  // also once for a depth of 0, which gives zeros
    const int64_t part = depth - d < kDepthBlock ? depth - d : kDepthBlock;
    const Bf16Pair* row = b + d / 2 * kTileColumns<Bf16Pair>;
    for (int64_t r = 0; r < rows; r += 16) {
      const Bf16Pair* left = a + r * (kLeftColumns<Bf16Pair> / 2);
      float* to = c + r * kTileColumns<Bf16Pair>;
      if (vectors == 3) multiply_registers<3>(part, left, a_panel, row, add || d > 0, to);
      else if (vectors == 2) multiply_registers<2>(part, left, a_panel, row, add || d > 0, to);
      else multiply_registers<1>(part, left, a_panel, row, add || d > 0, to);
      between();
    }
    d += kDepthBlock;
    a += kDepthBlock / 32 * a_panel;
  } while (d < depth);
}
#else
class TileRegisters {
 public:
  TileRegisters() {}
};
template <class... Arguments> void multiply_rows_amx(Arguments...) = delete;
#endif

// Factors of a tile's rows for C += gain A B. Static, because two versions of the module in one process would otherwise
// share the array.
template <class R>
static constexpr R kOnes[] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

struct NoCallback {
  MEGALODON_INLINE void operator()() const {}
};
// Multiplies `rows` rows of A = M by one panel of B: C = gain A B, or C += gain A B with `add`, which with AMX requires
// a gain of 1. The first tile prefetches part `tile` of `ahead`. between() is called after every tile.
template <class U, class Between = NoCallback>
void multiply_rows(int vectors, int64_t rows, int64_t depth, const U* a, int64_t a_panel, const U* b, SumOf<U> gain,
                   bool add, SumOf<U>* c, Ahead<U> ahead = {}, int64_t tile = 0, Between&& between = {}) {
  using R = SumOf<U>;
  constexpr int kColumns = kTileColumns<U>;
  if constexpr (kUsesAmx<U>) {
    multiply_rows_amx(vectors, rows, depth, a, a_panel, b, add, c, between);
    if (gain != 1)
      for (R* at = c; at < c + round_up(rows, kTileRows<U>) * kColumns; at += kLanes<R>)
        store(at, gain * load(static_cast<const R*>(at)));
  } else {
    for (int64_t r = 0; r < rows; ++tile) {
      const int64_t now = tile_rows<U>(vectors, rows - r);
      multiply_tile<false>(vectors, now, depth, a + r * Packed<U>::kRowUnits, a_panel, b, gain,
                           add ? kOnes<R> : nullptr, c + r * kColumns, ahead.part(tile));
      between();
      r += now;
    }
  }
}

}  // namespace megalodon::MEGALODON_ISA

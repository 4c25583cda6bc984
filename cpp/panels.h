// Packing of rows that lie anywhere into the panels of gemm.h, and back.
//
// `row(r)` points to row r, a row of `columns` elements of T, or is null where the row counts as zero. Packed matrices
// are written up to the edge that products read: columns to a whole vector, rows to whatever range is asked for.
#pragma once

#include <utility>

#include "gemm.h"
#include "parallel.h"

namespace megalodon::MEGALODON_ISA {

// A packed matrix with memory of its own.
template <class U>
struct PackedMatrix : private Scratch<U>, public Packed<U> {
  PackedMatrix(int64_t rows, int64_t columns)
      : Scratch<U>(Packed<U>::size(round_up(rows, kTileRows), columns)),
        Packed<U>{Scratch<U>::get(), round_up(rows, kTileRows)} {}
};

#if defined(__clang__)
#define MEGALODON_SHUFFLE_(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MEGALODON_SHUFFLE_(a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

// Exchanges the blocks of `step` lanes off the diagonal: the high one of a with the low one of b.
template <int step, class V, int... lane>
MEGALODON_INLINE void exchange_blocks(V& a, V& b, std::integer_sequence<int, lane...>) {
  constexpr int n = sizeof...(lane);
  using Index [[maybe_unused]] = typename VecOf<std::conditional_t<sizeof(V) / n == 8, int64_t, int32_t>, n>::type;
  const V low = MEGALODON_SHUFFLE_(a, b, (lane & step ? n + lane - step : lane)...);
  b = MEGALODON_SHUFFLE_(a, b, (lane & step ? n + lane : lane + step)...);
  a = low;
}
#undef MEGALODON_SHUFFLE_

// Transposes a square of kLanes<R> vectors.
template <class R, int step = kLanes<R> / 2>
MEGALODON_INLINE void transpose(Vec<R> (&row)[kLanes<R>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<R>; ++i)
    if (!(i & step)) exchange_blocks<step>(row[i], row[i + step], std::make_integer_sequence<int, kLanes<R>>{});
  if constexpr (step > 1) transpose<R, step / 2>(row);
}

// kLanes units of a row that has n elements left, n > 0; beyond them is zero.
template <class T>
MEGALODON_INLINE Vec<Compute<T>> load_units(const T* from, int64_t n) {
  if constexpr (kUnitDepth<Unit<T>> == 1) {
    return load_first(from, n);
  } else {
    T buffer[kVectorBytes / sizeof(T)] = {};
    if (n * static_cast<int64_t>(sizeof(T)) < kVectorBytes) {
      std::memcpy(buffer, from, static_cast<size_t>(n) * sizeof(T));
      from = buffer;
    }
    return load_raw<Vec<float>>(from);
  }
}

// Calls body(where, column) for every vector of a row of a packed matrix, seen as elements of E.
template <class E, class U, class Body>
MEGALODON_INLINE void for_each_vector(Packed<U> matrix, int64_t row, int64_t columns, Body&& body) {
  for (int64_t panel = 0, first = 0; first < columns; ++panel, first += kTileColumns<U>) {
    E* at = reinterpret_cast<E*>(matrix.at(panel, row));
    for (int64_t c = 0; c < kTileColumns<U> && first + c < columns; c += kLanes<SumOf<U>>) body(at + c, first + c);
  }
}

// Rows [begin, end) in the format for A = M.
template <class T, class RowAt>
void pack_by_columns(int64_t begin, int64_t end, int64_t columns, RowAt&& row, Packed<Unit<T>> to) {
  using Element = std::conditional_t<kUnitDepth<Unit<T>> == 1, Unit<T>, T>;
  for (int64_t r = begin; r < end; ++r) {
    const T* from = row(r);
    for_each_vector<Element>(to, r, columns, [&](Element* at, int64_t c) {
      store(at, from ? load_first(from + c, columns - c) : zeros<Compute<T>>());
    });
  }
}

// Rows [begin, end) in the format for A = M^T and for B. Where rows are paired both bounds are even.
template <class T, class RowAt>
void pack_by_rows(int64_t begin, int64_t end, int64_t columns, RowAt&& row, Packed<Unit<T>> to) {
  using U = Unit<T>;
  if constexpr (kUnitDepth<U> == 1) {
    pack_by_columns<T>(begin, end, columns, row, to);
  } else {
    for (int64_t r = begin; r < end; r += 2) {
      const T *even = row(r), *odd = row(r + 1);
      for_each_vector<U>(to, r, columns, [&](U* at, int64_t c) {
        const Bits low = even ? bit_cast<Bits>(load_first(even + c, columns - c)) >> 16 : Bits{};
        const Bits high = odd ? bit_cast<Bits>(load_first(odd + c, columns - c)) : Bits{};
        store_raw(at, low | high);
      });
    }
  }
}

// The transpose of the rows [begin, end), in the format for B: row r becomes column r, the columns become the depth.
// begin is a multiple of the vector.
template <class T, class RowAt>
void pack_transposed(int64_t begin, int64_t end, int64_t columns, RowAt&& row, Packed<Unit<T>> to) {
  using U = Unit<T>;
  using R = Compute<T>;
  constexpr int kSide = kLanes<R>, kStep = kSide * kUnitDepth<U>;
  for (int64_t r = begin; r < end; r += kSide) {
    U* out = to.at(r / kTileColumns<U>, 0) + r % kTileColumns<U>;
    const T* from[kSide];
    bool whole = true;
    for (int i = 0; i < kSide; ++i) {
      from[i] = r + i < end ? row(r + i) : nullptr;
      whole = whole && from[i];
    }
    int64_t c = 0;
    Vec<R> square[kSide];
    for (; whole && c + kStep <= columns; c += kStep, out += kSide * kTileColumns<U>) {
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) square[i] = load_units(from[i] + c, kStep);
      transpose<R>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) store_raw(out + i * kTileColumns<U>, square[i]);
    }
    for (; c < columns; c += kStep, out += kSide * kTileColumns<U>) {
      for (int i = 0; i < kSide; ++i) square[i] = from[i] ? load_units(from[i] + c, columns - c) : zeros<R>();
      transpose<R>(square);
      for (int i = 0; i < kSide && i < ceil_div(columns - c, kUnitDepth<U>); ++i)
        store_raw(out + i * kTileColumns<U>, square[i]);
    }
  }
}

// Row `row` of sums, times gain, to `to`.
template <class T>
void unpack_row(Packed<Compute<T>> from, int64_t row, int64_t columns, Compute<T> gain, T* to) {
  using R = Compute<T>;
  for (int64_t panel = 0, first = 0; first < columns; ++panel, first += kTileColumns<R>) {
    const R* at = from.at(panel, row);
    for (int64_t c = 0; c < kTileColumns<R> && first + c < columns; c += kLanes<R>)
      store_first(to + first + c, gain * load(at + c), columns - first - c);
  }
}

}  // namespace megalodon::MEGALODON_ISA

// Packing of rows at arbitrary addresses into the panels of gemm.h, and unpacking; for attention and linear layers.
//
// A caller passes a function row(r), which returns the address of row r, of `columns` elements of T, or null for a row
// of zeros. Packing writes only the rows [begin, end), but pads their columns with zeros as far as products read: to a
// whole vector or, if the depth runs along the columns, to kDepthStep. `watch`, a Finiteness, sees all packed elements.
#pragma once

#include <utility>

#include "gemm.h"
#include "huge_pages.h"
#include "parallel.h"

namespace megalodon::MEGALODON_ISA {

// holds() returns true if all elements passed to see() were finite. The class keeps the maximum of the elements' bits
// without the sign.
template <class T>
class Finiteness {
  static constexpr bool kPairs = kUnitDepth<Unit<T>> == 2, kDouble = sizeof(T) == 8;
  using Word = std::conditional_t<kPairs, uint16_t, uint32_t>;
  static constexpr int kWords = kVectorBytes / static_cast<int>(sizeof(Word));
  using Words = typename VecOf<Word, kWords>::type;

 public:
  template <class V>
  MEGALODON_INLINE void see(V elements) {
    Words mask;
    for (int i = 0; i < kWords; ++i) mask[i] = kDouble && i % 2 == 0 ? 0 : static_cast<Word>(~Word{}) >> 1;
    const Words magnitude = bit_cast<Words>(elements) & mask;
    largest_ = magnitude > largest_ ? magnitude : largest_;
  }
  bool holds() const {
    constexpr Word kInfinity = kPairs ? 0x7f80 : kDouble ? 0x7ff00000 : 0x7f800000;  // for a double: of its upper half
    for (int i = 0; i < kWords; ++i)
      if (largest_[i] >= kInfinity) return false;
    return true;
  }

 private:
  Words largest_{};
};
struct NoWatch {
  template <class V>
  MEGALODON_INLINE void see(V) const {}
};

// A packed matrix that owns its memory.
template <class U, int kColumns = kTileColumns<U>>
struct PackedMatrix : private Scratch<U>, public Packed<U, kColumns> {
  PackedMatrix(int64_t rows, int64_t columns)
      : Scratch<U>(Packed<U, kColumns>::size(round_up(rows, kRowPadding), columns)),
        Packed<U, kColumns>{Scratch<U>::get(), round_up(rows, kRowPadding)} {
    advise_huge_pages(this->data, static_cast<size_t>(this->size(this->rows, columns)) * sizeof(U));
  }
};
template <class U> using PackedLeftMatrix = PackedMatrix<U, kLeftColumns<U>>;

#if defined(__clang__)
#define MEGALODON_SHUFFLE_(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MEGALODON_SHUFFLE_(a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

// Exchanges each odd block of `step` lanes of `a` with the even block of `b` to its left.
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

// Lane i of the result is the sum of the lanes of row[i], bit-equal to sum_lanes(). The rows are overwritten.
template <class R, int step = kLanes<R> / 2>
MEGALODON_INLINE Vec<R> sum_rows(Vec<R> (&row)[kLanes<R>]) {
#pragma GCC unroll 8
  for (int i = 0; i < step; ++i) {
    exchange_blocks<step>(row[i], row[i + step], std::make_integer_sequence<int, kLanes<R>>{});
    row[i] += row[i + step];
  }
  if constexpr (step > 1) return sum_rows<R, step / 2>(row);
  else return row[0];
}

// Loads kLanes units of a row that has n elements left, with zeros beyond the n.
template <class T>
MEGALODON_INLINE Vec<Compute<T>> load_units(const T* from, int64_t n) {
  if constexpr (kUnitDepth<Unit<T>> == 1) {
    return load_first(from, n);
  } else {
    T buffer[kVectorBytes / sizeof(T)] = {};
    if (n * static_cast<int64_t>(sizeof(T)) < kVectorBytes) {
      if (n > 0) std::memcpy(buffer, from, static_cast<size_t>(n) * sizeof(T));
      from = buffer;
    }
    return load_raw<Vec<float>>(from);
  }
}

// Calls body(pointer, column) for every vector of a row of a packed matrix, as elements of E.
template <class E, class U, int kColumns, class Body>
MEGALODON_INLINE void for_each_vector_of_row(Packed<U, kColumns> matrix, int64_t row, int64_t columns, Body&& body) {
  for (int64_t panel = 0, first = 0; first < columns; ++panel, first += kColumns) {
    E* at = reinterpret_cast<E*>(matrix.at(panel, row));
    for (int64_t c = 0; c < kColumns && first + c < columns; c += kLanes<SumOf<U>>) body(at + c, first + c);
  }
}

// Packs rows [begin, end) in the format for A = M.
template <class T, class RowAt, class Watch = NoWatch>
void pack_by_columns(int64_t begin, int64_t end, int64_t columns, RowAt&& row, PackedLeft<Unit<T>> to,
                     Watch&& watch = {}) {
  using U = Unit<T>;
  using Element = std::conditional_t<kUnitDepth<U> == 1, U, T>;
  for (int64_t r = begin; r < end; ++r) {
    const T* from = row(r);
    for_each_vector_of_row<Element>(to, r, round_up(columns, kDepthStep<U>), [&](Element* at, int64_t c) {
      const auto elements = from && c < columns ? load_first(from + c, columns - c) : zeros<Compute<T>>();
      watch.see(elements);
      store(at, elements);
    });
  }
}

// Elements of two rows as pairs; a null row counts as zero.
template <class T>
MEGALODON_INLINE Bits load_pairs(const T* even, const T* odd, int64_t n) {
  const Bits low = even ? bit_cast<Bits>(load_first(even, n)) >> 16 : Bits{};
  return odd ? low | bit_cast<Bits>(load_first(odd, n)) : low;
}

// Packs rows [begin, end) in the format for A = M^T and for B. If rows are paired, both bounds are even.
template <class T, class RowAt, class Watch = NoWatch>
void pack_by_rows(int64_t begin, int64_t end, int64_t columns, RowAt&& row, Packed<Unit<T>> to, Watch&& watch = {}) {
  using U = Unit<T>;
  if constexpr (kUnitDepth<U> == 1) {
    pack_by_columns<T>(begin, end, columns, row, to, watch);
  } else {
    for (int64_t r = begin; r < end; r += 2) {
      const T *even = row(r), *odd = row(r + 1);
      for_each_vector_of_row<U>(to, r, columns, [&](U* at, int64_t c) {
        const Bits pairs = load_pairs(even ? even + c : even, odd ? odd + c : odd, columns - c);
        watch.see(pairs);
        store_raw(at, pairs);
      });
    }
  }
}

// Packs the transpose of the rows [begin, end) in the format for B: row r becomes column r, the columns become the
// depth. begin is a multiple of kLanes.
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
      for (int i = 0; i < kSide && i < ceil_div(round_up(columns, kDepthStep<U>) - c, kUnitDepth<U>); ++i)
        store_raw(out + i * kTileColumns<U>, square[i]);
    }
  }
}

// Packs the transpose of the rows [begin, end) in the format for A = M: columns become rows. begin is a multiple of
// kDepthStep; rows from end to the next multiple count as zero.
template <class T, class RowAt, class Watch = NoWatch>
void pack_transposed_left(int64_t begin, int64_t end, int64_t columns, RowAt&& row, PackedLeft<Unit<T>> to,
                          Watch&& watch = {}) {
  static_assert(kUsesAmx<Unit<T>>);
  constexpr int kSide = kLanes<float>;
  for (int64_t r = begin; r < end; r += kDepthStep<Unit<T>>) {
    for (int64_t c = 0; c < columns; c += kSide) {
      Vec<float> square[kSide];
      for (int i = 0; i < kSide; ++i) {
        const int64_t even = r + 2 * i, odd = even + 1;
        const T *low = even < end ? row(even) : nullptr, *high = odd < end ? row(odd) : nullptr;
        const Bits pairs = load_pairs(low ? low + c : low, high ? high + c : high, columns - c);
        watch.see(pairs);
        square[i] = bit_cast<Vec<float>>(pairs);
      }
      transpose<float>(square);
      for (int i = 0; i < kSide; ++i) store_raw(to.at(r / kDepthStep<Unit<T>>, c + i), square[i]);
    }
  }
}

// Return an element of a packed matrix: element_by_rows() in the format for A = M^T and B, element_by_columns() in the
// format for A = M.
template <class U, int kColumns>
MEGALODON_INLINE SumOf<U> element_by_rows(Packed<U, kColumns> matrix, int64_t row, int64_t column) {
  const int64_t panel = column / kColumns, at = column % kColumns;
  if constexpr (kUnitDepth<U> == 1) return matrix.at(panel, row)[at];
  else return widen(reinterpret_cast<const bf16*>(matrix.at(panel, row / 2 * 2))[2 * at + row % 2]);
}
template <class U>
MEGALODON_INLINE SumOf<U> element_by_columns(PackedLeft<U> matrix, int64_t row, int64_t column) {
  const int64_t panel = column / kLeftColumns<U>, at = column % kLeftColumns<U>;
  if constexpr (kUnitDepth<U> == 1) return matrix.at(panel, row)[at];
  else return widen(reinterpret_cast<const bf16*>(matrix.at(panel, row))[at]);
}

// Adds weight times the row `from` of `columns` elements to row `row` of `sums`, but only in panel `panel`.
template <class T, class R = Compute<T>>
void add_to_row(Packed<R> sums, int64_t panel, int64_t row, R weight, const T* from, int64_t columns) {
  const int64_t first = panel * kTileColumns<R>;
  const int64_t n = columns - first < kTileColumns<R> ? columns - first : kTileColumns<R>;
  R* to = sums.at(panel, row);
  for (int64_t c = 0; c < n; c += kLanes<R>)
    store(to + c, load(static_cast<const R*>(to) + c) + weight * load_first(from + first + c, n - c));
}

// Adds weight times the `rows` elements at `from` to column `column` of `sums`.
template <class T, class R = Compute<T>>
void add_to_column(Packed<R> sums, int64_t column, R weight, const T* from, int64_t rows) {
  R* to = sums.at(column / kTileColumns<R>, 0) + column % kTileColumns<R>;
  for (int64_t r = 0; r < rows; r += kLanes<R>) {
    const Vec<R> part = load_first(from + r, rows - r);
    for (int i = 0; i < kLanes<R> && r + i < rows; ++i) to[(r + i) * kTileColumns<R>] += weight * part[i];
  }
}

// Writes row `row` of `from`, times gain, to `to`.
template <class T>
void unpack_row(Packed<Compute<T>> from, int64_t row, int64_t columns, Compute<T> gain, T* to) {
  using R = Compute<T>;
  for (int64_t panel = 0, first = 0; first < columns; ++panel, first += kTileColumns<R>) {
    const R* at = from.at(panel, row);
    for (int64_t c = 0; c < kTileColumns<R> && first + c < columns; c += kLanes<R>)
      store_first(to + first + c, gain * load(at + c), columns - first - c);
  }
}

// Writes column `column` + i of `from`, times gain[i], to row(i) for i < n, unless row(i) is null. `column` is a
// multiple of kLanes; n <= kLanes.
template <class T, class RowAt>
void unpack_columns(Packed<Compute<T>> from, int64_t column, int64_t n, int64_t rows, Vec<Compute<T>> gain,
                    RowAt&& row) {
  using R = Compute<T>;
  constexpr int kSide = kLanes<R>;
  const R* at = from.at(column / kTileColumns<R>, 0) + column % kTileColumns<R>;
  T* to[kSide];
  for (int i = 0; i < n; ++i) to[i] = row(i);
  for (int64_t r = 0; r < rows; r += kSide, at += kSide * kTileColumns<R>) {
    Vec<R> square[kSide];
    for (int i = 0; i < kSide; ++i) square[i] = r + i < rows ? gain * load(at + i * kTileColumns<R>) : zeros<R>();
    transpose<R>(square);
    for (int i = 0; i < n; ++i)
      if (to[i]) store_first(to[i] + r, square[i], rows - r);
  }
}

}  // namespace megalodon::MEGALODON_ISA

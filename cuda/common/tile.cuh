// Tiles of 16-bit elements in shared memory, and copies between them and the fragments of mma_16816.
//
// The rows of a tile are cut into units of 8 elements (16 bytes). Unit u of row r is stored in the place of unit u ^
// (r % 8). So 8 neighbouring units of a row are in different banks, and so are the units u of 8 neighbouring rows:
// neither copies nor ldmatrix have bank conflicts. Kernels address elements by (row, column).
//
// Fragments, each loaded by a whole warp (layouts: matrix.cuh):
//   load_a       A (16 x 16)       A[i][k] = tile[row + i][column + k]
//   load_a_trans                   A[i][k] = tile[row + k][column + i]
//   load_b       two B (16 x 8)    B_n[k][j] = tile[row + 8 n + j][column + k]       for X Y^T, tile = Y
//   load_b_trans                   B_n[k][j] = tile[row + k][column + 8 n + j]       for X Y,   tile = Y
//   store_d      D (16 x 8)        tile[row + i][column + j] = D[i][j]
//   to_a         A (16 x 16) from two D (16 x 8) side by side, without shared memory
// In the emulator, check_a and check_b compare each loaded fragment with the elements of the tile at once.
// Rows and columns are multiples of 8.
#pragma once

#include "async.cuh"
#include "matrix.cuh"
#include "vec.cuh"

namespace gpu {

template <class T>
class Tile {
  static_assert(sizeof(T) == 2);

 public:
  static constexpr int kUnit = 8, kBlock = 64;  // elements; units are permuted inside a block

  // Row stride, in elements, of a tile whose rows have `width` elements.
  MEGALODON_INLINE static constexpr int pitch(int width) { return (width + kBlock - 1) / kBlock * kBlock; }

  // The tile takes rows * pitch(width) elements from `data` on. The address `data` is a multiple of 128.
  GPU_INLINE Tile(T* data, int width) : data_(data), pitch_(pitch(width)) {}

  // Address of the 8 elements of `row` from `column` on.
  GPU_INLINE T* unit(int row, int column) const {
    const unsigned r = static_cast<unsigned>(row), u = static_cast<unsigned>(column) / kUnit;
    return data_ + row * pitch_ + u / 8 * kBlock + (u % 8 ^ r % 8) * kUnit;
  }

  // Address of one element.
  GPU_INLINE const T* at(int row, int column) const { return unit(row, column) + column % kUnit; }

  // The tile without its first `column` columns, a multiple of kBlock.
  GPU_INLINE Tile from(int column) const {
    Tile tile = *this;
    tile.data_ += column;
    return tile;
  }

  // Fills the rows [0, rows). Row r gets the elements [0, valid) from row_of(r), an address in global memory, and zeros
  // in the columns [valid, width); a null row_of(r) gives zeros alone. `width` is a multiple of 8. All threads of the
  // block call load(); other threads see a copy after a barrier.
  // kWhole: load() uses cp.async, and the caller commits and waits; `valid` is a multiple of 8, and addresses are
  // multiples of 16. Otherwise load() copies element by element and is done on return.
  template <bool kWhole, class RowOf>
  GPU_INLINE void load(int rows, int width, int valid, RowOf&& row_of) const {
    // 8 threads share a row; each takes every 8th unit.
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int first = thread % 8 * kUnit;
    for (int row = thread / 8; row < rows; row += threads / 8) {
      const T* const from = row_of(row);
      T* const to = unit(row, first) - first;
      const int count = from ? valid : 0;
      for (int column = first; column < width; column += kBlock) {
        if (kWhole && column < count) {
          cp_async<16>(to + column, from + column);
        } else {
          Pack<T, kUnit> pack{};
          GPU_UNROLL
          for (int e = 0; e < kUnit; ++e)
            if (!kWhole && column + e < count) pack.element[e] = from[column + e];
          st_shared(to + column, pack);
        }
      }
    }
  }

  GPU_INLINE void load_a(uint32_t (&a)[4], int row, int column) const {
    ldmatrix(a, unit(row + lane() % 16, column + lane() / 16 * kUnit));
    check_a<T>(a, [&](int i, int k) { return at(row + i, column + k); });
  }

  GPU_INLINE void load_a_trans(uint32_t (&a)[4], int row, int column) const {
    ldmatrix_trans(a, unit(row + lane() % 8 + lane() / 16 * 8, column + lane() / 8 % 2 * kUnit));
    check_a<T>(a, [&](int i, int k) { return at(row + k, column + i); });
  }

  GPU_INLINE void load_b(uint32_t (&b)[2][2], int row, int column) const {
    uint32_t r[4];
    ldmatrix(r, unit(row + lane() % 8 + lane() / 16 * 8, column + lane() / 8 % 2 * kUnit));
    set(b, r);
    for (int n = 0; n < 2; ++n) check_b<T>(b[n], [&](int k, int j) { return at(row + 8 * n + j, column + k); });
  }

  GPU_INLINE void load_b_trans(uint32_t (&b)[2][2], int row, int column) const {
    uint32_t r[4];
    ldmatrix_trans(r, unit(row + lane() % 16, column + lane() / 16 * kUnit));
    set(b, r);
    for (int n = 0; n < 2; ++n) check_b<T>(b[n], [&](int k, int j) { return at(row + k, column + 8 * n + j); });
  }

  GPU_INLINE void store_d(const float (&d)[4], int row, int column) const {
    GPU_UNROLL
    for (int i = 0; i < 2; ++i)
      st_shared(unit(row + lane() / 4 + 8 * i, column) + lane() % 4 * 2, pack2<T>(d[2 * i], d[2 * i + 1]));
  }

 private:
  GPU_INLINE int lane() const { return static_cast<int>(threadIdx.x % kWarp); }
  GPU_INLINE void set(uint32_t (&b)[2][2], const uint32_t (&r)[4]) const {
    GPU_UNROLL
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = r[i];
  }

  T* data_;
  int pitch_;
};

// A = [left right], rounded to T.
template <class T>
GPU_INLINE void to_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  GPU_UNROLL
  for (int i = 0; i < 2; ++i) {
    a[i] = pack2<T>(left[2 * i], left[2 * i + 1]);
    a[2 + i] = pack2<T>(right[2 * i], right[2 * i + 1]);
  }
}

}  // namespace gpu

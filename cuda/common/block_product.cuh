// Products of matrices by a block of threads: D += A B. D is in registers; A and B are in slabs of shared memory.
//
//   TensorProduct<T, kVectors>   T = bf16 or fp16, on tensor cores; kVectors: rows can be read as 16-byte vectors
//   PlainProduct<R>              R = float or double, by multiply-adds, for arbitrary alignment
//
// D is kEdge x kEdge. A thread holds kMicro x kMicro elements of D: at(r, c) is the element (row(r), column(c)). The
// threads that hold elements of one row of D are numbered by slot(), 0 .. kSlots - 1.
// A slab holds an operand at kDepth indices of the inner dimension, in one of two layouts:
//   the operand's rows run along the inner dimension (A, B^T): kEdge rows of kDepth elements
//   they run across it ("by depth": A^T, B):                   kDepth rows of kEdge elements
//
//   load()      fills a slab; the caller commits the copies and waits for them. Row r of the slab gets `valid` elements
//               from row_of(r), an address in global memory, then zeros; a null row_of(r) gives zeros alone.
//               row_of.anywhere() is an arbitrary aligned address in global memory.
//   multiply()  adds a slab's product to D. It skips terms beyond `depth` and elements beyond `rows` and `columns`
//               where that is cheap.
//   store()     writes the columns [0, valid) of row r of D to row_of(r), unless row_of(r) is null
//   replace()   replaces each element x of a slab by f(x)
//   pipeline()  loads and multiplies all slabs; kStages - 1 slabs are being loaded at a time
#pragma once

#include "tile.cuh"

namespace gpu {

template <class T_, bool kVectors_>
struct TensorProduct {
  using T = T_;
  using R = float;
  static constexpr bool kVectors = kVectors_;
  static constexpr int kThreads = 256, kEdge = 128, kDepth = 64, kMicro = 8, kSlots = 16;
  static constexpr int kSlab = kEdge * kDepth;            // elements
  static constexpr int kWarpRows = 64, kWarpColumns = 32;  // a warp's part of D; there are 2 x 4 parts
  static_assert(kThreads / kWarp == kEdge / kWarpRows * (kEdge / kWarpColumns));

  struct Sum {
    float tile[4][4][4] = {};  // 16 x 8 each
    GPU_INLINE float& at(int r, int c) { return tile[r / 2][c / 2][r % 2 * 2 + c % 2]; }
    GPU_INLINE float at(int r, int c) const { return tile[r / 2][c / 2][r % 2 * 2 + c % 2]; }
  };

  GPU_INLINE static int lane() {
    return static_cast<int>(threadIdx.x % kWarp);
  }
  GPU_INLINE static int warp_row() {
    return static_cast<int>(threadIdx.x / kWarp / 4) * kWarpRows;
  }
  GPU_INLINE static int warp_column() {
    return static_cast<int>(threadIdx.x / kWarp % 4) * kWarpColumns;
  }
  GPU_INLINE static int row(int r) {
    return warp_row() + r / 2 * 16 + r % 2 * 8 + lane() / 4;
  }
  GPU_INLINE static int column(int c) {
    return warp_column() + c / 2 * 8 + lane() % 4 * 2 + c % 2;
  }
  GPU_INLINE static int slot() {
    return static_cast<int>(threadIdx.x / kWarp % 4) * 4 + lane() % 4;
  }

  // kWhole: the rows at row_of(r) consist of 16-byte vectors; this can hold even if kVectors is false.
  template <bool kByDepth, bool kWhole = kVectors, class RowOf>
  GPU_INLINE static void load(T* slab, int64_t valid, RowOf&& row_of) {
    constexpr int rows = kByDepth ? kDepth : kEdge, width = kByDepth ? kEdge : kDepth, units = width / Tile<T>::kUnit;
    const Tile<T> tile(slab, width);
    if constexpr (!kWhole) {
      tile.template load<false>(rows, width, static_cast<int>(valid < width ? valid : width), row_of);
    } else {
      // A thread copies the same unit of each of its rows. The rows are a multiple of 8 apart, so the unit has the same
      // place in all of them (tile.cuh).
      constexpr int step = kThreads / units;
      static_assert(step % 8 == 0);
      const int first = static_cast<int>(threadIdx.x / units), column = threadIdx.x % units * Tile<T>::kUnit;
      const bool inside = column < valid;
      T* const to = tile.unit(first, column);
      _Pragma("unroll 2")  // unrolling this loop or that of multiply() further needs more registers
      for (int r = 0; r < rows; r += step) {
        const T* from = row_of(first + r);
        const bool live = from && inside;
        cp_async<16>(to + r * width, live ? from + column : row_of.anywhere(), live ? 16 : 0);
      }
    }
  }

  template <bool kAByDepth, bool kBByDepth>
  GPU_INLINE static void multiply(Sum& d, const T* a_slab, const T* b_slab, int64_t depth, int64_t rows,
                                  int64_t columns) {
    if (warp_row() >= rows || warp_column() >= columns) return;
    // ldmatrix loads four 8 x 8 matrices, arranged 2 x 2. Each lane gives it the address of one of their 32 rows, at
    // row `major` and column `minor` for matrices in column-major order, at (across, along) for row-major order.
    const int major = lane() % 16, minor = lane() / 16 * 8, across = lane() % 8 + minor, along = lane() / 8 % 2 * 8;
    const int a_at = kAByDepth ? place(a_slab, kEdge, across, warp_row() + along)
                               : place(a_slab, kDepth, warp_row() + major, minor);
    const int b_at = kBByDepth ? place(b_slab, kEdge, major, warp_column() + minor)
                               : place(b_slab, kDepth, warp_column() + across, along);
    const int steps = static_cast<int>(depth < kDepth ? depth : kDepth);
    _Pragma("unroll 1")  // unrolled, it needs more registers than two blocks per SM have
    for (int k = 0; k < steps; k += 16) {
      uint32_t b[2][4];
      GPU_UNROLL
      for (int j = 0; j < 2; ++j) {
        if constexpr (kBByDepth) ldmatrix_trans(b[j], b_slab + ((b_at + k * kEdge) ^ (16 * j)));
        else ldmatrix(b[j], b_slab + (b_at ^ k) + 16 * j * kDepth);
      }
      GPU_UNROLL
      for (int i = 0; i < 4; ++i) {
        uint32_t a[4];
        if constexpr (kAByDepth) ldmatrix_trans(a, a_slab + ((a_at + k * kEdge) ^ (16 * i)));
        else ldmatrix(a, a_slab + (a_at ^ k) + 16 * i * kDepth);
        check_a<T>(a, [&](int r, int c) { return element<kAByDepth>(a_slab, warp_row() + 16 * i + r, k + c); });
        GPU_UNROLL
        for (int j = 0; j < 4; ++j) {
          const uint32_t right[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          check_b<T>(right, [&](int r, int c) { return element<kBByDepth>(b_slab, warp_column() + 8 * j + c, k + r); });
          mma_16816<T>(d.tile[i][j], a, right);
        }
      }
    }
  }

  template <class F>
  GPU_INLINE static void replace(T* slab, F&& f) {
    constexpr int width = kVectorWidth<T>;
    _Pragma("unroll 1")
    for (int i = static_cast<int>(threadIdx.x) * width; i < kSlab; i += kThreads * width) {
      R x[width];
      load_shared(x, slab + i);
      GPU_UNROLL
      for (int e = 0; e < width; ++e) x[e] = f(x[e]);
      store_shared(slab + i, x);
    }
  }

  template <bool kWhole = kVectors, class RowOf>
  GPU_INLINE static void store(const Sum& d, int64_t valid, RowOf&& row_of) {
    GPU_UNROLL
    for (int r = 0; r < kMicro; ++r) {
      T* to = row_of(row(r));
      if constexpr (kWhole) {
        uint32_t word[4];
        GPU_UNROLL
        for (int j = 0; j < 4; ++j) word[j] = pack2<T>(d.at(r, 2 * j), d.at(r, 2 * j + 1));
        transpose(word);
        const int first = warp_column() + lane() % 4 * 8;
        if (to && first < valid) st(to + first, Pack<uint32_t, 4>{{word[0], word[1], word[2], word[3]}});
      } else if (to) {
        GPU_UNROLL
        for (int c = 0; c < kMicro; ++c)
          if (column(c) < valid) to[column(c)] = from_real<T>(d.at(r, c));
      }
    }
  }

 private:
  // Returns the offset, in a slab, of the unit that begins at (row, column). Rows that are 16 apart have their units in
  // the same order. The unit at (row, column ^ 16 j), j < 4, is at this offset ^ 16 j.
  GPU_INLINE static int place(const T* slab, int width, int row, int column) {
    return static_cast<int>(Tile<T>(const_cast<T*>(slab), width).unit(row, column) - slab);
  }

  // Returns the address of an operand's element at depth k of a line, that is, of a row of A or a column of B.
  template <bool kByDepth>
  GPU_INLINE static const T* element(const T* slab, int line, int k) {
    const Tile<T> tile(const_cast<T*>(slab), kByDepth ? kEdge : kDepth);
    return kByDepth ? tile.at(k, line) : tile.at(line, k);
  }

  // Transposes the words of four neighbouring lanes: word j of lane i becomes word i of lane j. A lane then has 8
  // neighbouring elements.
  GPU_INLINE static void transpose(uint32_t (&word)[4]) {
    GPU_UNROLL
    for (int distance = 1; distance <= 2; distance *= 2) {
      const bool upper = lane() & distance;
      GPU_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (j & distance) continue;
        const uint32_t low = word[j], high = word[j + distance];
        const uint32_t other = __shfl_xor_sync(kFullMask, upper ? low : high, distance);
        word[j] = upper ? other : low;
        word[j + distance] = upper ? high : other;
      }
    }
  }
};

template <class R_>
struct PlainProduct {
  using T = R_;
  using R = R_;
  static constexpr bool kVectors = false;
  static constexpr int kThreads = 256, kMicro = 32 / sizeof(R), kEdge = 16 * kMicro, kDepth = 16, kSlots = 16;
  static constexpr int kPitch = kEdge + 8 / sizeof(R);  // row k of a slab begins at element k * kPitch
  static constexpr int kSlab = kDepth * kPitch;

  struct Sum {
    R element[kMicro][kMicro] = {};
    GPU_INLINE R& at(int r, int c) { return element[r][c]; }
    GPU_INLINE R at(int r, int c) const { return element[r][c]; }
  };

  GPU_INLINE static int row(int r) {
    return static_cast<int>(threadIdx.x / 16) + 16 * r;
  }
  GPU_INLINE static int column(int c) {
    return slot() + 16 * c;
  }
  GPU_INLINE static int slot() {
    return static_cast<int>(threadIdx.x % 16);
  }

  template <bool kByDepth, bool = true, class RowOf>  // kWhole has no effect here, nor in store()
  GPU_INLINE static void load(R* slab, int64_t valid, RowOf&& row_of) {
    constexpr int rows = kByDepth ? kDepth : kEdge, width = kByDepth ? kEdge : kDepth;
    for (int i = threadIdx.x; i < rows * width; i += kThreads) {
      const int row = i / width, column = i % width;
      R* to = slab + (kByDepth ? row * kPitch + column : column * kPitch + row);
      const R* from = column < valid ? row_of(row) : nullptr;
      if (from) cp_async<sizeof(R)>(to, from + column);
      else *to = 0;
    }
  }

  template <bool kAByDepth, bool kBByDepth>
  GPU_INLINE static void multiply(Sum& d, const R* a_slab, const R* b_slab, int64_t depth, int64_t rows,
                                  int64_t columns) {
    const int steps = static_cast<int>(depth < kDepth ? depth : kDepth);
    if (rows >= kEdge && columns >= kEdge) multiply_steps<true>(d, a_slab, b_slab, steps, rows, columns);
    else multiply_steps<false>(d, a_slab, b_slab, steps, rows, columns);
  }

  template <class F>
  GPU_INLINE static void replace(R* slab, F&& f) {
    for (int i = threadIdx.x; i < kDepth * kEdge; i += kThreads) {
      R& x = slab[i / kEdge * kPitch + i % kEdge];
      x = f(x);
    }
  }

  template <bool = true, class RowOf>
  GPU_INLINE static void store(const Sum& d, int64_t valid, RowOf&& row_of) {
    GPU_UNROLL
    for (int r = 0; r < kMicro; ++r) {
      R* to = row_of(row(r));
      GPU_UNROLL
      for (int c = 0; c < kMicro; ++c)
        if (to && column(c) < valid) to[column(c)] = d.at(r, c);
    }
  }

 private:
  template <bool kFull>
  GPU_INLINE static void multiply_steps(Sum& d, const R* a, const R* b, int steps, int64_t rows, int64_t columns) {
    for (int k = 0; k < steps; ++k, a += kPitch, b += kPitch) {
      R right[kMicro];
      GPU_UNROLL
      for (int c = 0; c < kMicro; ++c) right[c] = kFull || column(c) < columns ? b[column(c)] : R{0};
      GPU_UNROLL
      for (int r = 0; r < kMicro; ++r) {
        if (!kFull && row(r) >= rows) continue;
        const R left = a[row(r)];
        GPU_UNROLL
        for (int c = 0; c < kMicro; ++c) d.at(r, c) += left * right[c];
      }
    }
  }
};

// load(i, s) loads slab i into stage s of the ring, and use(i, s) reads slab i there. All threads of the block call
// pipeline(). kStagger: half of the warps call load() after use(), the others before it, so that addresses are computed
// while the tensor cores work, even with one block per SM.
template <int kStages, bool kStagger, class Load, class Use>
GPU_INLINE void pipeline(int slabs, Load&& load, Use&& use) {
  const auto load_if = [&](int slab, int stage) {
    if (slab < slabs) load(slab, stage);
    cp_async_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) load_if(i, i);
  const bool late = kStagger && threadIdx.x >= blockDim.x / 2;
  int stage = 0, free = kStages - 1;  // the stage in use, and the stage to load into
  for (int i = 0; i < slabs; ++i) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (!late) load_if(i + kStages - 1, free);
    use(i, stage);
    if (late) load_if(i + kStages - 1, free);
    free = stage;
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }
}

}  // namespace gpu

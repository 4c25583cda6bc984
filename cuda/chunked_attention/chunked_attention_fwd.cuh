// What the forward kernels of chunked attention share: the part of the grid that a block of rows sees, and padding.
#pragma once

#include <cmath>

#include "chunked_attention.cuh"
#include "vec.cuh"

namespace megalodon {
namespace chunked_attention {

template <class R>
constexpr R kInfinity = static_cast<R>(INFINITY);
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// How many slices of `size` elements K or V makes: one, which is empty, without elements, as scores and lse exist.
MEGALODON_INLINE int64_t count_slices(int64_t width, int size) { return width > 0 ? ceil_div(width, size) : 1; }

GPU_INLINE float exponential(float x) { return gpu::exp2_approx(x * kLog2e); }
GPU_INLINE double exponential(double x) { return exp(x); }

// The rows of a block, which are the last columns that it sees, and the columns before those rows. All count from
// `origin`, a multiple of 4 on the sequence's grid, so that DropKey's groups of four columns keep together.
struct Window {
  int64_t origin;
  int begin;      // the first column that the first row sees
  int row0, end;  // the rows of the block
  int chunk;      // C, or 2^31 - 1 if C is more

  GPU_INLINE Window(const ChunkedAttentionParams& p, const RowBlock& block) {
    constexpr int64_t kMost = 0x7fffffff;
    const int64_t row = block.row(), start = row - row % p.chunk_size;
    origin = start / 4 * 4;
    begin = static_cast<int>(start - origin);
    row0 = static_cast<int>(row - origin);
    end = row0 + block.live;
    chunk = static_cast<int>(p.chunk_size < kMost ? p.chunk_size : kMost);
  }

  // The first column that a row sees.
  GPU_INLINE int start(int row) const { return row - (row - begin) % chunk; }
  GPU_INLINE bool holds(int column) const { return column >= begin && column < end; }
};

// Makes an output again that is not finite, though its row's sum is; a row that sees a value that is not finite keeps
// `output`. Such outputs arise because a tile's rows share keys, some rows give a key the weight 0, and 0 times a NaN
// of a value is NaN. q is the row's query; k and v give rows by number on the window's grid, exp_of(score) the weight.
template <class T, class R, class Rows, class ExpOf>
GPU_INLINE R repaired(R output, const ChunkedAttentionFwdParams& p, const Window& window, const DropKey& drop, int row,
                      const T* q, const Rows& k, const Rows& v, int64_t column, ExpOf&& exp_of) {
  const int start = window.start(row);
#pragma unroll 1
  for (int key = start; key <= row; ++key) {
    const R value = gpu::to_real(v(key)[column]);
    if (value - value != 0) return output;
  }
  R sum = 0;
#pragma unroll 1
  for (int key = start; key <= row; ++key) {
    if (drop && drop.dropped(window.origin + row, window.origin + key)) continue;
    R score = 0;
#pragma unroll 1
    for (int64_t e = 0; e < p.key_dim; ++e) score += gpu::to_real(q[e]) * gpu::to_real(k(key)[e]);
    sum += exp_of(score) * gpu::to_real(v(key)[column]);
  }
  return sum;
}

// Stores zeros for the rows [live, rows) of a block, which are padding, in `columns` columns of o, and in lse.
template <class T>
GPU_INLINE void store_padding(const ChunkedAttentionFwdParams& p, const RowBlock& block, int64_t head, int64_t column,
                              int columns) {
  for (int i = block.live * columns + threadIdx.x; i < block.rows * columns; i += blockDim.x)
    static_cast<T*>(p.o)[((block.token + i / columns) * p.heads + head) * p.value_dim + column + i % columns] = T{};
  for (int i = block.live + threadIdx.x; column == 0 && i < block.rows; i += blockDim.x)
    static_cast<Compute<T>*>(p.lse)[(block.token + i) * p.heads + head] = 0;
}

}  // namespace chunked_attention
}  // namespace megalodon

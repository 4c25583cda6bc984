// Shared by the forward kernels of chunked attention: the columns that a block of rows sees, and padding.
#pragma once

#include <cmath>

#include "chunked_attention.cuh"
#include "vec.cuh"

namespace megalodon {
namespace chunked_attention {

template <class R>
constexpr R kInfinity = static_cast<R>(INFINITY);
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// Returns the number of slices of `size` elements in `width` elements, K or V. No elements make one empty slice,
// because scores and lse still exist.
MEGALODON_INLINE int64_t count_slices(int64_t width, int size) { return width > 0 ? ceil_div(width, size) : 1; }

GPU_INLINE float exponential(float x) { return gpu::exp2_approx(x * kLog2e); }
GPU_INLINE double exponential(double x) { return exp(x); }

// The rows of a block and the columns that they see: up to the last row or, if attention is not causal, to the end of
// the last row's chunk. Rows and columns are counted from `origin`, a multiple of 4 on the sequence's grid, so that
// DropKey's quads stay together.
struct Window {
  int64_t origin;
  int begin, end;     // [begin, end): the columns that any row sees
  int row0, row_end;  // [row0, row_end): the rows
  int chunk;          // C, or 2^31 - 1 if C is more
  bool causal;

  GPU_INLINE Window(const ChunkedAttentionParams& p, const RowBlock& block) {
    constexpr int64_t kMost = 0x7fffffff;
    const int64_t row = block.row(), start = row - row % p.chunk_size;
    origin = start / 4 * 4;
    begin = static_cast<int>(start - origin);
    row0 = static_cast<int>(row - origin);
    row_end = end = row0 + block.live;
    chunk = static_cast<int>(p.chunk_size < kMost ? p.chunk_size : kMost);
    causal = p.causal;
    if (!causal) {
      const int64_t last = row + block.live - 1, chunk_end = last - last % p.chunk_size + p.chunk_size;
      const int64_t sequence_end = block.position + p.sequences.end(block.sequence) - block.begin;
      end = static_cast<int>((chunk_end < sequence_end ? chunk_end : sequence_end) - origin);
    }
  }

  // The first and the last column that a row sees.
  GPU_INLINE int start(int row) const { return row - (row - begin) % chunk; }
  GPU_INLINE int last(int row) const {
    if (causal) return row;
    const int first = start(row);
    return first < end - chunk ? first + chunk - 1 : end - 1;
  }
  GPU_INLINE bool holds(int column) const { return column >= begin && column < end; }
};

// Recomputes the NaN outputs of a block, after its threads have stored all outputs. They arise because the rows of a
// tile share keys: a row gives the weight 0 to a key that it does not see, and 0 times a NaN or an infinity in the
// key's value is NaN. `lse` has the block's rows; rows whose lse is NaN or infinity stay NaN.
//
// A warp takes 4 rows, and 4 keys at a time. A lane adds up the products of some channels for the 16 scores, gets the
// total of one score by shuffles, and adds to some columns of the 4 outputs: (8 K + 4 V) / 16 elements read per score.
template <class T, int kColumns, class R = Compute<T>>
GPU_INLINE void repair(const ChunkedAttentionFwdParams& p, const RowBlock& block, const Window& window,
                       int64_t head, int64_t first_column, int columns, const GridRows<T>& k, const GridRows<T>& v,
                       const R* lse) {
  constexpr int kRows = 4, kKeys = 4, kScores = kRows * kKeys, kLaneColumns = kColumns / gpu::kWarp;
  const DropKey drop(p, head, block.sequence);  // the caller's would stay in registers during its main loop
  const int lane = threadIdx.x % gpu::kWarp, warp = threadIdx.x / gpu::kWarp, warps = blockDim.x / gpu::kWarp;
#pragma unroll 1
  for (int first = warp * kRows; first < block.live; first += warps * kRows) {
    const auto at = [&](int r) {  // for row r of the 4, or the block's last row
      return (block.token + (first + r < block.live ? first + r : block.live - 1)) * p.heads + head;
    };
    const auto output = [&](int r, int i) {
      return static_cast<T*>(p.o) + at(r) * p.value_dim + first_column + lane + i * gpu::kWarp;
    };
    // Returns true if the lane's output i of row r exists and is NaN.
    const auto is_nan = [&](int r, int i) {
      if (first + r >= block.live || lane + i * gpu::kWarp >= columns) return false;
      const R value = gpu::to_real(*output(r, i));
      return value != value;
    };
    bool any_nan = false;
#pragma unroll 1
    for (int r = 0; r < kRows; ++r)
#pragma unroll 1
      for (int i = 0; i < kLaneColumns; ++i) any_nan |= is_nan(r, i);
    if (!__any_sync(gpu::kFullMask, any_nan)) continue;

    R sum[kRows][kLaneColumns] = {};
    const int top = window.row0 + first;
    const int last = window.last((top + kRows < window.row_end ? top + kRows : window.row_end) - 1);
#pragma unroll 1
    for (int key = window.start(top); key <= last; key += kKeys) {
      const auto seen_key = [&](int j) { return key + j < last ? key + j : last; };
      R score[kScores] = {};  // of key j and row r at j * kRows + r
#pragma unroll 1
      for (int64_t e = lane; e < p.key_dim; e += gpu::kWarp) {
        R q[kRows];
        GPU_UNROLL
        for (int r = 0; r < kRows; ++r) q[r] = gpu::to_real(static_cast<const T*>(p.q)[at(r) * p.key_dim + e]);
        GPU_UNROLL
        for (int j = 0; j < kKeys; ++j) {
          const R factor = gpu::to_real(k(seen_key(j))[e]);
          GPU_UNROLL
          for (int r = 0; r < kRows; ++r) score[j * kRows + r] += q[r] * factor;
        }
      }
      // Lane l gets the sum over lanes of score[l % 16]. Each turn halves the number of scores per lane.
      GPU_UNROLL
      for (int turn = 1; turn <= 4; ++turn) {
        const int half = kScores >> turn;
        GPU_UNROLL
        for (int i = 0; i < kScores / 2; ++i) {
          if (i >= half) break;
          const R low = score[i], high = score[i + half];
          score[i] = (lane & half ? high : low) + __shfl_xor_sync(gpu::kFullMask, lane & half ? low : high, half);
        }
      }
      score[0] += __shfl_xor_sync(gpu::kFullMask, score[0], kScores);
      const int row = top + lane % kRows, column = key + lane / kRows % kKeys;
      const unsigned seen = __ballot_sync(gpu::kFullMask, column >= window.start(row) && column <= window.last(row));
      const bool dropped = drop && drop.dropped(window.origin + row, window.origin + column);
      const R weight = dropped ? 0 : exponential(score[0] * static_cast<R>(p.scale) - lse[first + lane % kRows]);
#pragma unroll 1
      for (int j = 0; j < kKeys; ++j) {
        R value[kLaneColumns];
        GPU_UNROLL
        for (int i = 0; i < kLaneColumns; ++i) {
          const int c = lane + i * gpu::kWarp;
          value[i] = c < columns ? gpu::to_real(v(seen_key(j))[first_column + c]) : R{0};
        }
        GPU_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const R factor = __shfl_sync(gpu::kFullMask, weight, j * kRows + r);
          GPU_UNROLL
          for (int i = 0; i < kLaneColumns; ++i) sum[r][i] += seen >> (j * kRows + r) & 1 ? factor * value[i] : R{0};
        }
      }
    }
    GPU_UNROLL
    for (int r = 0; r < kRows; ++r)
      GPU_UNROLL
      for (int i = 0; i < kLaneColumns; ++i)
        if (is_nan(r, i)) *output(r, i) = gpu::from_real<T>(sum[r][i]);
  }
}

// Stores zeros for the padding rows [live, rows) of a block, in `columns` columns of o, and in lse.
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

// Chunked attention, forward, of 16-bit types with K <= 256, on tensor cores.
//
//   s_ij = scale q_i . k_j,  for j in the chunk of i and, if causal, j <= i
//   lse_i = log sum_j exp(s_ij)      o_i = sum_j exp(s_ij - lse_i) v_j
//
//   q, k (T, H, K); v, o (T, H, V):              the call's dtype
//   cache_k (S, C, H, K); cache_v (S, C, H, V):  the call's dtype
//   lse (T, H):                                  float
//
// Grid: a block takes 128 tokens of a sequence (find_row_block), a head and kColumns columns of V; blocks of late rows,
// which see the most keys, come first. Each of 8 warps takes 16 rows, with scores, sums and output in registers.
// The block visits the keys that its rows see in tiles of kKeys, from the start of the first row's chunk on:
//   1. S = Q K^T
//   2. mask, DropKey; m' = max(m, max_j s), P = 2^(S - m'), f = 2^(m - m'), l = f l + sum_j P
//   3. O = f O + P V, P rounded to 16 bits
// The values of the tile are copied during 1, the keys of the next tile during 2 and 3.
// The block ends with o = O / l, lse = (m + log2 l) ln 2, and stores whole rows, from shared memory. S is kept times
// log2 e. Exceptions:
//   tiles that no row of a warp sees   the warp skips them
//   keys outside the block's window    zeros
//   every score of a row is dropped    l = o = 0
//   NaN outputs                        recomputed (`repair`), as a later NaN must not reach them
//
// Columns of V beyond kColumns go to other blocks, which recompute the scores: for K = 256, V = 2048, a score takes 8 *
// 256 + 2048 products instead of 256 + 2048. More columns per block would save products, but leave registers for only
// 64 rows. The block would read keys and values twice as often, at 40 bytes per clock and SM: L2 is slower.
//
// Tiles of 64 keys load the queries half as often as tiles of 32, but compute more scores that no row sees. With 256
// columns they are taken for long chunks, and if shared memory holds them (not on sm_86, sm_89 and sm_120).
//
// Shared memory: Q (or the output), a tile of keys, one of values, K padded to a multiple of 64; at K = 256, kColumns =
// 256 it is 96 KiB, with tiles of 64 keys 128 KiB. Registers: O takes kColumns / 2, S kKeys / 2; at most 128 for kColumns 64 (two blocks per SM), else
// 255; no spills.
// H100, T = 16384, H 1, K 256, V 2048, C 2048, bf16: at least 415 us, by shared memory (bench.predict). q, k, v, o once
// are 151 MB, 45 us; from L2 each row block reads keys and values of its chunk up to itself. 4096 products for each of
// T C / 2 scores: 139 us at 990 TFLOP/s, of which mma.sync reaches 0.62.
#pragma once

#include "chunked_attention_fwd.cuh"
#include "tile.cuh"

namespace megalodon {
namespace chunked_attention {

constexpr int kMmaRows = 128, kMmaThreads = 256, kMmaMaxDepth = 256;
constexpr int kWarpRows = 16;
constexpr int64_t kLongTilesFrom = 1024;  // least chunk for tiles of 64 keys beside 256 columns
static_assert(kMmaThreads / gpu::kWarp * kWarpRows == kMmaRows);

inline size_t mma_shared_bytes(int64_t key_dim, size_t columns, size_t keys) {
  const size_t depth = gpu::Tile<gpu::bf16>::pitch(static_cast<int>(key_dim));
  return 2 * (kMmaRows * (depth > columns ? depth : columns) + keys * depth + keys * columns);
}

// A lane's sums for its two rows, rows g and g + 8 of the warp's, where g = lane / 4.
template <int kColumns>
struct RowSums {
  float output[kColumns / 8][4] = {}, max[2] = {-kInfinity<float>, -kInfinity<float>}, sum[2] = {};
};

// Turns scores into probabilities relative to the new maximum and rescales earlier sums.
template <int kColumns, int kKeys>
GPU_INLINE void online_softmax(float (&s)[kKeys / 8][4], RowSums<kColumns>& rows) {
  float factor[2];
  GPU_UNROLL
  for (int j = 0; j < 2; ++j) {
    float max = rows.max[j];
    GPU_UNROLL
    for (int n = 0; n < kKeys / 8; ++n) max = fmaxf(max, fmaxf(s[n][2 * j], s[n][2 * j + 1]));
    max = fmaxf(max, __shfl_xor_sync(gpu::kFullMask, max, 1));
    max = fmaxf(max, __shfl_xor_sync(gpu::kFullMask, max, 2));
    const float shift = max == -kInfinity<float> ? 0 : max;
    factor[j] = gpu::exp2_approx(rows.max[j] - shift);
    float sum = 0;
    GPU_UNROLL
    for (int n = 0; n < kKeys / 8; ++n)
      GPU_UNROLL
      for (int i = 2 * j; i < 2 * j + 2; ++i) sum += s[n][i] = gpu::exp2_approx(s[n][i] - shift);
    rows.max[j] = max;
    rows.sum[j] = rows.sum[j] * factor[j] + sum;
  }
  if (!__any_sync(gpu::kFullMask, factor[0] != 1 || factor[1] != 1)) return;  // as in most later tiles
  GPU_UNROLL
  for (int n = 0; n < kColumns / 8; ++n)
    GPU_UNROLL
    for (int i = 0; i < 4; ++i) rows.output[n][i] *= factor[i / 2];
}

// `whole`: K, V and the pointers allow vectors of 16 bytes.
template <class T, int kColumns, int kKeys>
__global__ void __launch_bounds__(kMmaThreads, kColumns == 64 ? 2 : 1)
    chunked_attention_fwd_mma_kernel(ChunkedAttentionFwdParams p, bool whole) {
  using gpu::Tile;
  const int64_t splits = count_slices(p.value_dim, kColumns), parts = p.heads * splits;
  const int head = static_cast<int>(blockIdx.x % parts / splits);
  const int first_column = static_cast<int>(blockIdx.x % splits) * kColumns;
  const RowBlock block = find_row_block<kMmaRows>(p, gridDim.x / parts - 1 - blockIdx.x / parts);
  const int columns = static_cast<int>(p.value_dim - first_column < kColumns ? p.value_dim - first_column : kColumns);
  store_padding<T>(p, block, head, first_column, columns);
  if (block.live == 0) return;

  const int depth = static_cast<int>(p.key_dim), pitch = Tile<T>::pitch(depth);
  SMEM_DYN(T, shared);
  const Tile<T> queries(shared, depth), staged(shared, kColumns);
  const Tile<T> keys(shared + kMmaRows * (pitch > kColumns ? pitch : kColumns), depth);
  const Tile<T> values(keys.unit(kKeys, 0), kColumns);

  const Window window(p, block);
  const GridRows<T> k(p, block, window.origin, head, p.cache_k, p.k, p.key_dim);
  const GridRows<T> v(p, block, window.origin, head, p.cache_v, p.v, p.value_dim);
  const auto copy = [&](const Tile<T>& tile, int rows, int width, int valid, auto&& row_of) {
    if (whole) tile.template load<true>(rows, width, valid, row_of);
    else tile.template load<false>(rows, width, valid, row_of);
  };
  const auto copy_keys = [&](int column) {
    copy(keys, kKeys, pitch, depth, [&](int r) {
      return window.holds(column + r) ? k(column + r) : nullptr;
    });
    gpu::cp_async_commit();
  };
  const auto copy_values = [&](int column) {
    copy(values, kKeys, kColumns, columns, [&](int r) {
      return window.holds(column + r) ? v(column + r) + first_column : nullptr;
    });
    gpu::cp_async_commit();
  };
  const T* const q = static_cast<const T*>(p.q) + (block.token * p.heads + head) * p.key_dim;
  copy(queries, kMmaRows, pitch, depth, [&](int r) {
    return r < block.live ? q + r * p.heads * p.key_dim : nullptr;
  });
  copy_keys(0);

  const int lane = threadIdx.x % gpu::kWarp, warp_row = static_cast<int>(threadIdx.x) / gpu::kWarp * kWarpRows;
  const int top = window.row0 + warp_row;  // the warp's first row; rows from the window's row_end on are not stored
  const int row[2] = {top + lane / 4, top + lane / 4 + 8};
  const int start[2] = {window.start(row[0]), window.start(row[1])};
  const int last[2] = {window.last(row[0]), window.last(row[1])};
  const float scale = static_cast<float>(p.scale) * kLog2e;
  const DropKey drop(p, head, block.sequence);
  const uint32_t origin_quad = static_cast<uint32_t>(window.origin / 4);
  RowSums<kColumns> rows;
  for (int column = 0; column < window.end; column += kKeys) {
    gpu::cp_async_wait<0>();
    __syncthreads();  // the keys are complete, and no thread reads the previous values any more
    copy_values(column);
    const bool seen = __any_sync(
        gpu::kFullMask, row[0] < window.row_end && column <= last[1] && column + kKeys > start[0]);
    float s[kKeys / 8][4] = {};
    for (int channel = 0; seen && channel < pitch; channel += Tile<T>::kBlock) {
      const Tile<T> q_block = queries.from(channel), k_block = keys.from(channel);
      GPU_UNROLL
      for (int step = 0; step < Tile<T>::kBlock; step += 16) {
        uint32_t a[4], b[2][2];
        q_block.load_a(a, warp_row, step);
        GPU_UNROLL
        for (int n = 0; n < kKeys / 8; n += 2) {
          k_block.load_b(b, n * 8, step);
          gpu::mma_16816<T>(s[n], a, b[0]);
          gpu::mma_16816<T>(s[n + 1], a, b[1]);
        }
      }
    }
    gpu::cp_async_wait<0>();
    __syncthreads();  // the values are complete, and no thread reads the keys any more
    if (column + kKeys < window.end) copy_keys(column + kKeys);
    if (!seen) continue;

    const bool all_seen = __all_sync(gpu::kFullMask, column >= start[1] && column + kKeys - 1 <= last[0]);
    GPU_UNROLL
    for (int n = 0; n < kKeys / 8; ++n) {
      GPU_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int j = column + n * 8 + lane % 4 * 2 + i % 2;
        s[n][i] = all_seen || (j >= start[i / 2] && j <= last[i / 2]) ? s[n][i] * scale : -kInfinity<float>;
      }
      if (drop) drop.apply(s[n], 4 * origin_quad + top, origin_quad + column / 4 + n * 2, -kInfinity<float>);
    }
    online_softmax<kColumns, kKeys>(s, rows);
    GPU_UNROLL
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t a[4], b[2][2];
      gpu::to_a<T>(a, s[2 * step], s[2 * step + 1]);
      GPU_UNROLL
      for (int n = 0; n < kColumns / 8; n += 2) {
        values.load_b_trans(b, step * 16, n * 8);
        gpu::mma_16816<T>(rows.output[n], a, b[0]);
        gpu::mma_16816<T>(rows.output[n + 1], a, b[1]);
      }
    }
  }

  // No thread has read the queries since the last barrier, so the output replaces them.
  SMEM_ARRAY(float, lse, kMmaRows);
  float inverse[2];
  bool any_nan = false;
  GPU_UNROLL
  for (int j = 0; j < 2; ++j) {
    float sum = rows.sum[j];
    sum += __shfl_xor_sync(gpu::kFullMask, sum, 1);
    sum += __shfl_xor_sync(gpu::kFullMask, sum, 2);
    inverse[j] = sum == 0 ? 0 : 1 / sum;
    bool row_nan = false;
    GPU_UNROLL
    for (int n = 0; n < kColumns / 8; ++n)
      GPU_UNROLL
      for (int i = 2 * j; i < 2 * j + 2; ++i) row_nan |= rows.output[n][i] != rows.output[n][i];
    any_nan |= row_nan && is_finite(sum) && row[j] < window.row_end;
    if (lane % 4 != 0) continue;
    const int r = warp_row + lane / 4 + 8 * j;
    lse[r] = (rows.max[j] + log2f(sum)) * kLn2;
    if (first_column == 0 && r < block.live) static_cast<float*>(p.lse)[(block.token + r) * p.heads + head] = lse[r];
  }
  GPU_UNROLL
  for (int n = 0; n < kColumns / 8; ++n) {
    GPU_UNROLL
    for (int i = 0; i < 4; ++i) rows.output[n][i] *= inverse[i / 2];
    staged.store_d(rows.output[n], warp_row, n * 8);
  }
  __syncwarp();
  const int left = window.row_end - top, live = left < kWarpRows ? left : kWarpRows;
  T* const o = static_cast<T*>(p.o) + ((block.token + warp_row) * p.heads + head) * p.value_dim + first_column;
  const int64_t stride = p.heads * p.value_dim;
  const int width = whole ? Tile<T>::kUnit : 1;
  for (int i = lane * width; i < live * kColumns; i += gpu::kWarp * width) {
    const int r = i / kColumns, c = i % kColumns;
    const T* from = staged.unit(warp_row + r, c) + c % Tile<T>::kUnit;
    if (c >= columns) continue;
    if (whole) gpu::st(o + r * stride + c, gpu::ld_shared<gpu::Pack<T, Tile<T>::kUnit>>(from));
    else o[r * stride + c] = *from;
  }
  if (__syncthreads_or(any_nan)) repair<T, kColumns>(p, block, window, head, first_column, columns, k, v, lse);
}

}  // namespace chunked_attention
}  // namespace megalodon

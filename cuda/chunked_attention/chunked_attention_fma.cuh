// Chunked attention, forward, without tensor cores: float32, float64, and 16-bit types with K > 256; arbitrary K and V.
// chunked_attention_fwd.cu chooses between this file and chunked_attention_mma.cuh.
//
//   s_ij = scale q_i . k_j,  for j in the chunk of i and, if causal, j <= i
//   lse_i = log sum_j exp(s_ij)      o_i = sum_j exp(s_ij - lse_i) v_j
//
// Shapes as in chunked_attention_mma.cuh; R is double for float64, else float.
// Tensor cores could compute float32 as three products of tf32. But they truncate each sum, which over the thousands of
// terms of an output is less accurate than float32 should be. Multiply-adds round to nearest.
//
// Grid: a block takes 64 tokens of a sequence (find_row_block), a head and kColumns columns of V; late rows come first.
// The block visits the keys that its rows see in tiles of 64. For each tile:
//   1. scores, in slices of 128 bytes of channels of 64 queries and 64 keys: a thread adds to 4 x 4 scores
//   2. softmax, 4 threads per row: mask, DropKey; m' = max(m, max_j s), P = exp(S - m'), f = exp(m - m'),
//      l = f l + sum_j P
//   3. output, in slices of 16 KiB of values: a thread adds to kColumns / 32 x 8 sums of O, which it has scaled by f
// A slice is copied into one of two stages while the other stage is in use.
// The block ends with o = O / l, lse = m + log l. If every score is dropped, l = 0 and o = 0. NaN as in
// chunked_attention_mma.cuh. Columns of V beyond kColumns go to other blocks, which recompute the scores. For K = 256,
// V = 2048, a score takes
//   4 * 256 + 2048 products with kColumns 512 (float)
//   8 * 256 + 2048 products with kColumns 256 (double)
// instead of 256 + 2048.
//
// Shared memory: two stages, P and 3 numbers per row: 50 KiB for float, 66 KiB for double. Units of slices are permuted
// and rows of P padded by 16 bytes, so accesses have no bank conflicts.
// Registers: kColumns / 4 sums per thread; at most 255 (one block per SM), no spills.
// Bytes as in chunked_attention_mma.cuh. H100 (67 TFLOP/s), T = 16384, H 1, K 256, V 2048, C 2048, float32: 3072
// products for each of T C / 2 scores, 1.5 ms; 302 MB once, 90 us.
#pragma once

#include "async.cuh"
#include "chunked_attention_fwd.cuh"

namespace megalodon {
namespace chunked_attention {

constexpr int kFmaRows = 64, kFmaThreads = 256;

// In phase 1, kRowGroups x kKeyGroups threads have 4 x 4 scores each; in phase 3, kColumnGroups threads have 8 columns
// of the same kThreadRows rows. Sizes are in elements of R.
template <class R, int kColumns>
struct FmaTiling {
  static constexpr int kVector = gpu::kVectorWidth<R>;
  static constexpr int kKeys = kFmaThreads / 4, kKeyGroups = kKeys / 4, kRowGroups = kFmaRows / 4;
  static constexpr int kDepth = 128 / sizeof(R), kScorePitch = kKeys + kVector;
  static constexpr int kSliceKeys = 16384 / sizeof(R) / kColumns;
  static constexpr int kColumnGroups = kColumns / 8, kThreadRows = kFmaRows * kColumnGroups / kFmaThreads;
  static constexpr int kPerRow = kFmaThreads / kFmaRows;  // threads in the softmax of a row
  static constexpr int kProductSlice = (kFmaRows + kKeys) * kDepth, kValueSlice = kSliceKeys * kColumns;
  static constexpr int kStage = kProductSlice > kValueSlice ? kProductSlice : kValueSlice;
  static constexpr size_t kSharedBytes = (2 * kStage + kFmaRows * (kScorePitch + 3)) * sizeof(R);
  static_assert(kRowGroups * kKeyGroups == kFmaThreads && kThreadRows * kFmaThreads == kFmaRows * kColumnGroups);
  static_assert(kKeys % kSliceKeys == 0 && kPerRow == gpu::kWarp / 8 && kRowGroups == 16 && kKeyGroups == 16);
};

// Returns the place, in a slice of queries or keys, of the 16 bytes of a row that begin at a channel. 8 neighbouring
// rows of a channel, and neighbouring channels of a row, are in different banks.
template <class R>
GPU_INLINE int slice_place(int row, int channel) {
  constexpr int vector = gpu::kVectorWidth<R>, vectors = FmaTiling<R, 64>::kDepth / vector;
  static_assert(vectors == 8);
  return (row * vectors + (channel / vector ^ row % 8)) * vector;
}

// Fills a slice of kRows rows of kWidth elements; place(row, column) is the place of a 16-byte vector. Row r gets the
// elements [0, valid) from row_of(r), an address in global memory, then zeros; a null row_of(r) gives zeros alone. Uses
// cp.async if `whole` is true and T needs no conversion to R.
template <int kRows, int kWidth, class T, class R, class Place, class RowOf>
GPU_INLINE void copy_slice(R* to, int64_t valid, bool whole, Place&& place, RowOf&& row_of) {
  constexpr int vector = gpu::kVectorWidth<R>, threads = kFmaThreads / kRows > 8 ? kFmaThreads / kRows : 8;  // per row
  const int thread = threadIdx.x;
#pragma unroll 1
  for (int row = thread / threads; row < kRows; row += kFmaThreads / threads) {
    const T* const from = row_of(row);
    const int64_t count = from ? valid : 0;
    GPU_UNROLL
    for (int i = 0; i < kWidth; i += threads * vector) {
      const int column = i + thread % threads * vector;
      R* const at = to + place(row, column);
      if constexpr (sizeof(T) == sizeof(R)) {
        if (whole && column < count) {
          gpu::cp_async<16>(at, from + column);
          continue;
        }
      }
      R values[vector] = {};
      for (int e = 0; e < vector && column + e < count; ++e) values[e] = gpu::to_real(from[column + e]);
      gpu::store_shared(at, values);
    }
  }
}

// `whole`: K, V and the pointers allow vectors of 16 bytes.
template <class T, int kColumns>
__global__ void __launch_bounds__(kFmaThreads, 1)
    chunked_attention_fwd_fma_kernel(ChunkedAttentionFwdParams p, bool whole) {
  using R = Compute<T>;
  using Tiling = FmaTiling<R, kColumns>;
  constexpr int kVector = Tiling::kVector, kKeys = Tiling::kKeys, kThreadRows = Tiling::kThreadRows;
  const int64_t splits = count_slices(p.value_dim, kColumns), parts = p.heads * splits;
  const int64_t head = blockIdx.x % parts / splits, first_column = blockIdx.x % splits * kColumns;
  const RowBlock block = find_row_block<kFmaRows>(p, gridDim.x / parts - 1 - blockIdx.x / parts);
  const int columns = static_cast<int>(p.value_dim - first_column < kColumns ? p.value_dim - first_column : kColumns);
  store_padding<T>(p, block, head, first_column, columns);
  if (block.live == 0) return;

  SMEM_DYN(R, shared);
  R* const scores = shared + 2 * Tiling::kStage;  // (64, kKeys), probabilities after the softmax
  R* const factors = scores + kFmaRows * Tiling::kScorePitch;
  R *const sums = factors + kFmaRows, *const lse = sums + kFmaRows;

  const Window window(p, block);
  const GridRows<T> k(p, block, window.origin, head, p.cache_k, p.k, p.key_dim);
  const GridRows<T> v(p, block, window.origin, head, p.cache_v, p.v, p.value_dim);
  const T* const q = static_cast<const T*>(p.q) + (block.token * p.heads + head) * p.key_dim;
  const int products = static_cast<int>(count_slices(p.key_dim, Tiling::kDepth));
  const int slices = products + kKeys / Tiling::kSliceKeys;
  const auto copy = [&](int column, int slice, R* stage) {
    if (slice < products) {
      const int64_t channel = int64_t{slice} * Tiling::kDepth, valid = p.key_dim - channel;
      copy_slice<kFmaRows, Tiling::kDepth, T>(stage, valid, whole, slice_place<R>, [&](int r) {
        return r < block.live ? q + r * p.heads * p.key_dim + channel : nullptr;
      });
      R* const keys = stage + kFmaRows * Tiling::kDepth;
      copy_slice<kKeys, Tiling::kDepth, T>(keys, valid, whole, slice_place<R>, [&](int r) {
        return window.holds(column + r) ? k(column + r) + channel : nullptr;
      });
    } else {
      const int first = column + (slice - products) * Tiling::kSliceKeys;
      const auto place = [](int r, int c) { return r * kColumns + c; };
      copy_slice<Tiling::kSliceKeys, kColumns, T>(stage, columns, whole, place, [&](int r) {
        return window.holds(first + r) ? v(first + r) + first_column : nullptr;
      });
    }
    gpu::cp_async_commit();
  };

  const int thread = threadIdx.x, lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  const int row_group = lane % 8 + warp % 2 * 8;  // the thread has scores of the rows row_group + 16 i
  const int key_group = lane / 8 + warp / 2 * 4;  // the thread has scores of the keys key_group + 16 j
  const int softmax_row = lane % 8 + warp * 8, softmax_key = lane / 8;
  const int column_group = thread % Tiling::kColumnGroups, first_row = thread / Tiling::kColumnGroups * kThreadRows;
  const int row = window.row0 + softmax_row, start = window.start(row), last = window.last(row);
  R* const row_scores = scores + softmax_row * Tiling::kScorePitch + 4 * softmax_key;
  const R scale = static_cast<R>(p.scale);
  const DropKey drop(p, head, block.sequence);
  R max = -kInfinity<R>, sum = 0;  // of softmax_row
  R output[kThreadRows][8] = {};
  int stage_number = 0;
  copy(0, 0, shared);
  // Waits for a slice, starts to copy the next one, and returns the slice.
  const auto take = [&](int column, int slice) {
    gpu::cp_async_wait<0>();
    __syncthreads();  // this slice is complete, and no thread reads the previous one any more
    const R* const stage = shared + stage_number * Tiling::kStage;
    stage_number ^= 1;
    if (++slice == slices) {
      slice = 0;
      column += kKeys;
    }
    if (column < window.end) copy(column, slice, shared + stage_number * Tiling::kStage);
    return stage;
  };
  for (int column = 0; column < window.end; column += kKeys) {
    R score[4][4] = {};
    for (int slice = 0; slice < products; ++slice) {
      const R* const stage = take(column, slice);
#pragma unroll 1
      for (int d = 0; d < Tiling::kDepth; d += kVector) {
        // Rows that are 16 apart are 16 kDepth elements apart.
        const R* const queries = stage + slice_place<R>(row_group, d);
        const R* const keys = stage + slice_place<R>(kFmaRows + key_group, d);
        R a[4][kVector], b[kVector];
        GPU_UNROLL
        for (int i = 0; i < 4; ++i) gpu::load_shared(a[i], queries + i * Tiling::kRowGroups * Tiling::kDepth);
        GPU_UNROLL
        for (int j = 0; j < 4; ++j) {
          gpu::load_shared(b, keys + j * Tiling::kKeyGroups * Tiling::kDepth);
          GPU_UNROLL
          for (int e = 0; e < kVector; ++e)
            GPU_UNROLL
            for (int i = 0; i < 4; ++i) score[i][j] += a[i][e] * b[e];
        }
      }
    }
    GPU_UNROLL
    for (int i = 0; i < 4; ++i)
      GPU_UNROLL
      for (int j = 0; j < 4; ++j)
        scores[(row_group + i * Tiling::kRowGroups) * Tiling::kScorePitch + key_group + j * Tiling::kKeyGroups] =
            score[i][j] * scale;
    __syncthreads();

    R new_max = max, total = 0;
    for (int c = 0; c < kKeys; c += 4 * Tiling::kPerRow) {
      const int first = column + c + 4 * softmax_key;
      const unsigned dropped = drop ? drop.dropped_in_quad(window.origin + row, (window.origin + first) / 4) : 0;
      GPU_UNROLL
      for (int e = 0; e < 4; e += kVector) {
        R s[kVector];
        gpu::load_shared(s, row_scores + c + e);
        GPU_UNROLL
        for (int i = 0; i < kVector; ++i) {
          const int key = first + e + i;
          if (key < start || key > last || dropped >> (e + i) & 1) s[i] = -kInfinity<R>;
          new_max = fmax(new_max, s[i]);
        }
        gpu::store_shared(row_scores + c + e, s);
      }
    }
    GPU_UNROLL
    for (int distance = 8; distance < gpu::kWarp; distance *= 2)
      new_max = fmax(new_max, __shfl_xor_sync(gpu::kFullMask, new_max, distance));
    const R shift = new_max == -kInfinity<R> ? 0 : new_max, factor = exponential(max - shift);
    for (int c = 0; c < kKeys; c += 4 * Tiling::kPerRow) {
      GPU_UNROLL
      for (int e = 0; e < 4; e += kVector) {
        R s[kVector];
        gpu::load_shared(s, row_scores + c + e);
        GPU_UNROLL
        for (int i = 0; i < kVector; ++i) total += s[i] = exponential(s[i] - shift);
        gpu::store_shared(row_scores + c + e, s);
      }
    }
    if (softmax_key == 0) factors[softmax_row] = factor;
    sum = sum * factor + total;
    max = new_max;

    for (int slice = products; slice < slices; ++slice) {
      const R* const stage = take(column, slice) + column_group * kVector;
      if (slice == products)
        GPU_UNROLL
        for (int i = 0; i < kThreadRows; ++i)
          GPU_UNROLL
          for (int c = 0; c < 8; ++c) output[i][c] *= factors[first_row + i];
      const R* const key_scores = scores + first_row * Tiling::kScorePitch + (slice - products) * Tiling::kSliceKeys;
      for (int key = 0; key < Tiling::kSliceKeys; key += 2) {
        R a[kThreadRows][2], b[kVector];
        GPU_UNROLL
        for (int i = 0; i < kThreadRows; ++i) gpu::load_shared(a[i], key_scores + i * Tiling::kScorePitch + key);
        GPU_UNROLL
        for (int e = 0; e < 2; ++e)
          GPU_UNROLL
          for (int c = 0; c < 8; c += kVector) {
            gpu::load_shared(b, stage + (key + e) * kColumns + c * Tiling::kColumnGroups);
            GPU_UNROLL
            for (int i = 0; i < kThreadRows; ++i)
              GPU_UNROLL
              for (int j = 0; j < kVector; ++j) output[i][c + j] += a[i][e] * b[j];
          }
      }
    }
  }

  GPU_UNROLL
  for (int distance = 8; distance < gpu::kWarp; distance *= 2) sum += __shfl_xor_sync(gpu::kFullMask, sum, distance);
  if (softmax_key == 0) {
    sums[softmax_row] = sum;
    lse[softmax_row] = max + log(sum);
    if (first_column == 0 && softmax_row < block.live)
      static_cast<R*>(p.lse)[(block.token + softmax_row) * p.heads + head] = lse[softmax_row];
  }
  __syncthreads();
  bool any_nan = false;
  GPU_UNROLL
  for (int i = 0; i < kThreadRows; ++i) {
    if (first_row + i >= block.live) break;
    const R inverse = sums[first_row + i] == 0 ? 0 : 1 / sums[first_row + i];
    T* const o = static_cast<T*>(p.o) + ((block.token + first_row + i) * p.heads + head) * p.value_dim + first_column;
    GPU_UNROLL
    for (int c = 0; c < 8; c += kVector) {
      const int at = c * Tiling::kColumnGroups + column_group * kVector;
      R values[kVector];
      GPU_UNROLL
      for (int j = 0; j < kVector; ++j) {
        any_nan |= output[i][c + j] != output[i][c + j] && is_finite(sums[first_row + i]);
        values[j] = output[i][c + j] * inverse;
      }
      if (whole && at < columns) gpu::store(o + at, values);
      for (int j = 0; !whole && j < kVector && at + j < columns; ++j) o[at + j] = gpu::from_real<T>(values[j]);
    }
  }
  if (__syncthreads_or(any_nan)) repair<T, kColumns>(p, block, window, head, first_column, columns, k, v, lse);
}

}  // namespace chunked_attention
}  // namespace megalodon

// Chunked attention, forward, of few tokens per sequence after a cache, as in decoding: bound by memory. Launched by
// chunked_attention_fwd.cu.
//
//   s_j = scale q . k_j, for the keys j of the token's chunk so far
//   o = sum_j exp(s_j) v_j / sum_j exp(s_j);  lse = log sum_j exp(s_j)
//
//   q, k (T, H, K); v, o (T, H, V):              the call's dtype
//   cache_k (S, C, H, K); cache_v (S, C, H, V):  the same; only the rows in use are read
//   lse (T, H):                                  R, double for float64, else float
//
// 1. step_kernel: an item is a token and a head. A block takes tile i of an item's keys and kStepColumns
//    columns of V.
//    a. scores: a group of lanes, a power of two, takes kKeysInFlight keys at a time, 16 bytes of each per lane
//    b. m_i = max S, P = exp(S - m_i), l_i = sum P
//    c. c_i = sum P v: n threads share a vector of columns; each takes every n-th key, kKeysInFlight keys at a time;
//       their sums are added through shared memory
//    m_i, l_i and the columns c_i go to the workspace.
// 2. merge_kernel: a thread takes a column of an item and merges the tiles in their order:
//    m = max_i m_i;  o = sum_i exp(m_i - m) c_i / sum_i exp(m_i - m) l_i.
//
// Tiles have 64 keys, so that the cache of a single sequence is spread over all SMs; more if there are many items.
// Shared memory: about K + tile_keys + 1024 numbers of R. Registers: at most 128; no spills.
// Bytes: keys and values in use come once from memory. From L2, keys come again for each further kStepColumns columns,
// and keys and values for each further token of the sequence. The workspace has V + 2 numbers per tile, written and
// read: 6 % of the cache with tiles of 64 keys, K 256, V 2048, bf16, less with longer tiles.
// H100 (3.35 TB/s), S 8, H 1, K 256, V 2048, 2048 cached, bf16: 75.5 MB, 22.5 us.
// Example: 100 cached keys, L = 1: rows 0 .. 99 of the cache and the token itself are 101 keys, tiles of 64 and 37.
#pragma once

#include "chunked_attention_fwd.cuh"
#include "reduce.cuh"

namespace megalodon {
namespace chunked_attention {

constexpr int kStepTokens = 8;     // largest T / S that takes this path
constexpr int kStepThreads = 128;
constexpr int kMostStepColumns = 512;
template <int kWidth>
constexpr int kStepColumns = kStepThreads * kWidth < kMostStepColumns ? kStepThreads * kWidth : kMostStepColumns;
constexpr int kKeysInFlight = 4, kTilesInFlight = 8;
constexpr int kLeastTileKeys = 64, kMostTileKeys = 2048;
constexpr int64_t kManyBlocks = 2048;  // enough to fill any GPU several times

struct StepPlan {
  int tile_keys;
  int64_t tiles;  // per item
  void* sums;     // (T, H, tiles, V) R
  void* stats;    // (T, H, tiles, 2) R: max and sum

  template <class R>
  int64_t bytes(const ChunkedAttentionParams& p) const {
    return p.sequences.tokens * p.heads * tiles * (p.value_dim + 2) * static_cast<int64_t>(sizeof(R));
  }
};

inline bool takes_steps(const ChunkedAttentionParams& p) {
  return p.position && p.value_dim > 0 && p.sequences.tokens <= kStepTokens * p.sequences.count;
}

template <class R>
inline StepPlan plan_steps(const ChunkedAttentionParams& p) {
  StepPlan plan{kLeastTileKeys, 0, p.workspace, nullptr};
  const int64_t items = p.sequences.tokens * p.heads, blocks = items * ceil_div(p.value_dim, kMostStepColumns);
  while (plan.tile_keys < kMostTileKeys && blocks * ceil_div(p.chunk_size, 2 * plan.tile_keys) >= kManyBlocks)
    plan.tile_keys *= 2;
  plan.tile_keys = LAUNCH_SIZE(attention_tile, plan.tile_keys);
  plan.tiles = ceil_div(p.chunk_size, plan.tile_keys);
  plan.stats = static_cast<R*>(p.workspace) + items * plan.tiles * p.value_dim;
  return plan;
}

// Vectors of kWidth numbers in shared memory. A plane holds one 16-byte part of each vector, so that neighbouring
// vectors are in different banks. Planes are 128 n + 64 bytes apart, so that neighbouring numbers of a vector are, too.
template <class R, int kWidth>
struct Planes {
  static constexpr int kPart = kWidth < gpu::kVectorWidth<R> ? kWidth : gpu::kVectorWidth<R>;
  R* data;
  int vectors;

  MEGALODON_INLINE static constexpr int plane(int vectors) { return ((vectors + 7) / 8 * 8 + 4) * kPart; }
  MEGALODON_INLINE static constexpr int size(int vectors) { return plane(vectors) * (kWidth / kPart); }
  // Returns the maximum number of vectors whose planes take at most `numbers` numbers.
  static constexpr int64_t most_vectors(int64_t numbers) { return (numbers / kWidth - 4) / 8 * 8; }
  GPU_INLINE R& at(int vector, int i) const {
    return data[i / kPart * plane(vectors) + vector * kPart + i % kPart];
  }
  GPU_INLINE void load(R (&to)[kWidth], int vector) const {
    GPU_UNROLL
    for (int i = 0; i < kWidth; i += kPart) {
      R part[kPart];
      gpu::load_shared(part, &at(vector, i));
      GPU_UNROLL
      for (int j = 0; j < kPart; ++j) to[i + j] = part[j];
    }
  }
  GPU_INLINE void store(const R (&from)[kWidth], int vector) const {
    GPU_UNROLL
    for (int i = 0; i < kWidth; i += kPart) {
      R part[kPart];
      GPU_UNROLL
      for (int j = 0; j < kPart; ++j) part[j] = from[i + j];
      gpu::store_shared(&at(vector, i), part);
    }
  }
};

// Returns the bytes of q, of all threads' sums, and of the scores.
template <class R, int kWidth>
inline size_t step_shared_bytes(const ChunkedAttentionParams& p, const StepPlan& plan) {
  using Vectors = Planes<R, kWidth>;
  const int vectors = static_cast<int>(ceil_div(p.key_dim, kWidth));
  return static_cast<size_t>(Vectors::size(vectors) + Vectors::size(kStepThreads) + plan.tile_keys) * sizeof(R);
}

// Refuses a K that leaves no room for the sums and the scores.
template <class R, int kWidth>
inline void check_step(const ChunkedAttentionParams& p, const StepPlan& plan) {
  using Vectors = Planes<R, kWidth>;
  const auto numbers = static_cast<int64_t>(gpu::max_shared_bytes() / sizeof(R));
  const int64_t most = Vectors::most_vectors(numbers - Vectors::size(kStepThreads) - plan.tile_keys) * kWidth;
  if (p.key_dim > most)
    gpu::refuse("chunked_attention: `q` must have at most " + std::to_string(most) +
                " channels per head (K) in a call of few tokens with a state, because this device's shared memory "
                "holds no more, got " + std::to_string(p.key_dim) + "; split K into heads, or pass more than " +
                std::to_string(kStepTokens) + " tokens per sequence.");
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kStepThreads, 4)
    chunked_attention_step_kernel(ChunkedAttentionFwdParams p, StepPlan plan) {
  using R = Compute<T>;
  constexpr bool kWhole = kWidth > 1;
  constexpr int kColumns = kStepColumns<kWidth>;
  const int64_t splits = ceil_div(p.value_dim, kColumns), column = blockIdx.x % splits * kColumns;
  const int64_t tile = blockIdx.x / splits % plan.tiles, item = blockIdx.x / (splits * plan.tiles);
  const int64_t token = item / p.heads, head = item % p.heads;
  const int64_t s = find_live_sequence(p, token);
  if (s < 0) return;
  const RowBlock block{s, p.position[s], p.sequences.begin(s), token, 1, 1};
  const int64_t row = block.row(), origin = row - row % p.chunk_size + tile * plan.tile_keys;
  const int keys = row < origin                    ? 0
                   : row - origin < plan.tile_keys ? static_cast<int>(row - origin + 1)
                                                   : plan.tile_keys;
  R* const stats = static_cast<R*>(plan.stats) + (item * plan.tiles + tile) * 2;
  const int thread = threadIdx.x, lane = thread % gpu::kWarp;
  if (keys == 0) {
    if (column == 0 && thread == 0) stats[0] = -kInfinity<R>, stats[1] = 0;
    return;
  }

  SMEM_DYN(R, shared);
  const int query_vectors = static_cast<int>(ceil_div(p.key_dim, kWidth));
  const Planes<R, kWidth> query{shared, query_vectors};
  const Planes<R, kWidth> partial{shared + query.size(query_vectors), kStepThreads};
  R* const scores = partial.data + partial.size(kStepThreads);
  const GridRows<T> k(p, block, origin, head, p.cache_k, p.k, p.key_dim);
  const GridRows<T> v(p, block, origin, head, p.cache_v, p.v, p.value_dim);
  for (int64_t d = thread; d < p.key_dim; d += kStepThreads) {
    const R value = gpu::to_real(static_cast<const T*>(p.q)[item * p.key_dim + d]);
    query.at(static_cast<int>(d / kWidth), static_cast<int>(d % kWidth)) = value;
  }
  __syncthreads();

  int group = 1;  // lanes per key
  while (group < gpu::kWarp && group < query_vectors) group *= 2;
  const int step = kStepThreads / group;
  const DropKey drop(p, head, s);
  const R scale = static_cast<R>(p.scale);
  for (int first = 0; first < keys; first += step * kKeysInFlight) {
    const int key = first + thread / group;
    R sum[kKeysInFlight] = {};
    for (int d = lane % group; d < query_vectors; d += group) {
      R q[kWidth], k_vectors[kKeysInFlight][kWidth] = {};
      GPU_UNROLL
      for (int i = 0; i < kKeysInFlight; ++i)
        if (key + i * step < keys) gpu::load<kWhole>(k_vectors[i], k(key + i * step) + d * kWidth);
      query.load(q, d);
      GPU_UNROLL
      for (int e = 0; e < kWidth; ++e)
        GPU_UNROLL
        for (int i = 0; i < kKeysInFlight; ++i) sum[i] += q[e] * k_vectors[i][e];
    }
    for (int distance = group / 2; distance > 0; distance /= 2)
      GPU_UNROLL
      for (int i = 0; i < kKeysInFlight; ++i) sum[i] += __shfl_xor_sync(gpu::kFullMask, sum[i], distance);
    GPU_UNROLL
    for (int i = 0; i < kKeysInFlight; ++i) {
      const int at = key + i * step;
      if (lane % group == 0 && at < keys)
        scores[at] = drop && drop.dropped(row, origin + at) ? -kInfinity<R> : sum[i] * scale;
    }
  }
  __syncthreads();

  R max = -kInfinity<R>, sum = 0;
  for (int key = lane; key < keys; key += gpu::kWarp) max = fmax(max, scores[key]);
  max = gpu::warp_max(max);
  const R shift = max == -kInfinity<R> ? 0 : max;
  __syncthreads();
  for (int key = thread; key < keys; key += kStepThreads) scores[key] = exponential(scores[key] - shift);
  __syncthreads();
  for (int key = lane; key < keys; key += gpu::kWarp) sum += scores[key];
  sum = gpu::warp_sum(sum);
  if (column == 0 && thread == 0) stats[0] = max, stats[1] = sum;

  const int columns = static_cast<int>(p.value_dim - column < kColumns ? p.value_dim - column : kColumns);
  const int lanes = columns / kWidth, turns = kStepThreads / lanes;  // threads per row of v, and per vector of columns
  const int turn = thread / lanes, first = thread % lanes * kWidth;
  R total[kWidth] = {};
  for (int key = turn; turn < turns && key < keys; key += turns * kKeysInFlight) {
    R v_vectors[kKeysInFlight][kWidth] = {};
    GPU_UNROLL
    for (int i = 0; i < kKeysInFlight; ++i)
      if (key + i * turns < keys) gpu::load<kWhole>(v_vectors[i], v(key + i * turns) + column + first);
    GPU_UNROLL
    for (int i = 0; i < kKeysInFlight; ++i) {
      const R weight = key + i * turns < keys ? scores[key + i * turns] : 0;
      GPU_UNROLL
      for (int e = 0; e < kWidth; ++e) total[e] += weight * v_vectors[i][e];
    }
  }
  partial.store(total, thread);
  __syncthreads();
  R* const sums = static_cast<R*>(plan.sums) + (item * plan.tiles + tile) * p.value_dim + column;
  for (int c = thread; c < columns; c += kStepThreads) {
    R column_sum = 0;
    for (int i = 0; i < turns; ++i) column_sum += partial.at(i * lanes + c / kWidth, c % kWidth);
    sums[c] = column_sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kStepThreads)
    chunked_attention_merge_kernel(ChunkedAttentionFwdParams p, StepPlan plan) {
  using R = Compute<T>;
  const int64_t blocks = ceil_div(p.value_dim, kStepThreads), item = blockIdx.x / blocks;
  const int64_t column = blockIdx.x % blocks * kStepThreads + threadIdx.x;
  const bool live = find_live_sequence(p, item / p.heads) >= 0;
  const R* const stats = static_cast<const R*>(plan.stats) + item * plan.tiles * 2;
  const R* const sums = static_cast<const R*>(plan.sums) + item * plan.tiles * p.value_dim + column;
  R max = -kInfinity<R>, sum = 0, total = 0;
  for (int64_t i = 0; live && i < plan.tiles; ++i) max = fmax(max, stats[2 * i]);
  for (int64_t first = 0; live && first < plan.tiles; first += kTilesInFlight) {
    R weight[kTilesInFlight] = {}, part[kTilesInFlight] = {};
    GPU_UNROLL
    for (int j = 0; j < kTilesInFlight; ++j) {
      const int64_t i = first + j;
      const R tile_sum = i < plan.tiles ? stats[2 * i + 1] : 0;
      if (tile_sum == 0) continue;  // no keys, or all dropped
      weight[j] = exponential(stats[2 * i] - max);
      sum += weight[j] * tile_sum;
      if (column < p.value_dim) part[j] = sums[i * p.value_dim];
    }
    GPU_UNROLL
    for (int j = 0; j < kTilesInFlight; ++j) total += weight[j] * part[j];
  }
  if (column < p.value_dim)
    static_cast<T*>(p.o)[item * p.value_dim + column] = gpu::from_real<T>(sum == 0 ? 0 : total / sum);
  if (column == 0) static_cast<R*>(p.lse)[item] = live ? max + log(sum) : 0;
}

}  // namespace chunked_attention
}  // namespace megalodon

// Shared by the kernels of timestep_norm: the division of work, rows of a tile, numbers with a residual, carries.
//
// The T tokens are cut into tiles of kTile rows (tokens); a tile may hold rows of several sequences. A block takes a
// tile and a slice of the channels, a warp takes kRows neighbouring rows of the tile. A group has F = D / G channels;
// it is processed by 1 to 32 lanes: the smallest power of two that gives each vector of the group a lane, or 32. A warp
// takes 32 / lanes neighbouring groups of its rows, and these groups are the block's slice. A separate kernel scans the
// carries between tiles in double: two numbers per tile and group.
#pragma once

#include <cmath>

#include "sequences.cuh"
#include "timestep_norm.h"
#include "vec.cuh"

namespace megalodon {
namespace timestep_norm {

constexpr int kWarps = 8;  // per block
constexpr int kRows = 8;   // per warp
constexpr int kTile = kWarps * kRows;
constexpr int kThreads = kWarps * gpu::kWarp;

inline int64_t tiles(const TimestepNormParams& p) { return (p.sequences.tokens + kTile - 1) / kTile; }

// Division of a row over blocks and lanes.
struct Layout {
  int64_t vectors;  // per group
  unsigned slices;  // per row
  int log_lanes;    // per group
};

template <int kWidth>
Layout make_layout(const TimestepNormParams& p) {
  Layout layout{p.channels / p.groups / kWidth, 0, 0};
  while (1 << layout.log_lanes < gpu::kWarp && 1 << layout.log_lanes < layout.vectors) ++layout.log_lanes;
  const int64_t groups = gpu::kWarp >> layout.log_lanes;
  layout.slices = static_cast<unsigned>((p.groups + groups - 1) / groups);
  return layout;
}

GPU_INLINE int at_most(int limit, int64_t n) { return n < limit ? static_cast<int>(n) : limit; }

// A thread's tile, rows and group.
struct Place {
  GPU_INLINE Place(const TimestepNormParams& p, const Layout& layout, unsigned block)
      : warp(threadIdx.x / gpu::kWarp), lane(threadIdx.x % gpu::kWarp), lanes(1 << layout.log_lanes),
        vector(lane & (lanes - 1)), group_in_slice(lane >> layout.log_lanes), tile(block / layout.slices),
        first(tile * kTile), start(token(0) < p.sequences.tokens ? token(0) : p.sequences.tokens - 1),
        rows(at_most(kRows, p.sequences.tokens - token(0))),
        slice_group(int64_t{block % layout.slices} * (gpu::kWarp >> layout.log_lanes)),
        has_group(slice_group + group_in_slice < p.groups),
        group(has_group ? slice_group + group_in_slice : p.groups - 1) {}

  GPU_INLINE int64_t token(int r) const { return first + warp * kRows + r; }             // of the warp's row r
  GPU_INLINE int64_t readable_token(int r) const { return start + (r < rows ? r : 0); }  // token(r), or another below T

  int warp, lane, lanes;
  int vector;           // the lane's first vector of its group
  int group_in_slice;   // the lane's group, counted from slice_group
  int64_t tile, first;  // the tile and its first token
  int64_t start;        // the warp's first token, or T - 1
  int rows;             // number of the warp's rows below T; none if negative
  int64_t slice_group;  // the slice's first group
  bool has_group;       // the lane's group exists; otherwise `group` is another lane's
  int64_t group;
};

// Every lane gets the sums over its group.
template <class R>
GPU_INLINE void sum_groups(R (&value)[kRows], int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    GPU_UNROLL
    for (int r = 0; r < kRows; ++r) value[r] += __shfl_xor_sync(gpu::kFullMask, value[r], distance);
  }
}

// A number hi + lo. For float it has about twice float's digits; for double, lo is 0.
template <class R>
struct Pair {
  R hi, lo;
};

template <class R>
GPU_INLINE Pair<R> add(R a, R b) {
  const R sum = a + b, part = sum - a;
  return {sum, sizeof(R) == 8 ? 0 : (a - (sum - part)) + (b - part)};
}
template <class R>
GPU_INLINE Pair<R> add(const Pair<R>& a, R b) {
  return add(a.hi, a.lo + b);
}
template <class R>
GPU_INLINE R difference(const Pair<R>& a, const Pair<R>& b) {
  return (a.hi - b.hi) + (a.lo - b.lo);
}
template <class R>
GPU_INLINE double widen(const Pair<R>& a) {
  return static_cast<double>(a.hi) + a.lo;
}
template <class R>
GPU_INLINE Pair<R> split(double a) {
  const R hi = static_cast<R>(a);
  return {hi, static_cast<R>(a - hi)};
}

GPU_INLINE int64_t initial_count(const TimestepNormParams& p, int64_t s) { return p.count ? p.count[s] : 0; }

template <class R>
struct Moments {
  Pair<R> mean, var;
};

// Index of the mean's residual in `residual` (S, 2, G); the variance's residual is p.groups later.
GPU_INLINE int64_t residual_at(const TimestepNormParams& p, int64_t s, int64_t group) {
  return 2 * s * p.groups + group;
}

// The initial state of sequence s; zeros if the sequence is fresh.
template <class R>
GPU_INLINE Moments<R> initial_moments(const TimestepNormParams& p, int64_t s, int64_t group) {
  Moments<R> state = {};
  if (initial_count(p, s) == 0) return state;
  const int64_t at = s * p.groups + group;
  const int64_t mean_index = residual_at(p, s, group), var_index = mean_index + p.groups;
  const R* residual = static_cast<const R*>(p.residual);
  state.mean = add(static_cast<const R*>(p.mean)[at], residual ? residual[mean_index] : R{0});
  state.var = add(static_cast<const R*>(p.var)[at], residual ? residual[var_index] : R{0});
  return state;
}

// Positions of a tile's rows in their sequences, in shared memory.
template <class R>
struct Rows {
  int64_t* sequence;  // number of the row's sequence; -1: padding
  int* step;          // rows of the sequence before this row, at most kTile; -1: padding
  int* left;          // rows of the sequence after this row, at most kTile; -1: padding
  R* inverse_count;   // 1 / number of the sequence's timesteps up to and including this row
};

template <class R>
GPU_INLINE Rows<R> make_rows() {
  SMEM_ARRAY(int64_t, sequence, kTile);
  SMEM_ARRAY(int, step, kTile);
  SMEM_ARRAY(int, left, kTile);
  SMEM_ARRAY(R, inverse_count, kTile);
  return {sequence, step, left, inverse_count};
}

// Thread i looks up row i. Returns the number of timesteps of the row's sequence, up to and including the row. A
// barrier must follow.
template <class R>
GPU_INLINE int64_t look_up(const Rows<R>& rows, const TimestepNormParams& p, int64_t first) {
  const int i = threadIdx.x;
  if (i >= kTile) return 0;
  const int64_t token = first + i, s = token < p.sequences.tokens ? gpu::find_sequence(p.sequences, token) : -1;
  const int64_t step = s < 0 ? -1 : token - p.sequences.begin(s), seen = s < 0 ? 0 : initial_count(p, s) + step + 1;
  rows.sequence[i] = s;
  rows.step[i] = at_most(kTile, step);
  rows.left[i] = s < 0 ? -1 : at_most(kTile, p.sequences.end(s) - 1 - token);
  rows.inverse_count[i] = s < 0 ? 0 : R{1} / static_cast<R>(seen);
  return seen;
}

// Two numbers per tile and group, in the workspace: mean and variance in the forward, u and v in the backward. The
// forward scans the tiles from first to last, the backward from last to first; "before" is in this order. Until the
// scan the numbers are the tile's own; after it they are those of all tiles before the tile.
//
// A tile continues if one sequence fills it and has rows in the tile before, too; then `steps` is kContinues. Else, in
// the forward, `steps` is the number of timesteps of the last row's sequence so far, 0 for padding; in the backward 0.
constexpr int64_t kContinues = -1;
struct Carries {
  double *first, *second;  // (tiles, G)
  int64_t* steps;          // (tiles)
  Carries(void* workspace, int64_t tiles, int64_t groups)
      : first(static_cast<double*>(workspace)), second(first + tiles * groups),
        steps(reinterpret_cast<int64_t*>(second + tiles * groups)) {}
};
inline int64_t carries_bytes(int64_t tiles, int64_t groups) { return tiles * (2 * groups * 8 + 8); }

// An exclusive scan along tiles. A block takes kCarryGroups neighbouring groups, a thread takes a chunk of one group's
// tiles:
//   1. a thread combines the elements of its chunk;
//   2. the threads scan these sums;
//   3. a thread visits its chunk again and stores, for each tile, the combination of all tiles before it.
// Source: load(i, group) returns an Element, store(i, group, element) stores one; combine(before, after) merges two.
constexpr int kCarryGroups = 4;  // the doubles of a sector
constexpr int kCarryThreads = 512;

template <class Source>
__global__ void __launch_bounds__(kCarryThreads)
    timestep_norm_carry_kernel(Source source, int64_t tiles, int64_t groups) {
  using Element = typename Source::Element;
  SMEM_ARRAY(Element, shared, kCarryThreads);
  const int thread = threadIdx.x, threads = static_cast<int>(blockDim.x);
  const int64_t chunk = (tiles + threads / kCarryGroups - 1) / (threads / kCarryGroups);
  const int64_t group = int64_t{blockIdx.x} * kCarryGroups + thread % kCarryGroups;
  const int64_t begin = thread / kCarryGroups * chunk, end = begin + chunk < tiles ? begin + chunk : tiles;
  Element sum = {};
  for (int64_t i = begin; group < groups && i < end; ++i) sum = combine(sum, source.load(i, group));
  for (int distance = kCarryGroups; distance < threads; distance *= 2) {
    shared[thread] = sum;
    __syncthreads();
    if (thread >= distance) sum = combine(shared[thread - distance], sum);
    __syncthreads();
  }
  shared[thread] = sum;
  __syncthreads();
  sum = thread < kCarryGroups ? Element{} : shared[thread - kCarryGroups];
  if (group >= groups || begin >= end) return;
  Element own = source.load(begin, group);
  for (int64_t i = begin; i < end; ++i) {
    const Element next = i + 1 < end ? source.load(i + 1, group) : Element{};  // loads are issued before the store
    source.store(i, group, sum);
    sum = combine(sum, own);
    own = next;
  }
}

template <class Source>
void launch_carry(const Source& source, int64_t tiles, int64_t groups, void* stream) {
  const int64_t blocks = (groups + kCarryGroups - 1) / kCarryGroups;
  // If there are few tiles, a block has only as many warps as give each tile a thread for each group.
  const int64_t warp_tiles = gpu::kWarp / kCarryGroups, wanted = (tiles + warp_tiles - 1) / warp_tiles * gpu::kWarp;
  const int64_t threads = LAUNCH_SIZE(norm_carry_threads, wanted < kCarryThreads ? wanted : kCarryThreads);
  LAUNCH(timestep_norm_carry_kernel<Source>, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream,
         source, tiles, groups);
}

// Returns true if this thread merges the warps' results of group threadIdx.x of the slice.
GPU_INLINE bool is_merging_thread(const TimestepNormParams& p, const Layout& layout, const Place& place) {
  return static_cast<int>(threadIdx.x) < gpu::kWarp >> layout.log_lanes && place.slice_group + threadIdx.x < p.groups;
}

// Returns true if a sequence may continue from a tile to the next, as far as the host knows.
inline bool tiles_depend(const TimestepNormParams& p) {
  return p.sequences.tokens > kTile && (!p.sequences.by_row || kTile % p.sequences.row_length != 0);
}

// Returns true if there may be sequences without tokens, or tokens without channels.
inline bool may_be_empty(const TimestepNormParams& p) {
  const bool no_elements = p.sequences.tokens * p.channels == 0;
  return p.sequences.count > 0 && (p.sequences.spans || no_elements);
}

}  // namespace timestep_norm
}  // namespace megalodon

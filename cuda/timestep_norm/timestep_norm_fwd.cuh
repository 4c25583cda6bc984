// Timestep norm, forward: ops/timestep_norm/timestep_norm_reference.py.
//
//   gm, gv = mean, biased variance of x_t in its group of F = D / G channels;  n' = n + 1, c = 1 / n'
//   mean' = mean + c (gm - mean);  var' = var + c (gv - var + (1 - c) (gm - mean)^2);  rstd = 1 / sqrt(var' + eps)
//   y = (x - mean') rstd (1 + weight) + bias
//
//   x, y (T, D):                                       the call's dtype
//   weight, bias (D); stats (3, T, G); states (S, G):  R, float or double
//
// Grid: one block per tile and slice of the channels (timestep_norm.cuh); the blocks of one tile are consecutive.
// Launches:
//   timestep_norm_fwd_moments  phases 1 to 3 without a carry; stores each tile's moments
//   timestep_norm_carry        scans the moments
//   timestep_norm_fwd          all phases; its first blocks take the last tiles of x, which are still in L2
//   timestep_norm_fwd_empty    copies the states of empty sequences, if there may be any
//   timestep_norm_end_state    replaces timestep_norm_fwd if only end states are wanted: phases 1 to 4, in the tiles in
//                              which a sequence ends, so only these tiles of x are read twice
//   The first two are skipped if no sequence continues from a tile to the next, so decoding a token is one launch.
// Phases: 1. A warp computes gm and gv of its rows: gm by a sum of differences from the group's first channel, gv by a
//            sum of squared differences from gm. gm is a pair (hi, lo). A lane keeps its vectors of x for phase 5.
//         2. A warp merges the moments of those of its rows that belong to its last sequence.
//         3. A thread per group merges the warps' moments in order of time, starting from the carry, in double.
//         4. A warp scans its rows from the state that enters it. It sums only the changes of mean and variance since
//            that state, in R: errors are relative to these changes, so states do not drift.
//         5. y.
// If F is not a multiple of the vector width, or a tensor is misaligned, a lane's vectors have one element. In this
// case, or if a group has more vectors than a warp has lanes, phases 1 and 5 read x again, mostly from L1.
//
// Shared memory: 6 KB; 16 KB in the carry kernel. Registers: at most 128, so two blocks per SM; no spills, except 12
// bytes for fp16 on sm_80.
// Bytes: the minimum is x, y and stats once; timestep_norm_fwd reads x again, from L2 if it is there. Carries have 16
// bytes per tile and group, which are written and read twice: 1.6% of x for F = 32 in bf16. 7 of a block's 8 warps read
// weight and bias from L1.
// H100, (B 8, L 2048, D 1024, G 32) bf16, at least 62 us:
//   memory         67 + 6.3 MB, 22 us at 3.35 TB/s; 32 us if x comes from memory twice
//   instructions   20 us in the first launch and 42 in the last (bench.predict)
// Example: F = 32 bf16: 4 lanes per group, 8 groups per warp, 256 channels per block; lane 5 has channels 8 to 15 of
// group 1.
#pragma once

#include "timestep_norm.cuh"

namespace megalodon {
namespace timestep_norm {

// Phase 1: gm and gv of the warp's rows. kHeld: a lane has at most one vector of a group and keeps it in registers.
template <class T, int kWidth, bool kHeld>
class RowMoments {
  using R = Compute<T>;

 public:
  GPU_INLINE RowMoments(const TimestepNormParams& p, const Layout& layout, const Place& place)
      : vectors_(static_cast<int>(layout.vectors)), first_(place.vector), lanes_(place.lanes) {
    const int64_t size = layout.vectors * kWidth;
    GPU_UNROLL
    for (int r = 0; r < kRows; ++r) {
      from_[r] = static_cast<const T*>(p.x) + place.readable_token(r) * p.channels + place.group * size;
      if constexpr (kHeld) held_[r] = gpu::ld<Vector>(from_[r] + (first_ < vectors_ ? first_ : 0) * kWidth);
    }
    R shift[kRows], sum[kRows];
    const R per_channel = R{1} / static_cast<R>(size);
    GPU_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kHeld) shift[r] = __shfl_sync(gpu::kFullMask, gpu::to_real(held_[r].element[0]), 0, lanes_);
      else shift[r] = gpu::to_real(from_[r][0]);
      sum[r] = 0;
    }
    for_each_vector([&](int r, const R(&x)[kWidth]) {
      GPU_UNROLL
      for (int e = 0; e < kWidth; ++e) sum[r] += x[e] - shift[r];
    });
    sum_groups(sum, lanes_);
    GPU_UNROLL
    for (int r = 0; r < kRows; ++r) {
      mean[r] = add(shift[r], sum[r] * per_channel);
      var[r] = 0;
    }
    for_each_vector([&](int r, const R(&x)[kWidth]) {
      GPU_UNROLL
      for (int e = 0; e < kWidth; ++e) var[r] += (x[e] - mean[r].hi) * (x[e] - mean[r].hi);
    });
    sum_groups(var, lanes_);
    GPU_UNROLL
    for (int r = 0; r < kRows; ++r) {
      var[r] = var[r] * per_channel - mean[r].lo * mean[r].lo;
      if (var[r] < 0) var[r] = 0;
    }
  }

  // Calls f(vector, x) for the lane's vectors of row r.
  template <class F>
  GPU_INLINE void for_each_vector_of(int r, F&& f) const {
    R x[kWidth];
    if constexpr (kHeld) {
      GPU_UNROLL
      for (int e = 0; e < kWidth; ++e) x[e] = gpu::to_real(held_[r].element[e]);
      if (first_ < vectors_) f(first_, x);
    } else {
      for (int v = first_; v < vectors_; v += lanes_) {
        gpu::load<(kWidth > 1)>(x, from_[r] + int64_t{v} * kWidth);
        f(v, x);
      }
    }
  }

  Pair<R> mean[kRows];
  R var[kRows];

 private:
  // Calls f(r, x) for the lane's vectors of all rows.
  template <class F>
  GPU_INLINE void for_each_vector(F&& f) const {
    if constexpr (kHeld) {
      GPU_UNROLL
      for (int r = 0; r < kRows; ++r) for_each_vector_of(r, [&](int64_t, const R(&x)[kWidth]) { f(r, x); });
    } else {
      R x[kWidth];
      for (int v = first_; v < vectors_; v += lanes_) {
        GPU_UNROLL
        for (int r = 0; r < kRows; ++r) {
          gpu::load<(kWidth > 1)>(x, from_[r] + int64_t{v} * kWidth);
          f(r, x);
        }
      }
    }
  }

  using Vector = gpu::Pack<T, kWidth>;
  const int vectors_, first_, lanes_;
  const T* from_[kRows];
  Vector held_[kHeld ? kRows : 1];
};

// Results of phases 2 and 3 in shared memory.
template <class R>
struct Exchange {
  double *mean, *var;  // (kWarps, 32): moments of those rows of a warp that belong to its last sequence; after phase 3,
                       // the state that enters the warp
  double* weight;      // (kWarps): number of these rows / number of timesteps of their sequence so far
};

template <class R>
GPU_INLINE Exchange<R> make_exchange() {
  SMEM_ARRAY(double, mean, kWarps* gpu::kWarp);
  SMEM_ARRAY(double, var, kWarps* gpu::kWarp);
  SMEM_ARRAY(double, weight, kWarps);
  return {mean, var, weight};
}

// Number of a warp's rows in the sequence of its last row; 0 if that row is padding. `step`: Rows::step of that row.
GPU_INLINE int rows_of_last_sequence(int step) { return step < kRows ? step + 1 : kRows; }

// Stores each warp's Exchange::weight, by the thread that looked up the warp's last row. kFromTile: if the sequence
// began before the tile, only its timesteps in the tile count.
template <bool kFromTile, class R>
GPU_INLINE void weigh_rows(const Exchange<R>& exchange, const Rows<R>& rows, int64_t seen) {
  const int row = threadIdx.x;
  if (row >= kTile || row % kRows != kRows - 1) return;
  const int step = rows.step[row], size = rows_of_last_sequence(step);
  const double all = kFromTile && step > row ? row + 1 : static_cast<double>(seen);
  exchange.weight[row / kRows] = size > 0 ? size / all : 0;
}

// Phase 2.
template <class T, int kWidth, bool kHeld, class R>
GPU_INLINE void merge_rows(const Exchange<R>& exchange, const Rows<R>& rows, const Place& place,
                           const RowMoments<T, kWidth, kHeld>& moments) {
  const int size = rows_of_last_sequence(rows.step[place.warp * kRows + kRows - 1]);
  const R per_row = R{1} / static_cast<R>(size > 0 ? size : 1);
  const Pair<R> pivot = moments.mean[kRows - 1];
  R mean = 0, var = 0;
  GPU_UNROLL
  for (int r = 0; r < kRows; ++r) mean += r >= kRows - size ? difference(moments.mean[r], pivot) * per_row : 0;
  GPU_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const R d = difference(moments.mean[r], pivot) - mean;
    var += r >= kRows - size ? (moments.var[r] + d * d) * per_row : 0;
  }
  if (place.vector != 0) return;
  const int at = place.warp * gpu::kWarp + place.group_in_slice;
  exchange.mean[at] = size > 0 ? widen(pivot) + mean : 0;
  exchange.var[at] = var;
}

// Phase 3. Thread i takes group i of the slice and stores the state that enters each warp in `exchange`. `mean` and
// `var` are the state that enters the tile and, on return, the state after the tile's last warp.
template <class R>
GPU_INLINE void merge_warps(const Exchange<R>& exchange, const Rows<R>& rows, const TimestepNormParams& p,
                            int64_t group, double& mean, double& var) {
  for (int warp = 0; warp < kWarps; ++warp) {
    const int at = warp * gpu::kWarp + threadIdx.x, row = warp * kRows + kRows - 1, step = rows.step[row];
    const double own_mean = exchange.mean[at], own_var = exchange.var[at], weight = exchange.weight[warp];
    exchange.mean[at] = mean;
    exchange.var[at] = var;
    if (step < kRows) {  // the entering sequence ends inside the warp
      const Moments<R> state = step < 0 ? Moments<R>{} : initial_moments<R>(p, rows.sequence[row], group);
      mean = widen(state.mean);
      var = widen(state.var);
    }
    const double d = own_mean - mean;
    mean += weight * d;
    var += weight * ((own_var - var) + (1 - weight) * (d * d));
  }
}

template <class T, int kWidth, bool kHeld>
__global__ void __launch_bounds__(kThreads, 2)
    timestep_norm_fwd_moments_kernel(TimestepNormParams p, Layout layout, Carries carries) {
  using R = Compute<T>;
  const Place place(p, layout, blockIdx.x);
  const Rows<R> rows = make_rows<R>();
  const Exchange<R> exchange = make_exchange<R>();
  const RowMoments<T, kWidth, kHeld> moments(p, layout, place);
  weigh_rows<true>(exchange, rows, look_up(rows, p, place.first));
  __syncthreads();
  merge_rows(exchange, rows, place, moments);
  __syncthreads();
  if (!is_merging_thread(p, layout, place)) return;
  const int64_t group = place.slice_group + threadIdx.x, s = rows.sequence[kTile - 1];
  double mean = 0, var = 0;
  merge_warps(exchange, rows, p, group, mean, var);
  carries.first[place.tile * p.groups + group] = mean;
  carries.second[place.tile * p.groups + group] = var;
  if (group > 0) return;
  if (rows.step[kTile - 1] == kTile) carries.steps[place.tile] = kContinues;
  else if (s < 0) carries.steps[place.tile] = 0;
  else carries.steps[place.tile] = initial_count(p, s) + place.first + kTile - p.sequences.begin(s);
}

// Moments of consecutive tiles.
struct TileMoments {
  double steps, mean, var;
  bool closed;  // the last sequence begins in these tiles, so earlier tiles have no influence
};

GPU_INLINE TileMoments combine(const TileMoments& before, const TileMoments& after) {
  if (after.closed) return after;
  const double steps = before.steps + after.steps, weight = after.steps / steps, d = after.mean - before.mean;
  return {steps, before.mean + weight * d, before.var + weight * ((after.var - before.var) + (1 - weight) * (d * d)),
          before.closed};
}

struct TileMomentsSource {
  using Element = TileMoments;
  Carries carries;
  int64_t groups;
  GPU_INLINE TileMoments load(int64_t tile, int64_t group) const {
    const int64_t steps = carries.steps[tile], at = tile * groups + group;
    const bool closed = steps != kContinues;
    return {static_cast<double>(closed ? steps : kTile), carries.first[at], carries.second[at], closed};
  }
  GPU_INLINE void store(int64_t tile, int64_t group, const TileMoments& moments) const {
    carries.first[tile * groups + group] = moments.mean;
    carries.second[tile * groups + group] = moments.var;
  }
};

// Stores the state after the last row of sequence s.
template <class R>
GPU_INLINE void store_state(const TimestepNormFwdParams& p, int64_t s, int64_t group, const Moments<R>& state) {
  const int64_t at = s * p.groups + group;
  R* const residual = static_cast<R*>(p.residual_out) + residual_at(p, s, group);
  static_cast<R*>(p.mean_out)[at] = state.mean.hi;
  static_cast<R*>(p.var_out)[at] = state.var.hi;
  residual[0] = state.mean.lo;
  residual[p.groups] = state.var.lo;
  if (group == 0) p.count_out[s] = initial_count(p, s) + p.sequences.length(s);
}

// Phase 4: leaves mean and rstd after each row in moments.mean and moments.var; stores statistics and states.
template <class T, int kWidth, bool kHeld, class R>
GPU_INLINE void walk_rows(const TimestepNormFwdParams& p, const Rows<R>& rows, const Exchange<R>& exchange,
                          const Place& place, RowMoments<T, kWidth, kHeld>& moments) {
  const int at = place.warp * gpu::kWarp + place.group_in_slice;
  const int64_t plane = p.sequences.tokens * p.groups;
  Moments<R> base{split<R>(exchange.mean[at]), split<R>(exchange.var[at])};
  R mean_change = 0, var_change = 0;  // since `base`
  GPU_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int row = place.warp * kRows + r;
    const int64_t s = rows.sequence[row];
    if (r >= place.rows) break;
    if (s < 0) {
      moments.mean[r] = {};
      moments.var[r] = 0;
    } else {
      if (rows.step[row] == 0) {
        base = initial_moments<R>(p, s, place.group);
        if (initial_count(p, s) == 0) base.mean = moments.mean[r];
        mean_change = var_change = 0;
      }
      const R c = rows.inverse_count[row], d = difference(moments.mean[r], base.mean) - mean_change;
      mean_change += c * d;
      var_change += c * ((moments.var[r] - (base.var.hi + var_change)) + (1 - c) * (d * d));
      moments.mean[r] = add(base.mean, mean_change);
      const R shifted = base.var.hi + (base.var.lo + var_change) + static_cast<R>(p.eps);
      moments.var[r] = rsqrt(shifted) + 0 * shifted;  // NaN for a variance beyond the range of R
    }
    if (place.vector != 0) continue;
    if (p.stats) {
      R* const stats = static_cast<R*>(p.stats) + place.token(r) * p.groups + place.group;
      stats[0] = moments.mean[r].hi;
      stats[plane] = moments.mean[r].lo;
      stats[2 * plane] = moments.var[r];
    }
    if (rows.left[row] != 0 || !p.count_out) continue;
    store_state<R>(p, s, place.group, {moments.mean[r], add(base.var, var_change)});
  }
}

// Phases 2 to 4, after a barrier.
template <class T, int kWidth, bool kHeld, class R>
GPU_INLINE void walk_tile(const TimestepNormFwdParams& p, const Layout& layout, const Carries& carries,
                          const Rows<R>& rows, const Exchange<R>& exchange, const Place& place,
                          RowMoments<T, kWidth, kHeld>& moments) {
  merge_rows(exchange, rows, place, moments);
  __syncthreads();
  if (is_merging_thread(p, layout, place)) {
    const int64_t group = place.slice_group + threadIdx.x, at = place.tile * p.groups + group;
    double mean = rows.step[0] > 0 ? carries.first[at] : 0, var = rows.step[0] > 0 ? carries.second[at] : 0;
    merge_warps(exchange, rows, p, group, mean, var);
  }
  __syncthreads();
  if (place.has_group) walk_rows(p, rows, exchange, place, moments);
}

template <class T, int kWidth, bool kHeld>
__global__ void __launch_bounds__(kThreads, 2)
    timestep_norm_end_state_kernel(TimestepNormFwdParams p, Layout layout, Carries carries) {
  using R = Compute<T>;
  const Place place(p, layout, gridDim.x - 1 - blockIdx.x);
  const Rows<R> rows = make_rows<R>();
  const Exchange<R> exchange = make_exchange<R>();
  const int64_t seen = look_up(rows, p, place.first);
  __syncthreads();
  if (rows.left[0] == kTile) return;  // one sequence fills the tile and continues
  RowMoments<T, kWidth, kHeld> moments(p, layout, place);
  weigh_rows<false>(exchange, rows, seen);
  walk_tile(p, layout, carries, rows, exchange, place, moments);
}

// Phases 1 to 5.
template <class T, int kWidth, bool kHeld>
__global__ void __launch_bounds__(kThreads, 2)
    timestep_norm_fwd_kernel(TimestepNormFwdParams p, Layout layout, Carries carries) {
  using R = Compute<T>;
  constexpr bool kWhole = kWidth > 1;
  const Place place(p, layout, gridDim.x - 1 - blockIdx.x);
  const Rows<R> rows = make_rows<R>();
  const Exchange<R> exchange = make_exchange<R>();
  RowMoments<T, kWidth, kHeld> moments(p, layout, place);
  weigh_rows<false>(exchange, rows, look_up(rows, p, place.first));
  __syncthreads();
  walk_tile(p, layout, carries, rows, exchange, place, moments);
  if (!place.has_group) return;

  const int64_t channel = place.group * layout.vectors * kWidth;
  const R *weight = static_cast<const R*>(p.weight) + channel, *bias = static_cast<const R*>(p.bias) + channel;
  R gain[kWidth] = {}, shift[kWidth] = {};  // of the lane's vector; if kHeld is false, loaded for each vector
  const auto load_affine = [&](int64_t vector) {
    gpu::load_wide<kWhole>(gain, weight + vector * kWidth);
    gpu::load_wide<kWhole>(shift, bias + vector * kWidth);
  };
  if (kHeld && place.vector < layout.vectors) load_affine(place.vector);
  GPU_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (r >= place.rows) break;
    const bool padding = rows.step[place.warp * kRows + r] < 0;
    T* const y = static_cast<T*>(p.y) + place.token(r) * p.channels + channel;
    moments.for_each_vector_of(r, [&](int64_t vector, const R(&x)[kWidth]) {
      if constexpr (!kHeld) load_affine(vector);
      R normalized[kWidth];
      GPU_UNROLL
      for (int e = 0; e < kWidth; ++e) {
        const R centred = x[e] - moments.mean[r].hi - moments.mean[r].lo;
        normalized[e] = padding ? 0 : centred * moments.var[r] * (1 + gain[e]) + shift[e];
      }
      gpu::store<kWhole>(y + vector * kWidth, normalized);
    });
  }
}

// One thread per sequence and group. Stores the states of sequences without tokens or, if D = 0, of all sequences.
template <class R>
__global__ void __launch_bounds__(kThreads) timestep_norm_fwd_empty_kernel(TimestepNormFwdParams p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, count = p.sequences.count * p.groups;
  if (i >= count || !p.count_out || (p.channels > 0 && p.sequences.length(i / p.groups) > 0)) return;
  const int64_t s = i / p.groups, group = i % p.groups;
  Moments<R> state = initial_moments<R>(p, s, group);
  if (p.sequences.length(s) > 0) state = {{NAN, NAN}, {NAN, NAN}};  // statistics of no channels are NaN
  store_state(p, s, group, state);
}

}  // namespace timestep_norm
}  // namespace megalodon

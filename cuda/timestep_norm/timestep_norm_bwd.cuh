// Timestep norm, backward: ops/timestep_norm/timestep_norm_reference.py.
//
//   db = sum_F dy (1 + weight);  ds = sum_F dy (1 + weight) (x - mean_t);  a = -rstd db / n;  b = -rstd^3 ds / (2 n)
//   dx_t = dy rstd (1 + weight) + (sum over j >= t of [a_j + 2 b_j (x_t - mean_j)]) / F
//   dweight = sum_T dy (x - mean) rstd;  dbias = sum_T dy
//
// The sum over j is u + 2 v (x_t - m) for an arbitrary pivot m; another pivot m' has u' = u + 2 v (m' - m) and the same
// v. So sums of neighbouring tiles are added once they have the same pivot. The gradient of the end state adds a =
// dmean / n and b = dvar / n at the last row. The gradient of the initial state, which has seen n timesteps, is n u for
// the mean and n v for the variance, about the state's mean.
//
//   x, dy, dx (T, D):                                           the call's dtype
//   weight, dweight, dbias (D); stats (3, T, G); states (S, G): R, float or double
//
// Launches and phases:
//   timestep_norm_bwd_sums, a block for each tile and slice (timestep_norm.cuh):
//     1. A warp reduces the F channels of its rows to db and ds.
//     2. It sums a and b from its last row to its first: u and v of each row, about the row's own mean.
//     3. A thread per group passes the sums from warp to warp, the last warp first, in double.
//     4. A warp adds the sums that enter it and stores u and v of each row, as if its tile were the last.
//   timestep_norm_carry scans the tiles' carries, in double; skipped if no sequence continues from tile to tile.
//   timestep_norm_bwd, a block for some tiles and 32 vectors of a row; a lane takes one vector, a warp kRows rows of a
//     tile. It adds the carry that enters the tile, writes dx, sums dweight and dbias over the block's rows and stores
//     these shares. The last tiles come first, as they are still in L2. gpu::sum_shares adds the shares.
//   timestep_norm_bwd_empty passes on the gradients of empty sequences, if there may be any.
// If F is not a multiple of the vector width, or a tensor is misaligned, a lane's vectors have one element.
//
// Shared memory: 8 KB in sums, 10 KB in bwd, 16 KB in the carry kernel. Registers: at most 128, two blocks per SM (sums
// for f64, and if a lane loops over vectors: 210, one block); no spills.
// Bytes: the minimum is x, dy, dx and stats once. timestep_norm_bwd reads x, dy and stats again, from L2 if they are
// there. u and v, written and read: 16 bytes per token and group, 8% of x, dy and dx for F = 32 in bf16, 4% in fp32.
// Shares, written and read: at most 2% of x, dy and dx. 7 of 8 warps read gains from L1.
// H100, (B 8, L 2048, D 1024, G 32) bf16: 101 + 6.3 MB, 32 us at 3.35 TB/s; 55 us if all is read twice from memory.
// Example: T = 100 in one sequence: tile 1 has rows 64 .. 99, whose sums enter tile 0, about the mean of row 64.
#pragma once

#include "shares.cuh"
#include "timestep_norm.cuh"

namespace megalodon {
namespace timestep_norm {

constexpr int64_t kMinShares = 32, kMaxShares = 256;  // limits of the number of shares, if there are as many tiles
constexpr int64_t kShareChannels = 1 << 18;           // channels in all shares together, within these limits
inline int64_t most_shares(int64_t channels) {
  const int64_t count = channels > 0 ? kShareChannels / channels : kMaxShares;
  return LAUNCH_SIZE(norm_shares, count < kMinShares ? kMinShares : count > kMaxShares ? kMaxShares : count);
}

inline int64_t local_size(const TimestepNormBwdParams& p) { return tiles(p) * 2 * p.groups * kTile; }

// The workspace.
template <class R>
struct Scratch {
  R* local;  // (tiles, 2, G, kTile): u, v of each row, as if its tile were the last
  Carries carries;
  R* shares;  // (share_count, 2, D)
  int64_t tiles_per_share, share_count;

  explicit Scratch(const TimestepNormBwdParams& p)
      : local(static_cast<R*>(p.workspace)), carries(local + local_size(p), tiles(p), p.groups),
        shares(reinterpret_cast<R*>(carries.steps + tiles(p))),
        tiles_per_share((tiles(p) + most_shares(p.channels) - 1) / most_shares(p.channels)),
        share_count(tiles_per_share ? (tiles(p) + tiles_per_share - 1) / tiles_per_share : 0) {}

  int64_t bytes(const TimestepNormBwdParams& p) const {
    const int64_t reals = local_size(p) + share_count * 2 * p.channels;
    return carries_bytes(tiles(p), p.groups) + reals * static_cast<int64_t>(sizeof(R));
  }
};

template <class R>
GPU_INLINE Pair<R> mean_after(const TimestepNormBwdParams& p, int64_t token, int64_t group) {
  const R* mean = static_cast<const R*>(p.stats) + token * p.groups + group;
  return {mean[0], mean[p.sequences.tokens * p.groups]};
}

template <class R>
GPU_INLINE R rstd_after(const TimestepNormBwdParams& p, int64_t token, int64_t group) {
  return static_cast<const R*>(p.stats)[(2 * p.sequences.tokens + token) * p.groups + group];
}

// Phase 1: db and ds of the warp's rows. kOne: a lane has at most one vector of a group.
template <class T, int kWidth, bool kOne, class R>
GPU_INLINE void sum_rows(const TimestepNormBwdParams& p, const Layout& layout, const Place& place,
                         const Pair<R> (&mean)[kRows], R (&db)[kRows], R (&ds)[kRows]) {
  constexpr bool kWhole = kWidth > 1;
  const int64_t channel = place.group * layout.vectors * kWidth;
  R gain[kWidth];
  const auto add_vector = [&](int r, const R(&x)[kWidth], const R(&dy)[kWidth]) {
    GPU_UNROLL
    for (int e = 0; e < kWidth; ++e) {
      const R scaled = dy[e] * (1 + gain[e]);
      db[r] += scaled;
      ds[r] += scaled * (x[e] - mean[r].hi - mean[r].lo);
    }
  };
  const auto load_vector = [&](int r, int64_t vector, R(&x)[kWidth], R(&dy)[kWidth]) {
    const int64_t at = place.readable_token(r) * p.channels + channel + vector * kWidth;
    gpu::load<kWhole>(x, static_cast<const T*>(p.x) + at);
    gpu::load<kWhole>(dy, static_cast<const T*>(p.dy) + at);
  };
  const R* weight = static_cast<const R*>(p.weight) + channel;
  R x[kWidth], dy[kWidth];
  GPU_UNROLL
  for (int r = 0; r < kRows; ++r) db[r] = ds[r] = 0;
  if constexpr (kOne) {
    const bool has_vector = place.vector < layout.vectors;
    const int64_t vector = has_vector ? place.vector : 0;
    gpu::load_wide<kWhole>(gain, weight + vector * kWidth);
    GPU_UNROLL
    for (int r = 0; r < kRows; ++r) {
      load_vector(r, vector, x, dy);
      if (has_vector) add_vector(r, x, dy);
    }
  } else {
    for (int64_t vector = place.vector; vector < layout.vectors; vector += place.lanes) {
      gpu::load_wide<kWhole>(gain, weight + vector * kWidth);
      GPU_UNROLL
      for (int r = 0; r < kRows; ++r) {
        load_vector(r, vector, x, dy);
        add_vector(r, x, dy);
      }
    }
  }
  sum_groups(db, place.lanes);
  sum_groups(ds, place.lanes);
}

template <class R>
GPU_INLINE void store_rows(R* to, const R (&value)[kRows]) {
  constexpr int width = gpu::kVectorWidth<R>;
  GPU_UNROLL
  for (int r = 0; r < kRows; r += width) {
    gpu::Pack<R, width> pack;
    GPU_UNROLL
    for (int i = 0; i < width; ++i) pack.element[i] = value[r + i];
    gpu::st(to + r, pack);
  }
}

// Sums u, v of consecutive tiles, about `pivot`.
struct Sums {
  double u, v, pivot;
  bool closed;  // a sequence ends in these tiles, so later rows have no influence
};

GPU_INLINE Sums combine(const Sums& after, const Sums& before) {
  if (before.closed) return before;
  return {before.u + after.u + 2 * after.v * (before.pivot - after.pivot), before.v + after.v, before.pivot,
          after.closed};
}

template <class T, int kWidth, bool kOne>
__global__ void __launch_bounds__(kThreads, kOne && sizeof(T) < 8 ? 2 : 1)
    timestep_norm_bwd_sums_kernel(TimestepNormBwdParams p, Layout layout, Scratch<Compute<T>> scratch) {
  using R = Compute<T>;
  SMEM_ARRAY(double, exchange_u, kWarps* gpu::kWarp);
  SMEM_ARRAY(double, exchange_v, kWarps* gpu::kWarp);
  SMEM_ARRAY(double, exchange_pivot, kWarps* gpu::kWarp);
  const Place place(p, layout, blockIdx.x);
  const Rows<R> rows = make_rows<R>();
  look_up(rows, p, place.first);
  Pair<R> mean[kRows];
  R u[kRows], v[kRows];  // db and ds until the next loop over rows
  GPU_UNROLL
  for (int r = 0; r < kRows; ++r) mean[r] = mean_after<R>(p, place.readable_token(r), place.group);
  sum_rows<T, kWidth, kOne>(p, layout, place, mean, u, v);
  __syncthreads();

  GPU_UNROLL
  for (int r = kRows - 1; r >= 0; --r) {
    const int row = place.warp * kRows + r, left = rows.left[row];
    const R rstd = rstd_after<R>(p, place.readable_token(r), place.group), inverse_count = rows.inverse_count[row];
    u[r] = left < 0 ? 0 : -rstd * u[r] * inverse_count;
    v[r] = left < 0 ? 0 : -rstd * (rstd * (rstd * v[r])) * (inverse_count / 2);
    if (left == 0) {
      const int64_t at = rows.sequence[row] * p.groups + place.group;
      if (p.dmean_out) u[r] += static_cast<const R*>(p.dmean_out)[at] * inverse_count;
      if (p.dvar_out) v[r] += static_cast<const R*>(p.dvar_out)[at] * inverse_count;
    }
    if (r + 1 < kRows && left > 0) {
      u[r] += u[r + 1] + 2 * v[r + 1] * difference(mean[r], mean[r + 1]);
      v[r] += v[r + 1];
    }
  }
  const int at = place.warp * gpu::kWarp + place.group_in_slice;
  if (place.vector == 0) {
    exchange_u[at] = u[0];
    exchange_v[at] = v[0];
    exchange_pivot[at] = widen(mean[0]);
  }
  __syncthreads();
  if (is_merging_thread(p, layout, place)) {
    Sums sum = {};
    for (int warp = kWarps - 1; warp >= 0; --warp) {
      const int i = warp * gpu::kWarp + threadIdx.x;
      const Sums own{exchange_u[i], exchange_v[i], exchange_pivot[i], rows.left[warp * kRows] < kRows};
      exchange_u[i] = sum.u;
      exchange_v[i] = sum.v;
      exchange_pivot[i] = sum.pivot;
      sum = combine(sum, own);
    }
    const int64_t group = place.slice_group + threadIdx.x;
    scratch.carries.first[place.tile * p.groups + group] = sum.u;
    scratch.carries.second[place.tile * p.groups + group] = sum.v;
    if (group == 0) scratch.carries.steps[place.tile] = rows.left[0] == kTile ? kContinues : 0;
  }
  __syncthreads();
  if (place.vector != 0 || !place.has_group) return;
  const R entering_u = static_cast<R>(exchange_u[at]), entering_v = static_cast<R>(exchange_v[at]);
  const Pair<R> pivot = split<R>(exchange_pivot[at]);
  GPU_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (rows.left[place.warp * kRows + r] < kRows - r) continue;
    u[r] += entering_u + 2 * entering_v * difference(mean[r], pivot);
    v[r] += entering_v;
  }
  R* const local = scratch.local + (place.tile * 2 * p.groups + place.group) * kTile + place.warp * kRows;
  store_rows(local, u);
  store_rows(local + p.groups * kTile, v);
}

// Elements of timestep_norm_carry: the tiles, from the last to the first.
template <class R>
struct SumsSource {
  using Element = Sums;
  TimestepNormBwdParams p;
  Carries carries;
  int64_t tiles;
  GPU_INLINE Sums load(int64_t i, int64_t group) const {
    const int64_t tile = tiles - 1 - i, at = tile * p.groups + group;
    return {carries.first[at], carries.second[at], widen(mean_after<R>(p, tile * kTile, group)),
            carries.steps[tile] != kContinues};
  }
  GPU_INLINE void store(int64_t i, int64_t group, const Sums& sums) const {
    const int64_t at = (tiles - 1 - i) * p.groups + group;
    carries.first[at] = sums.u;
    carries.second[at] = sums.v;
  }
};

// Stores the gradient of sequence s's initial state, from u and v at its first row.
template <class R>
GPU_INLINE void store_state_gradient(const TimestepNormBwdParams& p, int64_t s, int64_t group, const Pair<R>& mean, R u,
                                     R v) {
  const R n = static_cast<R>(initial_count(p, s));
  const Pair<R> pivot = initial_moments<R>(p, s, group).mean;
  const int64_t at = s * p.groups + group;
  if (p.dmean) static_cast<R*>(p.dmean)[at] = n > 0 ? n * (u + 2 * v * difference(pivot, mean)) : 0;
  if (p.dvar) static_cast<R*>(p.dvar)[at] = n > 0 ? n * v : 0;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    timestep_norm_bwd_kernel(TimestepNormBwdParams p, unsigned slices, Scratch<Compute<T>> scratch) {
  using R = Compute<T>;
  constexpr bool kWhole = kWidth > 1;
  constexpr int kChannels = kWidth * gpu::kWarp;        // per block
  constexpr int kPitch = kChannels + kChannels / gpu::kWarp;  // an element of padding after each 32
  constexpr int kBatch = 4;                             // rows whose loads are in flight
  SMEM_ARRAY(R, sums, kWarps* kPitch);
  const Rows<R> rows = make_rows<R>();
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const int64_t share = (gridDim.x - 1 - blockIdx.x) / slices, slice = (gridDim.x - 1 - blockIdx.x) % slices;
  const int64_t size = p.channels / p.groups;
  const int64_t own = slice * kChannels + lane * kWidth, channel = own < p.channels ? own : 0, group = channel / size;
  const bool has_channel = own < p.channels;
  const R per_channel = R{1} / static_cast<R>(size);
  const int64_t count = (p.sequences.tokens + kTile - 1) / kTile, first_tile = share * scratch.tiles_per_share;
  R gain[kWidth], dweight[kWidth] = {}, dbias[kWidth] = {};
  gpu::load_wide<kWhole>(gain, static_cast<const R*>(p.weight) + channel);

  for (int64_t i = scratch.tiles_per_share - 1; i >= 0; --i) {
    const int64_t tile = first_tile + i, first = tile * kTile;
    if (tile >= count) continue;
    look_up(rows, p, first);
    __syncthreads();
    R entering_u = 0, entering_v = 0;
    Pair<R> pivot = {};
    if (rows.left[kTile - 1] > 0) {
      entering_u = static_cast<R>(scratch.carries.first[tile * p.groups + group]);
      entering_v = static_cast<R>(scratch.carries.second[tile * p.groups + group]);
      pivot = mean_after<R>(p, first + kTile, group);
    }
    for (int batch = 0; batch < kRows; batch += kBatch) {
      R x[kBatch][kWidth], dy[kBatch][kWidth], rstd[kBatch], u[kBatch], v[kBatch];
      Pair<R> mean[kBatch];
      GPU_UNROLL
      for (int r = 0; r < kBatch; ++r) {
        const int64_t row = first + warp * kRows + batch + r;
        const int64_t token = row < p.sequences.tokens ? row : p.sequences.tokens - 1;
        gpu::load<kWhole>(x[r], static_cast<const T*>(p.x) + token * p.channels + channel);
        gpu::load<kWhole>(dy[r], static_cast<const T*>(p.dy) + token * p.channels + channel);
        mean[r] = mean_after<R>(p, token, group);
        rstd[r] = rstd_after<R>(p, token, group);
      }
      const R* const local = scratch.local + (tile * 2 * p.groups + group) * kTile + warp * kRows + batch;
      gpu::load_wide(u, local);
      gpu::load_wide(v, local + p.groups * kTile);
      GPU_UNROLL
      for (int r = 0; r < kBatch; ++r) {
        const int row = warp * kRows + batch + r, left = rows.left[row];
        if (!has_channel || first + row >= p.sequences.tokens) continue;
        if (left > kTile - 1 - row) {
          u[r] += entering_u + 2 * entering_v * difference(mean[r], pivot);
          v[r] += entering_v;
        }
        R dx[kWidth] = {};
        GPU_UNROLL
        for (int e = 0; e < kWidth && left >= 0; ++e) {
          const R centred = x[r][e] - mean[r].hi - mean[r].lo;
          dweight[e] += dy[r][e] * (centred * rstd[r]);
          dbias[e] += dy[r][e];
          dx[e] = dy[r][e] * (rstd[r] * (1 + gain[e])) + (u[r] + 2 * v[r] * centred) * per_channel;
        }
        gpu::store<kWhole>(static_cast<T*>(p.dx) + (first + row) * p.channels + channel, dx);
        if (rows.step[row] == 0 && channel % size == 0)
          store_state_gradient(p, rows.sequence[row], group, mean[r], u[r], v[r]);
      }
    }
    __syncthreads();
  }

  GPU_UNROLL
  for (int output = 0; output < 2; ++output) {
    GPU_UNROLL
    for (int e = 0; e < kWidth; ++e) {
      const int c = lane * kWidth + e;
      sums[warp * kPitch + c + c / gpu::kWarp] = output ? dbias[e] : dweight[e];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < kChannels && slice * kChannels + c < p.channels; c += kThreads) {
      R sum = 0;
      for (int i = 0; i < kWarps; ++i) sum += sums[i * kPitch + c + c / gpu::kWarp];
      scratch.shares[(2 * share + output) * p.channels + slice * kChannels + c] = sum;
    }
    __syncthreads();
  }
}

// One thread per sequence and group. Stores the state gradients of sequences without tokens or, if D = 0, of all.
template <class R>
__global__ void __launch_bounds__(kThreads) timestep_norm_bwd_empty_kernel(TimestepNormBwdParams p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.sequences.count * p.groups || (p.channels > 0 && p.sequences.length(i / p.groups) > 0)) return;
  const bool fresh = initial_count(p, i / p.groups) == 0;
  const R *dmean = static_cast<const R*>(p.dmean_out), *dvar = static_cast<const R*>(p.dvar_out);
  const R rest = p.sequences.length(i / p.groups) > 0 ? NAN : 0;  // statistics of no channels are NaN
  if (p.dmean) static_cast<R*>(p.dmean)[i] = fresh ? 0 : dmean ? dmean[i] + rest : rest;
  if (p.dvar) static_cast<R*>(p.dvar)[i] = fresh ? 0 : dvar ? dvar[i] + rest : rest;
}

}  // namespace timestep_norm
}  // namespace megalodon

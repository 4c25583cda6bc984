// The gradients of CEMA's parameters: ops/cema/cema_reference.py. Basis, tiles and entering states: cema.cuh.
//
// Within a tile, let w_t = du_t/dq for a fixed entering state: w_t = q w_{t-1} + u_{t-1}, from zero. K is the gradient
// of the tile's last state that comes from later tokens: q r of the next token or, at a sequence's end,
// conj(dstate_out) / gamma.
//
//   dq     = sum over tiles of conj(p gamma (sum_t dy_t w_t + K w_end))
//   dgamma = conj(p sum_t dy_t u_t)
//   domega = sum_t dy_t x_t
//   dp     = Re(gamma sum_t dy_t u_t)
//          = Re(gamma sum_t x_t r_t)   if states or their gradients are given, as u then comes from more than x; the
//                                      kernel of the adjoint's output computes this sum
//
// w and u both run forwards, so nothing is stored per position. 11 multiply-adds per mode and position.
// cema_mma.cuh computes these sums on tensor cores where it can; otherwise cema_sums_kernel does.
//
// Grid of cema_sums_kernel: as the scan's (cema_scan.cuh); a thread has two channels and 4 modes of a tile.
//   1. For each run of a sequence in the tile: load or clear u, set w = 0. For each kRows rows: load x and dy, advance
//      u and w, add up the sums. At the run's end add K w.
//   2. Store the tile's sums.
// Grid of cema_finish_kernel: x over 32 channels, y over modes and, last, omega. Each of 8 warps adds an eighth of the
// tiles in double; then the first warp adds the warps' sums and applies the factors. Sizes alone fix the order of sums.
//
// Registers: at most 168 in cema_sums_kernel (12 warps per SM), no spills. Shared memory: 8 KB there, for initial
// states and K w, and 12 KB in cema_finish_kernel, 44 with lags (cema_mma.cuh).
// H100, (B 8, L 2048, D 1024, N 16) bf16, tile 128:
//   sums       3.0 G multiply-adds, 88 us at 67 TFLOP/s; 169 MB, 50 us: x, dy 67, sums 34 out and in, states 34
//   backward   5.9 G multiply-adds, 176 us: local scans 3 + 3, output 5, sums 11; 70 MB of workspace. At least 293 us,
//              by issue (bench.predict)
// Example: T = 40, tile 32, one sequence: tile 0 adds K w_end with K = q r of token 32, which enters its adjoint.
#pragma once

#include "cema.cuh"

namespace megalodon {
namespace cema {

constexpr int kRows = 4;         // rows loaded at once
template <class R> constexpr int kSumModes = sizeof(R) == 4 ? 4 : 2;  // per thread
constexpr int kFinishWarps = 8;

// Pairs of sums over t: of dy_t u_t, of dy_t w_t + K w_end, and of x_t r_t.
enum Sum { kSumFirst, kSumSecond, kSumWFirst, kSumWSecond, kProductFirst, kProductSecond, kMostSums };

struct Gradients {
  Scan scan, adjoint;
  ConstReals dy;                 // (T, D), the call's dtype; or null: zero
  Reals sums;                    // (parts, stride). A part: sums (kinds, N', D') by enum Sum; then, without `lags`, the
                                 // sums for domega (D')
  int64_t kinds, stride;         // of a part: kinds of sums, and numbers
  int64_t parts;                 // one per tile or, with `lags`, one in all
  Pairs slopes;                  // (2, tiles, D', N'): q times derivatives of both scans' local ends
  Reals lags;                    // (shares, kMmaTile, D'): sums over t of dy_t x_(t - lag), or null
  int64_t shares;                // of the tiles: the y grid of cema_tiles_kernel; 0: sums without tensor cores
  Reals dp, domega;              // (D, N), (D); domega is null if dy is null
  Complexes dq, dgamma;          // (D, N); dgamma is null if dy is null

  template <class R>
  MEGALODON_INLINE R* slope(int scan_index, int64_t k, int64_t mode, int64_t channel) const {
    return &slopes.as<R>()[((scan_index * scan.tiles + k) * scan.width + channel) * scan.lanes + mode].first;
  }
};

// A thread's states u, their derivatives w, and its sums.
template <class R, int modes = kSumModes<R>>
struct Sensitivity {
  Modes<R, modes> u;
  R w_first[modes][2], w_second[modes][2];
  R sum_first[modes][2], sum_second[modes][2], sum_w_first[modes][2], sum_w_second[modes][2], sum_omega[2];

  GPU_INLINE Sensitivity(const Scan& scan, const Place& place) : u(scan, place) {
    sum_omega[0] = sum_omega[1] = 0;
    GPU_UNROLL
    for (int m = 0; m < modes; ++m) {
      GPU_UNROLL
      for (int e = 0; e < 2; ++e)
        sum_first[m][e] = sum_second[m][e] = sum_w_first[m][e] = sum_w_second[m][e] = 0;
    }
    clear_w();
  }
  GPU_INLINE void clear_w() {
    GPU_UNROLL
    for (int m = 0; m < modes; ++m) w_first[m][0] = w_first[m][1] = w_second[m][0] = w_second[m][1] = 0;
  }
  // kInput: dy is given; else it is zero.
  template <bool kInput>
  GPU_INLINE void step(const R (&x)[2], const R (&dy)[2]) {
    GPU_UNROLL
    for (int m = 0; m < modes; ++m) {
      GPU_UNROLL
      for (int e = 0; e < 2; ++e) {
        const R before = w_first[m][e];
        w_first[m][e] = fma(u.alpha[m][e], before, fma(u.beta[m][e], w_second[m][e], u.first[m][e]));
        w_second[m][e] = fma(u.delta[m][e], w_second[m][e], before + u.second[m][e]);
      }
    }
    u.step(x);
    if constexpr (kInput) {
      GPU_UNROLL
      for (int e = 0; e < 2; ++e) {
        sum_omega[e] += dy[e] * x[e];
        GPU_UNROLL
        for (int m = 0; m < modes; ++m) {
          sum_first[m][e] += dy[e] * u.first[m][e];
          sum_second[m][e] += dy[e] * u.second[m][e];
          sum_w_first[m][e] += dy[e] * w_first[m][e];
          sum_w_second[m][e] += dy[e] * w_second[m][e];
        }
      }
    }
  }
  // Adds K w. K is q times the state that enters the adjoint's tile or, if `sequence` ends, conj(dstate_out) / gamma.
  GPU_INLINE void add_end(const Scan& adjoint, const Place& place, bool ends, int64_t sequence, Pair<R>* slots) {
    to_slots(slots, w_first, w_second);
    int i = 0;
    for_each_slot<modes>(adjoint, place, sequence, slots, [&](const Basis<R>& basis, Pair<R>* slot, int64_t at) {
      const R* const entering = adjoint.state<R>(place.tile, place.first_mode + i / 2, place.channel + i % 2);
      const Pair<R> k = ends ? basis.initial(adjoint, at, false)
                             : basis.multiply({basis.q.re + basis.shear, 1}, gpu::ld<Pair<R>>(entering));
      gpu::st_shared(slot, basis.multiply(k, gpu::ld_shared<Pair<R>>(slot)));
      ++i;
    });
    GPU_UNROLL
    for (int m = 0; m < modes; ++m) {
      GPU_UNROLL
      for (int e = 0; e < 2; ++e) {
        const auto sum = gpu::ld_shared<Pair<R>>(&slots[(2 * m + e) * kThreads]);
        sum_w_first[m][e] += sum.first;
        sum_w_second[m][e] += sum.second;
      }
    }
  }
};

template <class T, bool kInput>
__global__ void __launch_bounds__(kThreads, kBlocks<Compute<T>>) cema_sums_kernel(Gradients p) {
  using R = Compute<T>;
  SMEM_ARRAY(Pair<R>, slots, 2 * kSumModes<R> * kThreads);
  const Scan& scan = p.scan;
  const Place place = cema::place(scan, kSumModes<R>);
  Sensitivity<R> state(scan, place);
  if (scan.tiles > 1) state.u.load(scan, place);
  const auto advance = [&](auto rows, int64_t t) {
    constexpr int n = decltype(rows)::value;
    R x[n][2], dy[n][2] = {};
    const int64_t at = t * scan.channels + place.channel;
    load_rows(x, scan.in.as<T>() + at, scan.channels, scan.whole, place.has_second);
    if constexpr (kInput) load_rows(dy, p.dy.as<T>() + at, scan.channels, scan.whole, place.has_second);
    GPU_UNROLL
    for (int i = 0; i < n; ++i) state.template step<kInput>(x[i], dy[i]);
  };
  for (int64_t t = scan.begin(place.tile), to = scan.end(place.tile); t < to;) {
    const Run run(scan, t, to);
    if (run.sequence < 0) {
      t = run.end;
      continue;
    }
    state.clear_w();
    if (run.starts) {
      state.u.clear();
      if (scan.initial) state.u.enter(scan, place, run.sequence, slots + threadIdx.x, true);
    }
    for (; run.end - t >= kRows; t += kRows) advance(std::integral_constant<int, kRows>{}, t);
    for (; t < run.end; ++t) advance(std::integral_constant<int, 1>{}, t);
    const bool ends = run.ends(scan);
    if (!ends || p.adjoint.initial) state.add_end(p.adjoint, place, ends, run.sequence, slots + threadIdx.x);
  }
  if (!place.active) return;
  R* const sums = p.sums.as<R>() + place.tile * p.stride;
  const int64_t plane = scan.lanes * scan.width;
  GPU_UNROLL
  for (int m = 0; m < kSumModes<R>; ++m) {
    R* const to_mode = sums + (place.first_mode + m) * scan.width + place.channel;
    gpu::store(to_mode + kSumFirst * plane, state.sum_first[m]);
    gpu::store(to_mode + kSumSecond * plane, state.sum_second[m]);
    gpu::store(to_mode + kSumWFirst * plane, state.sum_w_first[m]);
    gpu::store(to_mode + kSumWSecond * plane, state.sum_w_second[m]);
  }
  // Lanes that share channels have equal sums for domega.
  if (place.part == 0) gpu::store(sums + p.kinds * plane + place.channel, state.sum_omega);
}

// kLags: p.lags is not null.
template <class R, bool kLags>
__global__ void __launch_bounds__(kFinishWarps* gpu::kWarp) cema_finish_kernel(Gradients p) {
  SMEM_ARRAY(double, parts, kFinishWarps * kMostSums * gpu::kWarp);
  SMEM_ARRAY(double, lags, kLags ? kMmaTile * gpu::kWarp : 1);
  const Scan& scan = p.scan;
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const int64_t d = int64_t{blockIdx.x} * gpu::kWarp + lane, n = scan.first_mode + blockIdx.y;
  const int64_t plane = scan.lanes * scan.width, at = blockIdx.y * scan.width + (d < scan.width ? d : 0);
  const bool is_omega = blockIdx.y + 1 == gridDim.y;
  const int kinds = is_omega ? !kLags : static_cast<int>(p.kinds);  // omega: one, or none if the lags give it
  const R* const sums = p.sums.as<R>() +
                        (is_omega ? p.kinds * plane + at - blockIdx.y * scan.width : at);
  double sum[kMostSums] = {};
  for (int64_t k = p.parts * warp / kFinishWarps; k < p.parts * (warp + 1) / kFinishWarps; ++k) {
    GPU_UNROLL
    for (int i = 0; i < kMostSums; ++i)
      if (i < kinds) sum[i] += sums[k * p.stride + i * plane];
  }
  GPU_UNROLL
  for (int i = 0; i < kMostSums; ++i) parts[(warp * kMostSums + i) * gpu::kWarp + lane] = sum[i];
  for (int lag = warp; kLags && lag < kMmaTile; lag += kFinishWarps) {
    double lag_sum = 0;
    for (int64_t i = 0; i < p.shares && d < scan.width; ++i)
      lag_sum += p.lags.as<R>()[(i * kMmaTile + lag) * scan.width + d];
    lags[lag * gpu::kWarp + lane] = lag_sum;
  }
  __syncthreads();
  if (warp > 0 || d >= scan.channels) return;
  GPU_UNROLL
  for (int i = 0; i < kMostSums; ++i) {
    sum[i] = 0;
    for (int w = 0; w < kFinishWarps; ++w) sum[i] += parts[(w * kMostSums + i) * gpu::kWarp + lane];
  }
  if (is_omega) {
    if (kLags) sum[0] = lags[lane];
    if (p.domega) p.domega.as<R>()[d] = static_cast<R>(sum[0]);
    return;
  }
  const Basis<R> basis(scan, blockIdx.y, d);
  const double shear = basis.shear, phase = basis.phase, p_scale = basis.p;
  const auto complex = [&](double first, double second) -> gpu::Complex<double> {
    return {first - shear * second, phase * second};
  };
  auto y_sum = complex(sum[kSumFirst], sum[kSumSecond]), w_sum = complex(sum[kSumWFirst], sum[kSumWSecond]);
  if constexpr (kLags) {
    // P(q) and P'(q), where P is the polynomial whose coefficients are the lags.
    const gpu::Complex<double> q{basis.q.re, basis.q.im};
    gpu::Complex<double> value{0, 0}, slope{0, 0};
    for (int lag = kMmaTile - 1; lag >= 0; --lag) {
      slope = gpu::fma(slope, q, value);
      value = gpu::fma(value, q, {lags[lag * gpu::kWarp + lane], 0});
    }
    y_sum = y_sum + value;
    w_sum = w_sum + slope;
  }
  const auto x_sum = p.kinds == kMostSums ? complex(sum[kProductFirst], sum[kProductSecond]) : y_sum;
  const gpu::Complex<double> gamma{basis.gamma.re, basis.gamma.im};
  const gpu::Complex<double> dgamma = p_scale * y_sum, dq = p_scale * (gamma * w_sum);
  const int64_t to = d * scan.modes + n;
  p.dp.as<R>()[to] = static_cast<R>(gpu::real_of_product(gamma, x_sum));
  gpu::st(p.dq.as<R>() + to, gpu::Complex<R>{static_cast<R>(dq.re), static_cast<R>(-dq.im)});
  if (!p.dgamma) return;
  gpu::st(p.dgamma.as<R>() + to,
          gpu::Complex<R>{static_cast<R>(dgamma.re), static_cast<R>(-dgamma.im)});
}

}  // namespace cema
}  // namespace megalodon

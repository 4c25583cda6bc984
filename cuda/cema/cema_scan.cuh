// The kernels of phases 1, 2 and 4 of cema.cuh, launched by cema_scan.cu; phase 3 is in cema_carry.cuh.
//
// Grid of phases 2 and 4: blocks of at most 128 threads; the blocks of a tile are neighbours. A thread takes two
// neighbouring channels and 4 or 8 modes; it keeps states and coefficients in registers. The lanes that take the other
// modes of the two channels are neighbours. They read the same elements, add up y by shuffles, kStored positions at a
// time, and each stores its share of these positions. A warp reads and writes 64 bytes or more of a row at a time, 32
// for N = 32.
//
// Registers: at most 168 (12 warps per SM), 255 for double; no spills. Shared memory: 16 KB for the states of sequences
// that start or end.
// Multiply-adds per mode and position: 3 in phase 2, 5 in phase 4, two more with products.
// If only end states are wanted, cema_ends_kernel of cema_ends.cuh replaces phase 4.
// H100, (B 8, L 2048, D 1024, N 16) bf16, tile 128: at least 124 us, by issue (bench.predict).
//   multiply-adds   2.1 G, 64 us at 67 TFLOP/s
//   memory          x 33.5 MB twice, y 33.5 MB: 30 us at 3.35 TB/s; states of 17 MB four times, which stay in L2
// Example: T = 300, tile 32: 10 tiles; the last has 12 positions. Two sequences start at tokens 0 and 100, in tiles 0
// and 3. So the states that enter tiles 1 .. 3 sum up from token 0, those that enter tiles 4 .. 9 from token 100.
#pragma once

#include "cema_carry.cuh"

namespace megalodon {
namespace cema {

constexpr int kStored = 4;  // most positions whose y add_parts sums at once

// Stores the matrix that multiplies a pair by re + i phase v. phase2: phase^2.
template <class R>
GPU_INLINE void store_matrix(const Scan& scan, int plane, int64_t at, double re, double v, double phase2,
                             double shear) {
  const double entries[4] = {re + shear * v, -(phase2 + shear * shear) * v, v, re - shear * v};
  GPU_UNROLL
  for (int i = 0; i < 4; ++i) {
    const R high = static_cast<R>(entries[i]);
    scan.plane<R>(plane + i)[at] = high;
    scan.plane<R>(plane + 4 + i)[at] = static_cast<R>(entries[i] - high);
  }
}

// Stores the powers q^0 .. q^kBlock as pairs. The last pair is the first column of the matrix that multiplies a pair by
// q^kBlock; the matrix's second column follows. phase2: phase^2.
template <class R>
GPU_INLINE void store_powers(const Scan& scan, int64_t mode, int64_t channel, double q_re, double phase2,
                             double shear) {
  const auto set = [&](int power, double first, double second) {
    gpu::st(scan.power<R>(power, mode, channel), Pair<R>{static_cast<R>(first), static_cast<R>(second)});
  };
  double re = 1, v = 0;
  for (int power = 0; power < kBlock; ++power) {
    set(power, re + shear * v, v);
    const double next = re * q_re - phase2 * v;
    v = v * q_re + re;
    re = next;
  }
  set(kBlock, re + shear * v, v);
  set(kBlock + 1, -(phase2 + shear * shear) * v, re - shear * v);
}

// A thread takes a mode and channel; neighbouring threads take neighbouring modes.
template <class R>
__global__ void cema_table_kernel(Scan scan, const R* p, const gpu::Complex<R>* q, const gpu::Complex<R>* gamma,
                                  bool carried) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= scan.lanes * scan.width) return;
  const int64_t mode = at % scan.lanes, n = scan.first_mode + mode, d = at / scan.lanes;
  const auto entry = [&](int plane) {
    return scan.plane<R>(plane) + (plane < kTileMatrix ? mode * scan.width + d : at);
  };
  if (n >= scan.modes || d >= scan.channels) {
    for (int plane = 0; plane < kPlanes; ++plane) *entry(plane) = 0;
    for (int i = 0; scan.powers && i < kPowers; ++i) gpu::st(scan.power<R>(i, mode, d), Pair<R>{0, 0});
    return Basis<R>{}.store(scan, mode, d);
  }
  // Stores the value, rounded to R, and returns what it stored.
  const auto set = [&](int plane, double value) { return *entry(plane) = static_cast<R>(value); };
  const gpu::Complex<R> pole = gpu::ld<gpu::Complex<R>>(q + d * scan.modes + n);
  gpu::Complex<R> g{1, 0};  // if gamma is null, because there is neither y nor dy
  if (gamma) g = gpu::ld<gpu::Complex<R>>(gamma + d * scan.modes + n);
  double phase = pole.im, scale = p[d * scan.modes + n];
  if (carried) {
    const R least = static_cast<R>(kLeastScale<R>);
    if (fabs(phase) < kLeastPhase<R>) phase = pole.im < 0 ? -kLeastPhase<R> : kLeastPhase<R>;
    if (fabs(scale) < kLeastScale<R>) scale = kLeastScale<R>;
    if (g.re < least && -g.re < least && g.im < least && -g.im < least) g = {least, 0};
  }
  // -beta is above Im(q)^2 by shear^2. Re(q) - shear is exact, because it is smaller than Re(q).
  const double phase2 = phase * phase, ulp = sizeof(R) == 4 ? 0x1p-23 : 0x1p-52;
  const double beta = set(kBeta, -phase2 * (1 + ulp)), gap = -beta - phase2;
  const double root = sqrt(gap > 0 ? gap : 0), alpha = set(kAlpha, pole.re < 0 ? pole.re - root : pole.re + root);
  const double shear = static_cast<R>(alpha - pole.re);
  set(kDelta, pole.re - shear);
  set(kOutFirst, scale * g.re);
  set(kOutSecond, -scale * (g.re * shear + g.im * phase));
  Basis<R> basis{};
  basis.q = pole;
  basis.phase = static_cast<R>(phase);
  basis.gamma = g;
  basis.p = static_cast<R>(scale);
  basis.shear = static_cast<R>(shear);
  basis.store(scan, mode, d);
  // Powers re + i phase v of q by squaring: tiles are powers of two.
  double re = pole.re, v = 1;
  const auto square = [&] {
    const double next = re * re - phase2 * v * v;
    v *= 2 * re;
    re = next;
  };
  for (int64_t length = 1; length < scan.tile; length *= 2) square();
  store_matrix<R>(scan, kTileMatrix, at, re, v, phase2, shear);
  for (int length = 1; length < kTilesPerWarp; length *= 2) square();
  store_matrix<R>(scan, kWarpMatrix, at, re, v, phase2, shear);
  if (scan.powers) store_powers<R>(scan, mode, d, pole.re, phase2, shear);
}

// Advances the states by `count` positions; the first one's x is at element `at` of `in`. A null `in` counts as zeros.
template <int modes, class T, class R>
GPU_INLINE void walk(const Scan& scan, const Place& place, Modes<R, modes>& state, const T* in, int64_t at, int count) {
  const int64_t step = scan.step();
  if (!in) {
    const R zeros[2] = {0, 0};
    for (; count > 0; --count) state.step(zeros);
    return;
  }
  in += at;
  for (; count >= kBatch<T>; count -= kBatch<T>, in += kBatch<T> * step) {
    R x[kBatch<T>][2];
    load_rows(x, in, step, scan.whole, place.has_second);
    GPU_UNROLL
    for (int j = 0; j < kBatch<T>; ++j) state.step(x[j]);
  }
  for (; count > 0; --count, in += step) {
    R x[1][2];
    load_rows(x, in, step, scan.whole, place.has_second);
    state.step(x[0]);
  }
}

template <class T, int modes>
__global__ void __launch_bounds__(kThreads, kBlocks<Compute<T>>) cema_local_kernel(Scans scans) {
  using R = Compute<T>;
  SMEM_ARRAY(Pair<R>, slots, 2 * modes * kThreads);
  const Scan& scan = scans.scan[blockIdx.y];
  const Place place = cema::place(scan, modes);
  const int64_t from = scan.begin(place.tile), to = scan.end(place.tile);
  const int64_t sequence = gpu::find_sequence(scan.sequences, scan.token(to - 1));
  const int64_t start = sequence < 0 ? to : scan.sequence_begin(sequence);
  if (threadIdx.x == 0 && blockIdx.x % (gridDim.x / scan.tiles) == 0) scan.stops[place.tile] = start >= from;
  Modes<R, modes> state(scan, place);
  const int64_t first = start < from ? from : start, step = scan.step();
  int64_t at = scan.token(first) * scan.channels + place.channel;
  int left = static_cast<int>(to - first);
  if (scan.initial && start >= from && left > 0) {
    walk(scan, place, state, scan.in.as<T>(), at, 1);
    state.enter(scan, place, sequence, slots + threadIdx.x);
    at += step;
    --left;
  }
  walk(scan, place, state, scan.in.as<T>(), at, left);
  state.store(scan, place);
}

// Sums y of n positions over the `split` lanes of two channels, number `part` = 0, 1, ... of them; n and split are
// powers of two. Each lane gets the sums of n / split positions, in order. If n < split, split / n neighbouring lanes
// get the sum of one position.
template <int split, int n, class R>
GPU_INLINE void add_parts(R (&y)[n][2], int part) {
  GPU_UNROLL
  for (int apart = split / 2, size = n / 2; apart > 0; apart /= 2, size /= 2) {
    const bool upper = part & apart;
    GPU_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (size == 0) y[0][e] += __shfl_xor_sync(gpu::kFullMask, y[0][e], apart);
      GPU_UNROLL
      for (int i = 0; i < size; ++i) {
        const R own = upper ? y[i + size][e] : y[i][e], other = upper ? y[i][e] : y[i + size][e];
        y[i][e] = own + __shfl_xor_sync(gpu::kFullMask, other, apart);
      }
    }
  }
}

// The output of a thread's channels. kProducts: also sums factor_t times the states. Without kInput, `in` counts as
// zero and is not read.
template <class T, int modes, int split, bool kProducts, bool kInput>
struct Output {
  using R = Compute<T>;
  const Scan& scan;
  const Place& place;
  Pair<R>* const slots;
  Modes<R, modes> state;
  R out_first[modes][2], out_second[modes][2], omega[2];
  R product_first[kProducts ? modes : 1][2], product_second[kProducts ? modes : 1][2];

  GPU_INLINE Output(const Scan& scan_, const Place& place_, Pair<R>* slots_)
      : scan(scan_), place(place_), slots(slots_), state(scan_, place_) {
    GPU_UNROLL
    for (int m = 0; m < modes; ++m) {
      const int64_t at = (place.first_mode + m) * scan.width + place.channel;
      gpu::load(out_first[m], scan.plane<R>(kOutFirst) + at);
      gpu::load(out_second[m], scan.plane<R>(kOutSecond) + at);
    }
    const bool adds_omega = kInput && place.part == 0 && !scan.loads_sums;
    omega[0] = adds_omega ? scan.omega.as<R>()[place.channel] : 0;
    omega[1] = adds_omega && place.has_second ? scan.omega.as<R>()[place.channel + 1] : 0;
    GPU_UNROLL
    for (auto* sums : {product_first, product_second}) {
      GPU_UNROLL
      for (int m = 0; m < (kProducts ? modes : 1); ++m) sums[m][0] = sums[m][1] = 0;
    }
  }

  // Advances by n positions of `sequence`, the first at element `at`. `adds_initial`: adds the initial state there.
  template <int n>
  GPU_INLINE void advance(int64_t at, bool adds_initial, int64_t sequence) {
    const int64_t step = scan.step();
    R x[n][2] = {}, factor[n][2];
    if constexpr (kInput) load_rows(x, scan.in.as<T>() + at, step, scan.whole, place.has_second);
    if constexpr (kProducts) load_rows(factor, scan.factor.as<T>() + at, step, scan.whole, place.has_second);
    constexpr int most = split < kStored ? split : kStored, rows = n < most ? n : most;
    GPU_UNROLL
    for (int i = 0; i < n; i += rows, at += rows * step) {
      R y[rows][2];
      GPU_UNROLL
      for (int j = 0; j < rows; ++j) {
        state.step(x[i + j]);
        if (adds_initial) state.enter(scan, place, sequence, slots);
        read(y[j], x[i + j]);
        if constexpr (kProducts) add_products(factor[i + j]);
      }
      add_parts<split>(y, place.part);
      store_rows(at, y);
    }
  }

  GPU_INLINE void read(R (&y)[2], const R (&x)[2]) const {
    GPU_UNROLL
    for (int e = 0; e < 2; ++e) {
      y[e] = kInput ? omega[e] * x[e] : 0;
      GPU_UNROLL
      for (int m = 0; m < modes; ++m) {
        y[e] += out_first[m][e] * state.first[m][e];
        y[e] += out_second[m][e] * state.second[m][e];
      }
    }
  }

  GPU_INLINE void add_products(const R (&factor)[2]) {
    GPU_UNROLL
    for (int m = 0; m < modes; ++m) {
      GPU_UNROLL
      for (int e = 0; e < 2; ++e) {
        product_first[m][e] += factor[e] * state.first[m][e];
        product_second[m][e] += factor[e] * state.second[m][e];
      }
    }
  }

  // Stores the positions whose sums add_parts has given to this lane.
  template <int n>
  GPU_INLINE void store_rows(int64_t at, R (&y)[n][2]) const {
    constexpr int rows = n > split ? n / split : 1, lanes = n > split ? 1 : split / n;
    if (!place.active || place.part % lanes > 0) return;
    const int64_t step = scan.step();
    at += place.part / lanes * rows * step;
    GPU_UNROLL
    for (int j = 0; j < rows; ++j, at += step) store(at, y[j]);
  }

  GPU_INLINE void store(int64_t at, R (&y)[2]) const {
    if (scan.loads_sums || scan.stores_sums) {
      R* const sums = scan.sums.as<R>() + at;
      GPU_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (e == 1 && !place.has_second) continue;
        if (scan.loads_sums) y[e] += sums[e];
        sums[e] = y[e];
      }
      if (scan.stores_sums) return;
    }
    T* const out = scan.out.as<T>() + at;
    if (scan.whole) {
      gpu::store(out, y);
    } else {
      out[0] = gpu::from_real<T>(y[0]);
      if (place.has_second) out[1] = gpu::from_real<T>(y[1]);
    }
  }
};

template <class T, int modes, int split, bool kProducts, bool kInput>
__global__ void __launch_bounds__(kThreads, kBlocks<Compute<T>>) cema_output_kernel(Scan scan) {
  using R = Compute<T>;
  SMEM_ARRAY(Pair<R>, slots, 2 * modes * kThreads);
  const Place place = cema::place(scan, modes);
  Output<T, modes, split, kProducts, kInput> output(scan, place, slots + threadIdx.x);
  if (scan.tiles > 1) output.state.load(scan, place);
  for (int64_t begin = scan.begin(place.tile), to = scan.end(place.tile); begin < to;) {
    const Run run(scan, begin, to);
    int64_t at = scan.token(begin) * scan.channels + place.channel;
    int left = static_cast<int>(run.end - begin);
    begin = run.end;
    if (run.sequence < 0) {
      R zeros[2] = {0, 0};
      for (int i = place.part; i < left && place.active; i += split) output.store(at + i * scan.step(), zeros);
      continue;
    }
    if (run.starts) output.state.clear();
    bool adds_initial = run.starts && scan.initial;
    while (left > 0) {
      if (left >= kBatch<T> && !adds_initial) {
        output.template advance<kBatch<T>>(at, false, run.sequence);
        at += kBatch<T> * scan.step();
        left -= kBatch<T>;
      } else {
        output.template advance<1>(at, adds_initial, run.sequence);
        adds_initial = false;
        at += scan.step();
        --left;
      }
    }
    if (scan.final && run.ends(scan)) output.state.leave(scan, place, run.sequence, slots + threadIdx.x);
  }
  if constexpr (kProducts) {
    if (!place.active) return;
    R* const products = scan.products.as<R>() + place.tile * scan.products_stride;
    GPU_UNROLL
    for (int m = 0; m < modes; ++m) {
      const int64_t at = (place.first_mode + m) * scan.width + place.channel;
      gpu::store(products + at, output.product_first[m]);
      gpu::store(products + scan.lanes * scan.width + at, output.product_second[m]);
    }
  }
}

template <class R>
__global__ void cema_empty_kernel(Scan scan) {
  const int64_t s = blockIdx.x, size = scan.channels * scan.modes;
  if (scan.sequences.length(s) > 0) return;
  for (int64_t i = s * size + threadIdx.x; i < (s + 1) * size; i += blockDim.x) {
    gpu::Complex<R> z{0, 0};
    if (scan.initial) z = gpu::ld<gpu::Complex<R>>(scan.initial.as<R>() + i);
    gpu::st(scan.final.as<R>() + i, z);
  }
}

}  // namespace cema
}  // namespace megalodon

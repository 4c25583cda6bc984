// Inner loops of the CEMA kernels, which cema_tile.h and cema_cpu.cpp call. A tile is one vector of channels at up to
// kTileSteps positions. A pass runs over a tile with the states of a few modes in registers:
//   scan_pass          states s of enum Form: state (N, 2, lanes)
//   sensitivity_pass   states u and their derivatives w by q: state (N, 4, lanes)
// Coefficients of the tile's channels are in coefs (N, kCoefs, lanes).
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"
#include "stream.h"

namespace megalodon::MEGALODON_ISA {

inline constexpr int kTileSteps = 32;
// Modes per pass, so that 32 registers suffice: a mode takes 6 in a scan (q, c, s) and 10 in a sensitivity pass (q, u,
// w and two sums). With 16 registers, coefficients become memory operands. Fewer modes per pass would cost more, as
// they hide less latency.
inline constexpr int kScanModes = 4;
inline constexpr int kSensitivityModes = 2;

enum Coef { kQRe, kQIm, kCRe, kCIm, kP, kCoefs };

// Sums over positions, in double. A gradient is such a sum times factors that are the same at all positions.
enum Sum {
  kSumWRe, kSumWIm,      // dy w
  kSumHRe, kSumHIm,      // dy u; u = h in the direct form
  kSumP,                 // x Re(g)
  kSumEndRe, kSumEndIm,  // the end state's gradient times w at the end of a segment
  kSums
};

// Step of a scan for each mode and position, after out = omega in.
// Without kInput, `in` counts as zero and is not read; without kOutput there is no `out`.
enum class Form {
  folded,   // s = q s + in,    out += Re(c s)
  direct,   // s = q s + p in,  out += Re(c s)
  adjoint,  // g = s + c in,    out += p Re(g),  kSumP += x Re(g),  s = q g
};

// Input and output of a pass. 16-bit rows are copied to the tile before its first pass and from it after the last,
// so that all passes are `inner`: no pass is compiled for 16 bits.
enum class Part {
  first,  // copies its input from the rows to the tile; in a scan it applies omega
  inner,  // input and output stay in the tile
  last,   // of a scan: writes its output to the rows
};

template <class R>
struct Tile {
  const R *from, *x_from;                            // rows of the input and of x
  R* to;                                             // rows of the output
  int64_t stride;                                    // elements from row to row
  R *__restrict in, *__restrict out, *__restrict x;  // (kTileSteps, lanes) copies of the rows
};

// Splits the modes from `n` on into passes of `size` modes, a power of two, and the rest into smaller passes. Calls
// pass(first mode, integral_constant of the pass's size) for each.
template <int size, class F>
MEGALODON_INLINE void for_each_pass(int64_t modes, F&& pass, int64_t n = 0) {
  for (; n + size <= modes; n += size) pass(n, std::integral_constant<int, size>{});
  if constexpr (size > 1) for_each_pass<size / 2>(modes, pass, n);
}

// Prefetches the next tiles' rows of two tensors, a and b, into the L2. A pass fetches one cache line of each tensor
// every few positions: many lines at once would fill the L1's load buffers and stall the pass. A run of lines goes
// along a row or down a column of lines.
struct FetchAhead {
  static constexpr int kBlock = 4;  // positions, unrolled

  const char *a = nullptr, *b = nullptr;  // the next lines
  int64_t count = 0, left = 0;            // lines in a run, and lines left in the current run
  int64_t runs = 0;                       // runs left
  int64_t line_step = 0, run_step = 0;    // bytes to add after every line, and after every run
  int burst = 1, pause = 1;               // lines per burst, and blocks between bursts, a power of two

  // Sets a pace of at least one line per `steps` positions.
  void set_pace(int64_t steps) {
    burst = static_cast<int>((kBlock + steps - 1) / steps);
    for (pause = 1; 2 * pause * kBlock <= steps;) pause *= 2;
  }
  MEGALODON_INLINE void next() {
    if (runs <= 0) return;
    __builtin_prefetch(a, 0, 2);
    __builtin_prefetch(b, 0, 2);
    a += line_step;
    b += line_step;
    if (--left > 0) return;
    left = count;
    --runs;
    a += run_step;
    b += run_step;
  }
  // Calls f(t) for each position of a pass and prefetches the next pass's coefficients and state into the L1.
  template <class R, class F>
  MEGALODON_INLINE void each_step(int64_t steps, const R* next_coefs, const R* next_state, F&& f) {
    FetchAhead local = *this;
    int64_t t = 0;
    for (; t + kBlock <= steps; t += kBlock) {
      const int64_t block = t / kBlock;
      if ((block & (pause - 1)) == 0)
        for (int line = 0; line < burst; ++line) local.next();
      __builtin_prefetch(next_state + block * kLanes<R>);
#pragma GCC unroll 4
      for (int i = 0; i < kBlock; ++i) {
        __builtin_prefetch(next_coefs + (t + i) * kLanes<R>);
        f(t + i);
      }
    }
#pragma GCC unroll 1
    for (; t < steps; ++t) f(t);
    *this = local;
  }
};

// Re(q). times(v, addend) returns Re(q) v + addend. If the addend is a product, wrap it in unfused(): only one of two
// products can be fused with their sum. The product with v is fused because, if q is near 1, its rounding error is
// nearly the same at every position. Without a fused instruction, Re(q) is split into an integer, whose product is
// exact, and a remainder, whose product is small.
template <class R>
struct Factor {
  using V = Vec<R>;
#if defined(__FMA__) || defined(__aarch64__)
  MEGALODON_INLINE void operator=(V q) { value = q; }
  MEGALODON_INLINE V times(V v, V addend) const { return value * v + addend; }
  V value;
#else
  MEGALODON_INLINE void operator=(V q) {
    const V one = splat(R{1}), nearest = q >= R(0.5) ? one : q <= R(-0.5) ? -one : zeros<R>();
    whole = q > 2 || q < -2 ? zeros<R>() : nearest;  // where |q| > 2, the remainder would not be exact
    rest = q - whole;
  }
  MEGALODON_INLINE V times(V v, V addend) const { return whole * v + (rest * v + addend); }
  V whole, rest;
#endif
};

template <class R>
MEGALODON_INLINE void add_lanes(double* sum, Vec<R> v) {
  alignas(kVectorBytes) R lanes[kLanes<R>];
  store(static_cast<R*>(lanes), v);
  for (int i = 0; i < kLanes<R>; ++i) sum[i] += lanes[i];
}

template <Form form, bool kOutput, bool kInput, Part part, int modes, class R>
void scan_pass(const Tile<R>& tile, int steps, Vec<R> omega, const R* coefs, R* state, double* sums,
               FetchAhead& ahead) {
  constexpr int lanes = kLanes<R>;
  const R* __restrict from = tile.from;
  R* __restrict to = tile.to;
  const R* __restrict x = tile.x;
  R *__restrict in = tile.in, *__restrict out = tile.out;
  const int64_t stride = tile.stride;
  using V = Vec<R>;
  Factor<R> q_re[modes];
  V q_im[modes], c_re[modes], c_im[modes], p[modes], re[modes], im[modes], sum_p[modes];
#pragma GCC unroll 8
  for (int m = 0; m < modes; ++m) {
    const R* coef = coefs + m * kCoefs * lanes;
    q_re[m] = load(coef + kQRe * lanes);
    q_im[m] = load(coef + kQIm * lanes);
    c_re[m] = load(coef + kCRe * lanes);
    c_im[m] = load(coef + kCIm * lanes);
    p[m] = load(coef + kP * lanes);
    re[m] = load(state + 2 * m * lanes);
    im[m] = load(state + (2 * m + 1) * lanes);
    sum_p[m] = V{};
  }
  const auto step = [&](int64_t t) __attribute__((always_inline)) {
    const V input = !kInput ? V{} : part == Part::first ? load(from + t * stride) : load(in + t * lanes);
    if (kInput && part == Part::first) store(in + t * lanes, input);
    V sum{};
#pragma GCC unroll 8
    for (int m = 0; m < modes; ++m) {
      if constexpr (form == Form::adjoint) {
        const V g_re = kInput ? re[m] + c_re[m] * input : re[m], g_im = kInput ? im[m] + c_im[m] * input : im[m];
        sum += p[m] * g_re;
        sum_p[m] += load(x + t * lanes) * g_re;
        re[m] = q_re[m].times(g_re, -unfused(q_im[m] * g_im));
        im[m] = q_re[m].times(g_im, unfused(q_im[m] * g_re));
      } else {
        const V drive = form == Form::folded ? input : p[m] * input;
        const V next_re = q_re[m].times(re[m], drive - q_im[m] * im[m]);
        const V next_im = q_re[m].times(im[m], unfused(q_im[m] * re[m]));
        if (kOutput) sum += c_re[m] * next_re;
        if (kOutput) sum -= c_im[m] * next_im;
        re[m] = next_re;
        im[m] = next_im;
      }
    }
    if (!kOutput) return;
    if (kInput || part != Part::first) sum += part == Part::first ? omega * input : load(out + t * lanes);
    if (part == Part::last) store(to + t * stride, sum);
    else store(out + t * lanes, sum);
  };
  ahead.each_step(steps, coefs + modes * kCoefs * lanes, state + modes * 2 * lanes, step);
#pragma GCC unroll 8
  for (int m = 0; m < modes; ++m) {
    store(state + 2 * m * lanes, re[m]);
    store(state + (2 * m + 1) * lanes, im[m]);
    if (form == Form::adjoint) add_lanes<R>(sums + (m * kSums + kSumP) * lanes, sum_p[m]);
  }
}

// u_t = q u_{t-1} + x_t (folded) or + p x_t (direct);  w = du/dq:  w_t = q w_{t-1} + u_{t-1}
// With kInput, adds sum_t dy_t w_t and sum_t dy_t u_t to `sums`.
template <bool kFolded, bool kInput, Part part, int modes, class R>
void sensitivity_pass(const Tile<R>& tile, int steps, const R* coefs, R* state, double* sums, FetchAhead& ahead) {
  constexpr int lanes = kLanes<R>;
  const R *__restrict from = tile.from, *__restrict x_from = tile.x_from;
  R *__restrict x = tile.x, *__restrict dy = tile.in;
  const int64_t stride = tile.stride;
  using V = Vec<R>;
  Factor<R> q_re[modes];
  V q_im[modes], p[modes], u_re[modes], u_im[modes], w_re[modes], w_im[modes];
  V sum_u_re[modes], sum_u_im[modes], sum_w_re[modes], sum_w_im[modes];
#pragma GCC unroll 8
  for (int m = 0; m < modes; ++m) {
    const R* coef = coefs + m * kCoefs * lanes;
    q_re[m] = load(coef + kQRe * lanes);
    q_im[m] = load(coef + kQIm * lanes);
    p[m] = load(coef + kP * lanes);
    u_re[m] = load(state + 4 * m * lanes);
    u_im[m] = load(state + (4 * m + 1) * lanes);
    w_re[m] = load(state + (4 * m + 2) * lanes);
    w_im[m] = load(state + (4 * m + 3) * lanes);
    sum_u_re[m] = sum_u_im[m] = sum_w_re[m] = sum_w_im[m] = V{};
  }
  const auto step = [&](int64_t t) __attribute__((always_inline)) {
    const V xt = part == Part::first ? load(x_from + t * stride) : load(x + t * lanes);
    const V dyt = !kInput ? V{} : part == Part::first ? load(from + t * stride) : load(dy + t * lanes);
    if (part == Part::first) {
      store(x + t * lanes, xt);
      if (kInput) store(dy + t * lanes, dyt);
    }
#pragma GCC unroll 8
    for (int m = 0; m < modes; ++m) {
      const V next_w_re = q_re[m].times(w_re[m], u_re[m] - q_im[m] * w_im[m]);
      const V next_w_im = q_re[m].times(w_im[m], u_im[m] + q_im[m] * w_re[m]);
      const V next_u_re = q_re[m].times(u_re[m], (kFolded ? xt : p[m] * xt) - q_im[m] * u_im[m]);
      const V next_u_im = q_re[m].times(u_im[m], unfused(q_im[m] * u_re[m]));
      w_re[m] = next_w_re;
      w_im[m] = next_w_im;
      u_re[m] = next_u_re;
      u_im[m] = next_u_im;
      if (!kInput) continue;
      sum_w_re[m] += dyt * next_w_re;
      sum_w_im[m] += dyt * next_w_im;
      sum_u_re[m] += dyt * next_u_re;
      sum_u_im[m] += dyt * next_u_im;
    }
  };
  ahead.each_step(steps, coefs + modes * kCoefs * lanes, state + modes * 4 * lanes, step);
#pragma GCC unroll 8
  for (int m = 0; m < modes; ++m) {
    store(state + 4 * m * lanes, u_re[m]);
    store(state + (4 * m + 1) * lanes, u_im[m]);
    store(state + (4 * m + 2) * lanes, w_re[m]);
    store(state + (4 * m + 3) * lanes, w_im[m]);
    if (!kInput) continue;
    double* sum = sums + m * kSums * lanes;
    add_lanes<R>(sum + kSumWRe * lanes, sum_w_re[m]);
    add_lanes<R>(sum + kSumWIm * lanes, sum_w_im[m]);
    add_lanes<R>(sum + kSumHRe * lanes, sum_u_re[m]);
    add_lanes<R>(sum + kSumHIm * lanes, sum_u_im[m]);
  }
}

// Sum of a b over positions, in four interleaved partial sums.
template <class R>
MEGALODON_INLINE Vec<R> dot_steps(const R* a, const R* b, int steps) {
  constexpr int lanes = kLanes<R>;
  Vec<R> sum[4] = {};
  int t = 0;
  for (; t + 4 <= steps; t += 4)
    for (int i = 0; i < 4; ++i) sum[i] += load(a + (t + i) * lanes) * load(b + (t + i) * lanes);
  for (; t < steps; ++t) sum[0] += load(a + t * lanes) * load(b + t * lanes);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Copy the first `size` elements of each of `steps` rows to a tile (steps, lanes), and back. Rows are `stride` apart.
template <class T>
MEGALODON_INLINE void load_rows(const T* rows, int64_t stride, int steps, int size, Compute<T>* tile) {
  constexpr int lanes = kLanes<Compute<T>>;
  if (size == lanes)
    for (int t = 0; t < steps; ++t) store(tile + t * lanes, load(rows + t * stride));
  else
    for (int t = 0; t < steps; ++t) store(tile + t * lanes, load_first(rows + t * stride, size));
}
template <class T>
MEGALODON_INLINE void store_rows(const Compute<T>* tile, int steps, int size, T* rows, int64_t stride) {
  constexpr int lanes = kLanes<Compute<T>>;
  if (size == lanes)
    for (int t = 0; t < steps; ++t) store(rows + t * stride, load(tile + t * lanes));
  else
    for (int t = 0; t < steps; ++t) store_first(rows + t * stride, load(tile + t * lanes), size);
}

}  // namespace megalodon::MEGALODON_ISA

// The inner loops of the CEMA kernels: a tile holds channels x steps in contiguous memory, a pass keeps a few modes in
// registers. in, out and x point to (steps, lanes) of R; coefs to (N, kCoefs, lanes); state to (N, 2 or 4, lanes).
#pragma once

#include <type_traits>

#include "simd.h"

namespace megalodon::MEGALODON_ISA {

inline constexpr int kTileSteps = 64;
inline constexpr int kTileVectors = 256 / kVectorBytes;  // whole cache lines of a row
// Modes of a pass fill 32 registers (q, c, s: 6 a mode; q, u, w and two sums: 10). With 16, coefficients become memory
// operands, which is cheaper than the latency that fewer modes would leave open.
inline constexpr int kScanModes = 4;
inline constexpr int kSensitivityModes = 2;

enum Coef { kQRe, kQIm, kCRe, kCIm, kP, kCoefs };

// Sums over steps, kept in double: gradients before the factors that do not depend on the step.
enum Sum { kSumWRe, kSumWIm, kSumHRe, kSumHIm, kSumP, kSumEndRe, kSumEndIm, kSums };

// out = omega in in the first pass of a vector, and then
// folded:  s = q s + in,    out += Re(c s)
// direct:  s = q s + p in,  out += Re(c s)
// adjoint: g = s + c in,    out += p Re(g),  kSumP += x Re(g),  s = q g
enum class Form { folded, direct, adjoint };

// Splits N modes into passes of nearly equal size and calls pass(first mode, integral_constant of the size).
template <int most, class F>
MEGALODON_INLINE void with_size(int64_t size, F&& f) {
  if constexpr (most > 1) {
    if (size < most) return with_size<most - 1>(size, f);
  }
  f(std::integral_constant<int, most>{});
}
template <int most, class F>
MEGALODON_INLINE void for_each_pass(int64_t modes, F&& pass) {
  const int64_t passes = (modes + most - 1) / most;
  for (int64_t i = 0; i < passes; ++i) {
    const int64_t n = modes * i / passes;
    with_size<most>(modes * (i + 1) / passes - n, [&](auto size) { pass(n, size); });
  }
}

template <class R>
MEGALODON_INLINE void add_lanes(double* sum, Vec<R> v) {
  alignas(kVectorBytes) R lanes[kLanes<R>];
  store(static_cast<R*>(lanes), v);
  for (int i = 0; i < kLanes<R>; ++i) sum[i] += lanes[i];
}

template <Form form, bool kOutput, bool kFirst, int modes, class R>
MEGALODON_INLINE void scan_pass(const R* __restrict in, R* __restrict out, const R* __restrict x, int steps,
                                Vec<R> omega, const R* coefs, R* state, double* sums) {
  constexpr int lanes = kLanes<R>;
  using V = Vec<R>;
  V q_re[modes], q_im[modes], c_re[modes], c_im[modes], p[modes], re[modes], im[modes], sum_p[modes];
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
  for (int t = 0; t < steps; ++t) {
    const V input = load(in + t * lanes);
    V sum{};
#pragma GCC unroll 8
    for (int m = 0; m < modes; ++m) {
      if constexpr (form == Form::adjoint) {
        const V g_re = re[m] + c_re[m] * input, g_im = im[m] + c_im[m] * input;
        sum += p[m] * g_re;
        sum_p[m] += load(x + t * lanes) * g_re;
        re[m] = q_re[m] * g_re - q_im[m] * g_im;
        im[m] = q_im[m] * g_re + q_re[m] * g_im;
      } else {
        const V drive = form == Form::folded ? input : p[m] * input;
        const V next_re = q_re[m] * re[m] + (drive - q_im[m] * im[m]);
        const V next_im = q_im[m] * re[m] + q_re[m] * im[m];
        if (kOutput) sum += c_re[m] * next_re;
        if (kOutput) sum -= c_im[m] * next_im;
        re[m] = next_re;
        im[m] = next_im;
      }
    }
    if (kOutput) store(out + t * lanes, (kFirst ? omega * input : load(out + t * lanes)) + sum);
  }
#pragma GCC unroll 8
  for (int m = 0; m < modes; ++m) {
    store(state + 2 * m * lanes, re[m]);
    store(state + (2 * m + 1) * lanes, im[m]);
    if (form == Form::adjoint) add_lanes<R>(sums + (m * kSums + kSumP) * lanes, sum_p[m]);
  }
}

// u = q u + x (or p x), w = dw/dq: w_t = q w_{t-1} + u_{t-1}; adds sum_t dy_t w_t and sum_t dy_t u_t to the sums.
template <bool kFolded, int modes, class R>
MEGALODON_INLINE void sensitivity_pass(const R* __restrict x, const R* __restrict dy, int steps, const R* coefs,
                                       R* state, double* sums) {
  constexpr int lanes = kLanes<R>;
  using V = Vec<R>;
  V q_re[modes], q_im[modes], p[modes], u_re[modes], u_im[modes], w_re[modes], w_im[modes];
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
  for (int t = 0; t < steps; ++t) {
    const V xt = load(x + t * lanes), dyt = load(dy + t * lanes);
#pragma GCC unroll 8
    for (int m = 0; m < modes; ++m) {
      const V next_w_re = q_re[m] * w_re[m] + (u_re[m] - q_im[m] * w_im[m]);
      const V next_w_im = q_im[m] * w_re[m] + (u_im[m] + q_re[m] * w_im[m]);
      const V next_u_re = q_re[m] * u_re[m] + ((kFolded ? xt : p[m] * xt) - q_im[m] * u_im[m]);
      const V next_u_im = q_im[m] * u_re[m] + q_re[m] * u_im[m];
      w_re[m] = next_w_re;
      w_im[m] = next_w_im;
      u_re[m] = next_u_re;
      u_im[m] = next_u_im;
      sum_w_re[m] += dyt * next_w_re;
      sum_w_im[m] += dyt * next_w_im;
      sum_u_re[m] += dyt * next_u_re;
      sum_u_im[m] += dyt * next_u_im;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < modes; ++m) {
    store(state + 4 * m * lanes, u_re[m]);
    store(state + (4 * m + 1) * lanes, u_im[m]);
    store(state + (4 * m + 2) * lanes, w_re[m]);
    store(state + (4 * m + 3) * lanes, w_im[m]);
    double* sum = sums + m * kSums * lanes;
    add_lanes<R>(sum + kSumWRe * lanes, sum_w_re[m]);
    add_lanes<R>(sum + kSumWIm * lanes, sum_w_im[m]);
    add_lanes<R>(sum + kSumHRe * lanes, sum_u_re[m]);
    add_lanes<R>(sum + kSumHIm * lanes, sum_u_im[m]);
  }
}

// The sum over steps of a b, in four interleaved partial sums.
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

// Copies rows of `channels` elements, `stride` apart, into (vectors, kTileSteps, lanes), and back.
template <class T>
void load_rows(const T* rows, int64_t stride, int steps, int channels, Compute<T>* tile) {
  constexpr int lanes = kLanes<Compute<T>>;
  const int whole = channels / lanes, rest = channels % lanes;
  for (int t = 0; t < steps; ++t) {
    const T* row = rows + t * stride;
    for (int w = 0; w < whole; ++w) store(tile + (w * kTileSteps + t) * lanes, load(row + w * lanes));
    if (rest) store(tile + (whole * kTileSteps + t) * lanes, load_first(row + whole * lanes, rest));
  }
}
template <class T>
void store_rows(const Compute<T>* tile, int steps, int channels, T* rows, int64_t stride) {
  constexpr int lanes = kLanes<Compute<T>>;
  const int whole = channels / lanes, rest = channels % lanes;
  for (int t = 0; t < steps; ++t) {
    T* row = rows + t * stride;
    for (int w = 0; w < whole; ++w) store(row + w * lanes, load(tile + (w * kTileSteps + t) * lanes));
    if (rest) store_first(row + whole * lanes, load(tile + (whole * kTileSteps + t) * lanes), rest);
  }
}

}  // namespace megalodon::MEGALODON_ISA

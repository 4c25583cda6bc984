// CEMA's coefficients from its parameters. Derivation: ops/cema/cema_coefficients_reference.py.
//
//   p = s(alpha);  r = 1 - p s(delta);  t_n = s(theta) n / N;  q = r e^(2 pi i t);  scaled = gamma / sqrt(N)
//
// Backward, with a + i b = dq e^(-2 pi i t); p, r and t are recomputed:
//   dp += -a s(delta);  dalpha = dp p (1 - p);  ddelta = -a p s(delta) (1 - s(delta))
//   dtheta = s(theta) (1 - s(theta)) sum_n b r 2 pi n / N;  dgamma = dscaled / sqrt(N)
//
// A job is a block of channels. It computes s(theta) of its channels, a vector of channels at a time, then the modes of
// each channel. The phase t is in turns: range reduction subtracts quarter turns exactly, but would round in radians.

#include "cema_coefficients.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "parallel.h"
#include "simd.h"
#include "vector_math.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int64_t kBlockElements = 2048;  // per job, approximately
constexpr double kTwoPi = 6.283185307179586;

// A vector of complex numbers.
template <class R>
struct Complex {
  Vec<R> re, im;
};

template <class R> using Lanes = std::make_integer_sequence<int, kLanes<R>>;

template <class R, int... i>
MEGALODON_INLINE Complex<R> split(Vec<R> a, Vec<R> b, std::integer_sequence<int, i...>) {
  return {__builtin_shufflevector(a, b, (2 * i)...), __builtin_shufflevector(a, b, (2 * i + 1)...)};
}
template <class R, int first, int... i>
MEGALODON_INLINE Vec<R> interleave(Complex<R> v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v.re, v.im, (first + i / 2 + i % 2 * kLanes<R>)...);
}

// The first n complex numbers, n in [1, kLanes].
template <class R>
MEGALODON_INLINE Complex<R> load_complex(const R* from, int64_t n) {
  constexpr int lanes = kLanes<R>;
  const Vec<R> second = 2 * n > lanes ? load_first(from + lanes, 2 * n - lanes) : zeros<R>();
  return split<R>(load_first(from, 2 * n), second, Lanes<R>{});
}
template <class R>
MEGALODON_INLINE void store_complex(R* to, Complex<R> v, int64_t n) {
  constexpr int lanes = kLanes<R>;
  store_first(to, interleave<R, 0>(v, Lanes<R>{}), 2 * n);
  if (2 * n > lanes) store_first(to + lanes, interleave<R, lanes / 2>(v, Lanes<R>{}), 2 * n - lanes);
}

// Calls body(theta, first, last) for each block of channels [first, last). theta[d - first] is s(theta) of channel d.
template <class R, class Body>
void for_each_block(const CemaCoefficientsParams& p, Body&& body) {
  constexpr int lanes = kLanes<R>;
  const int64_t rows = std::max(kBlockElements / std::max(p.modes, int64_t{1}) / lanes, int64_t{1}) * lanes;
  const double work = 16.0 * static_cast<double>(p.channels) * static_cast<double>(p.modes);
  parallel_jobs((p.channels + rows - 1) / rows, work, [&] {
    return [&, s = Scratch<R>(rows)](int64_t job) {
      const int64_t first = job * rows, last = std::min(first + rows, p.channels);
      for (int64_t d = first; d < last; d += lanes)
        store(&s[d - first], sigmoid(load_first(static_cast<const R*>(p.theta) + d, last - d)));
      body(s.get(), first, last);
    };
  });
}

// Values that the forward and the backward share, of modes n + 1, n + 2, ... in the first `count` lanes.
template <class R>
struct Modes {
  MEGALODON_INLINE Modes(const CemaCoefficientsParams& params, R theta, int64_t at, int64_t n, int64_t count)
      : number(lane_numbers() + static_cast<R>(n)),
        p(sigmoid(load_first(static_cast<const R*>(params.alpha) + at, count))),
        delta(sigmoid(load_first(static_cast<const R*>(params.delta) + at, count))),
        radius(1 - p * delta),
        phase(sincos_of_turns<R>(number * theta / static_cast<R>(params.modes))) {}

  static MEGALODON_INLINE Vec<R> lane_numbers() {
    Vec<R> v;
    for (int i = 0; i < kLanes<R>; ++i) v[i] = static_cast<R>(i + 1);
    return v;
  }

  const Vec<R> number, p, delta, radius;
  const SinCos<Vec<R>> phase;
};

template <class R>
void forward(const CemaCoefficientsFwdParams& params) {
  const int64_t N = params.modes;
  const R scale = 1 / std::sqrt(static_cast<R>(N));
  const R* gamma = static_cast<const R*>(params.gamma);
  R *p = static_cast<R*>(params.p), *q = static_cast<R*>(params.q), *scaled = static_cast<R*>(params.scaled);
  for_each_block<R>(params, [&](const R* theta, int64_t first, int64_t last) {
    for (int64_t d = first; d < last; ++d) {
      for (int64_t n = 0; n < N; n += kLanes<R>) {
        const int64_t at = d * N + n, count = std::min(N - n, int64_t{kLanes<R>});
        const Modes<R> m(params, theta[d - first], at, n, count);
        store_first(p + at, m.p, count);
        store_complex(q + 2 * at, {m.radius * m.phase.cos, m.radius * m.phase.sin}, count);
        const Complex<R> g = load_complex(gamma + 2 * at, count);
        store_complex(scaled + 2 * at, {g.re * scale, g.im * scale}, count);
      }
    }
  });
}

template <class R>
void backward(const CemaCoefficientsBwdParams& params) {
  const int64_t N = params.modes;
  const R scale = 1 / std::sqrt(static_cast<R>(N)), turn = static_cast<R>(kTwoPi) / static_cast<R>(N);
  const R *dp = static_cast<const R*>(params.dp), *dq = static_cast<const R*>(params.dq);
  const R* dscaled = static_cast<const R*>(params.dscaled);
  R *dalpha = static_cast<R*>(params.dalpha), *ddelta = static_cast<R*>(params.ddelta);
  R *dtheta = static_cast<R*>(params.dtheta), *dgamma = static_cast<R*>(params.dgamma);
  for_each_block<R>(params, [&](const R* theta, int64_t first, int64_t last) {
    for (int64_t d = first; d < last; ++d) {
      const R s = theta[d - first];
      Vec<R> dphase = zeros<R>();
      for (int64_t n = 0; n < N; n += kLanes<R>) {
        const int64_t at = d * N + n, count = std::min(N - n, int64_t{kLanes<R>});
        const Modes<R> m(params, s, at, n, count);
        const Complex<R> g = load_complex(dq + 2 * at, count);
        const Vec<R> a = g.re * m.phase.cos + g.im * m.phase.sin;  // the gradient of r
        const Vec<R> b = g.im * m.phase.cos - g.re * m.phase.sin;
        store_first(dalpha + at, (load_first(dp + at, count) - a * m.delta) * (m.p * (1 - m.p)), count);
        store_first(ddelta + at, -a * m.p * (m.delta * (1 - m.delta)), count);
        dphase += b * m.radius * m.number;  // lanes past the last mode have zero gradient
        const Complex<R> h = load_complex(dscaled + 2 * at, count);
        store_complex(dgamma + 2 * at, {h.re * scale, h.im * scale}, count);
      }
      dtheta[d] = sum_lanes<R>(dphase) * turn * s * (1 - s);
    }
  });
}

}  // namespace

void cema_coefficients_fwd_cpu(const CemaCoefficientsFwdParams& params) {
  params.dtype == DType::f64 ? forward<double>(params) : forward<float>(params);
}

void cema_coefficients_bwd_cpu(const CemaCoefficientsBwdParams& params) {
  params.dtype == DType::f64 ? backward<double>(params) : backward<float>(params);
}

}  // namespace megalodon::MEGALODON_ISA

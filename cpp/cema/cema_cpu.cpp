// CEMA on the CPU: cema_fwd_cpu() and cema_bwd_cpu(), which the bindings call. Derivation: ops/cema/cema_reference.py.
//
//   h_t = q h_{t-1} + p x_t,   y_t = Re(sum_n gamma_n h_t[n]) + omega x_t     x, y (T, D);  h, q, gamma (D, N) complex
//
// Division of the work. Channels are independent; a lane of a register is a channel.
//   vector    as many channels as a register has lanes
//   strip     several vectors
//   tile      one vector and 32 positions
//   segment   a sequence, or some of its positions if there are few channels and sequences
//   job       one strip and a group of segments
// Segments and groups fix the order of every sum and depend on shapes alone, so results are bit-equal for any number of
// threads.
//
// Forward, in folded form, u = h / p and c = gamma p: u = q u + x, y = Re(c u). For each segment, each 32 positions,
// each tile: scan 4 modes at a time with the states in registers. The first pass copies the vectors of x, D elements
// apart, to a contiguous tile (2 KB); the last pass writes y. 16-bit types are converted before and after the passes.
// The passes prefetch rows of the next 32 positions into the L2, and the next modes' coefficients and states into L1.
//
// Backward, with w = dh/dq and g = dL/dh:
//   1. sensitivities:  w_t = q w_{t-1} + h_{t-1};  sum dy w -> dq,  sum dy h -> dgamma, dp,  sum dy x -> domega;
//      q, h and w are conjugated here, so that the sums are gradients
//   2. adjoints:  g_t = conj(q) g_{t+1} + conj(gamma) dy_t;  dx_t = sum_n p Re(g_t) + omega dy_t;  this is the forward
//      scan over rows in reverse, also in folded form
//   3. add the groups' sums in order -> dp, dq, dgamma, domega
// Phase 1 stores nothing per position: scratch is O(D N) per group. Sums are added in double after each tile.
//
// Exceptions:
//   tiny p                  the direct form, which computes h itself, runs if a state would be divided by a tiny p
//   overflow                u may overflow where h does not, and then stays infinite or NaN. If a segment's last u, g
//                           or a sum is not finite, the call is recomputed in the direct form
//   states in the backward  with an initial state or the gradient of an end state, both phases run in the direct form,
//                           which computes dp = sum x Re(g) without division or cancellation
//   end states alone        the scan has no output; a backward without dy runs both scans in the direct form
//   several segments        each is first scanned from zero. A merge in double of these local end states, h ->
//                           q^length h + local, gives their initial states; a merge in reverse, their dstate_out
//   short sequences         as in decoding: a lane is a mode, and states stay in (D, N) order (cema_steps.h)
//
// Multiply-adds per mode and position:
//   forward    6, direct form 7, without output 4
//   backward   18, direct form 21, without dy 14. A reverse scan that recomputes h takes 20, and needs stored states.
// Registers of the scan: 4 modes x (q, c, h) x (re, im) = 24, x, the sum and temporaries.
// Bytes: forward reads x and writes y, the minimum; backward reads x once, dy twice and writes dx, 4/3 of the minimum.

#include "cema.h"

#include <cmath>
#include <complex>

#include "cema_plan.h"
#include "cema_steps.h"
#include "cema_tile.h"
#include "padding.h"
#include "parallel.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int64_t kShort = 4;          // mean length up to which forward_steps runs
constexpr double kFoldable = 0x1p-40;  // smallest p by which a state is divided

double scan_work(const CemaParams& params) { return 6.0 * params.sequences.tokens * params.channels * params.modes; }

template <class T>
void forward_steps(const CemaFwdParams& params) {
  using R = Compute<T>;
  const Sequences& sequences = params.sequences;
  const int64_t modes = params.modes, blocks = ceil_div(params.channels, Stepper<T>::kWidth);
  const int64_t groups = std::clamp<int64_t>(ceil_div(kJobs, blocks), 1, sequences.count);
  parallel_jobs<FlushDenormals>(blocks * groups, scan_work(params), [&] {
    return [&, stepper = Stepper<T>(modes)](int64_t job) {
      const int64_t group = job / blocks, end = sequences.count * (group + 1) / groups;
      const int64_t first = job % blocks * Stepper<T>::kWidth;
      const int64_t channels = std::min(Stepper<T>::kWidth, params.channels - first);
      const auto modal = [&](const void* tensor, int64_t at) { return static_cast<const R*>(tensor) + at; };
      for (int64_t s = sequences.count * group / groups; s < end; ++s) {
        const int64_t row = (s * params.channels + first) * modes * 2, size = channels * modes * 2;
        R* const to = params.state_out ? static_cast<R*>(params.state_out) + row : stepper.state.get();
        const R* from = params.state ? modal(params.state, row) : to;
        if (!params.state) std::fill_n(to, size, R(0));
        else if (sequences.length(s) == 0) std::copy_n(from, size, to);
        for (int64_t t = sequences.begin(s); t < sequences.end(s); ++t, from = to)
          stepper.step(static_cast<const T*>(params.x) + t * params.channels + first,
                        static_cast<T*>(params.y) + t * params.channels + first, channels, from, to,
                        modal(params.p, first * modes), modal(params.q, first * modes * 2),
                        modal(params.gamma, first * modes * 2), modal(params.omega, first));
      }
    };
  });
}

// Returns true if every segment of the job ends in a finite state.
template <class T>
bool forward_job(Strip<T>& strip, const CemaFwdParams& params, const CemaPlan& plan, bool folded, int64_t job) {
  bool finite = true;
  using R = Compute<T>;
  strip.select(job % plan.strips, folded, /*conjugated=*/false);
  const R* p = strip.modal(params.p);
  const int64_t group = job / plan.strips, stride = params.channels;
  for (int64_t s = plan.group_begin[group]; s < plan.group_begin[group + 1]; ++s) {
    const Segment& segment = plan.segments[s];
    strip.clear_state();
    if (params.state) {
      const R* state = strip.modal_row(params.state, s);
      strip.each_state(2, [&](int64_t i, R& re, R& im) {
        re = folded ? state[2 * i] / p[i] : state[2 * i];
        im = folded ? state[2 * i + 1] / p[i] : state[2 * i + 1];
      });
    }
    const T* x = strip.row(params.x, segment.begin);
    T* y = strip.row(params.y, segment.begin);
    const int64_t steps = segment.end - segment.begin, ahead = params.sequences.tokens - segment.begin;
    // sweep<form, kOutput, kInput>
    if (y && folded) strip.template sweep<Form::folded>(x, y, x, stride, steps, ahead, nullptr);
    else if (y) strip.template sweep<Form::direct>(x, y, x, stride, steps, ahead, nullptr);
    else if (folded) strip.template sweep<Form::folded, false>(x, y, x, stride, steps, ahead, nullptr);
    else strip.template sweep<Form::direct, false>(x, y, x, stride, steps, ahead, nullptr);
    finite = finite && strip.state_is_finite(2);
    if (params.state_out) {
      R* state_out = strip.modal_row(params.state_out, s);
      strip.each_state(2, [&](int64_t i, R re, R im) {
        state_out[2 * i] = folded ? p[i] * re : re;
        state_out[2 * i + 1] = folded ? p[i] * im : im;
      });
    }
  }
  return finite;
}

// Returns true if every last state is finite.
template <class T>
bool run_form(const CemaFwdParams& params, const CemaPlan& plan, bool folded) {
  bool finite = true;
  parallel_jobs<FlushDenormals>(plan.strips * plan.groups, scan_work(params), [&] {
    return [&, strip = Strip<T>(params, plan)](int64_t job) mutable {
      if (!forward_job(strip, params, plan, folded, job)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    };
  });
  return finite;
}

template <class T>
void run_forward(const CemaFwdParams& params, const CemaPlan& plan) {
  using R = Compute<T>;
  const auto *p = static_cast<const R*>(params.p), *state = static_cast<const R*>(params.state);
  const bool folded = !params.state || std::all_of(p, p + params.channels * params.modes,
                                                   [](auto value) { return std::abs(value) >= kFoldable; });
  if (!folded) return static_cast<void>(run_form<T>(params, plan, false));
  // If state_out is state, the first run overwrites the states that a second run would start from.
  const int64_t saved = state && state == params.state_out ? plan.count * params.channels * params.modes * 2 : 0;
  const Scratch<R> saved_states(saved);
  std::copy_n(state, saved, saved_states.get());
  if (run_form<T>(params, plan, true)) return;
  CemaFwdParams rerun = params;
  if (saved) rerun.state = saved_states.get();
  run_form<T>(rerun, plan, false);
}

template <class T>
void forward(const CemaFwdParams& params) {
  using R = Compute<T>;
  if (!params.ends_only) {
    zero_padding(params.sequences, params.y, params.channels * static_cast<int64_t>(sizeof(T)));
    if (params.sequences.tokens <= kShort * params.sequences.count) return forward_steps<T>(params);
  }
  const CemaPlan plan(params, kLanes<R>, num_threads());
  if (!plan.split) return run_forward<T>(params, plan);
  // Local end states of the segments -> their initial states -> their outputs.
  const Scratch<R> starts(plan.count * params.channels * params.modes * 2);
  CemaFwdParams local = params;
  local.y = nullptr;
  local.state = nullptr;
  local.state_out = starts.get();
  run_forward<T>(local, plan);
  merge(params, plan, /*conjugated=*/false, params.state, starts.get(), params.state_out);
  if (params.ends_only) return;
  local = params;
  local.state = starts.get();
  local.state_out = nullptr;
  run_forward<T>(local, plan);
}

// Number of a strip's sums: (vectors, N, kSums, lanes), then (vectors, lanes) for domega.
int64_t sums_per_strip(const CemaPlan& plan, int64_t modes) { return plan.channels * (modes * kSums + 1); }

// Phase 1 of the backward, with or without dy.
template <bool kFolded, bool kInput, class T>
void scan_sensitivities(Strip<T>& strip, const CemaBwdParams& params, const Segment& segment, int64_t s, double* sums) {
  using R = Compute<T>;
  constexpr int lanes = kLanes<R>;
  strip.clear_state();
  if (params.state) {
    const R* state = strip.modal_row(params.state, s);
    strip.each_state(4, [&](int64_t i, R& re, R& im) {
      re = state[2 * i];
      im = -state[2 * i + 1];
    });
  }
  const T *x = strip.row(params.x, segment.begin), *dy = kInput ? strip.row(params.dy, segment.begin) : x;
  const int64_t stride = params.channels, steps = segment.end - segment.begin, modes = strip.modes;
  double* sum_omega = sums + strip.width * modes * kSums;
  const int64_t ahead = params.sequences.tokens - segment.begin;
  const auto tile = [&](int64_t t, int count, int vector, int size) {
    const int64_t at = t * stride + vector * lanes;
    const Tile<R> rows = strip.tile_of(dy + at, x + at, nullptr, stride);
    const bool in_place = strip.kInPlace && size == lanes;
    if (!in_place) {
      load_rows(x + at, stride, count, size, rows.x);
      if (kInput) load_rows(dy + at, stride, count, size, rows.in);
    }
    for_each_pass<kSensitivityModes>(modes, [&](int64_t n, auto pass_modes) {
      const int64_t mode = vector * modes + n;
      const auto pass = [&](auto part) {
        sensitivity_pass<kFolded, kInput, part, pass_modes>(rows, count, strip.coefs.get() + mode * kCoefs * lanes,
                                                            strip.state.get() + mode * 4 * lanes,
                                                            sums + mode * kSums * lanes, strip.fetch);
      };
      if constexpr (Strip<T>::kInPlace)
        if (in_place && n == 0) return pass(std::integral_constant<Part, Part::first>{});
      pass(std::integral_constant<Part, Part::inner>{});
    });
    if (kInput) add_lanes<R>(sum_omega + vector * lanes, dot_steps(rows.x, rows.in, count));
  };
  strip.template each_tile<kSensitivityModes>(x, dy, stride, steps, ahead, tile);
  if (params.dstate_out) {
    const R* g = strip.modal_row(params.dstate_out, s);
    strip.each_mode([&](int64_t i, int64_t slot, int64_t lane) {
      const R* w = strip.state.get() + (slot * 4 + 2) * lanes + lane;
      double* sum = sums + slot * kSums * lanes + lane;
      sum[kSumEndRe * lanes] += double(g[2 * i]) * w[0] - double(g[2 * i + 1]) * w[lanes];
      sum[kSumEndIm * lanes] += double(g[2 * i]) * w[lanes] + double(g[2 * i + 1]) * w[0];
    });
  }
}

// Phase 2 of the backward. Returns true if the last state is finite.
template <class T>
bool scan_adjoints(Strip<T>& strip, const CemaBwdParams& params, const Segment& segment, int64_t s, bool folded,
                   double* sums) {
  using R = Compute<T>;
  strip.clear_state();
  const R* g = params.dstate_out ? strip.modal_row(params.dstate_out, s) : nullptr;
  if (g) {
    strip.each_state(2, [&](int64_t i, R& re, R& im) {
      re = g[2 * i];
      im = g[2 * i + 1];
    });
  }
  const int64_t stride = params.channels, steps = segment.end - segment.begin;
  if (steps > 0) {
    const T *x = strip.row(params.x, segment.end - 1), *dy = strip.row(params.dy, segment.end - 1);
    T* dx = strip.row(params.dx, segment.end - 1);
    if (!dy) strip.template sweep<Form::adjoint, true, false>(x, dx, x, -stride, steps, segment.end, sums);
    else if (!dx) strip.template sweep<Form::folded, false>(dy, dx, x, -stride, steps, segment.end, sums);
    else if (folded) strip.template sweep<Form::folded>(dy, dx, x, -stride, steps, segment.end, sums);
    else strip.template sweep<Form::adjoint>(dy, dx, x, -stride, steps, segment.end, sums);
  }
  if (params.dstate) {
    using Complex = std::complex<R>;
    const auto* q = reinterpret_cast<const Complex*>(strip.modal(params.q, 2));
    const auto* gamma = reinterpret_cast<const Complex*>(strip.modal(params.gamma, 2));
    auto* dstate = reinterpret_cast<Complex*>(strip.modal_row(params.dstate, s));
    strip.each_state(2, [&](int64_t i, R re, R im) {
      dstate[i] = folded ? std::conj(gamma[i] * q[i]) * Complex(re, im) : Complex(re, im);
    });
  }
  return strip.state_is_finite(2);
}

// Phases 1 and 2. Fills sums (groups, strips, sums_per_strip), or skips phase 1 if `sums` is null: dstate needs none.
// Returns true if every sum and last state is finite.
template <class T>
bool run_backward(const CemaBwdParams& params, const CemaPlan& plan, bool folded, double* sums) {
  const int64_t size = sums_per_strip(plan, params.modes);
  bool finite = true;
  parallel_jobs<FlushDenormals>(plan.strips * plan.groups, 3 * scan_work(params), [&] {
    return [&, strip = Strip<T>(params, plan)](int64_t job) mutable {
      const int64_t group = job / plan.strips, begin = plan.group_begin[group], end = plan.group_begin[group + 1];
      strip.select(job % plan.strips, folded, /*conjugated=*/true);
      double* const sum = sums ? sums + job * size : nullptr;
      double total = 0;
      if (sums) {
        std::fill_n(sum, size, 0.0);
        const auto with_dy = folded ? scan_sensitivities<true, true, T> : scan_sensitivities<false, true, T>;
        const auto scan = params.dy ? with_dy : scan_sensitivities<false, false, T>;
        for (int64_t s = begin; s < end; ++s) scan(strip, params, plan.segments[s], s, sum);
      }
      for (int64_t s = end - 1; s >= begin; --s)
        if (!scan_adjoints(strip, params, plan.segments[s], s, folded, sum)) total = NAN;
      for (int64_t i = 0; sums && i < size; ++i) total += sum[i] * 0;  // 0, or NaN if a sum is NaN or infinite
      if (total != 0) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    };
  });
  return finite;
}

// Phases 1 and 2, in the folded form if `state` and `dstate_out` are null and nothing overflows, else in the direct
// form. The folded form writes `sums` and `params.dx`, either of which may be null. The direct form needs `direct_sums`
// and `dx`, neither of which may be null. Returns true if the folded form computed the result.
template <class T>
bool run_folded_or_direct(CemaBwdParams params, const CemaPlan& plan, double* sums, double* direct_sums, void* dx) {
  if (!params.state && !params.dstate_out && run_backward<T>(params, plan, true, sums)) return true;
  params.dx = dx;
  run_backward<T>(params, plan, false, direct_sums);
  return false;
}

// Phase 3: adds the groups' sums in order and applies the factors that are constant over positions.
template <class R>
void finish(const CemaBwdParams& params, const CemaPlan& plan, bool folded, const double* sums) {
  constexpr int lanes = kLanes<R>;
  const int64_t modes = params.modes, size = sums_per_strip(plan, modes);
  const R *p = static_cast<const R*>(params.p), *gamma = static_cast<const R*>(params.gamma);
  parallel_jobs(params.channels, 20.0 * plan.groups * params.channels * modes, [&] {
    return [&](int64_t channel) {
      const int64_t d = channel % plan.channels, strip = channel / plan.channels;
      const auto total = [&](int64_t at) {
        double sum = 0;
        for (int64_t g = 0; g < plan.groups; ++g) sum += sums[(g * plan.strips + strip) * size + at];
        return sum;
      };
      if (params.domega)
        static_cast<R*>(params.domega)[channel] = static_cast<R>(total(plan.channels * modes * kSums + d));
      for (int64_t n = 0; n < modes; ++n) {
        const int64_t i = channel * modes + n;
        const auto sum = [&](int k) { return total(((d / lanes * modes + n) * kSums + k) * lanes + d % lanes); };
        const std::complex<double> h(sum(kSumHRe), sum(kSumHIm)), w(sum(kSumWRe), sum(kSumWIm));
        const std::complex<double> end(sum(kSumEndRe), sum(kSumEndIm));
        const std::complex<double> g = gamma ? std::complex<double>(gamma[2 * i], -gamma[2 * i + 1]) : 0;
        const double scale = folded ? p[i] : 1;
        const std::complex<double> dgamma = scale * h, dq = scale * g * w + end;
        static_cast<R*>(params.dp)[i] = static_cast<R>(folded ? std::real(g * h) : sum(kSumP));
        static_cast<R*>(params.dq)[2 * i] = static_cast<R>(dq.real());
        static_cast<R*>(params.dq)[2 * i + 1] = static_cast<R>(dq.imag());
        if (!params.dgamma) continue;
        static_cast<R*>(params.dgamma)[2 * i] = static_cast<R>(dgamma.real());
        static_cast<R*>(params.dgamma)[2 * i + 1] = static_cast<R>(dgamma.imag());
      }
    };
  });
}

template <class R>
void clear_parameter_gradients(const CemaBwdParams& params) {
  const int64_t size = params.channels * params.modes;
  std::fill_n(static_cast<R*>(params.dp), size, R{0});
  std::fill_n(static_cast<R*>(params.dq), 2 * size, R{0});
  if (params.dgamma) std::fill_n(static_cast<R*>(params.dgamma), 2 * size, R{0});
  if (params.domega) std::fill_n(static_cast<R*>(params.domega), params.channels, R{0});
}

template <class T>
void backward(const CemaBwdParams& params) {
  using R = Compute<T>;
  zero_padding(params.sequences, params.dx, params.channels * static_cast<int64_t>(sizeof(T)));
  const CemaPlan plan(params, kLanes<R>, num_threads());
  const Scratch<double> sums(plan.groups * plan.strips * sums_per_strip(plan, params.modes));
  if (!plan.split) {
    const bool folded = run_folded_or_direct<T>(params, plan, sums.get(), sums.get(), params.dx);
    return finish<R>(params, plan, folded, sums.get());
  }
  // Initial states of the segments, then the gradients of their end states, then both phases with these.
  const int64_t states = plan.count * params.channels * params.modes * 2;
  const Scratch<R> starts(states), ends(states);
  CemaFwdParams local_fwd{params, /*y=*/nullptr, /*state_out=*/starts.get(), /*ends_only=*/true};
  local_fwd.state = nullptr;
  run_forward<T>(local_fwd, plan);
  merge(params, plan, /*conjugated=*/false, params.state, starts.get(), nullptr);
  CemaBwdParams local = params;
  local.state = nullptr;
  local.dstate_out = nullptr;
  local.dx = nullptr;
  local.dstate = ends.get();
  if (params.dy) run_folded_or_direct<T>(local, plan, nullptr, sums.get(), params.dx);
  else std::fill_n(ends.get(), states, R(0));
  merge(params, plan, /*conjugated=*/true, params.dstate_out, ends.get(), params.dstate);
  local = params;
  local.state = starts.get();
  local.dstate_out = ends.get();
  local.dstate = nullptr;
  run_folded_or_direct<T>(local, plan, sums.get(), sums.get(), params.dx);
  finish<R>(params, plan, false, sums.get());
}

}  // namespace

// Without tokens, the forward only fills `state_out`. If that is null, too, no loop over the sequences runs: there may
// be 2^60.
void cema_fwd_cpu(const CemaFwdParams& params) {
  if (params.channels == 0 || (params.sequences.tokens == 0 && !params.state_out)) return;
  dispatch_dtype(params.dtype, [&](auto element) { forward<decltype(element)>(params); });
}

void cema_bwd_cpu(const CemaBwdParams& params) {
  if (params.channels == 0) return;
  if (params.sequences.tokens == 0 && !params.dstate) {
    dispatch_dtype(params.dtype, [&](auto element) { clear_parameter_gradients<Compute<decltype(element)>>(params); });
    return;
  }
  dispatch_dtype(params.dtype, [&](auto element) { backward<decltype(element)>(params); });
}

}  // namespace megalodon::MEGALODON_ISA

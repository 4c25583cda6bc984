// Layer norm and RMS norm of rows of D channels. Derivation: ops/layer_norm/layer_norm_reference.py.
//
//   m = mean_D x (RMS norm: 0);  r = 1 / sqrt(mean_D (x - m)^2 + eps);  xn = (x - m) r;  y = xn (1 + weight) + bias
//
// Backward, with e = dy (1 + weight); m and r are recomputed:
//   dx = r (e - mean_D(e) - xn mean_D(e xn))     (RMS norm: without mean_D(e))
//   dweight = sum_T dy xn;  dbias = sum_T dy
//
// A block is some neighbouring rows; their number depends on D alone. For each row, which stays in L1 or L2, a thread
//   1. sums x: the mean, rounded to R, is `high` (layer norm alone);
//   2. sums d = x - high and d^2, which give `low`, the remainder of the mean, and r; backward: also e and e d;
//   3. writes y; backward: writes dx, and adds to the block's sums for dweight and dbias, in R.
// Phase 2 also prefetches the row of y or dx, as stores that miss the caches would stall phase 3. Phase 3 prefetches
// the next row. The mean in two parts keeps a row accurate whose mean is far larger than its standard deviation.
// Backward: neighbouring blocks form at most kParts parts. In double, a part adds its blocks' sums in order; then the
// parts' sums are added in order.
//
// Memory traffic, in elements: forward x, y; backward x, dy, dx. Large outputs bypass the caches.

#include "layer_norm.h"

#include <algorithm>
#include <cmath>

#include "channel_groups.h"
#include "finite.h"
#include "parallel.h"
#include "simd.h"
#include "stream.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int64_t kBlockElements = 1 << 14;
constexpr int64_t kMaxBlockRows = 64;
constexpr int64_t kParts = 64;

// With 16-bit elements, the forward is bound by arithmetic and does not wait for stores.
template <class T> constexpr bool kShort = sizeof(T) == 2;

struct Blocks {
  explicit Blocks(const LayerNormParams& p)
      : rows(std::clamp(kBlockElements / std::max(p.channels, int64_t{1}), int64_t{1}, kMaxBlockRows)),
        count((p.rows + rows - 1) / rows) {}
  const int64_t rows, count;
};

// Sums over a row. add(offset, n, sums) adds n <= kLanes channels from `offset` on to `sums`, and zeros in other lanes.
template <class R, int kSums, class Add>
MEGALODON_INLINE void sum_row(int64_t channels, R (&totals)[kSums], Add&& add) {
  constexpr int64_t lanes = kLanes<R>, chains = 4;
  Vec<R> sums[chains][kSums] = {};
  int64_t i = 0;
  for (; i + chains * lanes <= channels; i += chains * lanes)
    for (int chain = 0; chain < chains; ++chain) add(i + chain * lanes, lanes, sums[chain]);
  for (; i + lanes <= channels; i += lanes) add(i, lanes, sums[0]);
  if (i < channels) add(i, channels - i, sums[1]);
  for (int k = 0; k < kSums; ++k)
    totals[k] = sum_lanes<R>((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
}

template <class R>
struct Statistics {
  R high, low, rstd;  // mean = high + low
  MEGALODON_INLINE Vec<R> normalize(Vec<R> x) const { return ((x - high) - low) * rstd; }
};

// 1 + weight, or 1 if weight is null.
template <class R>
void fill_gain(const LayerNormParams& p, R* gain) {
  const R* weight = static_cast<const R*>(p.weight);
  for (int64_t i = 0; i < p.channels; ++i) gain[i] = weight ? 1 + weight[i] : 1;
}

template <class T>
MEGALODON_INLINE Compute<T> rounded_mean(const LayerNormParams& p, const T* x) {
  using R = Compute<T>;
  if (p.is_rms_norm) return 0;
  R sum[1];
  sum_row<R>(p.channels, sum, [&](int64_t i, int64_t n, Vec<R>* sums) __attribute__((always_inline)) {
    sums[0] += load_first(x + i, n);
  });
  return sum[0] / static_cast<R>(p.channels);
}

// Statistics from the sums of d = x - high and d^2. rstd is 0 if squares left the range of R; then wide_statistics() is
// needed.
template <class R>
MEGALODON_INLINE Statistics<R> statistics(const LayerNormParams& p, R high, R sum, R squares) {
  const R D = static_cast<R>(p.channels), low = p.is_rms_norm ? 0 : sum / D, var = squares / D - low * low;
  const R shifted = (var < 0 ? 0 : var) + static_cast<R>(p.eps);
  return {high, low, squares_in_range(shifted) ? 1 / std::sqrt(shifted) : 0};
}

// Statistics computed in a wider type, and the means of e and of e xn for the backward.
template <class R>
struct WideStatistics {
  Statistics<R> x_statistics;
  R mean_e, projection;
};
template <class T, class R = Compute<T>>
__attribute__((noinline)) WideStatistics<R> wide_statistics(const LayerNormParams& p, const T* x, const T* dy,
                                                            const R* gain) {
  using Wide = WideOf<R>;
  const Wide D = static_cast<Wide>(p.channels);
  Wide mean = 0, var = 0, mean_e = 0, projection = 0;
  for (int64_t i = 0; !p.is_rms_norm && i < p.channels; ++i) mean += Wide(widen(x[i])) / D;
  for (int64_t i = 0; i < p.channels; ++i) {
    const Wide d = widen(x[i]) - mean, e = dy ? Wide(widen(dy[i])) * gain[i] : 0;
    var += d * d / D;
    mean_e += e / D;
    projection += e * d / D;
  }
  const Wide rstd = 1 / std::sqrt(var + p.eps);
  const R high = static_cast<R>(mean);
  return {{high, static_cast<R>(mean - high), static_cast<R>(rstd)},
          p.is_rms_norm ? 0 : static_cast<R>(mean_e), static_cast<R>(rstd * projection)};
}

template <class T>
void forward_row(const LayerNormFwdParams& p, int64_t row, const Compute<T>* gain, const Compute<T>* bias,
                 bool streams) {
  using R = Compute<T>;
  const T* x = static_cast<const T*>(p.x) + row * p.channels;
  T* y = static_cast<T*>(p.y) + row * p.channels;
  const R high = rounded_mean(p, x);
  R sums[2];
  sum_row<R>(p.channels, sums, [&](int64_t i, int64_t n, Vec<R>* sums) __attribute__((always_inline)) {
    const Vec<R> d = keep_first<R>(load_first(x + i, n) - high, n);
    if (!kShort<T> && !streams) __builtin_prefetch(y + i, 1, 2);
    sums[0] += d;
    sums[1] += d * d;
  });
  Statistics<R> s = statistics<R>(p, high, sums[0], sums[1]);
  if (s.rstd == 0) s = wide_statistics<T>(p, x, nullptr, gain).x_statistics;
  for_each_vector<R>(p.channels, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    __builtin_prefetch(x + p.channels + i, 0, 2);
    const Vec<R> out = s.normalize(load_first(x + i, n)) * load_first(gain + i, n) + load_first(bias + i, n);
    stream_or_store(streams, y + i, out, n);
  });
}

// Adds the row's dweight and dbias to sums (2, D).
template <class T>
void backward_row(const LayerNormBwdParams& p, int64_t row, const Compute<T>* gain, Compute<T>* sums, bool streams) {
  using R = Compute<T>;
  const T* x = static_cast<const T*>(p.x) + row * p.channels;
  const T* dy = static_cast<const T*>(p.dy) + row * p.channels;
  T* dx = static_cast<T*>(p.dx) + row * p.channels;
  const R high = rounded_mean(p, x);
  R totals[4];
  sum_row<R>(p.channels, totals, [&](int64_t i, int64_t n, Vec<R>* sums) __attribute__((always_inline)) {
    const Vec<R> d = keep_first<R>(load_first(x + i, n) - high, n);
    if (!streams) __builtin_prefetch(dx + i, 1);
    const Vec<R> e = load_first(dy + i, n) * load_first(gain + i, n);
    sums[0] += d;
    sums[1] += d * d;
    sums[2] += e;
    sums[3] += e * d;
  });
  const R D = static_cast<R>(p.channels);
  Statistics<R> s = statistics<R>(p, high, totals[0], totals[1]);
  R mean_e = p.is_rms_norm ? 0 : totals[2] / D;
  R projection = s.rstd * (totals[3] - s.low * totals[2]) / D;  // the mean of e xn
  if (s.rstd == 0) {
    const WideStatistics<R> wide = wide_statistics<T>(p, x, dy, gain);
    s = wide.x_statistics;
    mean_e = wide.mean_e;
    projection = wide.projection;
  }
  for_each_vector<R>(p.channels, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    __builtin_prefetch(x + p.channels + i, 0, 2);
    __builtin_prefetch(dy + p.channels + i, 0, 2);
    const Vec<R> xn = s.normalize(load_first(x + i, n)), d = load_first(dy + i, n);
    stream_or_store(streams, dx + i, s.rstd * ((d * load_first(gain + i, n) - mean_e) - xn * projection), n);
    if (p.dweight) store_first(sums + i, load_first(sums + i, n) + d * xn, n);
    if (p.dbias) store_first(sums + p.channels + i, load_first(sums + p.channels + i, n) + d, n);
  });
}

template <class T>
void forward(const LayerNormFwdParams& p) {
  using R = Compute<T>;
  const Blocks blocks(p);
  Scratch<R> gain(p.channels), bias(p.channels);
  fill_gain(p, gain.get());
  const bool streams = !kShort<T> && worth_streaming(static_cast<const T*>(p.y), p.rows, p.channels);
  for (int64_t i = 0; i < p.channels; ++i) bias[i] = p.bias ? static_cast<const R*>(p.bias)[i] : 0;
  parallel_jobs<StreamFence>(blocks.count, static_cast<double>(p.rows * p.channels), [&] {
    return [&](int64_t block) {
      for (int64_t row = block * blocks.rows; row < smaller((block + 1) * blocks.rows, p.rows); ++row)
        forward_row<T>(p, row, gain.get(), bias.get(), streams);
    };
  }, Order::shares);
}

template <class T>
void backward(const LayerNormBwdParams& p) {
  using R = Compute<T>;
  const Blocks blocks(p);
  const int64_t parts = smaller(blocks.count, kParts), size = 2 * p.channels;
  Scratch<R> gain(p.channels);
  fill_gain(p, gain.get());
  const bool streams = worth_streaming(static_cast<const T*>(p.dx), p.rows, p.channels);
  Scratch<double> totals(parts * size);
  parallel_jobs<StreamFence>(parts, 2 * static_cast<double>(p.rows * p.channels), [&] {
    return [&, sums = Scratch<R>(size)](int64_t part) {
      double* total = totals.get() + part * size;
      std::fill_n(total, size, 0.0);
      for (int64_t block = part * blocks.count / parts; block < (part + 1) * blocks.count / parts; ++block) {
        std::fill_n(sums.get(), size, R{0});
        for (int64_t row = block * blocks.rows; row < smaller((block + 1) * blocks.rows, p.rows); ++row)
          backward_row<T>(p, row, gain.get(), sums.get(), streams);
        for (int64_t i = 0; i < size; ++i) total[i] += sums[i];
      }
    };
  }, Order::shares);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) totals[i] += totals[part * size + i];
  R* const outputs[2] = {static_cast<R*>(p.dweight), static_cast<R*>(p.dbias)};
  for (int output = 0; output < 2; ++output)
    for (int64_t i = 0; outputs[output] && i < p.channels; ++i)
      outputs[output][i] = parts ? static_cast<R>(totals[output * p.channels + i]) : 0;
}

}  // namespace

void layer_norm_fwd_cpu(const LayerNormFwdParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) { forward<decltype(type)>(params); });
}

void layer_norm_bwd_cpu(const LayerNormBwdParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) { backward<decltype(type)>(params); });
}

}  // namespace megalodon::MEGALODON_ISA

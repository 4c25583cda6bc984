// Code that the forward and the backward of timestep_norm share: statistics of single rows, states, division into
// blocks.
#pragma once

#include "channel_groups.h"
#include "relay.h"
#include "stream.h"
#include "timestep_norm.h"

namespace megalodon::MEGALODON_ISA {

// Rows of a block. Fewer than kMinRows would be correct, too, but each block waits for the carry of the one before it
// (relay.h). Even without tokens, a block has rows: their number is a divisor.
constexpr int64_t kMinRows = 4, kMaxRows = 512;
constexpr int64_t kBlockBytes = 160 << 10;  // of a block's rows of x and their statistics, unless kMinRows take more

// For each lane, the sum of some values, and the sum of their squared deviations from their mean. All lanes have the
// same number of values. Unlike sums of squares, Moments avoid cancellation; unlike two passes, they need each value
// once.
template <class R>
struct Moments {
  Vec<R> sum, squares;
};
// Joins a and b, of `values` values each: their means differ by difference / values.
template <class R>
MEGALODON_INLINE Moments<R> merge_moments(const Moments<R>& a, const Moments<R>& b, int values) {
  const Vec<R> difference = a.sum - b.sum;
  return {a.sum + b.sum, a.squares + b.squares + difference * difference * (R{0.5} / static_cast<R>(values))};
}
// Returns the Moments of x - shift, over the `count` vectors at x.
template <int count, class T, class R = Compute<T>>
MEGALODON_INLINE Moments<R> moments_of(const T* x, Vec<R> shift) {
  constexpr int half = count / 2;
  if constexpr (count == 1) {
    return {load(x) - shift, zeros<R>()};
  } else if constexpr (count == 2) {
    const auto [a, b] = load_two(x);
    return merge_moments<R>({a - shift, zeros<R>()}, {b - shift, zeros<R>()}, 1);
  } else {
    return merge_moments<R>(moments_of<half>(x, shift), moments_of<half>(x + half * kLanes<R>, shift), half);
  }
}
// Lane i of the result has the moments of all lanes of group(i), which has `values` values per lane. Called with
// first = 0 and bit = 1; at `bit` it joins the groups first, first + bit, ..., whose lanes are already added up over
// the higher bits. The recursion is depth-first, so that few vectors are live.
template <class R, int values, int bit = 1, class Group>
MEGALODON_INLINE Moments<R> moments_of_each(int first, Group&& group) {
  if constexpr (bit == kLanes<R>) return group(first);
  else {
    const Moments<R> a = moments_of_each<R, values, 2 * bit>(first, group);
    const Moments<R> b = moments_of_each<R, values, 2 * bit>(first + bit, group);
    const auto sums = pair_crosswise<R, bit>(a.sum, b.sum), squares = pair_crosswise<R, bit>(a.squares, b.squares);
    return merge_moments<R>({sums.kept, squares.kept}, {sums.other, squares.other}, values * (kLanes<R> / 2 / bit));
  }
}

// Mean, as the sum hi + lo, and biased variance of `groups` neighbouring groups, each of `vectors` vectors, in one pass
// over the differences from the group's first element. May write kLanes values past the end of hi, lo and var.
template <int vectors, class T, class R = Compute<T>>
void whole_vector_group_statistics(const T* x, int64_t groups, R* hi, R* lo, R* var) {
  constexpr int lanes = kLanes<R>, size = vectors * lanes;
  for (int64_t first = 0; first < groups; first += lanes) {
    const int64_t last = groups - 1 - first;
    const Moments<R> m = moments_of_each<R, vectors>(0, [&](int i) __attribute__((always_inline)) {
      const T* group = x + (first + smaller(i, last)) * size;
      for (int64_t k = 0; k < size; k += lanes) fetch_ahead(group + k, k);
      const Vec<R> shift = load_splat(group);
      hi[first + i] = shift[0];
      return moments_of<vectors>(group, shift);
    });
    // lo: what rounding took from shift + shifted
    const Vec<R> shift = load(hi + first), shifted = m.sum / size, mean = shift + shifted, part = mean - shift;
    store(hi + first, mean);
    store(lo + first, (shift - (mean - part)) + (shifted - part));
    store(var + first, m.squares / size);
  }
}

// Mean (hi + lo) and biased variance of `groups` neighbouring groups of arbitrary size, in two passes: sums of the
// differences from the group's first element, then of the squared differences from the mean.
template <class T, class R = Compute<T>>
void arbitrary_group_statistics(const T* x, const T* x_end, int64_t groups, int64_t size, R* hi, R* lo, R* var) {
  constexpr int lanes = kLanes<R>;
  const Vec<R> channels = splat(static_cast<R>(size));
  for (int64_t first = 0; first < groups; first += lanes, x += lanes * size, hi += lanes, lo += lanes, var += lanes) {
    const int64_t n = smaller(lanes, groups - first);
    for (int64_t i = 0; i < n; ++i) hi[i] = size > 0 ? load_within(x + i * size, 1, x_end)[0] : 0;
    const auto deviation = [&](int64_t i, int64_t k, int64_t width) __attribute__((always_inline)) {
      fetch_ahead(x + i * size + k, k);
      return keep_first<R>(load_within(x + i * size + k, width, x_end) - splat(hi[i]), width);
    };
    const Terms<R, 1> sum = sum_groups<R, 1>(n, size, [&](int64_t i, int64_t k, int64_t width) {
      return Terms<R, 1>{deviation(i, k, width)};
    });
    const Vec<R> shift = load(hi), shifted = sum.v[0] / channels, mean = shift + shifted, part = mean - shift;
    const Vec<R> rounding = (shift - (mean - part)) + (shifted - part);
    store(hi, mean);
    store(lo, rounding);
    const Terms<R, 1> squares = sum_groups<R, 1>(n, size, [&](int64_t i, int64_t k, int64_t width) {
      const Vec<R> d = deviation(i, k, width);
      return Terms<R, 1>{d * d};
    });
    const Vec<R> v = squares.v[0] / channels - rounding * rounding;
    store(var, v < 0 ? zeros<R>() : v);
  }
}

template <class T, class R = Compute<T>>
void group_statistics(const T* x, const T* x_end, int64_t groups, int64_t size, R* hi, R* lo, R* var) {
  switch (size % kLanes<R> == 0 ? size / kLanes<R> : 0) {
    case 1: return whole_vector_group_statistics<1>(x, groups, hi, lo, var);
    case 2: return whole_vector_group_statistics<2>(x, groups, hi, lo, var);
    case 4: return whole_vector_group_statistics<4>(x, groups, hi, lo, var);
    case 8: return whole_vector_group_statistics<8>(x, groups, hi, lo, var);
    default: return arbitrary_group_statistics(x, x_end, groups, size, hi, lo, var);
  }
}

// Number of timesteps of sequence s, with those of its initial state, before `token`: one of its tokens, or its end.
inline double count_before(const TimestepNormParams& p, int64_t s, int64_t token) {
  return static_cast<double>((p.count ? p.count[s] : 0) + token - p.sequences.begin(s));
}

// Loads the initial state of sequence s, or zeros if it has none.
template <class R>
void load_state(const TimestepNormParams& p, int64_t s, double* mean, double* var) {
  const int64_t groups = p.groups, at = s * groups;
  const bool fresh = !p.count || p.count[s] == 0;
  const R* residual = static_cast<const R*>(p.residual);
  for (int64_t g = 0; g < groups; ++g) {
    mean[g] = fresh ? 0 : static_cast<const R*>(p.mean)[at + g];
    var[g] = fresh ? 0 : static_cast<const R*>(p.var)[at + g];
    if (fresh || !residual) continue;
    mean[g] += residual[2 * at + g];
    var[g] += residual[2 * at + groups + g];
  }
}

template <class R>
void store_state(const TimestepNormFwdParams& p, int64_t s, const double* mean, const double* var) {
  if (!p.count_out) return;
  const int64_t at = s * p.groups;
  R *residual = static_cast<R*>(p.residual_out) + 2 * at, *mean_out = static_cast<R*>(p.mean_out) + at;
  R* var_out = static_cast<R*>(p.var_out) + at;
  for (int64_t g = 0; g < p.groups; ++g) {
    mean_out[g] = static_cast<R>(mean[g]);
    var_out[g] = static_cast<R>(var[g]);
    residual[g] = static_cast<R>(mean[g] - mean_out[g]);
    residual[p.groups + g] = static_cast<R>(var[g] - var_out[g]);
  }
}

// Loads u and v (timestep_norm_bwd_cpu.cpp) after the last row of sequence s: the gradients of mean and var of its end
// state, divided by the number of timesteps.
template <class R>
void load_state_gradient(const TimestepNormBwdParams& p, int64_t s, double* uv) {
  const double n = count_before(p, s, p.sequences.end(s));
  const R* const incoming[2] = {static_cast<const R*>(p.dmean_out), static_cast<const R*>(p.dvar_out)};
  for (int i = 0; i < 2; ++i)
    for (int64_t g = 0; g < p.groups; ++g) uv[i * p.groups + g] = incoming[i] ? incoming[i][s * p.groups + g] / n : 0;
}

// Stores the gradients of the initial state of sequence s, n u and n v before its first row; zeros if n is 0.
template <class R>
void store_state_gradient(const TimestepNormBwdParams& p, int64_t s, const double* uv) {
  const double n = count_before(p, s, p.sequences.begin(s));
  R* const outgoing[2] = {static_cast<R*>(p.dmean), static_cast<R*>(p.dvar)};
  for (int i = 0; i < 2; ++i)
    for (int64_t g = 0; outgoing[i] && g < p.groups; ++g)
      outgoing[i][s * p.groups + g] = n > 0 ? static_cast<R>(n * uv[i * p.groups + g]) : 0;
}

// Data shared by all threads: gains, the vector layout, the division into blocks and the carries between them.
template <class R>
struct TimestepNormPlan {
  TimestepNormPlan(const TimestepNormParams& p, int64_t element_bytes)
      : channels(p.channels, p.groups), rows(block_rows(p, element_bytes)),
        blocks((p.sequences.tokens + rows - 1) / rows), gain(p.channels + kLanes<R>), relay(blocks, 2 * p.groups) {
    for (int64_t c = 0; p.weight && c < p.channels; ++c) gain[c] = 1 + static_cast<const R*>(p.weight)[c];
  }
  template <class Params>
  static int64_t block_rows(const Params& p, int64_t element_bytes) {
    const int64_t row_bytes = p.channels * element_bytes + p.groups * 3 * static_cast<int64_t>(sizeof(double));
    const int64_t fitting = smaller(kBlockBytes / row_bytes, kMaxRows), most = fitting < kMinRows ? kMinRows : fitting;
    const int64_t tokens = p.sequences.tokens;
    if (tokens <= most) return tokens < kMinRows ? kMinRows : tokens;
    const int64_t blocks = (tokens + 2 * most - 1) / (2 * most) * 2;  // even, so that two threads take half each
    return (tokens + blocks - 1) / blocks;
  }
  const Channels<R> channels;
  const int64_t rows, blocks;
  Scratch<R> gain;
  Relay relay;
};

}  // namespace megalodon::MEGALODON_ISA

// Timestep norm on the CPU: group norm with cumulative statistics along time. Derivation:
// ops/timestep_norm/timestep_norm_reference.py.
//
//   gm, gv = mean and biased variance of x_t in its group of F = D / G channels;  n' = n + 1, c2 = 1 / n', c1 = 1 - c2
//   mean' = mean + c2 (gm - mean);  var' = c1 var + c2 (gv + c1 (gm - mean)^2);  rstd = 1 / sqrt(var' + eps)
//   y = (x - mean') rstd (1 + weight) + bias
//
// The T tokens are divided into blocks of rows that fit in L2. A block may have rows of several sequences; the division
// depends on shapes alone. A thread takes the next block in order of time (backward, timestep_norm_bwd_cpu.cpp: from
// the end) and
//   1. reduces each row's groups, F channels to two numbers, kLanes groups at a time, merging lanes by a transposition;
//   2. scans each run of rows of one sequence along time, in double, G values per row. A run that starts inside its
//      sequence is scanned without an initial state, and merged with the previous block's carry when the carry arrives;
//   3. writes y; backward: writes dx, and sums dweight and dbias over the block. `ends_only` skips this phase.
// Only the carry, 2 G doubles, is passed from block to block: threads wait for a merge, not for each other's rows.
//
// Memory traffic, in elements: forward x, y; backward x, dy, dx; plus 3 T G statistics. Rows are read twice: first from
// memory, prefetched some pages ahead, then from L2. Large outputs bypass the caches. Other outputs are prefetched,
// too, because a store first reads the line that it overwrites.
//
// Groups in vectors: if F is a multiple of kLanes, a vector has one group; else each vector permutes its groups'
// statistics to its channels, e.g. F = 3, kLanes = 8: channels 8..15 are in groups 2 3 3 3 4 4 4 5.

#include <cmath>

#include "timestep_norm_plan.h"

namespace megalodon::MEGALODON_ISA {
namespace {

// The forward on one thread. Each scratch array holds G values for each row of a block.
template <class T>
class Forward {
  using R = Compute<T>;

 public:
  Forward(const TimestepNormFwdParams& params, TimestepNormPlan<R>& plan)
      : p(params), plan(plan), G(p.groups), D(p.channels), mean_(scratch_size()), var_(scratch_size()),
        start_(2 * G), hi_(scratch_size()), lo_(scratch_size()), rstd_(scratch_size()),
        streams_(worth_streaming(static_cast<const T*>(p.y), p.sequences.tokens, D)) {}

  void operator()(int64_t block) {
    const int64_t from = block * plan.rows, to = smaller(from + plan.rows, p.sequences.tokens);
    int64_t continued_s = -1, continued_end = 0;
    p.sequences.for_each_run(from, to, [&](int64_t s, int64_t a, int64_t b) {
      if (s < 0) return;
      scan(s, a, b, (a - from) * G);
      if (a == p.sequences.begin(s)) return deliver(block, s, b, (b - 1 - from) * G);
      continued_s = s;
      continued_end = b;
    });
    if (continued_s >= 0) {
      plan.relay.wait(block - 1);
      merge(plan.relay.carry(block - 1), count_before(p, continued_s, from), continued_end - from);
      deliver(block, continued_s, continued_end, (continued_end - 1 - from) * G);
    }
    if (p.ends_only) return;
    p.sequences.for_each_run(from, to, [&](int64_t s, int64_t a, int64_t b) { write(s, a, b, (a - from) * G); });
  }

 private:
  int64_t scratch_size() const { return plan.rows * G + kLanes<R>; }

  // Fills mean_ and var_, from index `at` on, with the statistics after each of the rows [a, b).
  void scan(int64_t s, int64_t a, int64_t b, int64_t at) {
    const T* x = static_cast<const T*>(p.x);
    R *hi = &hi_[at], *lo = &lo_[at], *row_var = &rstd_[at];
    group_statistics(x + a * D, x + p.sequences.tokens * D, (b - a) * G, D / G, hi, lo, row_var);
    double *mean0 = start_.get(), *var0 = mean0 + G, n = 0;
    if (a == p.sequences.begin(s)) {
      load_state<R>(p, s, mean0, var0);
      n = count_before(p, s, a);
    } else {
      std::memset(mean0, 0, static_cast<size_t>(2 * G) * sizeof(double));
    }
    for (double *mean = &mean_[at], *var = &var_[at], *end = mean + (b - a) * G; mean != end; mean += G, var += G) {
      n += 1;
      const double c2 = 1 / n, c1 = 1 - c2;
#pragma omp simd
      for (int64_t g = 0; g < G; ++g) {
        const double d = (hi[g] - mean0[g]) + lo[g];
        mean[g] = mean0[g] + c2 * d;
        var[g] = c1 * var0[g] + c2 * (row_var[g] + c1 * d * d);
      }
      mean0 = mean;
      var0 = var;
      hi += G;
      lo += G;
      row_var += G;
    }
  }

  // Merges the statistics of n earlier rows into those of the block's first rows, scanned without an initial state. The
  // earlier mean is at `carry`, the variance at carry + G.
  void merge(const double* carry, double n, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      double *mean = &mean_[row * G], *var = &var_[row * G];
      const double new_share = static_cast<double>(row + 1) / (n + static_cast<double>(row + 1));
      const double old_share = 1 - new_share;
#pragma omp simd
      for (int64_t g = 0; g < G; ++g) {
        const double d = mean[g] - carry[g];
        mean[g] = carry[g] + new_share * d;
        var[g] = old_share * carry[G + g] + new_share * (var[g] + old_share * d * d);
      }
    }
  }

  // Takes the statistics at `at`, before token `end` of sequence s. If the sequence ends there, stores them as its end
  // state, else passes them to the next block.
  void deliver(int64_t block, int64_t s, int64_t end, int64_t at) {
    if (end == p.sequences.end(s)) return store_state<R>(p, s, &mean_[at], &var_[at]);
    std::memcpy(plan.relay.carry(block), &mean_[at], static_cast<size_t>(G) * sizeof(double));
    std::memcpy(plan.relay.carry(block) + G, &var_[at], static_cast<size_t>(G) * sizeof(double));
    plan.relay.publish(block);
  }

  void write(int64_t s, int64_t a, int64_t b, int64_t at) {
    const int64_t size = (b - a) * G, plane = p.sequences.tokens * G;
    R* const row_stats[3] = {&hi_[at], &lo_[at], &rstd_[at]};
    if (s < 0) {
      std::memset(static_cast<T*>(p.y) + a * D, 0, static_cast<size_t>((b - a) * D) * sizeof(T));
      for (R* to : row_stats) std::memset(to, 0, static_cast<size_t>(size) * sizeof(R));
    } else {
      R *hi = row_stats[0], *lo = row_stats[1], *rstd = row_stats[2];
      const double *mean = &mean_[at], *var = &var_[at], eps = p.eps;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        hi[i] = static_cast<R>(mean[i]);
        lo[i] = static_cast<R>(mean[i] - hi[i]);
        const R shifted = static_cast<R>(var[i] + eps);
        rstd[i] = 1 / std::sqrt(shifted) + 0 * shifted;  // NaN for a variance beyond the range of R
      }
    }
    for (int i = 0; p.stats && i < 3; ++i)
      std::memcpy(static_cast<R*>(p.stats) + i * plane + a * G, row_stats[i], static_cast<size_t>(size) * sizeof(R));
    if (s < 0) return;
    if (streams_) write_tiles<true>(a, b, at);
    else write_tiles<false>(a, b, at);
  }

  template <bool kStream>
  void write_tiles(int64_t a, int64_t b, int64_t at) {
    constexpr int tile = 2;
    for (; a + tile <= b; a += tile, at += tile * G) write_rows<tile, kStream>(a, at);
    for (; a < b; ++a, at += G) write_rows<1, kStream>(a, at);
  }

  template <int rows, bool kStream>
  void write_rows(int64_t a, int64_t at) {
    const R* const stats[3] = {&hi_[at], &lo_[at], &rstd_[at]};
    const R *bias = static_cast<const R*>(p.bias), *gain = plan.gain.get();
    const T* x = static_cast<const T*>(p.x) + a * D;
    T* y = static_cast<T*>(p.y) + a * D;
    plan.channels.template for_each_vector_with_statistics<rows>(
        stats, [=, D = D](int64_t, int64_t c, int64_t n, auto& s) __attribute__((always_inline)) {
          const Vec<R> g = load(gain + c), b = load_first(bias + c, n);
          for (int row = 0; row < rows; ++row) {
            const Vec<R> centered = load_first(x + row * D + c, n) - s[row][0] - s[row][1];
            const Vec<R> out = centered * s[row][2] * g + b;
            if constexpr (kStream) {
              stream(y + row * D + c, out);
            } else {
              fetch_ahead<1>(y + row * D + c, c);
              store_first(y + row * D + c, out, n);
            }
          }
        });
  }

  const TimestepNormFwdParams& p;
  TimestepNormPlan<R>& plan;
  const int64_t G, D;
  Scratch<double> mean_, var_, start_;
  Scratch<R> hi_, lo_, rstd_;
  const bool streams_;
};

template <class T>
void forward(const TimestepNormFwdParams& p) {
  using R = Compute<T>;
  Scratch<double> state(2 * p.groups);
  for (int64_t s = 0; p.count_out && s < p.sequences.count; ++s) {
    if (p.sequences.length(s) > 0) continue;
    load_state<R>(p, s, state.get(), state.get() + p.groups);
    store_state<R>(p, s, state.get(), state.get() + p.groups);
  }
  if (p.sequences.tokens > 0) {
    TimestepNormPlan<R> plan(p, sizeof(T));
    const double work = 4.0 * static_cast<double>(p.sequences.tokens * p.channels);
    parallel_jobs<StreamFence>(plan.blocks, work, [&] { return Forward<T>(p, plan); });
  }
  for (int64_t s = 0; p.count_out && s < p.sequences.count; ++s)  // last, because count_out may be `count`
    p.count_out[s] = (p.count ? p.count[s] : 0) + p.sequences.length(s);
}

}  // namespace

void timestep_norm_fwd_cpu(const TimestepNormFwdParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) { forward<decltype(type)>(params); });
}

}  // namespace megalodon::MEGALODON_ISA

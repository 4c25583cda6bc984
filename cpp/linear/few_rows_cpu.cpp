// Products of few rows, whose time is that of reading the weights once.
//
//   y_to = sum_i x_ti w_oi + b_o
//
// A thread owns contiguous rows of the weights: if neighbouring rows belonged to different threads, hardware
// prefetchers would fetch some lines twice. A thread processes one row of the weights at a time or, if x has several
// rows, kTogether: then each loaded vector is used in many sums, in registers. x stays in L1 or L2. The order of a sum
// depends on I, the vector length and the number of rows alone.

#include "few_rows.h"

#include <algorithm>

#include "panels.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int kMostRows = kRegisters / 8;  // most rows of x processed together
constexpr int kTogether = 4;               // rows of the weights processed together
constexpr int64_t kAhead = 4096;           // prefetch distance in bytes of the weights

// A vector of elements of x or of the weights. a.times(b, sum) returns sum + a b.
template <class T>
struct Factors {
  using R = Compute<T>;
  static constexpr int64_t kCount = kLanes<R>;
  Vec<R> values;
  MEGALODON_INLINE Factors(const T* from, int64_t n) : values(load_first(from, n)) {}
  MEGALODON_INLINE Vec<R> times(const Factors& other, Vec<R> sum) const { return sum + values * other.values; }
};
#if defined(MEGALODON_BF16_PAIRS)
// Pairs of bfloat16, whose products are exact. Denormals count as zero.
template <>
struct Factors<bf16> {
  static constexpr int64_t kCount = 2 * kLanes<float>;
  Bits values;
  MEGALODON_INLINE Factors(const bf16* from, int64_t n) : values(load_first_pairs(from, n)) {}
  MEGALODON_INLINE Vec<float> times(const Factors& other, Vec<float> sum) const {
    return add_pairs(sum, values, other.values);
  }
};
#endif

// Multiplies `rows` rows of x, from `row` on, by `outputs` rows of the weights, from `output` on.
template <class T, int rows, int outputs>
MEGALODON_INLINE void products(const LinearFewRowsParams& p, int64_t row, int64_t output) {
  using R = Compute<T>;
  constexpr int64_t lanes = kLanes<R>, step = Factors<T>::kCount;
  constexpr int chains = kRegisters / 2 / (rows * outputs);  // vectors of partial sums per output
  const T* x = static_cast<const T*>(p.x) + row * p.inputs;
  const T* weight = static_cast<const T*>(p.weight) + output * p.inputs;
  // With several rows of the weights, prefetches the next group of rows, but at most 4 kAhead bytes ahead.
  const int64_t group = outputs * p.inputs * static_cast<int64_t>(sizeof(T));
  const int64_t ahead = outputs == 1 ? kAhead : std::min(4 * kAhead, group);
  Vec<R> sums[chains][rows][outputs] = {};
  const auto add = [&](int chain, int64_t i, int64_t n) __attribute__((always_inline)) {
    for (int r = 0; r < rows; ++r) {
      const Factors<T> factor(x + r * p.inputs + i, n);
      for (int o = 0; o < outputs; ++o)
        sums[chain][r][o] = factor.times(Factors<T>(weight + o * p.inputs + i, n), sums[chain][r][o]);
    }
  };
  int64_t i = 0;
  for (; i + chains * step <= p.inputs; i += chains * step)
    for (int chain = 0; chain < chains; ++chain) {
      const int64_t at = i + chain * step;
      for (int o = 0; o < outputs; ++o)
        __builtin_prefetch(reinterpret_cast<const char*>(weight + o * p.inputs + at) + ahead, 0, 2);
      add(chain, at, step);
    }
  for (; i < p.inputs; i += step) add(0, i, std::min(step, p.inputs - i));
  constexpr int count = rows * outputs;
  R totals[(count + lanes - 1) / lanes * lanes];  // (rows, outputs): the chains and then the lanes added up
  for (int first = 0; first < count; first += lanes) {
    Vec<R> part[lanes] = {};
    for (int i = 0; i < lanes && first + i < count; ++i) {
      const int r = (first + i) / outputs, o = (first + i) % outputs;
      part[i] = sums[0][r][o];
      for (int chain = 1; chain < chains; ++chain) part[i] += sums[chain][r][o];
    }
    if constexpr (count == 1) totals[0] = sum_lanes<R>(part[0]);
    else store(totals + first, sum_rows<R>(part));
  }
  T* y = static_cast<T*>(p.y) + row * p.outputs + output;
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t o = 0; o < outputs; o += lanes) {
    const int64_t n = std::min(lanes, outputs - o);
    const Vec<R> offset = bias ? load_first(bias + output + o, n) : zeros<R>();
    for (int r = 0; r < rows; ++r)
      store_first(y + r * p.outputs + o, load_first(static_cast<const R*>(totals) + r * outputs + o, n) + offset, n);
  }
}

// Multiplies all rows of x by the rows [begin, end) of the weights.
template <class T>
MEGALODON_INLINE void run_job(const LinearFewRowsParams& p, int64_t begin, int64_t end) {
  int64_t output = begin;
  if (p.rows > 1)
    for (; output + kTogether <= end; output += kTogether) {
      int64_t row = 0;
      for (; row + kMostRows <= p.rows; row += kMostRows) products<T, kMostRows, kTogether>(p, row, output);
      for (; row < p.rows; ++row) products<T, 1, kTogether>(p, row, output);
    }
  for (; output < end; ++output)
    for (int64_t row = 0; row < p.rows; ++row) products<T, 1, 1>(p, row, output);
}

}  // namespace

void linear_few_rows_cpu(const LinearFewRowsParams& p) {
  // The number of jobs depends on the threads. It changes no sum, because jobs start at multiples of kTogether.
  const int64_t groups = (p.outputs + kTogether - 1) / kTogether;
  const int64_t jobs = std::min<int64_t>(groups, num_threads());
  const auto begin = [&](int64_t job) { return std::min(kTogether * (groups * job / jobs), p.outputs); };
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_jobs(jobs, static_cast<double>(p.rows * p.inputs * p.outputs), [&] {
      return [&](int64_t job) { run_job<T>(p, begin(job), begin(job + 1)); };
    });
  });
}

}  // namespace megalodon::MEGALODON_ISA

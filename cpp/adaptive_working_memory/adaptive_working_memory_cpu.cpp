// Read and write a working memory at a few positions, as in decoding. Derivation: ops/adaptive_working_memory/adaptive_working_memory_reference.py.
//
//   o_t = softmax(q_t) M;  after each chunk  M' = (1 - r) M + r P^T (V - F M), of that chunk or an earlier one
//
// A job owns one head of one sequence; its M (K, V) fits into the L1 or L2. A read passes over M once. A chunk is
// written kRows positions at a time: they read M, then add to N = P^T (V - F M).

#include "adaptive_working_memory.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "padding.h"
#include "parallel.h"
#include "simd.h"
#include "sizes.h"
#include "vector_math.h"

namespace megalodon::MEGALODON_ISA {
namespace {

template <class T>
class Head {
  using R = Compute<T>;
  static constexpr int64_t kLane = kLanes<R>;
  static constexpr int kRows = 4;

 public:
  explicit Head(const WorkingMemoryStepsParams& params)
      : p_(params),
        key_width_(round_up(params.key_dim, kLane)),
        value_width_(round_up(params.value_dim, kLane)),
        weights_(kRows * key_width_),
        shares_(kRows * key_width_),
        max_(key_width_),
        total_(key_width_),
        unknown_(kRows * value_width_),
        news_(params.key_dim * value_width_) {}

  // Runs head h of sequence s over all of its positions.
  void run(int64_t s, int64_t h) {
    const int64_t C = p_.chunk_size, unwritten = p_.visible * C, steps = p_.sequences.length(s);
    const int64_t begin = p_.sequences.begin(s), head = s * p_.heads + h;
    const int64_t seen = p_.position[s];
    const int64_t cached = std::min(seen, unwritten - C + seen % C);
    memory_ = static_cast<R*>(p_.memory) + head * p_.key_dim * p_.value_dim;
    mass_ = static_cast<R*>(p_.mass) + head * p_.key_dim;
    if (seen < unwritten) std::fill(mass_, mass_ + p_.key_dim, R{0});
    for (int64_t t = 0; t < steps; ++t) {
      read(begin + t, h);
      const int64_t now = seen + t + 1;
      if (now % C == 0 && now >= unwritten) write(s, h, begin + t + 1 - unwritten, begin, cached, now == unwritten);
    }
  }

 private:
  const T* row(const void* tensor, int64_t token, int64_t h, int64_t width) const {
    return static_cast<const T*>(tensor) + (token * p_.heads + h) * width;
  }

  void read(int64_t token, int64_t h) {
    R* weights = weights_.get();
    softmax(row(p_.q, token, h, p_.key_dim), weights);
    R* sums = unknown_.get();
    std::fill(sums, sums + value_width_, R{0});
    for (int64_t i = 0; i < p_.key_dim; ++i) {
      const R* m = memory_ + i * p_.value_dim;
      for_each_vector<R>(p_.value_dim, [&](int64_t c, int64_t n) {
        store(sums + c, load(static_cast<const R*>(sums) + c) + weights[i] * load_first(m + c, n));
      });
    }
    T* o = static_cast<T*>(p_.o) + (token * p_.heads + h) * p_.value_dim;
    for_each_vector<R>(p_.value_dim, [&](int64_t c, int64_t n) {
      store_first(o + c, load(static_cast<const R*>(sums) + c), n);
    });
  }

  // Writes the chunk from token `first` on. Its tokens before `begin` are the last of the cache's `cached` rows.
  void write(int64_t s, int64_t h, int64_t first, int64_t begin, int64_t cached, bool is_first_chunk) {
    const int64_t C = p_.chunk_size, K = p_.key_dim, V = p_.value_dim;
    const auto step = [&](const void* cache, const void* tokens, int64_t j, int64_t width) {
      const int64_t token = first + j;
      return token < begin ? row(cache, s * p_.visible * C + cached + token - begin, h, width)
                           : row(tokens, token, h, width);
    };
    sum_over_steps([&](int64_t j) { return step(p_.cache_k, p_.k, j, K); });
    std::fill(&news_[0], &news_[0] + K * value_width_, R{0});
    for (int64_t j = 0; j < C; j += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, C - j);
      std::fill(&weights_[0], &weights_[0] + kRows * key_width_, R{0});  // also of missing rows
      std::fill(&shares_[0], &shares_[0] + kRows * key_width_, R{0});
      for (int64_t i = 0; i < rows; ++i) {
        const T* k = step(p_.cache_k, p_.k, j + i, K);
        softmax(k, &weights_[i * key_width_]);
        for_each_vector<R>(K, [&](int64_t c, int64_t n) {
          const Vec<R> share = exp(load_first(k + c, n) - load(static_cast<const R*>(&max_[c]))) *
                               load(static_cast<const R*>(&total_[c]));
          store_first(&shares_[i * key_width_ + c], share, n);
        });
        const T* v = step(p_.cache_v, p_.v, j + i, V);
        for_each_vector<R>(V, [&](int64_t c, int64_t n) { store(&unknown_[i * value_width_ + c], load_first(v + c, n)); });
      }
      for (int64_t i = rows * value_width_; i < kRows * value_width_; ++i) unknown_[i] = 0;
      add_rows();
    }
    merge(is_first_chunk);
  }

  // max_ = max_j k_j,  total_ = 1 / sum_j exp(k_j - max_), for each channel of the chunk's keys.
  template <class Key>
  void sum_over_steps(Key&& key) {
    for_each_vector<R>(p_.key_dim, [&](int64_t c, int64_t n) {
      Vec<R> most = splat(-std::numeric_limits<R>::infinity()), total = zeros<R>();
      for (int64_t j = 0; j < p_.chunk_size; ++j) {
        const Vec<R> logit = load_first(key(j) + c, n);
        most = logit > most ? logit : most;
      }
      for (int64_t j = 0; j < p_.chunk_size; ++j) total += exp(load_first(key(j) + c, n) - most);
      store(&max_[c], most);
      store(&total_[c], 1 / total);
    });
  }

  // unknown_ -= weights_ M;  news_ += shares_^T unknown_
  void add_rows() {
    const int64_t K = p_.key_dim, V = p_.value_dim;
    for_each_vector<R>(V, [&](int64_t c, int64_t n) {
      Vec<R> u[kRows];
      for (int i = 0; i < kRows; ++i) u[i] = load(static_cast<const R*>(&unknown_[i * value_width_ + c]));
      for (int64_t k = 0; k < K; ++k) {
        const Vec<R> m = load_first(static_cast<const R*>(memory_) + k * V + c, n);
        for (int i = 0; i < kRows; ++i) u[i] -= weights_[i * key_width_ + k] * m;
      }
      for (int64_t k = 0; k < K; ++k) {
        R* at = &news_[k * value_width_ + c];
        Vec<R> sum = load(static_cast<const R*>(at));
        for (int i = 0; i < kRows; ++i) sum += shares_[i * key_width_ + k] * u[i];
        store(at, sum);
      }
    });
  }

  // M += r (N - M),  z = log(exp(z) + exp(w))
  void merge(bool is_first_chunk) {
    for (int64_t k = 0; k < p_.key_dim; ++k) {
      const R w = max_[k] - std::log(total_[k]), z = is_first_chunk ? -std::numeric_limits<R>::infinity() : mass_[k];
      const R more = std::max(z, w), total = more + std::log1p(std::exp(std::min(z, w) - more));
      const R r = std::exp(w - total);
      mass_[k] = total;
      R* m = memory_ + k * p_.value_dim;
      for_each_vector<R>(p_.value_dim, [&](int64_t c, int64_t n) {
        const Vec<R> before = load_first(static_cast<const R*>(m) + c, n);
        store_first(m + c, before + r * (load(static_cast<const R*>(&news_[k * value_width_ + c])) - before), n);
      });
    }
  }

  // exp(x - max x) / sum, of K numbers.
  void softmax(const T* logits, R* weights) const {
    R most = -std::numeric_limits<R>::infinity(), sum = 0;
    for_each_vector<R>(p_.key_dim, [&](int64_t c, int64_t n) {
      const Vec<R> logit = load_first(logits + c, n);
      for (int64_t i = 0; i < n; ++i) most = logit[i] > most || logit[i] != logit[i] ? logit[i] : most;
    });
    for_each_vector<R>(p_.key_dim, [&](int64_t c, int64_t n) {
      const Vec<R> weight = exp(load_first(logits + c, n) - most);
      for (int64_t i = 0; i < n; ++i) sum += weight[i];
      store_first(weights + c, weight, n);
    });
    for (int64_t i = 0; i < p_.key_dim; ++i) weights[i] /= sum;
  }

  const WorkingMemoryStepsParams& p_;
  const int64_t key_width_, value_width_;  // in whole vectors
  Scratch<R> weights_, shares_;            // (kRows, K) F and P of some positions
  Scratch<R> max_, total_;                 // (K)
  Scratch<R> unknown_, news_;              // (kRows, V) V - F M of these positions, or sums of a read; and N (K, V)
  R *memory_ = nullptr, *mass_ = nullptr;
};

}  // namespace

void working_memory_steps_cpu(const WorkingMemoryStepsParams& p) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    zero_padding(p.sequences, p.o, p.heads * p.value_dim * static_cast<int64_t>(sizeof(T)));
    const double work = static_cast<double>(p.sequences.tokens * p.heads * p.key_dim * p.value_dim);
    parallel_jobs<FlushDenormals>(p.sequences.count * p.heads, work, [&] {
      return [&, head = Head<T>(p)](int64_t job) mutable { head.run(job / p.heads, job % p.heads); };
    });
  });
}

}  // namespace megalodon::MEGALODON_ISA

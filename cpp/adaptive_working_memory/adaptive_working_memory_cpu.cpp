// Read and write a working memory at a few positions, as in decoding. Derivation:
// ops/adaptive_working_memory/adaptive_working_memory_reference.py.
//
//   o_t = softmax(q_t) M                      read, at each position
//   N = P^T (V - F M),  M' = (1 - r) M + r N  write, when a chunk is complete: of the one `visible` - 1 chunks earlier
//
// V (C, V) has the values of the chunk that is written. Its keys give F, by a softmax over the K channels of each
// position, and P, by a softmax over the C positions for each channel. r (K) is the weight of N: merge().
//
// A job owns one head of one sequence; its M (K, V) fits into the L1 or L2. A read passes over M once. A write takes
// kRows positions at a time: it computes their rows of V - F M, then adds their part of N.

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
  static constexpr int kRows = 4;  // positions that a write takes at a time

 public:
  explicit Head(const WorkingMemoryStepsParams& params)
      : p_(params),
        key_width_(round_up(params.key_dim, kLanes<R>)),
        value_width_(round_up(params.value_dim, kLanes<R>)),
        read_weights_(kRows * key_width_),
        write_weights_(kRows * key_width_),
        max_(key_width_),
        inverse_sum_(key_width_),
        residual_(kRows * value_width_),
        update_(params.key_dim * value_width_) {}

  // Runs head h over all positions of sequence s.
  void run(int64_t s, int64_t h) {
    const int64_t C = p_.chunk_size, visible = p_.visible * C;  // positions of a chunk and of the visible chunks
    const int64_t begin = p_.sequences.begin(s), steps = p_.sequences.length(s), head = s * p_.heads + h;
    const int64_t initial_position = p_.position[s];
    const int64_t cached = std::min(initial_position, visible - C + initial_position % C);  // rows in use of a cache
    memory_ = static_cast<R*>(p_.memory) + head * p_.key_dim * p_.value_dim;
    mass_ = static_cast<R*>(p_.mass) + head * p_.key_dim;
    if (initial_position < visible) std::fill(mass_, mass_ + p_.key_dim, R{0});
    for (int64_t t = 0; t < steps; ++t) {
      read(begin + t, h);
      const int64_t position = initial_position + t + 1;
      const int64_t first = begin + t + 1 - visible;
      if (position % C == 0 && position >= visible) write(s, h, first, begin, cached, position == visible);
    }
  }

 private:
  const T* row(const void* tensor, int64_t token, int64_t h, int64_t width) const {
    return static_cast<const T*>(tensor) + (token * p_.heads + h) * width;
  }

  void read(int64_t token, int64_t h) {
    R* weights = read_weights_.get();
    softmax(row(p_.q, token, h, p_.key_dim), weights);
    R* sums = residual_.get();
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

  // Writes the chunk that starts at token `first` to M. Its tokens before `begin`, the first of this call, are the last
  // of the cache's `cached` rows.
  void write(int64_t s, int64_t h, int64_t first, int64_t begin, int64_t cached, bool is_first_chunk) {
    const int64_t C = p_.chunk_size, K = p_.key_dim, V = p_.value_dim;
    const auto chunk_row = [&](const void* cache, const void* tokens, int64_t j, int64_t width) {
      const int64_t token = first + j;
      return token < begin ? row(cache, s * p_.visible * C + cached + token - begin, h, width)
                           : row(tokens, token, h, width);
    };
    sum_over_chunk([&](int64_t j) { return chunk_row(p_.cache_k, p_.k, j, K); });
    std::fill(&update_[0], &update_[0] + K * value_width_, R{0});
    for (int64_t j = 0; j < C; j += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, C - j);
      std::fill(&read_weights_[0], &read_weights_[0] + kRows * key_width_, R{0});  // for rows past the chunk
      std::fill(&write_weights_[0], &write_weights_[0] + kRows * key_width_, R{0});
      for (int64_t i = 0; i < rows; ++i) {
        const T* k = chunk_row(p_.cache_k, p_.k, j + i, K);
        softmax(k, &read_weights_[i * key_width_]);
        for_each_vector<R>(K, [&](int64_t c, int64_t n) {
          const Vec<R> weight = exp(load_first(k + c, n) - load(static_cast<const R*>(&max_[c]))) *
                                load(static_cast<const R*>(&inverse_sum_[c]));
          store_first(&write_weights_[i * key_width_ + c], weight, n);
        });
        const T* v = chunk_row(p_.cache_v, p_.v, j + i, V);
        for_each_vector<R>(V, [&](int64_t c, int64_t n) {
          store(&residual_[i * value_width_ + c], load_first(v + c, n));
        });
      }
      for (int64_t i = rows * value_width_; i < kRows * value_width_; ++i) residual_[i] = 0;
      add_rows();
    }
    merge(is_first_chunk);
  }

  // max_ = max_j k_j and inverse_sum_ = 1 / sum_j exp(k_j - max_), over the chunk's positions j, for each key channel.
  template <class Key>
  void sum_over_chunk(Key&& key) {
    for_each_vector<R>(p_.key_dim, [&](int64_t c, int64_t n) {
      Vec<R> max = splat(-std::numeric_limits<R>::infinity()), sum = zeros<R>();
      for (int64_t j = 0; j < p_.chunk_size; ++j) {
        const Vec<R> logit = load_first(key(j) + c, n);
        max = logit > max ? logit : max;
      }
      for (int64_t j = 0; j < p_.chunk_size; ++j) sum += exp(load_first(key(j) + c, n) - max);
      store(&max_[c], max);
      store(&inverse_sum_[c], 1 / sum);
    });
  }

  // residual_ -= read_weights_ M;  update_ += write_weights_^T residual_
  void add_rows() {
    const int64_t K = p_.key_dim, V = p_.value_dim;
    for_each_vector<R>(V, [&](int64_t c, int64_t n) {
      Vec<R> residual[kRows];
      for (int i = 0; i < kRows; ++i) residual[i] = load(static_cast<const R*>(&residual_[i * value_width_ + c]));
      for (int64_t k = 0; k < K; ++k) {
        const Vec<R> m = load_first(static_cast<const R*>(memory_) + k * V + c, n);
        for (int i = 0; i < kRows; ++i) residual[i] -= read_weights_[i * key_width_ + k] * m;
      }
      for (int64_t k = 0; k < K; ++k) {
        R* at = &update_[k * value_width_ + c];
        Vec<R> sum = load(static_cast<const R*>(at));
        for (int i = 0; i < kRows; ++i) sum += write_weights_[i * key_width_ + k] * residual[i];
        store(at, sum);
      }
    });
  }

  // For each key channel, z = mass_ is the log of the weight of the chunks in M, and w = log sum_j exp(k_j) that of the
  // chunk that is written:  z' = log(exp(z) + exp(w)),  r = exp(w - z'),  M += r (N - M).
  void merge(bool is_first_chunk) {
    for (int64_t k = 0; k < p_.key_dim; ++k) {
      const R w = max_[k] - std::log(inverse_sum_[k]);
      const R z = is_first_chunk ? -std::numeric_limits<R>::infinity() : mass_[k];
      const R larger = std::max(z, w), new_mass = larger + std::log1p(std::exp(std::min(z, w) - larger));
      const R r = std::exp(w - new_mass);
      mass_[k] = new_mass;
      R* m = memory_ + k * p_.value_dim;
      for_each_vector<R>(p_.value_dim, [&](int64_t c, int64_t n) {
        const Vec<R> before = load_first(static_cast<const R*>(m) + c, n);
        store_first(m + c, before + r * (load(static_cast<const R*>(&update_[k * value_width_ + c])) - before), n);
      });
    }
  }

  // weights = exp(logits - max) / sum, over the K logits. A NaN gives NaN weights.
  void softmax(const T* logits, R* weights) const {
    R max = -std::numeric_limits<R>::infinity(), sum = 0;
    for_each_vector<R>(p_.key_dim, [&](int64_t c, int64_t n) {
      const Vec<R> logit = load_first(logits + c, n);
      for (int64_t i = 0; i < n; ++i) max = logit[i] > max || logit[i] != logit[i] ? logit[i] : max;
    });
    for_each_vector<R>(p_.key_dim, [&](int64_t c, int64_t n) {
      const Vec<R> weight = exp(load_first(logits + c, n) - max);
      for (int64_t i = 0; i < n; ++i) sum += weight[i];
      store_first(weights + c, weight, n);
    });
    for (int64_t i = 0; i < p_.key_dim; ++i) weights[i] /= sum;
  }

  const WorkingMemoryStepsParams& p_;
  const int64_t key_width_, value_width_;  // K and V, rounded up to whole vectors
  Scratch<R> read_weights_;                // (kRows, K) softmax(q) of a read, or rows of F of a write
  Scratch<R> write_weights_;               // (kRows, K) rows of P
  Scratch<R> max_, inverse_sum_;           // (K)
  Scratch<R> residual_;                    // (kRows, V) rows of V - F M, or the sums of a read
  Scratch<R> update_;                      // (K, V) N
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

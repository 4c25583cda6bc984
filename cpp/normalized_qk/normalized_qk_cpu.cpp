// Normalized queries and keys: per-head RMS norm of a shared z, affine, rotary.
// Derivation: ops/normalized_qk/normalized_qk_reference.py.
//
//   r = 1 / sqrt(mean_K z^2 + eps);  zn = z r;  q = rotate(zn a_0 + beta_0),  k = rotate(zn a_1 + beta_1)
//   a_i = (1 + gamma_i) / sqrt(K);  rotate: (re, im) <- (re cos - im sin, im cos + re sin) for each pair of channels
//
// Backward, with e_0 = rotate^-1(dq), e_1 = rotate^-1(dk):
//   dbeta_i = sum_T e_i;  dgamma_i = sum_T e_i zn / sqrt(K)
//   dzn = e_0 a_0 + e_1 a_1;  dz = r (dzn - zn mean_K(dzn zn))
//
// A block is kBlockTokens tokens. A thread lists a block's tokens and their rows of the rotary table, and processes one
// head of one token at a time (backward: of kTile tokens), whose K values are in L1. A vector holds whole (re, im)
// pairs. A vector of the table holds (cos, sin) pairs, which become (cos, cos) and (-sin, sin).
// Backward: the tiles of a block add to its sums for dgamma and dbeta, (4, H, K) of R in L1 or L2. Neighbouring blocks
// form at most kParts parts. In double, a part adds its blocks' sums in order; then the parts' sums are added in order.
//
// Memory traffic, in elements: forward z, q, k; backward z, dq, dk, dz; plus K table values per token, from L2 or L3.

#include "normalized_qk.h"

#include <cmath>
#include <utility>

#include "finite.h"
#include "parallel.h"
#include "simd.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int64_t kBlockTokens = 64;
constexpr int64_t kParts = 64;
constexpr int kTile = 4;

// For each pair of lanes (a, b): swap_pairs returns (b, a), double_even (a, a), double_odd (b, b).
template <class R, int... i>
MEGALODON_INLINE Vec<R> swap_pairs(Vec<R> v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i ^ 1)...);
}
template <class R, int... i>
MEGALODON_INLINE Vec<R> double_even(Vec<R> v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i & ~1)...);
}
template <class R, int... i>
MEGALODON_INLINE Vec<R> double_odd(Vec<R> v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i | 1)...);
}
template <class R, int... i>
MEGALODON_INLINE Vec<R> alternating_signs(std::integer_sequence<int, i...>) {
  return Vec<R>{(i % 2 ? R(1) : R(-1))...};
}

// Rotates (re, im) pairs by the angles of a vector of (cos, sin) pairs, or back.
template <class R>
struct Rotation {
  using Lanes = std::make_integer_sequence<int, kLanes<R>>;
  MEGALODON_INLINE explicit Rotation(Vec<R> table)
      : cos(double_even<R>(table, Lanes{})), sin(double_odd<R>(table, Lanes{}) * alternating_signs<R>(Lanes{})) {}
  MEGALODON_INLINE Vec<R> forward(Vec<R> v) const { return v * cos + swap_pairs<R>(v, Lanes{}) * sin; }
  MEGALODON_INLINE Vec<R> backward(Vec<R> v) const { return v * cos - swap_pairs<R>(v, Lanes{}) * sin; }
  Vec<R> cos, sin;  // (cos, cos), (-sin, sin)
};

// Return 1 / sqrt(mean z^2 + eps) of one head. wide_inverse_rms handles squares outside the range of R.
template <class T>
__attribute__((noinline)) Compute<T> wide_inverse_rms(const T* z, int64_t key_dim, double eps) {
  WideOf<Compute<T>> sum = 0;
  for (int64_t i = 0; i < key_dim; ++i) {
    const WideOf<Compute<T>> v = widen(z[i]);
    sum += v * v;
  }
  return static_cast<Compute<T>>(1 / std::sqrt(sum / static_cast<double>(key_dim) + eps));
}
template <class T>
MEGALODON_INLINE Compute<T> inverse_rms(const T* z, int64_t key_dim, double eps) {
  using R = Compute<T>;
  constexpr int64_t lanes = kLanes<R>;
  Vec<R> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= key_dim; i += 4 * lanes)
    for (int chain = 0; chain < 4; ++chain) {
      const Vec<R> v = load(z + i + chain * lanes);
      sums[chain] += v * v;
    }
  for (; i < key_dim; i += lanes) {
    const Vec<R> v = load_first(z + i, key_dim - i);
    sums[0] += v * v;
  }
  const R sum = sum_lanes<R>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  const R mean = sum / static_cast<R>(key_dim) + static_cast<R>(eps);
  return squares_in_range(mean) ? 1 / std::sqrt(mean) : wide_inverse_rms(z, key_dim, eps);
}

// Data shared by all threads: the gains a_0 and a_1 of the affine map.
template <class R>
struct Affine {
  explicit Affine(const NormalizedQkParams& p)
      : size(p.heads * p.key_dim), root(1 / std::sqrt(static_cast<double>(p.key_dim))), gain(2 * size) {
    for (int64_t i = 0; i < 2 * size; ++i)
      gain[i] = static_cast<R>((1 + static_cast<double>(static_cast<const R*>(p.gamma)[i])) * root);
  }
  const int64_t size;  // H * K
  const double root;   // 1 / sqrt(K)
  Scratch<R> gain;     // (2, H, K)
};

// The tokens of a block that are in a sequence, and their rows of the rotary table.
template <class R>
struct Tokens {
  // Calls zero(begin, end) for padding.
  template <class Zero>
  Tokens(const NormalizedQkParams& p, int64_t from, int64_t to, Zero&& zero) {
    p.sequences.for_each_run(from, to, [&](int64_t s, int64_t a, int64_t b) {
      if (s < 0) return zero(a, b);
      int64_t position = ((p.position ? p.position[s] : 0) + a - p.sequences.begin(s)) % p.chunk_size;
      for (; a < b; ++a, position = position + 1 == p.chunk_size ? 0 : position + 1) {
        token[count] = a;
        table[count++] = static_cast<const R*>(p.rotary) + position * p.key_dim;
      }
    });
  }
  int64_t count = 0;
  int64_t token[kBlockTokens];
  const R* table[kBlockTokens];
};

template <class T>
void zero_rows(void* tensor, int64_t width, int64_t from, int64_t to) {
  std::memset(static_cast<T*>(tensor) + from * width, 0, static_cast<size_t>((to - from) * width) * sizeof(T));
}

template <class T>
void forward_block(const NormalizedQkFwdParams& p, const Affine<Compute<T>>& affine, int64_t from, int64_t to) {
  using R = Compute<T>;
  const int64_t size = affine.size, key_dim = p.key_dim;
  const Tokens<R> tokens(p, from, to, [&](int64_t a, int64_t b) {
    zero_rows<T>(p.q, size, a, b);
    zero_rows<T>(p.k, size, a, b);
  });
  const R* beta = static_cast<const R*>(p.beta);
  for (int64_t i = 0; i < tokens.count; ++i)
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t at = tokens.token[i] * size + h * key_dim;
      const T* z = static_cast<const T*>(p.z) + at;
      T *q = static_cast<T*>(p.q) + at, *k = static_cast<T*>(p.k) + at;
      const R *table = tokens.table[i], *a0 = &affine.gain[h * key_dim], *a1 = a0 + size;
      const R *b0 = beta + h * key_dim, *b1 = b0 + size;
      const Vec<R> r = splat(inverse_rms(z, key_dim, p.eps));
      for_each_vector<R>(key_dim, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        const Rotation<R> rotation(load_first(table + c, n));
        const Vec<R> zn = load_first(z + c, n) * r;
        store_first(q + c, rotation.forward(zn * load_first(a0 + c, n) + load_first(b0 + c, n)), n);
        store_first(k + c, rotation.forward(zn * load_first(a1 + c, n) + load_first(b1 + c, n)), n);
      });
    }
}

// Backward of one head of `rows` tokens. Adds dbeta_0, dbeta_1 and sqrt(K) times dgamma_0, dgamma_1 to sums (4, H, K).
template <class T, int rows>
void backward_tile(const NormalizedQkBwdParams& p, const Affine<Compute<T>>& affine, int64_t h, const int64_t* token,
                   const Compute<T>* const* tables, Compute<T>* dzn, Compute<T>* sums) {
  using R = Compute<T>;
  const int64_t size = affine.size, key_dim = p.key_dim;
  const R *a0 = &affine.gain[h * key_dim], *a1 = a0 + size;
  const T *z[rows], *dq[rows], *dk[rows];
  const R* table[rows];
  Vec<R> r[rows], projection[rows] = {};
  for (int row = 0; row < rows; ++row) {
    const int64_t at = token[row] * size + h * key_dim;
    z[row] = static_cast<const T*>(p.z) + at;
    dq[row] = static_cast<const T*>(p.dq) + at;
    dk[row] = static_cast<const T*>(p.dk) + at;
    table[row] = tables[row];
    r[row] = splat(inverse_rms(z[row], key_dim, p.eps));
  }
  sums += h * key_dim;
  for_each_vector<R>(key_dim, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    const Vec<R> gain0 = load_first(a0 + c, n), gain1 = load_first(a1 + c, n);
    Vec<R> sum[4] = {};
    for (int row = 0; row < rows; ++row) {
      const Rotation<R> rotation(load_first(table[row] + c, n));
      const Vec<R> zn = load_first(z[row] + c, n) * r[row];
      const Vec<R> e0 = rotation.backward(load_first(dq[row] + c, n));
      const Vec<R> e1 = rotation.backward(load_first(dk[row] + c, n));
      const Vec<R> d = e0 * gain0 + e1 * gain1;
      sum[0] += e0;
      sum[1] += e1;
      sum[2] += e0 * zn;
      sum[3] += e1 * zn;
      projection[row] += d * zn;
      store_first(dzn + row * key_dim + c, d, n);
    }
    for (int i = 0; i < 4; ++i) store_first(sums + i * size + c, load_first(sums + i * size + c, n) + sum[i], n);
  });
  for (int row = 0; row < rows; ++row) {
    const Vec<R> mean = splat(sum_lanes<R>(projection[row]) / static_cast<R>(key_dim));
    T* dz = static_cast<T*>(p.dz) + token[row] * size + h * key_dim;
    for_each_vector<R>(key_dim, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      const Vec<R> zn = load_first(z[row] + c, n) * r[row];
      store_first(dz + c, r[row] * (load_first(dzn + row * key_dim + c, n) - zn * mean), n);
    });
  }
}

template <class T>
void forward(const NormalizedQkFwdParams& p) {
  const Affine<Compute<T>> affine(p);
  const int64_t tokens = p.sequences.tokens, blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
  parallel_jobs(blocks, 8.0 * static_cast<double>(tokens * affine.size), [&] {
    return [&](int64_t block) {
      const int64_t from = block * kBlockTokens, to = from + kBlockTokens;
      forward_block<T>(p, affine, from, to < tokens ? to : tokens);
    };
  }, Order::shares);
}

template <class T>
class Backward {
  using R = Compute<T>;

 public:
  Backward(const NormalizedQkBwdParams& params, const Affine<R>& affine, int64_t blocks, int64_t parts, double* sums)
      : p(params), affine(affine), blocks(blocks), parts(parts), part_sums(sums), dzn_(kTile * p.key_dim),
        sums_(4 * affine.size) {}

  void operator()(int64_t part) {
    double* total = part_sums + part * 4 * affine.size;
    for (int64_t i = 0; i < 4 * affine.size; ++i) total[i] = 0;
    for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
      const int64_t from = block * kBlockTokens, to = from + kBlockTokens;
      run(from, to < p.sequences.tokens ? to : p.sequences.tokens);
      for (int64_t i = 0; i < 4 * affine.size; ++i) total[i] += sums_[i];
    }
  }

 private:
  void run(int64_t from, int64_t to) {
    for (int64_t i = 0; i < 4 * affine.size; ++i) sums_[i] = 0;
    const Tokens<R> tokens(p, from, to, [&](int64_t a, int64_t b) { zero_rows<T>(p.dz, affine.size, a, b); });
    int64_t i = 0;
    for (; i + kTile <= tokens.count; i += kTile) tile<kTile>(tokens, i);
    for (; i < tokens.count; ++i) tile<1>(tokens, i);
  }

  template <int rows>
  void tile(const Tokens<R>& tokens, int64_t i) {
    for (int64_t h = 0; h < p.heads; ++h)
      backward_tile<T, rows>(p, affine, h, tokens.token + i, tokens.table + i, dzn_.get(), sums_.get());
  }

  const NormalizedQkBwdParams& p;
  const Affine<R>& affine;
  const int64_t blocks, parts;
  double* const part_sums;  // (parts, 4, H, K)
  Scratch<R> dzn_, sums_;
};

template <class T>
void backward(const NormalizedQkBwdParams& p) {
  using R = Compute<T>;
  const Affine<R> affine(p);
  const int64_t size = affine.size, tokens = p.sequences.tokens, blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t parts = blocks < kParts ? blocks : kParts;
  Scratch<double> sums(parts * 4 * size);
  parallel_jobs(parts, 16.0 * static_cast<double>(tokens * size),
                [&] { return Backward<T>(p, affine, blocks, parts, sums.get()); }, Order::shares);
  R* const outputs[2] = {static_cast<R*>(p.dbeta), static_cast<R*>(p.dgamma)};
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < 4 * size; ++i) sums[i] += sums[part * 4 * size + i];
  for (int64_t i = 0; i < 4 * size; ++i) {
    const double sum = parts > 0 ? sums[i] : 0;
    const int64_t affine_part = i / (2 * size);
    outputs[affine_part][i % (2 * size)] = static_cast<R>(affine_part == 0 ? sum : sum * affine.root);
  }
}

}  // namespace

void normalized_qk_fwd_cpu(const NormalizedQkFwdParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) { forward<decltype(type)>(params); });
}

void normalized_qk_bwd_cpu(const NormalizedQkBwdParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) { backward<decltype(type)>(params); });
}

}  // namespace megalodon::MEGALODON_ISA

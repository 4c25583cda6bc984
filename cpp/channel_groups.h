// Rows of channels that fall into groups of any size: sums over each group, and group values spread over the channels.
#pragma once

#include <type_traits>
#include <utility>

#include "parallel.h"
#include "simd.h"

namespace megalodon::MEGALODON_ISA {

MEGALODON_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class R> using LaneInt = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
template <class R> using LaneIndex = typename VecOf<LaneInt<R>, kLanes<R>>::type;

// How D channels in G groups fall into vectors. The last vector may overlap the one before it.
template <class R>
class Channels {
 public:
  static constexpr int lanes = kLanes<R>;

  Channels(int64_t channels, int64_t groups)
      : count(channels), groups(groups), group_size(channels / groups), vectors((channels + lanes - 1) / lanes),
        width(smaller(channels, lanes)), one_group_a_vector(group_size % lanes == 0),
        first_group_(one_group_a_vector ? 0 : vectors), index_(one_group_a_vector ? 0 : vectors) {
    if (one_group_a_vector) return;
    for (int64_t j = 0; j < vectors; ++j) {
      first_group_[j] = offset(j) / group_size;
      for (int lane = 0; lane < lanes; ++lane)
        index_[j][lane] = smaller(offset(j) + lane, channels - 1) / group_size - first_group_[j];
    }
  }
  int64_t offset(int64_t j) const { return smaller(j * lanes, count - width); }

  // For each vector j of channels: op(j, offset, width, s), where s[row][i] holds statistic i of the row for them.
  // statistics[i] points to (rows, G) values and may be read kLanes past its end.
  template <int rows, int kinds, class Op>
  MEGALODON_INLINE void for_each_vector(const R* const (&statistics)[kinds], Op&& op) const {
    Vec<R> s[rows][kinds];
    if (one_group_a_vector) {
      for (int64_t g = 0, j = 0; g < groups; ++g) {
        for (int row = 0; row < rows; ++row)
          for (int i = 0; i < kinds; ++i) s[row][i] = splat(statistics[i][row * groups + g]);
        for (int64_t k = 0; k < group_size; k += lanes, ++j) op(j, g * group_size + k, int64_t{lanes}, s);
      }
      return;
    }
    for (int64_t j = 0; j < vectors; ++j) {
      for (int row = 0; row < rows; ++row)
        for (int i = 0; i < kinds; ++i)
          s[row][i] = __builtin_shuffle(load(statistics[i] + row * groups + first_group_[j]), index_[j]);
      op(j, offset(j), width, s);
    }
  }

  const int64_t count, groups, group_size, vectors, width;
  const bool one_group_a_vector;

 private:
  Scratch<int64_t> first_group_;
  Scratch<LaneIndex<R>> index_;
};

// Loads a vector of which n elements are wanted; the others are whatever follows, as far as `end` allows.
template <class T>
MEGALODON_INLINE Vec<Compute<T>> load_within(const T* from, int64_t n, const T* end) {
  return n >= kLanes<Compute<T>> || end - from >= kLanes<Compute<T>> ? load(from) : load_first(from, n);
}

template <class R>
MEGALODON_INLINE Vec<R> keep_first(Vec<R> v, int64_t n) {
  if (n >= kLanes<R>) return v;
  LaneIndex<R> lane{};
  for (int i = 0; i < kLanes<R>; ++i) lane[i] = i;
  return lane < lane - lane + static_cast<LaneInt<R>>(n) ? v : zeros<R>();
}

// Lanes to be merged: kept[i], other[i] are a[i], a[i ^ bit] where i has the bit clear, else b[i], b[i ^ bit].
template <class R>
struct LanePairs {
  Vec<R> kept, other;
};
template <class R, int bit, int... i>
MEGALODON_INLINE LanePairs<R> pair_crosswise(Vec<R> a, Vec<R> b, std::integer_sequence<int, i...>) {
  const Vec<R> other = __builtin_shufflevector(a, b, (i & bit ? i : i + kLanes<R>)...);
  return {__builtin_shufflevector(a, b, (i & bit ? i + kLanes<R> : i)...),
          __builtin_shufflevector(other, other, (i ^ bit)...)};
}
template <class R, int bit>
MEGALODON_INLINE LanePairs<R> pair_crosswise(Vec<R> a, Vec<R> b) {
  return pair_crosswise<R, bit>(a, b, std::make_integer_sequence<int, kLanes<R>>{});
}
// Lane i of the result is the sum of the lanes of v[i].
template <class R, int bit = kLanes<R> / 2>
MEGALODON_INLINE Vec<R> sum_each(Vec<R>* v) {
  if constexpr (bit == 0) return v[0];
  for (int i = 0; i < bit; ++i) {
    const auto pairs = pair_crosswise<R, bit>(v[i], v[i + bit]);
    v[i] = pairs.kept + pairs.other;
  }
  return sum_each<R, bit / 2>(v);
}

// Several vectors that are summed side by side.
template <class R, int n>
struct Terms {
  Vec<R> v[n];
  MEGALODON_INLINE Terms operator+(const Terms& other) const {
    Terms sum;
    for (int i = 0; i < n; ++i) sum.v[i] = v[i] + other.v[i];
    return sum;
  }
};

// Lane i of total[k] is sum k over the `size` elements of group i, for `groups` <= kLanes groups.
// term(i, offset, n) gives the Terms of n <= kLanes elements of group i, zero in the other lanes.
template <class R, int kSums, class Term>
MEGALODON_INLINE void sum_groups(int64_t groups, int64_t size, Vec<R> (&total)[kSums], Term&& term) {
  constexpr int64_t lanes = kLanes<R>, chains = 4;
  Vec<R> sums[kSums][lanes];
  const auto each_group = [&](auto&& sum_group) __attribute__((always_inline)) {
    for (int64_t i = 0; i < groups; ++i) {
      const Terms<R, kSums> sum = sum_group(i);
      for (int k = 0; k < kSums; ++k) sums[k][i] = sum.v[k];
    }
  };
  if (size < lanes) {
    each_group([&](int64_t i) __attribute__((always_inline)) { return term(i, 0, size); });
  } else if (size == lanes) {
    each_group([&](int64_t i) __attribute__((always_inline)) { return term(i, 0, lanes); });
  } else if (size == 2 * lanes) {
    each_group([&](int64_t i) __attribute__((always_inline)) { return term(i, 0, lanes) + term(i, lanes, lanes); });
  } else {
    each_group([&](int64_t i) __attribute__((always_inline)) {
      Terms<R, kSums> chain[chains] = {};
      int64_t k = 0;
      for (; k + chains * lanes <= size; k += chains * lanes)
        for (int c = 0; c < chains; ++c) chain[c] = chain[c] + term(i, k + c * lanes, lanes);
      for (; k + lanes <= size; k += lanes) chain[0] = chain[0] + term(i, k, lanes);
      if (k < size) chain[1] = chain[1] + term(i, k, size - k);
      return (chain[0] + chain[1]) + (chain[2] + chain[3]);
    });
  }
  for (int k = 0; k < kSums; ++k) {
    for (int64_t i = groups; i < lanes; ++i) sums[k][i] = zeros<R>();
    total[k] = sum_each<R>(sums[k]);
  }
}

}  // namespace megalodon::MEGALODON_ISA

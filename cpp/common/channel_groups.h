// For the norms on the CPU: rows of channels in groups of arbitrary size, sums over each group, and broadcasts of a
// group's value to its channels.
#pragma once

#include <type_traits>
#include <utility>

#include "parallel.h"
#include "simd.h"

namespace megalodon::MEGALODON_ISA {

MEGALODON_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class R> using LaneInt = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
template <class R> using LaneIndex = typename VecOf<LaneInt<R>, kLanes<R>>::type;

// Lane i of the result is lane index[i] of v.
template <class R>
MEGALODON_INLINE Vec<R> permuted(Vec<R> v, const LaneIndex<R>& index) {
#if defined(__clang__)
  return __builtin_shufflevector(v, index);
#else
  return __builtin_shuffle(v, index);
#endif
}

// Layout of D channels in G groups as vectors. The last vector may overlap the one before it.
template <class R>
class Channels {
 public:
  static constexpr int lanes = kLanes<R>;

  Channels(int64_t channels, int64_t groups)
      : count(channels), groups(groups), group_size(channels / groups), vectors((channels + lanes - 1) / lanes),
        width(smaller(channels, lanes)), one_group_per_vector(group_size % lanes == 0),
        first_group_(one_group_per_vector ? 0 : vectors), index_(one_group_per_vector ? 0 : vectors) {
    if (one_group_per_vector) return;
    for (int64_t j = 0; j < vectors; ++j) {
      first_group_[j] = offset(j) / group_size;
      for (int lane = 0; lane < lanes; ++lane)
        index_[j][lane] = smaller(offset(j) + lane, channels - 1) / group_size - first_group_[j];
    }
  }
  int64_t offset(int64_t j) const { return smaller(j * lanes, count - width); }

  // Calls op(j, offset, width, s) for each vector j of channels. s[row][i] has statistic i of the row; each lane holds
  // the value of its channel's group. statistics[i] points to (rows, G) values and may be read kLanes past its end.
  template <int rows, int kinds, class Op>
  MEGALODON_INLINE void for_each_vector_with_statistics(const R* const (&statistics)[kinds], Op&& op) const {
    Vec<R> s[rows][kinds];
    if (one_group_per_vector) {
      // Local copies: the compiler cannot know that op() does not write to the members.
      const int64_t all = groups, end = count, size = group_size;
      for (int64_t g = 0, c = 0; c < end; ++g) {
        for (int row = 0; row < rows; ++row)
          for (int i = 0; i < kinds; ++i) s[row][i] = splat(statistics[i][row * all + g]);
        for (const int64_t next = c + size; c < next; c += lanes) op(c / lanes, c, int64_t{lanes}, s);
      }
      return;
    }
    for (int64_t j = 0; j < vectors; ++j) {
      for (int row = 0; row < rows; ++row)
        for (int i = 0; i < kinds; ++i)
          s[row][i] = permuted<R>(load(statistics[i] + row * groups + first_group_[j]), index_[j]);
      op(j, offset(j), width, s);
    }
  }

  const int64_t count, groups, group_size, vectors, width;
  const bool one_group_per_vector;

 private:
  Scratch<int64_t> first_group_;
  Scratch<LaneIndex<R>> index_;
};

// Loads a vector whose first n lanes the caller uses. The other lanes hold the elements that follow, or zeros if a
// whole vector would pass `end`.
template <class T>
MEGALODON_INLINE Vec<Compute<T>> load_within(const T* from, int64_t n, const T* end) {
  return n >= kLanes<Compute<T>> || end - from >= kLanes<Compute<T>> ? load(from) : load_first(from, n);
}

// Zeroes all lanes but the first n.
template <class R>
MEGALODON_INLINE Vec<R> keep_first(Vec<R> v, int64_t n) {
  if (n >= kLanes<R>) return v;
  LaneIndex<R> lane{};
  for (int i = 0; i < kLanes<R>; ++i) lane[i] = i;
  return lane < lane - lane + static_cast<LaneInt<R>>(n) ? v : zeros<R>();  // lane - lane + n has n in all lanes
}

// Two vectors whose sum has, in each lane i, the sum of two lanes of a or, if i has `bit` set, of b.
template <class R>
struct LanePairs {
  Vec<R> kept;   // a[i], or b[i]
  Vec<R> other;  // a[i ^ bit], or b[i ^ bit]
};
template <class R, int bit, int... i>
MEGALODON_INLINE LanePairs<R> pair_crosswise(Vec<R> a, Vec<R> b, std::integer_sequence<int, i...>) {
#if defined(__AVX512F__)
  // Each of the two is one instruction. For `kept` the compiler would emit a shuffle, which only one port executes.
  const Vec<R> other = __builtin_shufflevector(a, b, (i & bit ? (i ^ bit) + kLanes<R> : i ^ bit)...);
  constexpr unsigned mask = ((i & bit ? 1u << i : 0u) | ...);
  if constexpr (sizeof(R) == 4)
    return {bit_cast<Vec<R>>(_mm512_mask_blend_ps(mask, bit_cast<__m512>(a), bit_cast<__m512>(b))), other};
  else return {bit_cast<Vec<R>>(_mm512_mask_blend_pd(mask, bit_cast<__m512d>(a), bit_cast<__m512d>(b))), other};
#else
  const Vec<R> other = __builtin_shufflevector(a, b, (i & bit ? i : i + kLanes<R>)...);
  return {__builtin_shufflevector(a, b, (i & bit ? i + kLanes<R> : i)...),
          __builtin_shufflevector(other, other, (i ^ bit)...)};
#endif
}
template <class R, int bit>
MEGALODON_INLINE LanePairs<R> pair_crosswise(Vec<R> a, Vec<R> b) {
  return pair_crosswise<R, bit>(a, b, std::make_integer_sequence<int, kLanes<R>>{});
}

// Several vectors that are summed in parallel.
template <class R, int n>
struct Terms {
  Vec<R> v[n];
  MEGALODON_INLINE Terms operator+(const Terms& other) const {
    Terms sum;
    for (int i = 0; i < n; ++i) sum.v[i] = v[i] + other.v[i];
    return sum;
  }
};

// With `first` 0, lane i of the result's v[k] is the sum of all lanes of group(i).v[k]; group(i) returns Terms. Inner
// calls sum the groups i with i % bit == first. The recursion is depth-first, so that few vectors are live.
template <class R, int kSums, int bit = 1, class Group>
MEGALODON_INLINE Terms<R, kSums> sum_each(int first, Group&& group) {
  if constexpr (bit == kLanes<R>) return group(first);
  else {
    const Terms<R, kSums> a = sum_each<R, kSums, 2 * bit>(first, group);
    const Terms<R, kSums> b = sum_each<R, kSums, 2 * bit>(first + bit, group);
    Terms<R, kSums> sum;
    for (int k = 0; k < kSums; ++k) {
      const auto pairs = pair_crosswise<R, bit>(a.v[k], b.v[k]);
      sum.v[k] = pairs.kept + pairs.other;
    }
    return sum;
  }
}

// Lane i of the result's v[k] is the sum of term k over the `size` elements of group i; `groups` <= kLanes.
// term(i, offset, n) returns the Terms of n <= kLanes elements of group i, from its element `offset` on; further lanes
// are zero.
template <class R, int kSums, class Term>
MEGALODON_INLINE Terms<R, kSums> sum_groups(int64_t groups, int64_t size, Term&& term) {
  constexpr int64_t lanes = kLanes<R>, chains = 4;
  if (size == 2 * lanes)
    return sum_each<R, kSums>(0, [&](int lane) __attribute__((always_inline)) {
      const int64_t i = smaller(lane, groups - 1);
      return term(i, 0, lanes) + term(i, lanes, lanes);
    });
  if (size == 4 * lanes)
    return sum_each<R, kSums>(0, [&](int lane) __attribute__((always_inline)) {
      const int64_t i = smaller(lane, groups - 1);
      return (term(i, 0, lanes) + term(i, lanes, lanes)) + (term(i, 2 * lanes, lanes) + term(i, 3 * lanes, lanes));
    });
  Terms<R, kSums> sums[lanes] = {};
  const auto each_group = [&](auto&& sum_group) __attribute__((always_inline)) {
    for (int64_t i = 0; i < groups; ++i) sums[i] = sum_group(i);
  };
  if (size < lanes) {
    each_group([&](int64_t i) __attribute__((always_inline)) { return term(i, 0, size); });
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
  return sum_each<R, kSums>(0, [&](int i) __attribute__((always_inline)) { return sums[i]; });
}

}  // namespace megalodon::MEGALODON_ISA

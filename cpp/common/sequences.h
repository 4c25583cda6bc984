// Batches of every kind in one form, for all kernels: S sequences in a flat row of T tokens. make_sequences() of
// tensor_view.h fills it.
#pragma once

#include "dtype.h"

namespace megalodon {

constexpr int64_t kMaxPositions = int64_t{1} << 62;  // limit on a state's position: adding a length never overflows

// Sequence s holds the tokens [begin(s), end(s)). Sequences are in order and do not overlap; tokens outside them are
// padding. Without spans, each row is a sequence.
//
// On a GPU, spans are not checked before a kernel reads them. For arbitrary values, 0 <= begin(s) <= end(s) <= T: a
// span beyond the batch ends with it, and one that would end before it begins is empty. If spans overlap, two sequences
// share a token, which then gets the result of either.
struct Sequences {
  int64_t count;                   // S
  int64_t tokens;                  // T = B * L
  int64_t row_length;              // L
  const int64_t* spans = nullptr;  // (S, 2), first and last-plus-one tokens
  int64_t stride = 2;              // from one span to the next; 1 for neighbouring pairs of S + 1 offsets
  bool by_row = true;              // S = B, and sequence s begins row s; a launcher may divide its work by rows

  MEGALODON_INLINE int64_t begin(int64_t s) const {
    return by_row ? s * row_length : within(0, spans[s * stride], tokens);
  }
  MEGALODON_INLINE int64_t end(int64_t s) const {
    const int64_t from = begin(s), most = by_row ? from + row_length : tokens;
    return spans ? within(from, spans[s * stride + 1], most) : most;
  }
  MEGALODON_INLINE int64_t length(int64_t s) const { return end(s) - begin(s); }
  // The padding before sequence s is [gap_begin(s), gap_end(s)); s = count gives the padding at the end.
  MEGALODON_INLINE int64_t gap_begin(int64_t s) const { return s == 0 ? 0 : end(s - 1); }
  MEGALODON_INLINE int64_t gap_end(int64_t s) const { return s == count ? tokens : begin(s); }

  MEGALODON_INLINE static int64_t within(int64_t least, int64_t n, int64_t most) {
    return n < least ? least : n > most ? most : n;
  }

  // Calls f(s, begin, end) for each part of a sequence in [from, to), in order, and f(-1, begin, end) for padding.
  MEGALODON_NO_EXEC_CHECK
  template <class F>
  MEGALODON_INLINE void for_each_run(int64_t from, int64_t to, F&& f) const {
    int64_t s = 0;  // the first sequence that ends after `from`
    for (int64_t high = count; s < high;) {
      const int64_t middle = s + (high - s) / 2;
      if (end(middle) > from) high = middle;
      else s = middle + 1;
    }
    while (from < to) {
      const bool inside = s < count && begin(s) <= from;
      const int64_t next = inside ? end(s) : s < count ? begin(s) : to;
      const int64_t stop = next < to ? next : to;
      if (from < stop) f(inside ? s : -1, from, stop);
      from = stop > from ? stop : from;
      s += inside;
    }
  }
};

}  // namespace megalodon

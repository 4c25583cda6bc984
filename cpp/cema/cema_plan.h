// Division of the work of cema_cpu.cpp, whose head defines the parts: segments of tokens, groups of segments, strips of
// channels.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <complex>

#include "cema.h"
#include "cema_pass.h"
#include "parallel.h"
#include "sizes.h"

namespace megalodon::MEGALODON_ISA {

inline constexpr int64_t kSplitBelow = 4;  // split sequences if vectors of channels times sequences is less
inline constexpr int64_t kSplitJobs = 16;  // target for segments times vectors of channels after a split
inline constexpr int64_t kMinSegment = 16 * kTileSteps;    // positions
inline constexpr int64_t kMinStrip = 256 / kVectorBytes;   // vectors; fewer if threads need more strips
inline constexpr int64_t kJobs = 32;                       // target for strips times groups
inline constexpr int64_t kMinGroup = 4 * kTileSteps;       // tokens

// Maximum number of vectors in a strip. With 16 modes, each of them adds 80 vectors of coefficients, 64 of states and
// 128 of rows (two tiles of 32 positions, two tensors) to the working set, which fills about half the L2.
inline int64_t max_strip() {
  static const int64_t vectors = [] {
    int64_t level2 = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    level2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (level2 <= 0) level2 = 1 << 20;
    return std::clamp<int64_t>(level2 / 512 / kVectorBytes, kMinStrip, 16 * kMinStrip);
  }();
  return vectors;
}

struct Segment {
  int64_t sequence, begin, end;
};

// Segments and groups fix the order of every sum, so they are functions of shapes alone. Channels are independent: the
// width of a strip changes no result and may depend on the number of threads.
struct CemaPlan {
  int64_t count;                     // number of segments
  bool split;                        // true if some sequence has several segments; otherwise segment s is sequence s
  int64_t groups, strips, channels;  // number of groups, of strips, and of channels per strip
  Scratch<Segment> segments;         // (count)
  Scratch<int64_t> group_begin;      // (groups + 1): group g holds segments [group_begin[g], group_begin[g + 1])

  CemaPlan(const CemaParams& params, int lanes, int threads)
      : count(count_segments(params, lanes)), split(count > params.sequences.count),
        groups(count_groups(params, lanes)), segments(count), group_begin(groups + 1) {
    const Sequences& sequences = params.sequences;
    const int64_t longest = longest_segment(params, lanes);
    for (int64_t s = 0, i = 0; s < sequences.count; ++s) {
      int64_t begin = sequences.begin(s);
      const int64_t end = sequences.end(s);
      for (; end - begin > longest; begin += longest) segments[i++] = {s, begin, begin + longest};
      segments[i++] = {s, begin, end};
    }
    // A group is a segment of a split sequence, or the segments that begin in its equal share of the tokens.
    for (int64_t g = 0, i = 0; g <= groups; ++g) {
      const int64_t token = ceil_div(sequences.tokens * g, groups);
      while (i < count && (g == groups || (split ? i < g : segments[i].begin < token))) ++i;
      group_begin[g] = i;
    }
    const int64_t vectors = ceil_div(params.channels, lanes);
    // Memory is faster for long rows, so strips are as wide as possible while threads are busy 9/10 of the time. Then
    // the widths are made nearly equal.
    int64_t width = std::min(vectors, max_strip());
    const auto busy = [&](int64_t w) {
      const int64_t rounds = ceil_div(groups * ceil_div(vectors, w), threads);
      return 10 * groups * vectors >= 9 * rounds * threads * w;
    };
    while (width > 1 && !busy(width)) --width;
    width = ceil_div(vectors, ceil_div(vectors, width));
    channels = width * lanes;
    strips = ceil_div(vectors, width);
  }

 private:
  static int64_t longest_segment(const CemaParams& params, int lanes) {
    const int64_t units = ceil_div(params.channels, lanes) * params.sequences.count, tokens = params.sequences.tokens;
    if (units >= kSplitBelow) return tokens;
    return std::max(kMinSegment, ceil_div(tokens * units, kSplitJobs * kTileSteps) * kTileSteps);
  }
  static int64_t count_segments(const CemaParams& params, int lanes) {
    const int64_t longest = std::max<int64_t>(1, longest_segment(params, lanes));
    int64_t total = 0;
    for (int64_t s = 0; s < params.sequences.count; ++s)
      total += std::max<int64_t>(1, ceil_div(params.sequences.length(s), longest));
    return total;
  }
  int64_t count_groups(const CemaParams& params, int lanes) const {
    const int64_t most_strips = ceil_div(ceil_div(params.channels, lanes), kMinStrip);
    if (split) return count;
    const int64_t most = std::min(count, ceil_div(params.sequences.tokens, kMinGroup));
    return std::clamp<int64_t>(ceil_div(kJobs, most_strips), 1, std::max<int64_t>(most, 1));
  }
};

// Computes the segments' initial states from their local end states. With `conjugated`, q is conjugated and time runs
// backwards.
//   initial (S, D, N): initial states of the sequences; null for zeros
//   ends (segments, D, N): on entry, each segment's end state after a start from zero; on return, its initial state
//   final (S, D, N): receives the end states of the sequences, unless it is null
template <class R>
void merge(const CemaParams& params, const CemaPlan& plan, bool conjugated, const void* initial, R* ends, void* final) {
  using Complex = std::complex<double>;
  const int64_t size = params.channels * params.modes, count = plan.count;
  const auto* q = static_cast<const std::complex<R>*>(params.q);
  const auto* from = static_cast<const std::complex<R>*>(initial);
  auto* to = static_cast<std::complex<R>*>(final);
  auto* states = reinterpret_cast<std::complex<R>*>(ends);
  for (int64_t i = 0; i < size; ++i) {
    Complex carry, power;
    int64_t length = -1;  // the exponent of `power`
    for (int64_t k = 0; k < count; ++k) {
      const int64_t at = conjugated ? count - 1 - k : k;
      const Segment& segment = plan.segments[at];
      const bool starts_sequence = k == 0 || plan.segments[conjugated ? at + 1 : at - 1].sequence != segment.sequence;
      if (starts_sequence) carry = from ? Complex(from[segment.sequence * size + i]) : Complex(0);
      if (length != segment.end - segment.begin) {
        length = segment.end - segment.begin;
        power = 1;
        Complex square = conjugated ? std::conj(Complex(q[i])) : Complex(q[i]);
        for (int64_t n = length; n > 0; n /= 2, square *= square)
          if (n % 2) power *= square;
      }
      const Complex local(states[at * size + i]);
      states[at * size + i] = std::complex<R>(carry);
      carry = power * carry + local;
      if (to) to[segment.sequence * size + i] = std::complex<R>(carry);
    }
  }
}

}  // namespace megalodon::MEGALODON_ISA

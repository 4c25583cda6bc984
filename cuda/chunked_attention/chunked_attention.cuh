// Shared by the kernels of chunked attention: the tokens of a block of threads, rows of keys and values, DropKey.
//
// The rows of a sequence are numbered on its grid: first the `position` rows of its cache, then the tokens of this
// call, so that token t is row position + t. Row i sees the columns from i - i % C to i or, if attention is not causal,
// to the end of its chunk.
//
// Only the device knows spans and position, so a launcher counts blocks of rows by T and S alone. It divides the tokens
// into ranges:
//   one in each row   each of the B rows of L tokens is a range
//   other spans       the ranges are the padding in front, and each of the S sequences with the padding behind it
// A range is cut into blocks of kRows tokens. For other spans, range r begins at token begin(r), and its blocks are
// numbered from begin(r) / kRows + r on. This leaves at least ceil(length / kRows) numbers for each range; excess
// numbers have no rows.
// Example: kRows 4, spans [0, 5), [5, 6), T 8: the first blocks of the ranges [0, 0), [0, 5), [5, 8) are 0, 1, 3.
#pragma once

#include "chunked_attention.h"
#include "philox.cuh"
#include "portable.cuh"
#include "sequences.cuh"

namespace megalodon {
namespace chunked_attention {

template <class R>
GPU_INLINE bool is_finite(R value) { return value - value == 0; }

// Returns the sequence of `token`, or -1 for padding and for sequences whose position is not in [0, C).
GPU_INLINE int64_t find_live_sequence(const ChunkedAttentionParams& p, int64_t token) {
  const int64_t s = gpu::find_sequence(p.sequences, token);
  return s < 0 || gpu::find_position(p.position, s, p.chunk_size) < 0 ? -1 : s;
}

// Returns the number of blocks of a launch; a grid has at most 2^31 - 1.
inline unsigned grid_size(int64_t blocks) {
  constexpr int64_t kMost = 0x7fffffff;
  if (blocks > kMost)
    gpu::refuse("chunked_attention: `k` must be small enough for " + std::to_string(kMost) +
                " blocks of a CUDA kernel, got " + std::to_string(blocks) + "; pass fewer sequences or heads at once.");
  return static_cast<unsigned>(blocks);
}

// A block of neighbouring tokens of one range.
struct RowBlock {
  int64_t sequence;  // of the first `live` tokens
  int64_t position;  // number of rows in the sequence's cache
  int64_t begin;     // the sequence's first token, which is row `position` of its grid
  int64_t token;     // the block's first token
  int rows;          // number of tokens
  int live;          // number of tokens that belong to the sequence; the others are padding

  GPU_INLINE int64_t row() const { return position + token - begin; }  // row of `token` on the grid
};

// Returns the number of blocks of kRows tokens that a launcher must provide.
template <int kRows>
inline int64_t count_row_blocks(const Sequences& sequences) {
  if (sequences.by_row) return (sequences.row_length + kRows - 1) / kRows * sequences.count;
  return sequences.tokens / kRows + sequences.count + 1;
}

template <int kRows>
GPU_INLINE RowBlock find_row_block(const ChunkedAttentionParams& p, int64_t number) {
  const Sequences& sequences = p.sequences;
  int64_t sequence, begin, first, stop;  // the range is [begin, stop)
  if (sequences.by_row) {
    const int64_t blocks = (sequences.row_length + kRows - 1) / kRows;
    sequence = number / blocks;
    begin = sequences.begin(sequence);
    stop = begin + sequences.row_length;
    first = number % blocks * kRows;
  } else {
    // Range r begins where sequence r - 1 does. Find the last range whose first block is at most `number`.
    const auto range_begin = [&](int64_t r) { return r == 0 ? int64_t{0} : sequences.begin(r - 1); };
    int64_t range = 0;
    for (int64_t high = sequences.count + 1; high - range > 1;) {
      const int64_t middle = range + (high - range) / 2;
      if (range_begin(middle) / kRows + middle <= number) range = middle;
      else high = middle;
    }
    sequence = range - 1;
    begin = range_begin(range);
    stop = range < sequences.count ? range_begin(range + 1) : sequences.tokens;
    first = (number - begin / kRows - range) * kRows;
  }
  RowBlock block{sequence, 0, begin, begin + first, 0, 0};
  const auto within = [&](int64_t to) {
    const int64_t left = to - block.token;
    return static_cast<int>(left < 0 ? 0 : left < kRows ? left : kRows);
  };
  block.rows = within(stop);
  block.live = sequence < 0 ? 0 : within(sequences.end(sequence));
  if (block.live > block.rows) block.live = block.rows;  // spans overlap
  if (block.live > 0) block.position = gpu::find_position(p.position, sequence, p.chunk_size);
  if (block.position < 0) block.live = 0;
  return block;
}

// Rows of one head of k or v; a row has `width` elements, K or V. Row 0 here is row `origin` of the grid.
template <class T>
class GridRows {
 public:
  GPU_INLINE GridRows(const ChunkedAttentionParams& p, const RowBlock& block, int64_t origin, int64_t head,
                      const void* cache, const void* tokens, int64_t width)
      : cache_(static_cast<const T*>(cache) + ((block.sequence * p.chunk_size + origin) * p.heads + head) * width),
        tokens_(static_cast<const T*>(tokens) + ((block.begin + origin - block.position) * p.heads + head) * width),
        cached_(block.position > origin ? static_cast<int>(block.position - origin) : 0),
        stride_(static_cast<int>(p.heads * width)) {}

  GPU_INLINE const T* operator()(int row) const {
    return (row < cached_ ? cache_ : tokens_) + int64_t{row} * stride_;
  }

 private:
  const T *cache_, *tokens_;  // addresses of row 0, which may not exist
  int cached_;                // rows in the cache
  int stride_;
};

// DropKey drops the score of (row, column) if a random word is less than dropkey * 2^32. A quad is four columns: quad j
// has the columns 4 j .. 4 j + 3. Philox draws the four words of a quad at once, with `seed` as its key and (quad, row,
// head, sequence) as its counter. Word column % 4 is for `column`.
class DropKey {
 public:
  GPU_INLINE DropKey(const ChunkedAttentionParams& p, int64_t head, int64_t sequence)
      : seed_(p.seed ? *p.seed : 0),
        threshold_(p.seed ? static_cast<uint32_t>(p.dropkey * 0x1p32) : 0),
        head_(static_cast<uint32_t>(head)),
        sequence_(static_cast<uint32_t>(sequence)) {}

  GPU_INLINE explicit operator bool() const { return threshold_ != 0; }

  GPU_INLINE bool dropped(int64_t row, int64_t column) const {
    return dropped_in_quad(row, column / 4) >> (column % 4) & 1;
  }

  // Returns four bits: bit i is set if the score of the quad's column i is dropped.
  GPU_INLINE unsigned dropped_in_quad(int64_t row, int64_t quad) const {
    uint32_t word[4];
    draw(word, static_cast<uint32_t>(row), static_cast<uint32_t>(quad));
    unsigned bits = 0;
    GPU_UNROLL
    for (int i = 0; i < 4; ++i) bits |= static_cast<unsigned>(word[i] < threshold_) << i;
    return bits;
  }

  // Replaces the dropped scores in a fragment D of mma (matrix.cuh): 16 rows from `row` on, and the two quads from
  // `quad` on. Lanes 2 i and 2 i + 1 need words of the same two rows: each draws those of one row and passes on two.
  GPU_INLINE void apply(float (&score)[4], uint32_t row, uint32_t quad, float replacement) const {
    const unsigned lane = threadIdx.x % gpu::kWarp, odd = lane % 2;
    uint32_t word[4];
    draw(word, row + lane / 4 + 8 * odd, quad + lane % 4 / 2);
    const uint32_t first = __shfl_xor_sync(gpu::kFullMask, odd ? word[0] : word[2], 1);
    const uint32_t second = __shfl_xor_sync(gpu::kFullMask, odd ? word[1] : word[3], 1);
    if ((odd ? first : word[0]) < threshold_) score[0] = replacement;
    if ((odd ? second : word[1]) < threshold_) score[1] = replacement;
    if ((odd ? word[2] : first) < threshold_) score[2] = replacement;
    if ((odd ? word[3] : second) < threshold_) score[3] = replacement;
  }

 private:
  GPU_INLINE void draw(uint32_t (&word)[4], uint32_t row, uint32_t quad) const {
    word[0] = quad;
    word[1] = row;
    word[2] = head_;
    word[3] = sequence_;
    gpu::philox(word, seed_);
  }

  uint64_t seed_;
  uint32_t threshold_, head_, sequence_;
};

}  // namespace chunked_attention
}  // namespace megalodon

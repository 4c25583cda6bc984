// The backward of chunked attention: distribution of work over launches, and rows of a block.
//
// A chunk's rows are cut into blocks of kEdge, from the chunk's start on. Blocks are numbered by sequence, chunk, head
// and block, so that the blocks of one head of a chunk are neighbours. A launcher does not know spans or position, so a
// sequence's first number depends on sizes alone:
//   one in each row   as if every sequence had L tokens after C - 1 cached rows
//   other spans       sequence s begins at begin(s) * blocks / most_rows + 2 s, or later if there are caches
// Excess numbers have no rows. Example: kEdge 2, C 3 (two blocks per chunk), spans [0, 4), [4, 5): the sequences begin
// at the numbers 0 and 4; sequence 0 takes the numbers 0, 1 (rows 0, 1 and 2) and 2 (row 3), and 3 is in excess.
#pragma once

#include "chunked_attention.cuh"

namespace megalodon {
namespace chunked_attention {

// Distribution of work over the launches, from sizes alone.
struct BwdPlan {
  int64_t most_rows;  // maximum rows of a chunk
  int64_t blocks;     // blocks of kEdge rows in most_rows
  int64_t total;      // how many block numbers there are, over all sequences and heads
  int64_t panels;     // per round; a panel is a column of tiles of P and of dS
  int64_t rounds;
  int64_t query_blocks;  // that a round's panels see: from its first panel or, if not causal, `blocks - 1` before it
  void* delta;        // (T, H), R; null if every chunk is one block
  void* dq_sums[2];   // (blocks * kEdge, K), R; of the chunk that two rounds share
  void* tiles;        // (panels, 2, blocks * kEdge, kEdge), the call's dtype; P and dS
  void* factors;      // (panels, blocks), float; of the tiles of dS; empty unless the dtype is fp16
};

// A block of kEdge rows of one head of a chunk. Rows are counted from the chunk's start.
struct ChunkBlock {
  int64_t sequence, head;
  int64_t start;   // the chunk's first row on the grid of its sequence
  int64_t token;   // the token of row `cached`
  int64_t number;  // number of the chunk's block 0 for this head
  int cached;      // rows below `cached` are keys of the cache, later rows are tokens
  int rows;        // rows of the chunk, up to the end of this call
  int first;       // the block's first row
};

// Returns the first block number of sequence s, for one head.
template <int kEdge>
MEGALODON_INLINE int64_t first_number(const ChunkedAttentionParams& p, const BwdPlan& plan, int64_t s, int64_t begin) {
  const int64_t cached_blocks = p.position ? plan.blocks : 0;
  // A sequence of n rows has at most n * blocks / most_rows + 1 blocks, and rounding down takes less than one.
  if (!p.sequences.by_row) return begin * plan.blocks / plan.most_rows + s * (cached_blocks + 2);
  const int64_t rows = p.sequences.row_length + (p.position ? p.chunk_size - 1 : 0), rest = rows % p.chunk_size;
  return s * (rows / p.chunk_size * plan.blocks + (rest + kEdge - 1) / kEdge);
}

// Finds the block with `number`, or returns false if the number has no rows. Called by whole warps.
template <int kEdge>
GPU_INLINE bool find_block(ChunkBlock& block, const ChunkedAttentionParams& p, const BwdPlan& plan, int64_t number) {
  const Sequences& sequences = p.sequences;
  const auto first_of = [&](int64_t s) {
    return first_number<kEdge>(p, plan, s, sequences.by_row ? 0 : sequences.begin(s)) * p.heads;
  };
  // Find the last sequence whose first number is at most `number`, or sequence 0. Each lane tests one of 32 candidates.
  int64_t s = 0;
  for (int64_t high = sequences.count; high - s > 1;) {
    const int64_t step = (high - s + gpu::kWarp - 1) / gpu::kWarp, candidate = s + threadIdx.x % gpu::kWarp * step;
    const bool before = candidate == s || (candidate < high && first_of(candidate) <= number);
    const int steps = __popc(__ballot_sync(gpu::kFullMask, before)) - 1;
    s += steps * step;
    if (s + step < high) high = s + step;
  }
  if (sequences.count == 0 || sequences.length(s) <= 0) return false;
  const int64_t position = gpu::find_position(p.position, s, p.chunk_size);
  if (position < 0) return false;
  const int64_t end = position + sequences.length(s);
  const int64_t local = number - first_of(s), chunk_numbers = plan.blocks * p.heads, chunk = local / chunk_numbers;
  if (local < 0 || chunk > (end - 1) / p.chunk_size) return false;
  block.sequence = s;
  block.start = chunk * p.chunk_size;
  block.cached = chunk == 0 ? static_cast<int>(position) : 0;
  block.rows = static_cast<int>(end - block.start < p.chunk_size ? end - block.start : p.chunk_size);
  block.token = sequences.begin(s) + block.start + block.cached - position;
  const int64_t within = local % chunk_numbers;
  const int blocks = (block.rows + kEdge - 1) / kEdge, head_block = static_cast<int>(within % blocks);
  block.head = within / blocks;
  block.number = number - head_block;
  block.first = head_block * kEdge;
  return block.head < p.heads;
}

// Rows of one head of a chunk in a tensor of `width` elements per head: of tokens, or of keys, some of them cached.
template <class T, bool kKeys = false>
struct ChunkRows {
  T* tensor;          // address of the first element
  T *cache, *tokens;  // addresses of row 0, which may not exist
  int stride;         // elements per token; 2^31 of them would be gigabytes
  int cached, rows;

  // Returns the address of row `row`, or null if the row does not exist.
  GPU_INLINE T* operator()(int row) const {
    if (row >= rows || (!kKeys && row < cached)) return nullptr;
    const uint64_t shift = uint64_t{static_cast<unsigned>(row)} * static_cast<unsigned>(stride);
    return (kKeys && row < cached ? cache : tokens) + shift;
  }

  GPU_INLINE T* anywhere() const { return tensor; }

  // Returns these rows from row `row` on, each from `column` on.
  GPU_INLINE ChunkRows from(int row, int64_t column) const {
    const int64_t shift = int64_t{row} * stride + column;
    return {tensor, cache + shift, tokens + shift, stride, cached - row, rows - row};
  }
};

// Rows of a tile of P or dS.
template <class T>
struct TileRows {
  T* first;
  int pitch;

  GPU_INLINE T* operator()(int row) const { return first + int64_t{row} * pitch; }
  GPU_INLINE T* anywhere() const { return first; }
};

template <bool kKeys = false, class T>
GPU_INLINE ChunkRows<T, kKeys> chunk_rows(const ChunkedAttentionParams& p, const ChunkBlock& block, T* tokens,
                                          int64_t width, T* cache = nullptr) {
  return {tokens, cache + (block.sequence * p.chunk_size * p.heads + block.head) * width,
          tokens + ((block.token - block.cached) * p.heads + block.head) * width, static_cast<int>(p.heads * width),
          block.cached, block.rows};
}

template <class T>
GPU_INLINE const T* typed(const void* p) { return static_cast<const T*>(p); }
template <class T>
GPU_INLINE T* typed(void* p) { return static_cast<T*>(p); }

}  // namespace chunked_attention
}  // namespace megalodon

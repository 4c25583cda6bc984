// Shared by the CPU's forward and backward of chunked attention: the chunks, the rows they read, the masks, and the
// distribution of chunks over threads.
#pragma once

#include <algorithm>
#include <limits>
#include <queue>
#include <vector>

#include "chunked_attention.h"
#include "padding.h"
#include "panels.h"
#include "parallel.h"
#include "philox.h"
#include "stream.h"

namespace megalodon::MEGALODON_ISA {

// A chunk of a sequence, up to the last token of this call. Its rows are numbered from the chunk's start: rows of the
// cache first, then tokens of this call.
struct Chunk {
  int64_t sequence;
  int64_t start;   // position of row 0 (chunked_attention.h), a multiple of C
  int64_t cached;  // number of rows in the cache
  int64_t token;   // index of the first token, which is row `cached`
  int64_t keys;    // number of rows, those in the cache included
  bool causal;

  int64_t queries() const { return keys - cached; }
  // Query `row` sees the keys [0, seen_by(row)). Key `row` is visible to the queries [first_to_see(row), keys).
  int64_t seen_by(int64_t row) const { return causal ? row + 1 : keys; }
  int64_t first_to_see(int64_t row) const { return causal ? row : 0; }
};

inline std::vector<Chunk> list_chunks(const ChunkedAttentionParams& p) {
  std::vector<Chunk> chunks;
  for (int64_t s = 0; s < p.sequences.count; ++s) {
    const int64_t position = p.position ? p.position[s] : 0, end = position + p.sequences.length(s);
    for (int64_t at = position; at < end;) {
      const int64_t start = at - at % p.chunk_size, stop = p.chunk_size < end - start ? start + p.chunk_size : end;
      chunks.push_back({s, start, at - start, p.sequences.begin(s) + at - position, stop - start, p.causal});
      at = stop;
    }
  }
  return chunks;
}

// Rows of one head of a chunk, as a function for panels.h: the address of a row; null for a row past the end, and for a
// cached row if `cache` is null.
template <class T>
struct ChunkRows {
  const T* cache;
  const T* tokens;
  int64_t cached, keys, stride;

  MEGALODON_INLINE const T* operator()(int64_t row) const {
    if (row >= keys) return nullptr;
    if (row >= cached) return tokens + (row - cached) * stride;
    return cache ? cache + row * stride : nullptr;
  }
};

template <class T>
ChunkRows<T> chunk_rows(const ChunkedAttentionParams& p, const Chunk& chunk, int64_t head, const void* cache,
                        const void* tokens, int64_t width) {
  const int64_t stride = p.heads * width;
  return {cache ? static_cast<const T*>(cache) + chunk.sequence * p.chunk_size * stride + head * width : nullptr,
          static_cast<const T*>(tokens) + chunk.token * stride + head * width, chunk.cached, chunk.keys, stride};
}

// Prefetches the next rows of up to four tensors into the L2, a few at a time between the tiles of the current product.
// The rows of one head are not adjacent in memory, so each narrow row would miss the cache. The hardware prefetches
// wide rows itself.
class RowsAhead {
 public:
  // Adds the rows [begin, end), except cached rows; adds none if rows are wide.
  template <class T>
  void add(const ChunkRows<T>& rows, int64_t width, int64_t begin, int64_t end) {
    constexpr int64_t kWide = 1024, element = sizeof(T);
    begin = std::max(begin, rows.cached);
    end = std::min(end, rows.keys);
    if (begin >= end || width * element >= kWide) return;
    parts_[count_++] = {reinterpret_cast<const char*>(rows(begin)), rows.stride * element, width * element,
                        end - begin};
    bytes_ += (end - begin) * width * element;
  }

  // Spreads the prefetches over `calls` calls.
  void pace(int64_t calls) { bytes_per_call_ = ceil_div(bytes_, std::max<int64_t>(calls, 1)); }

  MEGALODON_INLINE void operator()() {
    for (int64_t left = bytes_per_call_; left > 0 && count_ > 0;) {
      Part& part = parts_[count_ - 1];
      for (int64_t at = 0; at < part.width; at += kLineBytes) __builtin_prefetch(part.row + at, 0, 2);
      left -= part.width;
      part.row += part.stride;
      if (--part.rows == 0) --count_;
    }
  }

 private:
  struct Part {
    const char* row;
    int64_t stride, width, rows;
  };
  Part parts_[4];
  int count_ = 0;
  int64_t bytes_ = 0, bytes_per_call_ = 0;
};

template <class R>
MEGALODON_INLINE Vec<R> lane_numbers() {
  Vec<R> lanes;
  for (int i = 0; i < kLanes<R>; ++i) lanes[i] = static_cast<R>(i);
  return lanes;
}

// A block of scores is one panel of S^T: row r holds the scores of key `key + r` for the queries from `query` on.
// Sets the scores of keys that a query does not see to -inf.
template <class R>
void mask_unseen(R* scores, int64_t key, int64_t keys, int64_t query, const Chunk& chunk) {
  const Vec<R> more_seen = chunk.causal ? lane_numbers<R>() : zeros<R>();  // keys that a lane sees and lane 0 does not
  for (int64_t r = std::max<int64_t>(chunk.seen_by(query) - key, 0); r < keys; ++r)
    for (int64_t c = 0; c < kTileColumns<R>; c += kLanes<R>) {
      R* at = scores + r * kTileColumns<R> + c;
      const Vec<R> seen_after = more_seen + static_cast<R>(chunk.seen_by(query + c) - 1 - key - r);
      store(at, seen_after < R{0} ? splat(-std::numeric_limits<R>::infinity()) : load(static_cast<const R*>(at)));
    }
}

// DropKey. Philox(seed; column / 4, row, head, sequence) returns four words, for four columns. The score of (row,
// column) is dropped if its word, number column % 4, is less than dropkey * 2^32. A row is the position of a query and
// a column that of a key (chunked_attention.h).
class DropKey {
 public:
  explicit DropKey(const ChunkedAttentionParams& p)
      : seed_(p.seed ? *p.seed : 0), threshold_(static_cast<uint64_t>(p.dropkey * 0x1p32)) {}

  MEGALODON_INLINE explicit operator bool() const { return threshold_ != 0; }

  // Sets the dropped scores of a block to -inf.
  template <class R>
  void apply(R* scores, int64_t key, int64_t keys, int64_t query, const Chunk& chunk, int64_t head) const {
    using Narrow = typename VecOf<uint32_t, kLanes<R>>::type;
    using Wide = typename VecOf<std::conditional_t<sizeof(R) == 4, uint32_t, uint64_t>, kLanes<R>>::type;
    const int64_t first = chunk.start + key, last = first + keys;
    const Wide largest = Wide{} + static_cast<uint32_t>(threshold_ - 1);
    uint32_t words[4][kTileColumns<R>];
    for (int64_t quad = first / 4; quad * 4 < last; ++quad) {
      for (int lane = 0; lane < kTileColumns<R>; lane += kPhiloxStreams) {
        PhiloxWord word[4];
        draw(word, splat_word(quad), splat_word(chunk.start + query + lane) + stream_numbers(), chunk, head);
        for (int e = 0; e < 4; ++e)
          store_raw(&words[e][lane], __builtin_convertvector(word[e], typename VecOf<uint32_t, kPhiloxStreams>::type));
      }
      for (int e = 0; e < 4; ++e) {
        const int64_t column = quad * 4 + e;
        if (column < first || column >= last) continue;
        for (int c = 0; c < kTileColumns<R>; c += kLanes<R>) {
          R* at = scores + (column - first) * kTileColumns<R> + c;
          const Wide word = __builtin_convertvector(load_raw<Narrow>(&words[e][c]), Wide);
          store(at, word <= largest ? splat(-std::numeric_limits<R>::infinity()) : load(static_cast<const R*>(at)));
        }
      }
    }
  }

  // Sets the dropped scores of one query, which are contiguous, to -inf.
  template <class R>
  void apply_to_row(R* scores, int64_t key, int64_t keys, int64_t query, const Chunk& chunk, int64_t head) const {
    const int64_t first = chunk.start + key, last = first + keys;
    for (int64_t quad = first / 4; quad * 4 < last; quad += kPhiloxStreams) {
      PhiloxWord word[4];
      draw(word, splat_word(quad) + stream_numbers(), splat_word(chunk.start + query), chunk, head);
      const int64_t begin = std::max(first, quad * 4), end = std::min(last, (quad + kPhiloxStreams) * 4);
      for (int64_t column = begin; column < end; ++column)
        if (static_cast<uint32_t>(word[column % 4][column / 4 - quad]) < threshold_)
          scores[column - first] = -std::numeric_limits<R>::infinity();
    }
  }

 private:
  static MEGALODON_INLINE PhiloxWord splat_word(int64_t word) { return PhiloxWord{} + static_cast<uint64_t>(word); }
  static MEGALODON_INLINE PhiloxWord stream_numbers() {
    PhiloxWord numbers;
    for (int i = 0; i < kPhiloxStreams; ++i) numbers[i] = static_cast<uint64_t>(i);
    return numbers;
  }
  MEGALODON_INLINE void draw(PhiloxWord (&word)[4], PhiloxWord quad, PhiloxWord row, const Chunk& chunk,
                             int64_t head) const {
    word[0] = quad;
    word[1] = row;
    word[2] = splat_word(head);
    word[3] = splat_word(chunk.sequence);
    philox(word, seed_);
  }

  uint64_t seed_, threshold_;
};

// Calls body(chunk, head) for every head of every chunk; work(chunk) is the work of one head. The calls are made in one
// of two ways:
//   1. The threads share the calls. Each thread has its own body = make(1).
//   2. The calling thread makes one call after the other, with body = make(threads). parallel_jobs inside the body
//      spread blocks of `block` rows over the threads.
// Large chunks come first, in way 2 if an estimate of the time says that it is faster. The other chunks take way 1, but
// a single call that is left takes way 2.
template <class Work, class Make>
void for_each_chunk(const std::vector<Chunk>& chunks, int64_t heads, int64_t block, Work&& work, Make&& make) {
  const int threads = num_threads();
  double total = 0;
  std::vector<const Chunk*> order;
  for (const Chunk& chunk : chunks) {
    total += work(chunk) * static_cast<double>(heads);
    order.push_back(&chunk);
  }
  const auto first = order.begin(), first_small = std::stable_partition(first, order.end(), [&](const Chunk* chunk) {
    return threads > 1 && work(*chunk) * 2 * threads > total;
  });
  // Estimated end of the chunks from `at` on if they take way 1.
  const auto end_from = [&](auto at) {
    struct Thread {
      double end;
      bool operator<(const Thread& other) const { return end > other.end; }  // earliest end on top
    };
    std::priority_queue<Thread> team({}, std::vector<Thread>(static_cast<size_t>(threads)));
    double last = 0;
    for (; at != order.end(); ++at)
      for (int64_t head = 0; head < heads; ++head) {
        const double end = team.top().end + work(**at);
        team.pop();
        team.push({end});
        last = std::max(last, end);
      }
    return last;
  };
  double spread_time = 0;  // estimate for the large chunks if they take way 2
  for (auto at = first; at != first_small; ++at) {
    // Block i of a causal chunk reads i + 1 blocks of keys: n blocks keep (n + 1) / 2 threads busy.
    const double busy_threads = static_cast<double>(ceil_div((*at)->keys, block) + 1) / 2;
    spread_time += work(**at) * static_cast<double>(heads) / std::min<double>(threads, busy_threads);
  }
  auto rest = first;
  if (first != first_small && spread_time + end_from(first_small) < end_from(first)) {
    auto body = make(threads);
    for (; rest != first_small; ++rest)
      for (int64_t head = 0; head < heads; ++head) body(**rest, head);
  }
  if (rest == order.end()) return;
  const int64_t jobs = (order.end() - rest) * heads;
  parallel_jobs(jobs, total, [&] {
    return [&, body = make(jobs == 1 ? threads : 1)](int64_t job) mutable { body(*rest[job / heads], job % heads); };
  });
}

// Scratch memory of type S for each thread that works in a body of for_each_chunk.
template <class S>
class PerThread {
 public:
  PerThread(int threads, const ChunkedAttentionParams& params) {
    slots_.reserve(static_cast<size_t>(threads));
    for (int i = 0; i < threads; ++i) slots_.emplace_back(params);
  }
  // Maximum number of threads inside the body.
  int threads() const { return static_cast<int>(slots_.size()); }
  const S& get() const { return slots_[slots_.size() > 1 ? static_cast<size_t>(body_number()) : 0]; }

 private:
  std::vector<S> slots_;
};

}  // namespace megalodon::MEGALODON_ISA

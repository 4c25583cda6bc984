// Launches attention's state for its binding: the state after a call has the keys and values of each sequence's
// unfinished chunk, and the position in it.
//
//   k (T, H, K); v (T, H, V):             keys and values of this call
//   caches (S, C, H, K) and (S, C, H, V): keys and values of the old and of the new state
//
// The rows of a new cache are `kept` rows of the old one, if the chunk is still the same, then `fresh` rows of the last
// tokens, then zeros. In place, only the fresh rows are written. A position outside [0, C) becomes -1 and has no rows.
//
// 1. rows kernel: a block takes one row of a sequence's new caches or, in place, one row that may be fresh. If each
//    sequence has one block, as for a decoded token, it also writes the position, and there is no second launch.
// 2. position kernel: a thread takes a sequence. It runs second, because position_out may be `position`, which kernel 1
//    reads.
// Rows are copied in units of 16 bytes if alignment allows it, else element by element.
// Bytes: each row in use is read and written once, the minimum; in place, the fresh rows alone.
// H100, decoding in place, S 8, K 256, V 2048, bf16: 74 KB; the launch dominates.
#include "chunked_attention_fwd.cuh"

namespace megalodon {
namespace {

using namespace chunked_attention;

constexpr int kThreads = 128;
using Unit = gpu::Pack<uint32_t, 4>;

struct CacheCopy {
  const void *cache, *tokens;  // of the old state; of this call
  void* out;                   // of the new state
  int64_t units;               // per row

  MEGALODON_INLINE bool in_place() const { return cache == out; }
};

struct StatePlan {
  ChunkedAttentionStateParams params;
  CacheCopy copies[2];  // of keys, of values
  int64_t rows;         // blocks per sequence
};

template <class U>
__global__ void __launch_bounds__(kThreads) chunked_attention_state_kernel(StatePlan plan) {
  const ChunkedAttentionStateParams& p = plan.params;
  const int64_t s = blockIdx.x / plan.rows, i = blockIdx.x % plan.rows, C = p.chunk_size;
  const int64_t position = gpu::find_position(p.position, s, C), stop = p.sequences.end(s);
  const int64_t cached = position < 0 ? 0 : position, length = position < 0 ? 0 : p.sequences.length(s);
  const int64_t end = cached + length, start = end - end % C;
  const int64_t kept = start == 0 ? cached : 0, fresh = end - start - kept;
  GPU_UNROLL
  for (int j = 0; j < 2; ++j) {
    const CacheCopy& copy = plan.copies[j];
    const int64_t row = copy.in_place() ? kept + i : i;
    if (row >= (copy.in_place() ? kept + fresh : C)) continue;
    const U* const from = row < kept ? static_cast<const U*>(copy.cache) + (s * C + row) * copy.units
                          : row < kept + fresh
                              ? static_cast<const U*>(copy.tokens) + (stop - fresh + row - kept) * copy.units
                              : nullptr;
    U* const to = static_cast<U*>(copy.out) + (s * C + row) * copy.units;
    for (int64_t u = threadIdx.x; u < copy.units; u += kThreads) gpu::st(to + u, from ? gpu::ld<U>(from + u) : U{});
  }
  if (plan.rows == 1) {
    __syncthreads();  // all threads have read the position
    if (threadIdx.x == 0) p.position_out[s] = position < 0 ? -1 : end % C;
  }
}

__global__ void __launch_bounds__(kThreads) chunked_attention_position_kernel(ChunkedAttentionStateParams p) {
  const int64_t s = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (s >= p.sequences.count) return;
  const int64_t position = gpu::find_position(p.position, s, p.chunk_size);
  p.position_out[s] = position < 0 ? -1 : (position + p.sequences.length(s)) % p.chunk_size;
}

// Launches the rows kernel; returns true if it also writes the positions.
template <class U>
bool launch_rows(const ChunkedAttentionStateParams& p, int64_t element, void* stream) {
  const int64_t key = p.heads * p.key_dim * element, value = p.heads * p.value_dim * element;
  const auto unit = static_cast<int64_t>(sizeof(U));
  StatePlan plan{p, {{p.cache_k, p.k, p.cache_k_out, key / unit}, {p.cache_v, p.v, p.cache_v_out, value / unit}}, 0};
  // A sequence has at most row_length tokens.
  const bool in_place = plan.copies[0].in_place() && plan.copies[1].in_place();
  plan.rows = in_place && p.sequences.row_length < p.chunk_size ? p.sequences.row_length : p.chunk_size;
  if (plan.rows > 0)
    LAUNCH(chunked_attention_state_kernel<U>, grid_size(p.sequences.count * plan.rows), kThreads, 0, stream, plan);
  return plan.rows == 1;
}

bool takes_units(const ChunkedAttentionStateParams& p, int64_t element) {
  const auto unit = static_cast<int64_t>(sizeof(Unit));
  if (p.heads * p.key_dim * element % unit || p.heads * p.value_dim * element % unit) return false;
  for (const void* pointer : {p.k, p.v, p.cache_k, p.cache_v, static_cast<const void*>(p.cache_k_out),
                              static_cast<const void*>(p.cache_v_out)})
    if (!gpu::aligned<1>(static_cast<const Unit*>(pointer))) return false;
  return true;
}

}  // namespace

int64_t workspace_chunked_attention_state_cuda(const ChunkedAttentionStateParams&) { return 0; }

void launch_chunked_attention_state_cuda(const ChunkedAttentionStateParams& params, void* stream) {
  const int64_t sequences = params.sequences.count;
  if (sequences == 0) return;
  bool done = false;
  dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    using U = gpu::Pack<T, 1>;
    done = takes_units(params, sizeof(T)) ? launch_rows<Unit>(params, sizeof(T), stream)
                                          : launch_rows<U>(params, sizeof(T), stream);
  });
  if (done) return;
  LAUNCH(chunked_attention_position_kernel, static_cast<unsigned>(ceil_div(sequences, kThreads)), kThreads, 0, stream,
         params);
}

}  // namespace megalodon

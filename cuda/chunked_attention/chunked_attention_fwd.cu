// Launches attention's forward for its binding: steps, tensor cores, or multiply-adds.
#include "chunked_attention_fma.cuh"
#include "chunked_attention_mma.cuh"
#include "chunked_attention_step.cuh"

namespace megalodon {
namespace {

using namespace chunked_attention;

template <class T>
bool takes_vectors(const ChunkedAttentionFwdParams& p) {
  constexpr int width = gpu::kVectorWidth<T>;
  if (p.key_dim % width || p.value_dim % width) return false;
  for (const void* pointer : {p.q, p.k, p.v, p.cache_k, p.cache_v, static_cast<const void*>(p.o)})
    if (!gpu::aligned<width>(static_cast<const T*>(pointer))) return false;
  return true;
}

template <class T, int kColumns, int kKeys>
void launch_mma(const ChunkedAttentionFwdParams& p, void* stream) {
  const int64_t blocks = count_row_blocks<kMmaRows>(p.sequences) * p.heads * count_slices(p.value_dim, kColumns);
  LAUNCH((chunked_attention_fwd_mma_kernel<T, kColumns, kKeys>), grid_size(blocks), kMmaThreads,
         mma_shared_bytes(p.key_dim, kColumns, kKeys), stream, p, takes_vectors<T>(p));
}

template <class T>
void launch_mma(const ChunkedAttentionFwdParams& p, void* stream) {
  const size_t long_bytes = mma_shared_bytes(p.key_dim, 256, 64) + sizeof(float) * kMmaRows;  // with lse
  const bool is_long = p.chunk_size >= LAUNCH_SIZE(attention_long_tiles, kLongTilesFrom);
  if (p.value_dim > 128 && is_long && long_bytes <= gpu::max_shared_bytes()) launch_mma<T, 256, 64>(p, stream);
  else if (p.value_dim > 128) launch_mma<T, 256, 32>(p, stream);
  else if (p.key_dim > 128) launch_mma<T, 128, 32>(p, stream);
  else if (p.value_dim > 64) launch_mma<T, 128, 64>(p, stream);
  else launch_mma<T, 64, 48>(p, stream);
}

template <class T, int kColumns>
void launch_fma(const ChunkedAttentionFwdParams& p, void* stream) {
  const int64_t blocks = count_row_blocks<kFmaRows>(p.sequences) * p.heads * count_slices(p.value_dim, kColumns);
  LAUNCH((chunked_attention_fwd_fma_kernel<T, kColumns>), grid_size(blocks), kFmaThreads,
         (FmaTiling<Compute<T>, kColumns>::kSharedBytes), stream, p, takes_vectors<T>(p));
}

template <class T>
void launch_fma(const ChunkedAttentionFwdParams& p, void* stream) {
  if constexpr (sizeof(T) == 4) {
    if (p.value_dim > 256) return launch_fma<T, 512>(p, stream);
  }
  if constexpr (sizeof(T) > 2) {
    if (p.value_dim <= 64) return launch_fma<T, 64>(p, stream);
  }
  launch_fma<T, 256>(p, stream);
}

template <class T, int kWidth>
void launch_steps(const ChunkedAttentionFwdParams& p, void* stream) {
  const StepPlan plan = plan_steps<Compute<T>>(p);
  check_step<Compute<T>, kWidth>(p, plan);
  const int64_t items = p.sequences.tokens * p.heads, splits = ceil_div(p.value_dim, kStepColumns<kWidth>);
  const unsigned blocks = grid_size(items * plan.tiles * splits);
  const unsigned merge_blocks = grid_size(items * ceil_div(p.value_dim, kStepThreads));
  LAUNCH((chunked_attention_step_kernel<T, kWidth>), blocks, kStepThreads,
         (step_shared_bytes<Compute<T>, kWidth>(p, plan)), stream, p, plan);
  LAUNCH(chunked_attention_merge_kernel<T>, merge_blocks, kStepThreads, 0, stream, p, plan);
}

}  // namespace

int64_t workspace_chunked_attention_fwd_cuda(const ChunkedAttentionFwdParams& params) {
  int64_t bytes = 0;
  if (takes_steps(params))
    dispatch_dtype(params.dtype, [&](auto type) {
      using R = Compute<decltype(type)>;
      bytes = plan_steps<R>(params).template bytes<R>(params);
    });
  return bytes;
}

void launch_chunked_attention_fwd_cuda(const ChunkedAttentionFwdParams& params, void* stream) {
  if (params.sequences.tokens == 0 || params.heads == 0) return;
  dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    if (takes_steps(params)) {
      if (takes_vectors<T>(params)) return launch_steps<T, gpu::kVectorWidth<T>>(params, stream);
      return launch_steps<T, 1>(params, stream);
    }
    if constexpr (sizeof(T) == 2) {
      if (params.key_dim <= kMmaMaxDepth) return launch_mma<T>(params, stream);
    }
    launch_fma<T>(params, stream);
  });
}

}  // namespace megalodon

// Launches the forward of normalized queries and keys for its binding.
#include "normalized_qk_fwd.cuh"

namespace megalodon {
namespace {

template <class T, int kWidth, bool kWhole>
void launch(const NormalizedQkFwdParams& p, void* stream) {
  using namespace normalized_qk;
  const int64_t items = (p.sequences.tokens + kTokens - 1) / kTokens * p.heads, vectors = p.key_dim / kWidth;
  if (vectors <= gpu::kWarp) {
    const int64_t blocks = (items + kWarpsPerBlock - 1) / kWarpsPerBlock;
    LAUNCH((normalized_qk_fwd_warp_kernel<T, kWidth, kWhole>), static_cast<unsigned>(blocks),
           kWarpsPerBlock * gpu::kWarp, 0, stream, p);
  } else {
    const int64_t warps = (vectors + gpu::kWarp - 1) / gpu::kWarp, most = kMaxThreads / gpu::kWarp;
    LAUNCH((normalized_qk_fwd_block_kernel<T, kWidth, kWhole>), static_cast<unsigned>(items),
           static_cast<unsigned>((warps < most ? warps : most) * gpu::kWarp), 0, stream, p);
  }
}

template <class T>
bool takes_vectors(const NormalizedQkFwdParams& p) {
  using R = Compute<T>;
  constexpr int width = gpu::kVectorWidth<T>, real = gpu::kVectorWidth<R>;
  const auto whole = [](const void* tensor) { return gpu::aligned<width>(static_cast<const T*>(tensor)); };
  const auto whole_real = [](const void* tensor) { return gpu::aligned<real>(static_cast<const R*>(tensor)); };
  return p.key_dim % width == 0 && whole(p.z) && whole(p.q) && whole(p.k) && whole_real(p.gamma) &&
         whole_real(p.beta) && whole_real(p.rotary);
}

}  // namespace

int64_t workspace_normalized_qk_fwd_cuda(const NormalizedQkFwdParams&) { return 0; }

void launch_normalized_qk_fwd_cuda(const NormalizedQkFwdParams& params, void* stream) {
  if (params.sequences.tokens == 0 || params.heads * params.key_dim == 0) return;
  dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    if (takes_vectors<T>(params)) launch<T, gpu::kVectorWidth<T>, true>(params, stream);
    else launch<T, 2, false>(params, stream);
  });
}

}  // namespace megalodon

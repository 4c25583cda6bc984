// Launches the backward of normalized queries and keys for its binding.
#include "normalized_qk_bwd.cuh"

#include <cmath>

namespace megalodon {
namespace {

using namespace normalized_qk;

template <class T, int kWidth, bool kWhole>
void launch_parts(const NormalizedQkBwdParams& p, const Parts& parts, void* stream) {
  constexpr int vectors = kWidth == 8 ? 1 : 2;  // per lane
  const unsigned blocks = static_cast<unsigned>(parts.count * p.heads);
  if (p.key_dim <= gpu::kWarp * vectors * kWidth)
    LAUNCH((normalized_qk_bwd_warp_kernel<T, kWidth, vectors, kWhole>), blocks, kThreads, 0, stream, p, parts);
  else LAUNCH((normalized_qk_bwd_block_kernel<T, kWidth, kWhole>), blocks, kThreads, 0, stream, p, parts);
}

template <class T>
bool takes_vectors(const NormalizedQkBwdParams& p) {
  using R = Compute<T>;
  constexpr int width = gpu::kVectorWidth<T>, real = gpu::kVectorWidth<R>;
  const auto whole = [](const void* tensor) { return gpu::aligned<width>(static_cast<const T*>(tensor)); };
  const auto whole_real = [](const void* tensor) { return gpu::aligned<real>(static_cast<const R*>(tensor)); };
  return p.key_dim % width == 0 && whole(p.z) && whole(p.dq) && whole(p.dk) && whole(p.dz) && whole_real(p.gamma) &&
         whole_real(p.rotary);
}

}  // namespace

int64_t workspace_normalized_qk_bwd_cuda(const NormalizedQkBwdParams& params) {
  const int64_t real = params.dtype == DType::f64 ? 8 : 4;
  return make_parts(params).count * 4 * params.heads * params.key_dim * real;
}

void launch_normalized_qk_bwd_cuda(const NormalizedQkBwdParams& params, void* stream) {
  const int64_t channels = params.heads * params.key_dim;
  if (channels == 0) return;
  const Parts parts = make_parts(params);
  dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    using R = Compute<T>;
    if (parts.count > 0) {
      if (takes_vectors<T>(params)) launch_parts<T, gpu::kVectorWidth<T>, true>(params, parts, stream);
      else launch_parts<T, 2, false>(params, parts, stream);
    }
    const double root = std::sqrt(static_cast<double>(params.key_dim));
    gpu::sum_shares<R>({static_cast<const R*>(params.workspace), parts.count, 2 * channels,
                        static_cast<R*>(params.dbeta), static_cast<R*>(params.dgamma), 1 / root}, stream);
  });
}

}  // namespace megalodon

// Launches timestep norm's backward of end states for its binding.
#include "timestep_norm_end_state_bwd.cuh"

namespace megalodon {
namespace {

using namespace timestep_norm;

template <class T, int kWidth>
void launch_tiles(const TimestepNormEndStateBwdParams& p, void* stream) {
  const int64_t channels = kWidth * gpu::kWarp, slices = (p.channels + channels - 1) / channels;
  const int64_t tiles = (p.sequences.tokens + kTile - 1) / kTile;
  LAUNCH((timestep_norm_end_state_bwd_kernel<T, kWidth>), static_cast<unsigned>(slices * tiles), kThreads, 0, stream, p,
         static_cast<unsigned>(slices));
}

template <class T>
void launch(const TimestepNormEndStateBwdParams& p, void* stream) {
  constexpr int width = gpu::kVectorWidth<T>;
  const bool vectors = p.channels / p.groups % width == 0 && gpu::aligned<width>(static_cast<const T*>(p.x)) &&
                       gpu::aligned<width>(static_cast<const T*>(p.dx));
  if (vectors) launch_tiles<T, width>(p, stream);
  else launch_tiles<T, 1>(p, stream);
}

}  // namespace

int64_t workspace_timestep_norm_end_state_bwd_cuda(const TimestepNormEndStateBwdParams&) { return 0; }

void launch_timestep_norm_end_state_bwd_cuda(const TimestepNormEndStateBwdParams& params, void* stream) {
  if (params.sequences.tokens * params.channels == 0) return;
  dispatch_dtype(params.dtype, [&](auto type) { launch<decltype(type)>(params, stream); });
}

}  // namespace megalodon

// Launches timestep norm's forward for its binding.
#include "timestep_norm_fwd.cuh"

namespace megalodon {
namespace {

using namespace timestep_norm;

template <class T, int kWidth, bool kHeld>
void launch_tiles(const TimestepNormFwdParams& p, const Layout& layout, void* stream) {
  const int64_t count = tiles(p);
  const unsigned blocks = static_cast<unsigned>(count * layout.slices);
  const Carries carries(p.workspace, count, p.groups);
  if (tiles_depend(p)) {
    LAUNCH((timestep_norm_fwd_moments_kernel<T, kWidth, kHeld>), blocks, kThreads, 0, stream, p, layout, carries);
    launch_carry(TileMomentsSource{carries, p.groups}, count, p.groups, stream);
  }
  if (p.ends_only)
    LAUNCH((timestep_norm_end_state_kernel<T, kWidth, kHeld>), blocks, kThreads, 0, stream, p, layout, carries);
  else LAUNCH((timestep_norm_fwd_kernel<T, kWidth, kHeld>), blocks, kThreads, 0, stream, p, layout, carries);
}

template <class T>
void launch(const TimestepNormFwdParams& p, void* stream) {
  using R = Compute<T>;
  constexpr int width = gpu::kVectorWidth<T>, real = gpu::kVectorWidth<R>;
  if (may_be_empty(p)) {
    const int64_t blocks = (p.sequences.count * p.groups + kThreads - 1) / kThreads;
    LAUNCH(timestep_norm_fwd_empty_kernel<R>, static_cast<unsigned>(blocks), kThreads, 0, stream, p);
  }
  if (p.sequences.tokens * p.channels == 0) return;
  const bool vectors = p.channels / p.groups % width == 0 && gpu::aligned<width>(static_cast<const T*>(p.x)) &&
                       gpu::aligned<width>(static_cast<const T*>(p.y)) &&
                       gpu::aligned<real>(static_cast<const R*>(p.weight)) &&
                       gpu::aligned<real>(static_cast<const R*>(p.bias));
  const Layout layout = vectors ? make_layout<width>(p) : make_layout<1>(p);
  if (!vectors) launch_tiles<T, 1, false>(p, layout, stream);
  else if (layout.vectors > gpu::kWarp) launch_tiles<T, width, false>(p, layout, stream);
  else launch_tiles<T, width, true>(p, layout, stream);
}

}  // namespace

int64_t workspace_timestep_norm_fwd_cuda(const TimestepNormFwdParams& params) {
  return tiles_depend(params) ? carries_bytes(tiles(params), params.groups) : 0;
}

void launch_timestep_norm_fwd_cuda(const TimestepNormFwdParams& params, void* stream) {
  if (params.sequences.count + params.sequences.tokens == 0) return;
  dispatch_dtype(params.dtype, [&](auto type) { launch<decltype(type)>(params, stream); });
}

}  // namespace megalodon

// Launches timestep norm's backward for its binding.
#include "timestep_norm_bwd.cuh"

namespace megalodon {
namespace {

using namespace timestep_norm;

template <class T, int kWidth>
void launch_tiles(const TimestepNormBwdParams& p, void* stream) {
  using R = Compute<T>;
  const Scratch<R> scratch(p);
  const Layout layout = make_layout<kWidth>(p);
  const unsigned blocks = static_cast<unsigned>(tiles(p) * layout.slices);
  if (layout.vectors > 1 << layout.log_lanes)
    LAUNCH((timestep_norm_bwd_sums_kernel<T, kWidth, false>), blocks, kThreads, 0, stream, p, layout, scratch);
  else LAUNCH((timestep_norm_bwd_sums_kernel<T, kWidth, true>), blocks, kThreads, 0, stream, p, layout, scratch);
  if (tiles_depend(p)) launch_carry(SumsSource<R>{p, scratch.carries, tiles(p)}, tiles(p), p.groups, stream);
  const int64_t channels = kWidth * gpu::kWarp, slices = (p.channels + channels - 1) / channels;
  LAUNCH((timestep_norm_bwd_kernel<T, kWidth>), static_cast<unsigned>(slices * scratch.share_count), kThreads, 0,
         stream, p, static_cast<unsigned>(slices), scratch);
}

template <class T>
void launch(const TimestepNormBwdParams& p, void* stream) {
  using R = Compute<T>;
  constexpr int width = gpu::kVectorWidth<T>, real = gpu::kVectorWidth<R>;
  if (may_be_empty(p)) {
    const int64_t blocks = (p.sequences.count * p.groups + kThreads - 1) / kThreads;
    LAUNCH(timestep_norm_bwd_empty_kernel<R>, static_cast<unsigned>(blocks), kThreads, 0, stream, p);
  }
  if (p.channels == 0) return;
  if (p.sequences.tokens > 0) {
    const auto whole = [](const void* tensor) { return gpu::aligned<width>(static_cast<const T*>(tensor)); };
    const bool vectors = p.channels / p.groups % width == 0 && whole(p.x) && whole(p.dy) && whole(p.dx) &&
                         gpu::aligned<real>(static_cast<const R*>(p.weight));
    if (vectors) launch_tiles<T, width>(p, stream);
    else launch_tiles<T, 1>(p, stream);
  }
  const Scratch<R> scratch(p);
  gpu::sum_shares<R>({scratch.shares, scratch.share_count, p.channels, static_cast<R*>(p.dweight),
                      static_cast<R*>(p.dbias), 1}, stream);
}

}  // namespace

int64_t workspace_timestep_norm_bwd_cuda(const TimestepNormBwdParams& params) {
  int64_t bytes = 0;
  dispatch_dtype(params.dtype, [&](auto type) { bytes = Scratch<Compute<decltype(type)>>(params).bytes(params); });
  return bytes;
}

void launch_timestep_norm_bwd_cuda(const TimestepNormBwdParams& params, void* stream) {
  dispatch_dtype(params.dtype, [&](auto type) { launch<decltype(type)>(params, stream); });
}

}  // namespace megalodon

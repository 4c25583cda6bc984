// Launches CEMA's backward for its binding: cema_bwd.cuh, or cema_mma.cuh on tensor cores.
#include "cema_mma.cuh"

namespace megalodon {
namespace {

using namespace cema;

// Returns the sizes and the call's tensors; the pointers into the workspace stay null.
Gradients make_gradients(const CemaBwdParams& params) {
  Gradients g{};
  g.scan = make_scan(params);
  const bool stateless = params.dy && !params.dstate_out && !params.dstate;
  if (stateless && takes_mma(params, g.scan, params.x, params.dy)) {
    cut_for_mma(g.scan);
    // Two blocks for each of an H100's 132 SMs, if there are enough tiles.
    const int64_t most = ceil_div(g.scan.tiles, kMmaTiles), wanted = 264 / ceil_div(params.channels, kMmaChannels);
    g.shares = LAUNCH_SIZE(cema_shares, wanted < 1 ? 1 : wanted < most ? wanted : most);
  }
  g.scan.whole = takes_two_channels(params.dtype, params.channels, {params.x, params.dy, params.dx});
  g.scan.in = params.x;
  g.scan.omega = params.omega;
  g.scan.initial = params.state;
  g.adjoint = g.scan;
  g.adjoint.reverse = true;
  g.adjoint.by_mma = g.shares && takes_mma(params, g.scan, params.dy, params.dx) && takes_mma_output(g.scan);
  g.adjoint.in = params.dy;
  g.adjoint.out = params.dx;
  g.adjoint.initial = params.dstate_out;
  g.adjoint.final = params.dstate;
  g.adjoint.factor = params.state || params.dstate_out || !params.dy ? params.x : nullptr;
  g.kinds = g.adjoint.factor ? kMostSums : kProductFirst;  // without `factor`: no products, the last of enum Sum
  g.stride = (g.kinds * g.scan.lanes + 1) * g.scan.width;
  g.parts = g.shares ? 1 : g.scan.tiles;
  g.dy = params.dy;
  g.dp = params.dp;
  g.dq = params.dq;
  g.dgamma = params.dgamma;
  g.domega = params.domega;
  return g;
}

// Return the bytes of `slopes` and `lags`, which are used if tensor cores compute the sums; otherwise 0.
int64_t slopes_bytes(const Gradients& g) {
  return g.shares ? workspace_part(4 * g.scan.tiles * g.scan.lanes * g.scan.width * sizeof(float)) : 0;
}
int64_t lags_bytes(const Gradients& g) { return workspace_part(g.shares * kMmaTile * g.scan.width * sizeof(float)); }

// Phases 1 and 2 of cema_mma.cuh: the states that enter the tiles of both scans, and the sums.
void launch_tiles(const Gradients& g, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(g.scan.channels, kMmaChannels)), static_cast<unsigned>(g.shares));
  const auto launch = [&](auto groups) {
    LAUNCH((cema_tiles_kernel<groups>), grid, kMmaThreads, 2 * kMmaWords * sizeof(uint32_t), stream, g);
  };
  if (g.scan.lanes == 4) launch(std::integral_constant<int, 1>{});
  else launch(std::integral_constant<int, 2>{});
  const auto blocks = static_cast<unsigned>(ceil_div(g.scan.lanes * g.scan.width, gpu::kWarp));
  LAUNCH(cema_carry_kernel<float>, blocks, kCarryWarps * gpu::kWarp, 0, stream, Scans{{g.scan, g.scan}});
  LAUNCH(cema_cross_kernel<float>, blocks, kCarryWarps * gpu::kWarp, 0, stream, g);
}

}  // namespace

int64_t workspace_cema_bwd_cuda(const CemaBwdParams& params) {
  const Gradients g = make_gradients(params);
  const int64_t real = params.dtype == DType::f64 ? 8 : 4;
  return table_bytes(params) + 2 * states_bytes(g.scan, params.dtype) + slopes_bytes(g) +
         (g.shares ? powers_bytes(g.scan) : 0) + lags_bytes(g) + sums_bytes(params) + g.parts * g.stride * real;
}

void launch_cema_bwd_cuda(const CemaBwdParams& params, void* stream) {
  if (params.channels == 0) return;
  Gradients g = make_gradients(params);
  g.scan.table = g.adjoint.table = params.workspace;
  char* memory = static_cast<char*>(params.workspace) + table_bytes(params);
  memory = take_states(g.scan, params.dtype, memory);
  memory = take_states(g.adjoint, params.dtype, memory);
  const auto take = [&](int64_t bytes) -> void* {  // null for 0 bytes
    memory += bytes;
    return bytes ? memory - bytes : nullptr;
  };
  g.slopes = take(slopes_bytes(g));
  g.scan.powers = g.adjoint.powers = take(g.shares ? powers_bytes(g.scan) : 0);
  g.lags = take(lags_bytes(g));
  g.adjoint.sums = memory;
  g.sums = memory + sums_bytes(params);
  launch_empty(params.dtype, g.adjoint, stream);  // sequences without tokens
  for_each_group(g.adjoint, [&] {
    g.scan.first_mode = g.adjoint.first_mode;
    launch_table(params, g.scan, static_cast<bool>(g.adjoint.factor), stream);
    if (g.lags) launch_tiles(g, stream);  // `lags` is null unless tensor cores compute the sums
    else launch_states(params.dtype, g.scan, &g.adjoint, stream);
    dispatch_dtype(params.dtype, [&](auto type) {
      using T = decltype(type);
      using R = Compute<T>;
      const int64_t plane = g.scan.lanes * g.scan.width;
      g.adjoint.products = g.sums.as<R>() + kProductFirst * plane;
      g.adjoint.products_stride = g.stride;
      launch_output(params.dtype, g.adjoint, stream);
      if (g.scan.tiles > 0 && !g.lags) {
        const Grid grid(g.scan, kSumModes<R>);
        if (g.dy) LAUNCH((cema_sums_kernel<T, true>), grid.blocks, grid.threads, 0, stream, g);
        else LAUNCH((cema_sums_kernel<T, false>), grid.blocks, grid.threads, 0, stream, g);
      }
      const int64_t left = g.scan.modes - g.scan.first_mode;  // y of the grid: the group's modes, then omega
      const dim3 blocks(static_cast<unsigned>((g.scan.width + gpu::kWarp - 1) / gpu::kWarp),
                        static_cast<unsigned>((left < g.scan.lanes ? left : g.scan.lanes) + 1));
      if constexpr (sizeof(R) == 4) {
        if (g.lags) return LAUNCH((cema_finish_kernel<R, true>), blocks, kFinishWarps * gpu::kWarp, 0, stream, g);
      }
      LAUNCH((cema_finish_kernel<R, false>), blocks, kFinishWarps * gpu::kWarp, 0, stream, g);
    });
  });
}

}  // namespace megalodon

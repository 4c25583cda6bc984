#include "cema_bwd.cuh"

namespace megalodon {
namespace {

using namespace cema;

// Sizes and tensors; no workspace yet.
Gradients make_gradients(const CemaBwdParams& params) {
  Gradients g{};
  g.scan = make_scan(params);
  g.scan.whole = takes_pairs(params.dtype, params.channels, {params.x, params.dy, params.dx});
  g.scan.in = params.x;
  g.scan.omega = params.omega;
  g.scan.initial = params.state;
  g.adjoint = g.scan;
  g.adjoint.reverse = true;
  g.adjoint.in = params.dy;
  g.adjoint.out = params.dx;
  g.adjoint.initial = params.dstate_out;
  g.adjoint.final = params.dstate;
  g.adjoint.factor = params.state || params.dstate_out || !params.dy ? params.x : nullptr;
  g.kinds = g.adjoint.factor ? kMostSums : kProductFirst;
  g.stride = (g.kinds * g.scan.lanes + 1) * g.scan.width;
  g.dy = params.dy;
  g.dp = params.dp;
  g.dq = params.dq;
  g.dgamma = params.dgamma;
  g.domega = params.domega;
  return g;
}

}  // namespace

int64_t workspace_cema_bwd_cuda(const CemaBwdParams& params) {
  const Gradients g = make_gradients(params);
  const int64_t real = params.dtype == DType::f64 ? 8 : 4;
  return table_bytes(params) + 2 * states_bytes(params) + sums_bytes(params) + g.scan.tiles * g.stride * real;
}

void launch_cema_bwd_cuda(const CemaBwdParams& params, void* stream) {
  if (params.channels == 0) return;
  Gradients g = make_gradients(params);
  g.scan.table = g.adjoint.table = params.workspace;
  char* memory = static_cast<char*>(params.workspace) + table_bytes(params);
  memory = take_states(g.scan, params, memory);
  memory = take_states(g.adjoint, params, memory);
  g.adjoint.sums = memory;
  g.sums = memory + sums_bytes(params);
  launch_empty(params.dtype, g.adjoint, stream);
  for_each_group(g.adjoint, [&] {
    g.scan.first_mode = g.adjoint.first_mode;
    launch_table(params, g.scan, g.adjoint.factor != nullptr, stream);
    launch_states(params.dtype, g.scan, &g.adjoint, stream);
    dispatch_dtype(params.dtype, [&](auto type) {
      using T = decltype(type);
      using R = Compute<T>;
      const int64_t plane = g.scan.lanes * g.scan.width;
      g.adjoint.products = static_cast<R*>(g.sums) + kProductFirst * plane;
      g.adjoint.products_stride = g.stride;
      launch_output(params.dtype, g.adjoint, stream);
      if (g.scan.tiles > 0) {
        const Grid grid(g.scan, kSumModes<R>);
        if (g.dy) LAUNCH((cema_sums_kernel<T, true>), grid.blocks, grid.threads, 0, stream, g);
        else LAUNCH((cema_sums_kernel<T, false>), grid.blocks, grid.threads, 0, stream, g);
      }
      const int64_t left = g.scan.modes - g.scan.first_mode;
      const dim3 blocks(static_cast<unsigned>((g.scan.width + gpu::kWarp - 1) / gpu::kWarp),
                        static_cast<unsigned>((left < g.scan.lanes ? left : g.scan.lanes) + 1));
      LAUNCH(cema_finish_kernel<R>, blocks, kFinishWarps * gpu::kWarp, 0, stream, g);
    });
  });
}

}  // namespace megalodon

// Launches CEMA's forward for its binding: the phases of cema.cuh, or cema_step.cuh for short sequences.
#include "cema.cuh"
#include "cema_step.cuh"

namespace megalodon {
namespace {

using namespace cema;

// Returns true if one launch that visits each sequence from start to end is faster than a scan of four launches: for
// up to 4 positions per sequence or, if there is little work, up to 64.
bool has_few_steps(const CemaFwdParams& p) {
  if (p.ends_only) return false;
  const int64_t T = p.sequences.tokens, S = p.sequences.count;
  return S > 0 && p.modes <= kMostModes && (T <= 4 * S || (T <= 64 * S && T * p.channels * p.modes <= 1 << 22));
}

// Returns a scan with sizes and tensors, but without workspace.
Scan make_forward(const CemaFwdParams& params) {
  Scan scan = make_scan(params);
  scan.by_mma = !params.ends_only && takes_mma(params, scan, params.x, params.y) && takes_mma_output(scan);
  if (scan.by_mma) cut_for_mma(scan);
  scan.whole = takes_two_channels(params.dtype, params.channels, {params.x, params.y});
  scan.in = params.x;
  scan.out = params.y;
  scan.omega = params.omega;
  scan.initial = params.state;
  scan.final = params.state_out;
  return scan;
}

void launch_steps(const CemaFwdParams& params, void* stream) {
  int lanes = 1;
  while (lanes < params.modes) lanes *= 2;
  const int64_t blocks = (params.channels * lanes + kStepThreads - 1) / kStepThreads;
  // At most about 8 blocks per SM: if there are more sequences, a block takes several.
  const int64_t rows = blocks < 1024 ? 1024 / blocks : 1;
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(rows < params.sequences.count ? rows : params.sequences.count));
  dispatch_dtype(params.dtype, [&](auto type) {
    LAUNCH(cema_step_kernel<decltype(type)>, grid, kStepThreads, 0, stream, params, lanes);
  });
}

}  // namespace

int64_t workspace_cema_fwd_cuda(const CemaFwdParams& params) {
  if (has_few_steps(params)) return 0;
  const Scan scan = make_forward(params);
  return table_bytes(params) + states_bytes(scan, params.dtype) +
         (scan.by_mma ? powers_bytes(scan) : sums_bytes(params));
}

void launch_cema_fwd_cuda(const CemaFwdParams& params, void* stream) {
  if (params.channels == 0 || (params.sequences.tokens == 0 && params.sequences.count == 0)) return;
  if (has_few_steps(params)) return launch_steps(params, stream);
  Scan scan = make_forward(params);
  scan.table = params.workspace;
  char* const memory = static_cast<char*>(params.workspace) + table_bytes(params);
  char* const rest = take_states(scan, params.dtype, memory);
  (scan.by_mma ? scan.powers.data : scan.sums.data) = rest;
  launch_empty(params.dtype, scan, stream);
  for_each_group(scan, [&] {
    launch_table(params, scan, params.state != nullptr, stream);
    launch_states(params.dtype, scan, nullptr, stream);
    if (params.ends_only) launch_ends(params.dtype, scan, stream);
    else launch_output(params.dtype, scan, stream);
  });
}

}  // namespace megalodon

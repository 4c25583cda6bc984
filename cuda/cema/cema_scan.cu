// Sizes of a scan, its parts of the workspace, and its launches, for cema_fwd.cu and cema_bwd.cu.
#include "cema_scan.cuh"

#include "cema_ends.cuh"

namespace megalodon {
namespace cema {
namespace {

// Tensor cores are used on GPUs that have this much shared memory for a block: the A100 and its successors. On other
// GPUs they would take longer than the scans, by operation counts (bench/predict.py): there tensor cores and memory are
// slower relative to the other units.
constexpr size_t kMmaShared = 160 << 10;

constexpr int64_t kMostBlocks = 65535;  // in a grid's y

int64_t real_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

template <class F>
void dispatch_lanes(int64_t lanes, F&& f) {
  switch (lanes) {
    case 4: return f(std::integral_constant<int, 4>{});
    case 8: return f(std::integral_constant<int, 8>{});
    case 16: return f(std::integral_constant<int, 16>{});
    default: return f(std::integral_constant<int, kMostModes>{});
  }
}

template <class T, bool kProducts, bool kInput>
void launch_output_of(const Scan& scan, void* stream) {
  dispatch_lanes(scan.lanes, [&](auto lanes) {
    // 8 modes per thread if registers suffice.
    constexpr int modes = lanes == 4 || kProducts || sizeof(T) == 8 || (lanes == 32 && sizeof(T) == 4) ? 4 : 8;
    const Grid grid(scan, modes);
    LAUNCH((cema_output_kernel<T, modes, lanes / modes, kProducts, kInput>), grid.blocks, grid.threads, 0, stream,
           scan);
  });
}

// Calls f with the number of modes per thread of a kernel that only advances states, as an integral_constant.
template <class T, class F>
void dispatch_modes(const Scan& scan, F&& f) {
  if constexpr (sizeof(T) < 8) {
    if (scan.lanes > 4) return f(std::integral_constant<int, 8>{});
  }
  f(std::integral_constant<int, 4>{});
}

}  // namespace

Scan make_scan(const CemaParams& params) {
  Scan scan{};
  scan.sequences = params.sequences;
  scan.channels = params.channels;
  scan.modes = params.modes;
  scan.width = ceil_div(params.channels, 2) * 2;
  const int64_t T = params.sequences.tokens, work = T * params.channels * params.modes;
  // Longer tiles mean fewer states, but fewer threads: tiles grow with the square root of the work.
  for (scan.tile = kLeastTile; scan.tile < kMostTile && work >> 16 >= scan.tile * scan.tile;) scan.tile *= 2;
  scan.tile = LAUNCH_SIZE(cema_tile, scan.tile);
  scan.tiles = ceil_div(T, scan.tile);
  for (scan.lanes = 4; scan.lanes < kMostModes && scan.lanes < params.modes;) scan.lanes *= 2;
  return scan;
}

// Requires bf16, at least two tiles, and sequences of whole tiles without padding or states. One tile would fill only
// 1/8 of a product of the backward's sums.
bool takes_mma(const CemaParams& params, const Scan& scan, const void* from, const void* to) {
  const Sequences& sequences = params.sequences;
  const bool dense = !sequences.spans && sequences.row_length % kMmaTile == 0;
  const auto aligned = [](const void* tensor) { return gpu::aligned<8>(static_cast<const gpu::bf16*>(tensor)); };
  const bool eighths = params.channels > 0 && params.channels % 8 == 0 && aligned(from) && aligned(to);
  return params.dtype == DType::bf16 && dense && !params.state && eighths && scan.tile >= kMmaTile &&
         sequences.tokens >= 2 * kMmaTile && gpu::max_shared_bytes() >= kMmaShared;
}

// Requires tokens for half of a product's rows, and 5 to 16 modes: 4 are cheap to scan, 17 need too many registers.
bool takes_mma_output(const Scan& scan) {
  const int64_t tokens = scan.sequences.tokens, block_tokens = kMmaRows * kMmaTile;
  return scan.lanes > 4 && scan.modes <= 16 && 2 * tokens >= block_tokens && tokens <= kMostBlocks * block_tokens;
}

void cut_for_mma(Scan& scan) {
  scan.tile = kMmaTile;
  scan.tiles = scan.sequences.tokens / kMmaTile;
}

int64_t table_bytes(const CemaParams& params) {
  const Scan scan = make_scan(params);
  return workspace_part((kPlanes + kBasis) * scan.lanes * scan.width * real_bytes(params.dtype));
}

int64_t states_bytes(const Scan& scan, DType dtype) {
  return workspace_part(scan.tiles * scan.lanes * scan.width * 2 * real_bytes(dtype)) + workspace_part(scan.tiles * 4);
}

int64_t powers_bytes(const Scan& scan) {
  return workspace_part(2 * kPowers * scan.lanes * scan.width * sizeof(float));
}

int64_t sums_bytes(const CemaParams& params) {
  const Scan scan = make_scan(params);
  const int64_t bytes = params.sequences.tokens * scan.channels * real_bytes(params.dtype);
  return params.modes > kMostModes ? workspace_part(bytes) : 0;
}

char* take_states(Scan& scan, DType dtype, char* memory) {
  const int64_t bytes = states_bytes(scan, dtype);
  scan.states = memory;
  scan.stops = reinterpret_cast<int32_t*>(memory + bytes - workspace_part(scan.tiles * 4));
  return memory + bytes;
}

void launch_table(const CemaParams& params, const Scan& scan, bool carried, void* stream) {
  const auto launch = [&](auto real) {
    using R = decltype(real);
    const auto blocks = static_cast<unsigned>(ceil_div(scan.lanes * scan.width, kThreads));
    LAUNCH(cema_table_kernel<R>, blocks, kThreads, 0, stream, scan, static_cast<const R*>(params.p),
           static_cast<const gpu::Complex<R>*>(params.q), static_cast<const gpu::Complex<R>*>(params.gamma), carried);
  };
  params.dtype == DType::f64 ? launch(double{}) : launch(float{});
}

void launch_states(DType dtype, const Scan& a, const Scan* b, void* stream) {
  if (a.tiles <= 1) return;  // no state enters the only tile
  const Scans scans{{a, b ? *b : a}};
  const int count = b ? 2 : 1;
  dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (a.by_mma) {
      launch_mma_local(a, stream);
    } else {
      dispatch_modes<T>(a, [&](auto modes) {
        const Grid grid(a, modes, count);
        LAUNCH((cema_local_kernel<T, modes>), grid.blocks, grid.threads, 0, stream, scans);
      });
    }
    const dim3 grid(static_cast<unsigned>(ceil_div(a.lanes * a.width, gpu::kWarp)), static_cast<unsigned>(count));
    LAUNCH(cema_carry_kernel<Compute<T>>, grid, kCarryWarps * gpu::kWarp, 0, stream, scans);
  });
}

void launch_output(DType dtype, const Scan& scan, void* stream) {
  if (scan.tiles == 0) return;
  if (scan.by_mma) return launch_mma_output(scan, stream);
  dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (!scan.in) launch_output_of<T, true, false>(scan, stream);
    else if (scan.factor) launch_output_of<T, true, true>(scan, stream);
    else launch_output_of<T, false, true>(scan, stream);
  });
}

void launch_ends(DType dtype, const Scan& scan, void* stream) {
  if (scan.tiles == 0) return;
  dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    dispatch_modes<T>(scan, [&](auto modes) {
      const Grid grid(scan, modes);
      LAUNCH((cema_ends_kernel<T, modes>), grid.blocks, grid.threads, 0, stream, scan);
    });
  });
}

void launch_empty(DType dtype, const Scan& scan, void* stream) {
  const Sequences& sequences = scan.sequences;
  const bool all_full = !sequences.spans && sequences.tokens > 0;
  if (all_full || sequences.count == 0 || !scan.final) return;
  const auto blocks = static_cast<unsigned>(sequences.count);
  if (dtype == DType::f64) LAUNCH(cema_empty_kernel<double>, blocks, kThreads, 0, stream, scan);
  else LAUNCH(cema_empty_kernel<float>, blocks, kThreads, 0, stream, scan);
}

}  // namespace cema
}  // namespace megalodon

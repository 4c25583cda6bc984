// Launches layer norm and RMS norm for their binding.
#include "layer_norm.cuh"

namespace megalodon {
namespace {

using namespace layer_norm;

// Calls launch(type, n, kWhole) with the dtype and the vectors that D and the alignment of the tensors allow.
template <class Launch>
void choose_vectors(const LayerNormParams& p, std::initializer_list<const void*> tensors,
                    std::initializer_list<const void*> parameters, Launch&& launch) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    using R = Compute<T>;
    constexpr int n = gpu::kVectorWidth<T>;
    bool whole = p.channels % n == 0;
    for (const void* tensor : tensors) whole = whole && gpu::aligned<n>(static_cast<const T*>(tensor));
    for (const void* parameter : parameters)
      whole = whole && gpu::aligned<gpu::kVectorWidth<R>>(static_cast<const R*>(parameter));
    if (whole) launch(type, std::integral_constant<int, n>{}, std::true_type{});
    else launch(type, std::integral_constant<int, 1>{}, std::false_type{});
  });
}

unsigned threads_for(int64_t channels, int n) {
  const int64_t threads = round_up(ceil_div(channels, n), gpu::kWarp);
  return static_cast<unsigned>(threads < kMaxThreads ? threads : kMaxThreads);
}

int64_t real_bytes(const LayerNormParams& p) { return p.dtype == DType::f64 ? 8 : 4; }

Parts make_parts(const LayerNormBwdParams& p) {
  const int64_t needed = ceil_div(p.rows, kMaxParts);
  const int64_t rows = LAUNCH_SIZE(norm_part, needed < kLeastRows ? kLeastRows : needed);
  const bool in_shared = 2 * p.channels * real_bytes(p) <= LAUNCH_SIZE(norm_sums, kMostSums);
  return {rows, ceil_div(p.rows, rows), in_shared};
}

}  // namespace

int64_t workspace_layer_norm_fwd_cuda(const LayerNormFwdParams&) { return 0; }

void launch_layer_norm_fwd_cuda(const LayerNormFwdParams& p, void* stream) {
  if (p.rows * p.channels == 0) return;
  choose_vectors(p, {p.x, p.y}, {p.weight, p.bias}, [&](auto type, auto n, auto whole) {
    const int64_t most = LAUNCH_SIZE(norm_blocks, kMaxBlocks), blocks = p.rows < most ? p.rows : most;
    LAUNCH((layer_norm_fwd_kernel<decltype(type), n, whole>), static_cast<unsigned>(blocks),
           threads_for(p.channels, n), 0, stream, p);
  });
}

// The shares, and D numbers for a sum that the caller does not want.
int64_t workspace_layer_norm_bwd_cuda(const LayerNormBwdParams& p) {
  return (2 * make_parts(p).count + 1) * p.channels * real_bytes(p);
}

void launch_layer_norm_bwd_cuda(const LayerNormBwdParams& p, void* stream) {
  if (p.channels == 0) return;
  const Parts parts = make_parts(p);
  choose_vectors(p, {p.x, p.dy, p.dx}, {p.weight, p.workspace}, [&](auto type, auto n, auto whole) {
    using R = Compute<decltype(type)>;
    const bool wanted = p.dweight || p.dbias;
    if (parts.count > 0) {
      const int64_t bytes = wanted && parts.in_shared ? 2 * p.channels * static_cast<int64_t>(sizeof(R)) : 0;
      LAUNCH((layer_norm_bwd_kernel<decltype(type), n, whole>), static_cast<unsigned>(parts.count),
             threads_for(p.channels, n), static_cast<size_t>(bytes), stream, p, parts);
    }
    if (!wanted) return;
    R* const workspace = static_cast<R*>(p.workspace);
    const auto or_unwanted = [&](void* result) {
      return result ? static_cast<R*>(result) : workspace + 2 * parts.count * p.channels;
    };
    gpu::sum_shares<R>({workspace, parts.count, p.channels, or_unwanted(p.dweight), or_unwanted(p.dbias), 1}, stream);
  });
}

}  // namespace megalodon

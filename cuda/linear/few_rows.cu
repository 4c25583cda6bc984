// Launches products of few rows for their binding.
#include "few_rows.cuh"

namespace megalodon {
namespace {

using namespace linear;

template <class T, int n>
void launch(const LinearFewRowsParams& p, void* stream) {
  const bool shared = p.outputs < LAUNCH_SIZE(linear_shared, kSharedBelow);
  const int64_t blocks = shared ? p.outputs : ceil_div(p.outputs, kWarps);
  const int64_t groups = ceil_div(p.rows, kMostRows);
  if (blocks > INT32_MAX || groups > UINT16_MAX)  // the most that a grid has
    gpu::refuse("linear: `x` and `weight` must have fewer than 2^19 and 2^33 rows, got " + std::to_string(p.rows) +
                " and " + std::to_string(p.outputs) + ".");
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(groups));
  if (p.rows == 1) LAUNCH((linear_few_rows_kernel<T, n, 1>), grid, kThreads, 0, stream, p, shared);
  else LAUNCH((linear_few_rows_kernel<T, n, kMostRows>), grid, kThreads, 0, stream, p, shared);
}

}  // namespace

int64_t workspace_linear_few_rows_cuda(const LinearFewRowsParams&) { return 0; }

void launch_linear_few_rows_cuda(const LinearFewRowsParams& p, void* stream) {
  if (p.rows * p.outputs == 0) return;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int n = gpu::kVectorWidth<T>;
    const auto aligned = [](const void* tensor) { return gpu::aligned<n>(static_cast<const T*>(tensor)); };
    if (p.inputs % n == 0 && aligned(p.x) && aligned(p.weight)) launch<T, n>(p, stream);
    else launch<T, 1>(p, stream);
  });
}

}  // namespace megalodon

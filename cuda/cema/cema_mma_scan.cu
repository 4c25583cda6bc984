// Launches the kernels of cema_mma_scan.cuh, for cema_scan.cu.
#include "cema_mma_scan.cuh"

namespace megalodon {
namespace cema {
namespace {

// Calls f with the launch's grid and, as an integral_constant, the number of groups of 4 lanes: 2 for 8 lanes (5 to 8
// modes), 4 for 16 lanes (9 to 16 modes). Scans with other numbers of lanes do not come here (cema_scan.cu).
template <class F>
void dispatch_groups(const Scan& scan, F&& f) {
  const dim3 grid(static_cast<unsigned>(ceil_div(scan.channels, kMmaChannels)),
                  static_cast<unsigned>(ceil_div(scan.tiles, kMmaRows)));
  if (scan.lanes == 8) f(grid, std::integral_constant<int, 2>{});
  else f(grid, std::integral_constant<int, 4>{});
}

}  // namespace

void launch_mma_local(const Scan& scan, void* stream) {
  dispatch_groups(scan, [&](dim3 grid, auto groups) {
    LAUNCH((cema_mma_local_kernel<groups>), grid, kMmaThreads, kScanWords * sizeof(uint32_t), stream, scan);
  });
}

void launch_mma_output(const Scan& scan, void* stream) {
  dispatch_groups(scan, [&](dim3 grid, auto groups) {
    LAUNCH((cema_mma_output_kernel<groups>), grid, kMmaThreads, kScanWords * sizeof(uint32_t), stream, scan);
  });
}

}  // namespace cema
}  // namespace megalodon

// Phase 3 of cema.cuh: the states at tiles' ends -> the states that enter tiles, in place.
//
// Grid: a block takes 32 modes and channels, each of its 16 warps 8 tiles: 128 tiles per round. The states at the
// tiles' ends stay in registers until the entering states replace them in memory. Neighbouring lanes take neighbouring
// modes. Each warp carries zero over its tiles; then all warps carry the round's entering state over the warps before
// them. Shared memory: 4.2 KB (8.3 for double).
#pragma once

#include "cema.cuh"

namespace megalodon {
namespace cema {

constexpr int kCarryWarps = 16;

struct Scans {
  Scan scan[2];  // chosen by blockIdx.y
};

// z -> A z + e, with A in two parts.
template <class R>
struct Matrix {
  R entry[8];

  GPU_INLINE Matrix(const Scan& scan, int plane, int64_t at) {
    GPU_UNROLL
    for (int i = 0; i < 8; ++i) entry[i] = scan.plane<R>(plane + i)[at];
  }
  GPU_INLINE Pair<R> operator()(Pair<R> z, Pair<R> e) const {
    return {entry[0] * z.first + (entry[1] * z.second + (entry[4] * z.first + (entry[5] * z.second + e.first))),
            entry[2] * z.first + (entry[3] * z.second + (entry[6] * z.first + (entry[7] * z.second + e.second)))};
  }
};

// Calls visit(tile, entering state, end state) for each of the warp's tiles, after storing the entering state.
template <class R, class Visit>
GPU_INLINE void carry(const Scan& scan, Visit&& visit) {
  SMEM_ARRAY(Pair<R>, ends, kCarryWarps * gpu::kWarp);
  SMEM_ARRAY(int, stopped, kCarryWarps);
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const int64_t pairs = scan.lanes * scan.width, pair = int64_t{blockIdx.x} * gpu::kWarp + lane;
  const int64_t at = pair < pairs ? pair : 0;
  const Matrix<R> over_tile(scan, kTileMatrix, at), over_span(scan, kSpanMatrix, at);
  Pair<R> enters{0, 0};  // the round
  for (int64_t round = 0; round < scan.tiles; round += kCarryWarps * kSpan) {
    const int64_t begin = round + warp * kSpan;
    const auto tile = [&](int i) { return scan.reverse ? scan.tiles - 1 - (begin + i) : begin + i; };
    const int count = static_cast<int>(scan.tiles - begin < kSpan ? scan.tiles - begin : kSpan);
    Pair<R> end[kSpan];
    bool stops[kSpan];
    GPU_UNROLL
    for (int i = 0; i < kSpan; ++i) {
      if (i >= count) continue;
      end[i] = pair < pairs ? gpu::ld<Pair<R>>(scan.pairs<R>(tile(i), at, 0)) : Pair<R>{0, 0};
      stops[i] = scan.stops[tile(i)];
    }
    Pair<R> z{0, 0};
    bool any = false;
    GPU_UNROLL
    for (int i = 0; i < kSpan; ++i) {
      if (i >= count) continue;
      z = stops[i] ? end[i] : over_tile(z, end[i]);
      any = any || stops[i];
    }
    gpu::st_shared(&ends[threadIdx.x], z);
    if (lane == 0) stopped[warp] = any;
    __syncthreads();
    z = enters;
    for (int w = 0; w < kCarryWarps; ++w) {
      if (w == warp) z = enters;
      const auto end_of_warp = gpu::ld_shared<Pair<R>>(&ends[w * gpu::kWarp + lane]);
      enters = stopped[w] ? end_of_warp : over_span(enters, end_of_warp);
    }
    Pair<R> enters_tile[kSpan];
    GPU_UNROLL
    for (int i = 0; i < kSpan; ++i) {
      if (i >= count) continue;
      if (pair < pairs) gpu::st(scan.pairs<R>(tile(i), at, 0), z);
      enters_tile[i] = z;
      z = stops[i] ? end[i] : over_tile(z, end[i]);
    }
    GPU_UNROLL
    for (int i = 0; i < kSpan; ++i)
      if (i < count) visit(tile(i), enters_tile[i], end[i]);
    __syncthreads();
  }
}

template <class R>
__global__ void __launch_bounds__(kCarryWarps* gpu::kWarp) cema_carry_kernel(Scans scans) {
  carry<R>(scans.scan[blockIdx.y], [](int64_t, Pair<R>, Pair<R>) {});
}

}  // namespace cema
}  // namespace megalodon

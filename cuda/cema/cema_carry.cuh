// Phase 3 of cema.cuh: replaces the states at the tiles' ends by the states that enter the tiles.
//
// Grid: x over 32 series, y over scans. A series is a mode of a channel; neighbouring lanes take neighbouring modes. A
// block has 16 warps. A warp takes 8 tiles, so the block takes 128 tiles per round. Phases of a round:
//   1. a warp keeps the states at its tiles' ends in registers and carries a zero state over its tiles;
//   2. every warp carries the state that enters the round over the warps before it, from their results of phase 1;
//   3. a warp carries the resulting state over its tiles and stores the states that enter them.
// Shared memory: 4.2 KB (8.3 for double).
#pragma once

#include "cema.cuh"

namespace megalodon {
namespace cema {

constexpr int kCarryWarps = 16;

struct Scans {
  Scan scan[2];  // chosen by blockIdx.y
};

// The map z -> A z + e of pairs. A, of 2 x 2, is the sum of its entries rounded to R, entry[0 .. 3] by rows, and of
// their rounding errors, entry[4 .. 7].
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
  const int64_t size = scan.lanes * scan.width, index = int64_t{blockIdx.x} * gpu::kWarp + lane;
  const int64_t at = index < size ? index : 0;
  const Matrix<R> over_tile(scan, kTileMatrix, at), over_warp(scan, kWarpMatrix, at);
  Pair<R> round_state{0, 0};  // enters the round
  for (int64_t round = 0; round < scan.tiles; round += kCarryWarps * kTilesPerWarp) {
    const int64_t begin = round + warp * kTilesPerWarp;
    const auto tile = [&](int i) { return scan.reverse ? scan.tiles - 1 - (begin + i) : begin + i; };
    const int count = static_cast<int>(scan.tiles - begin < kTilesPerWarp ? scan.tiles - begin : kTilesPerWarp);
    Pair<R> end[kTilesPerWarp];
    bool stops[kTilesPerWarp];
    GPU_UNROLL
    for (int i = 0; i < kTilesPerWarp; ++i) {
      if (i >= count) continue;
      end[i] = index < size ? gpu::ld<Pair<R>>(scan.state<R>(tile(i), at, 0)) : Pair<R>{0, 0};
      stops[i] = scan.stops[tile(i)];
    }
    Pair<R> z{0, 0};  // phase 1
    bool any_stop = false;
    GPU_UNROLL
    for (int i = 0; i < kTilesPerWarp; ++i) {
      if (i >= count) continue;
      z = stops[i] ? end[i] : over_tile(z, end[i]);
      any_stop = any_stop || stops[i];
    }
    gpu::st_shared(&ends[threadIdx.x], z);
    if (lane == 0) stopped[warp] = any_stop;
    __syncthreads();
    z = round_state;  // phase 2
    for (int w = 0; w < kCarryWarps; ++w) {
      if (w == warp) z = round_state;
      const auto end_of_warp = gpu::ld_shared<Pair<R>>(&ends[w * gpu::kWarp + lane]);
      round_state = stopped[w] ? end_of_warp : over_warp(round_state, end_of_warp);
    }
    Pair<R> tile_state[kTilesPerWarp];  // phase 3
    GPU_UNROLL
    for (int i = 0; i < kTilesPerWarp; ++i) {
      if (i >= count) continue;
      if (index < size) gpu::st(scan.state<R>(tile(i), at, 0), z);
      tile_state[i] = z;
      z = stops[i] ? end[i] : over_tile(z, end[i]);
    }
    GPU_UNROLL
    for (int i = 0; i < kTilesPerWarp; ++i)
      if (i < count) visit(tile(i), tile_state[i], end[i]);
    __syncthreads();
  }
}

template <class R>
__global__ void __launch_bounds__(kCarryWarps* gpu::kWarp) cema_carry_kernel(Scans scans) {
  carry<R>(scans.scan[blockIdx.y], [](int64_t, Pair<R>, Pair<R>) {});
}

}  // namespace cema
}  // namespace megalodon

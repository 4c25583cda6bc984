// The backward's sums on tensor cores, for bf16 without states: replaces the local scans and cema_sums_kernel. Launched
// by cema_bwd.cu.
//
// For each tile, from its x_0 .. x_127 and dy_0 .. dy_127, which are exact as operands, the kernels compute
//
//   e = sum_j q^(127-j) x_j     r = sum_j q^j dy_j     the ends of the two local scans (phase 2 of cema.cuh)
//   e' = q de/dq                r' = q dr/dq           their slopes, sums of (127-j) q^(127-j) x_j and of j q^j dy_j
//   c_i = sum_t dy_t x_(t-i)                           for each lag i < 128; c is also summed over tiles
//
// Let u be the state that enters the tile, k the state that enters it in the adjoint, and P(z) = sum_i c_i z^i. Then
// the sums of cema_bwd.cuh are
//
//   sum_t dy_t u_t = P(q) + q r u        sum_t dy_t w_t + K w_end = P'(q) + (r + r') u + k (e' + 128 q^128 u)
//
//   1. cema_tiles_kernel:   e and r, stored as the states; e' and r'; c, for each share of the tiles
//   2. cema_carry_kernel:   e -> u
//      cema_cross_kernel:   r -> k by the same carry, and the sums with u and k
//   3. the output's kernel: dx from k, by cema_mma_scan.cuh where it can
//      cema_finish_kernel:  adds P(q) and P'(q), by Horner's rule
//
// Grid of cema_tiles_kernel: x over 16 channels, y over shares; a block takes 8 tiles at once, a warp two channels.
// Grid of cema_cross_kernel: the carry's; each of warps 0 to 3 adds up one kind of the warps' sums.
// Registers: at most 128 (16 warps per SM). Shared memory: 90.3 KB, and 12.1 KB in cema_cross_kernel.
// H100, (B 8, L 2048, D 1024, N 16):
//   tiles      4.2 M products, 36 us at 1024 multiply-adds per cycle and SM; 2.8 warp instructions per channel and
//              position, 51 us; x, dy 67 MB in, ends and slopes 67 MB out, 40 us
//   cross      102 MB, 30 us
//   backward   at least 113 us (bench.predict), and 75 MB of workspace
// Example: L = 256, T = 512: 4 tiles, one group of 8; u = 0 in tiles 0 and 2, k = 0 in tiles 1 and 3.
//
// Operands of the products:
//   lags    c_(i+16j) = sum_t dy_(t+i) x_(t-16j). For each 16 positions t this is one product of A[i][t] = dy_(t+i), 16
//           x 16, and B[t][j] = x_(t-16j), 16 x 8, zero for positions outside the tile. A lane has 4 of the 128 lags.
//   ends    A has 16 positions of 8 tiles: 8 rows of x, then 8 rows of dy, the last position first. B has q^j and j
//           q^j, j = 15 .. 0, as pairs (cema.cuh) of 4 modes, in three parts of bf16 that sum to a float. Earlier
//           positions' sums, times q^16, are added in float, because tensor cores truncate. A lane has all ends and
//           slopes of a tile and mode.
//   words   A word of shared memory holds x, or dy, of channels 2p and 2p + 1 at one position; a register joins halves
//           of two words. Rows k = 2t, 2t + 1, 2t + 8, 2t + 9 of a product are positions t, t + 4, t + 8, t + 12, so
//           that four lanes read neighbouring words.
#pragma once

#include "cema_bwd.cuh"
#include "cema_carry.cuh"
#include "cema_mma_parts.cuh"

namespace megalodon {
namespace cema {

constexpr int kMmaTiles = 8;  // per block at once: half the rows of A
// Sizes in words of shared memory: a block of positions, a tile with zeros after its end, a channel pair, all pairs.
constexpr int kBlockPitch = kBlock + 4, kTilePitch = (kMmaBlocks + 1) * kBlockPitch;
constexpr int kChannelPairPitch = kMmaTiles * kTilePitch + 4, kMmaWords = kMmaWarps * kChannelPairPitch;

// Returns the word of position s in a tile. 8 positions that are 16 positions or a tile apart, and the 4 positions from
// each of them on, are in different banks.
GPU_INLINE int word_of(int s) { return s / kBlock * kBlockPitch + s % kBlock; }

// Adds the lags of a tile. In lane 4 g + t, sum[e][i] is c of channel e and lag g + 8 (i / 2) + 16 (2 t + i % 2).
GPU_INLINE void add_lags(float (&sum)[2][4], const uint32_t* x, const uint32_t* dy) {
  const int g = threadIdx.x % gpu::kWarp / 4, t = threadIdx.x % 4;
  const uint32_t* from[4];
  GPU_UNROLL
  for (int m = 0; m < 4; ++m) from[m] = dy + word_of(t + g + 4 * m);
  const auto dy_word = [&](int block, int m) { return from[m % 4][(block + m / 4) * kBlockPitch]; };
  const uint32_t* const xs = x + t - g * kBlockPitch;
  float d[2][4] = {};
  uint32_t a[2][4];
  a[0][3] = gpu::join_halves<0>(dy_word(0, 0), dy_word(0, 1));
  a[1][3] = gpu::join_halves<1>(dy_word(0, 0), dy_word(0, 1));
  GPU_UNROLL
  for (int block = 0; block < kMmaBlocks; ++block) {
    uint32_t dy_words[4], x_words[4];  // positions t + 8, + 12, + 16, + 20 of dy, and t, + 4, + 8, + 12 of x
    GPU_UNROLL
    for (int m = 0; m < 4; ++m) {
      dy_words[m] = dy_word(block, m + 2);
      x_words[m] = g <= block ? xs[block * kBlockPitch + 4 * m] : 0;
    }
    const auto multiply = [&](auto channel) {
      constexpr int e = decltype(channel)::value;
      a[e][0] = a[e][3];
      a[e][1] = a[e][2] = gpu::join_halves<e>(dy_words[0], dy_words[1]);
      a[e][3] = gpu::join_halves<e>(dy_words[2], dy_words[3]);
      const uint32_t b[2] = {gpu::join_halves<e>(x_words[0], x_words[1]), gpu::join_halves<e>(x_words[2], x_words[3])};
      const auto half = [=](const uint32_t* words, int s) {
        return reinterpret_cast<const gpu::bf16*>(words + word_of(s)) + e;
      };
      gpu::check_a<gpu::bf16>(a[e], [=](int i, int k) { return half(dy, block * kBlock + step_of(k) + i); });
      gpu::check_b<gpu::bf16>(b, [=](int k, int j) {
        return j <= block ? half(x, (block - j) * kBlock + step_of(k)) : nullptr;
      });
      gpu::mma_16816<gpu::bf16>(d[e], a[e], b);
    };
    multiply(std::integral_constant<int, 0>{});
    multiply(std::integral_constant<int, 1>{});
  }
  GPU_UNROLL
  for (int i = 0; i < 4; ++i) {
    sum[0][i] += d[0][i];
    sum[1][i] += d[1][i];
  }
}

// Stores ends and slopes of the tiles [first, first + kMmaTiles) and 4 * groups modes from `mode` on. `channel` is
// number e of the warp's two.
template <int groups, int e>
GPU_INLINE void store_ends(const Gradients& p, int64_t first, int mode, int64_t channel, const uint32_t* x,
                           const uint32_t* dy) {
  const int g = threadIdx.x % gpu::kWarp / 4, t = threadIdx.x % 4;
  const Powers<groups, 2> powers(p.scan, mode, channel);
  float sum[groups][2][4] = {};
#pragma unroll 2
  for (int block = 0; block < kMmaBlocks; ++block) {
    const uint32_t* const xs = x + g * kTilePitch + block * kBlockPitch + t;
    const uint32_t* const dys = dy + g * kTilePitch + (kMmaBlocks - 1 - block) * kBlockPitch + kBlock - 1 - t;
    const uint32_t a[4] = {gpu::join_halves<e>(xs[0], xs[4]), gpu::join_halves<e>(dys[0], dys[-4]),
                           gpu::join_halves<e>(xs[8], xs[12]), gpu::join_halves<e>(dys[-8], dys[-12])};
    gpu::check_a<gpu::bf16>(a, [=](int i, int k) {
      const int s = block * kBlock + step_of(k);
      const uint32_t* const word = i < 8 ? x + i * kTilePitch + word_of(s)
                                         : dy + (i - 8) * kTilePitch + word_of(kMmaTile - 1 - s);
      return reinterpret_cast<const gpu::bf16*>(word) + e;
    });
    float d[groups][2][4] = {};
    powers.multiply(a, d);
    powers.append(sum, d);
  }
  if (first + g >= p.scan.tiles) return;
  GPU_UNROLL
  for (int n = 0; n < groups; ++n) {
    const int lane_mode = mode + 4 * n + t;
    gpu::st(p.scan.state<float>(first + g, lane_mode, channel), Pair<float>{sum[n][0][0], sum[n][0][1]});
    gpu::st(p.adjoint.state<float>(first + g, lane_mode, channel), Pair<float>{sum[n][0][2], sum[n][0][3]});
    gpu::st(p.slope<float>(0, first + g, lane_mode, channel), Pair<float>{sum[n][1][0], sum[n][1][1]});
    gpu::st(p.slope<float>(1, first + g, lane_mode, channel), Pair<float>{sum[n][1][2], sum[n][1][3]});
  }
}

// 4 * groups is N', or 8 if N' is larger.
template <int groups>
__global__ void __launch_bounds__(kMmaThreads, 2) cema_tiles_kernel(Gradients p) {
  SMEM_DYN(uint32_t, words);
  const Scan& scan = p.scan;
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const int64_t channel = int64_t{blockIdx.x} * kMmaChannels + 2 * warp;
  uint32_t* const x = words + warp * kChannelPairPitch;
  uint32_t* const dy = x + kMmaWords;
  for (int i = 0; i < kMmaTiles / 2; ++i)  // zeros after the tiles of dy
    dy[(lane / kBlock * kMmaTiles / 2 + i) * kTilePitch + word_of(kMmaTile + lane % kBlock)] = 0;
  float lags[2][4] = {};
  for (int64_t first = int64_t{blockIdx.y} * kMmaTiles; first < scan.tiles; first += int64_t{gridDim.y} * kMmaTiles) {
    const TileCopy<kMmaTiles> copy(scan, first, int64_t{blockIdx.x} * kMmaChannels);
    const auto word = [=](int channel_pair, int i, int step) {
      return words + channel_pair * kChannelPairPitch + i * kTilePitch + word_of(step);
    };
    copy.load(scan, scan.in, word);
    copy.load(scan, p.dy, [=](int channel_pair, int i, int step) { return word(channel_pair, i, step) + kMmaWords; });
    const int64_t tile = first + threadIdx.x, tiles_of_row = scan.sequences.row_length / kMmaTile;
    if (blockIdx.x == 0 && threadIdx.x < kMmaTiles && tile < scan.tiles) {
      scan.stops[tile] = tile % tiles_of_row == 0;
      p.adjoint.stops[tile] = (tile + 1) % tiles_of_row == 0;
    }
    __syncthreads();
    if (channel < scan.channels) {
#pragma unroll 1
      for (int i = 0; i < kMmaTiles && first + i < scan.tiles; ++i)
        add_lags(lags, x + i * kTilePitch, dy + i * kTilePitch);
#pragma unroll 1
      for (int mode = 0; mode < scan.lanes; mode += 4 * groups) {
        store_ends<groups, 0>(p, first, mode, channel, x, dy);
        store_ends<groups, 1>(p, first, mode, channel + 1, x, dy);
      }
    }
    __syncthreads();
  }
  if (channel >= scan.channels) return;
  GPU_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int lag = lane / 4 + 8 * (i / 2) + kBlock * (lane % 4 * 2 + i % 2);
    const float both[2] = {lags[0][i], lags[1][i]};
    gpu::store(p.lags.as<float>() + (int64_t{blockIdx.y} * kMmaTile + lag) * scan.width + channel, both);
  }
}

// Replaces r by k. Stores the sums over all tiles of q r u and of (r + r') u + k (e' + 128 q^128 u), by enum Sum.
template <class R>
__global__ void __launch_bounds__(kCarryWarps* gpu::kWarp) cema_cross_kernel(Gradients p) {
  SMEM_ARRAY(R, sums, kProductFirst * kCarryWarps * gpu::kWarp);
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const int64_t size = p.scan.lanes * p.scan.width, index = int64_t{blockIdx.x} * gpu::kWarp + lane;
  const int64_t at = index < size ? index : 0;
  const int64_t mode = at % p.scan.lanes, channel = at / p.scan.lanes;
  const Basis<R> basis(p.scan, mode, channel);
  const Matrix<R> over_tile(p.scan, kTileMatrix, at);
  Pair<R> y_sum{0, 0}, w_sum{0, 0};
  carry<R>(p.adjoint, [&](int64_t k, Pair<R> entering, Pair<R> r) {
    const auto load = [&](const R* source) { return gpu::ld<Pair<R>>(source); };
    auto u = load(p.scan.state<R>(k, at, 0));
    const auto e_slope = load(p.slope<R>(0, k, at, 0));
    const auto r_slope = load(p.slope<R>(1, k, at, 0));
    if (p.scan.stops[k]) u = {0, 0};
    if (p.adjoint.stops[k]) entering = {0, 0};
    const Pair<R> u_later = over_tile(u, {0, 0}), r_u = basis.multiply(r, u), slope_u = basis.multiply(r_slope, u);
    const Pair<R> k_slope = basis.multiply(
        entering, {e_slope.first + kMmaTile * u_later.first, e_slope.second + kMmaTile * u_later.second});
    y_sum = {y_sum.first + r_u.first, y_sum.second + r_u.second};
    w_sum = {w_sum.first + slope_u.first + k_slope.first, w_sum.second + slope_u.second + k_slope.second};
  });
  const auto q_of_y = basis.multiply({basis.q.re + basis.shear, 1}, y_sum);
  const R totals[kProductFirst] = {q_of_y.first, q_of_y.second, w_sum.first + y_sum.first, w_sum.second + y_sum.second};
  GPU_UNROLL
  for (int kind = 0; kind < kProductFirst; ++kind)
    sums[(kind * kCarryWarps + warp) * gpu::kWarp + lane] = totals[kind];
  __syncthreads();
  if (warp >= kProductFirst || index >= size) return;
  R sum = 0;
  for (int w = 0; w < kCarryWarps; ++w) sum += sums[(warp * kCarryWarps + w) * gpu::kWarp + lane];
  p.sums.as<R>()[warp * size + mode * p.scan.width + channel] = sum;
}

}  // namespace cema
}  // namespace megalodon

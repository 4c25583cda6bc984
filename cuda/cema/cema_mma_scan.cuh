// Phases 2 and 4 of cema.cuh on tensor cores, for bf16 and 5 to 16 modes: the outputs of the forward, and dx. Launched
// by cema_mma_scan.cu.
//
// For a block of 16 positions of a tile, with v, the state before the block, and c = gamma p:
//
//   e = sum_j q^(15-j) x_j      v <- q^16 v + e      y_i = sum_(j<=i) k_(i-j) x_j + sum_n Re(c_n q_n^(i+1) v_n)
//
// k is the impulse response: k_i = Re(sum_n c_n q_n^i), plus omega if i = 0. In a product D = A B the rows of A are 16
// tiles. Its columns are x of 16 positions, exact in bf16, or v of 8 modes, as pairs (cema.cuh). The matrices B stay in
// registers, for one channel:
//
//   Powers          16 positions x pairs of 4 modes: q^(15-j), each a sum of three bf16
//   OutputOperands  16 positions x 8 positions: k_(i-j); pairs of 8 modes x 8 positions: the two factors of a pair of v
//                   in Re(c q^(i+1) v)
//
// Grid: x over 16 channels, y over 16 tiles; a warp takes two channels, one after the other.
// Registers: at most 128 (16 warps per SM). Shared memory: 67.7 KB, and 1 KB in phase 4.
// H100, (B 8, L 2048, D 1024, N 16), minimum times:
//   phase 2   memory 15 us: x in, 33.5 MB; states out, 17 MB
//             products 7 us: 0.8 M at 1024 multiply-adds per cycle and SM
//   phase 4   memory 25 us: x and states in, y out, 84 MB
//             products 16 us: 1.8 M
//             instructions 25 us: 1.4 of a warp for each 4 positions of a channel
//   forward   41 us (bench.predict), 17 MB of states, 5 MB of coefficients
// Example: L = 256, T = 512: 4 tiles in the rows of A, and 12 rows of zeros. Tiles 0 and 2 begin a row: v = 0 there.
//
// NaN and infinity: B has zeros where j > i, but zero times NaN is NaN. So if any x of a block is not finite, each y_i
// is computed with zeros instead of the later x.
// Rounding: each number of OutputOperands, and of v in its products, is a sum of two bf16. These have 16 bits; y keeps
// 8. The carried v is summed in float outside of tensor cores, because tensor cores truncate sums.
// Layout: D of the product for e has the layout of A, so v needs no shuffle. A word of shared memory holds x of
// channels 2p and 2p + 1 at one position; a register of A joins halves of two words. Rows k = 2t, 2t + 1, 2t + 8 and
// 2t + 9 of B are positions t, t + 4, t + 8 and t + 12, so that four lanes read neighbouring words. Columns of
// OutputOperands, and so of y, have the same order. y replaces x in shared memory. The adjoint's scan stores its tiles
// there in reverse.
#pragma once

#include "cema_mma_parts.cuh"

namespace megalodon {
namespace cema {

constexpr int kOutputParts = 2;  // bf16 parts of each number of OutputOperands
// Sizes in words of shared memory: a tile, the 16 tiles of a channel pair, all channel pairs.
constexpr int kRowPitch = kMmaTile + 4, kRowsPitch = kMmaRows * kRowPitch + 4, kScanWords = kMmaWarps * kRowsPitch;

// Returns true if no number of A in the warp is an infinity or NaN.
GPU_INLINE bool all_finite(const uint32_t (&a)[4]) {
  uint32_t sum = 0;
  GPU_UNROLL
  for (int i = 0; i < 4; ++i) sum |= (a[i] & 0x7fff7fffu) + 0x00800080u;  // an exponent of ones overflows
  return !__any_sync(gpu::kFullMask, (sum & 0x80008000u) != 0);
}

// Operands for y of a block of one channel. `response`, in shared memory: 16 zeros, then k_0 .. k_15.
template <int groups>
struct OutputOperands {
  uint32_t b_x[2][kOutputParts][2];                // B of 8 positions
  uint32_t b_states[groups / 2][2][kOutputParts][2];  // B of 8 modes and 8 positions

  GPU_INLINE OutputOperands(const Scan& scan, int64_t channel, float* response) {
    const int lane = threadIdx.x % gpu::kWarp, g = lane / 4, t = lane % 4;
    float k[3] = {};  // k_0, k_(step_of(g) + 1) and k_(step_of(g + 8) + 1)
    GPU_UNROLL
    for (int n = 0; n < groups; ++n) {
      const auto plane = [&](int index) { return scan.plane<float>(index)[(4 * n + t) * scan.width + channel]; };
      const float first = plane(kOutFirst), second = plane(kOutSecond), beta = plane(kBeta);
      const float two_shears = plane(kAlpha) - plane(kDelta);
      k[0] += first;
      GPU_UNROLL
      for (int half = 0; half < 2; ++half) {
        const auto power = gpu::ld<Pair<float>>(scan.power<float>(step_of(g + 8 * half) + 1, 4 * n + t, channel));
        // The outputs for the power times the pairs (1, 0) and (0, 1), which are the columns of its matrix.
        float factors[2] = {first * power.first + second * power.second,
                            first * (beta * power.second) + second * (power.first - two_shears * power.second)};
        k[1 + half] += factors[0];
        GPU_UNROLL
        for (int part = 0; part < kOutputParts; ++part) b_states[n / 2][half][part][n % 2] = take_part(factors);
      }
    }
    GPU_UNROLL
    for (int apart = 1; apart < 4; apart *= 2) {
      GPU_UNROLL
      for (int i = 0; i < 3; ++i) k[i] += __shfl_xor_sync(gpu::kFullMask, k[i], apart);
    }
    if (lane < kBlock) response[lane] = 0;
    if (lane == 0) response[kBlock] = k[0] + scan.omega.as<float>()[channel];
    if (t == 0) response[kBlock + step_of(g) + 1] = k[1];
    if (t == 0 && g < 7) response[kBlock + step_of(g + 8) + 1] = k[2];
    __syncwarp();
    GPU_UNROLL
    for (int half = 0; half < 2; ++half) {
      GPU_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float* const at = response + kBlock + step_of(g + 8 * half) - step_of(2 * t + 8 * i);
        float values[2] = {at[0], at[-4]};  // of the positions of rows 2 t and 2 t + 1
        GPU_UNROLL
        for (int part = 0; part < kOutputParts; ++part) b_x[half][part][i] = take_part(values);
      }
    }
  }
  GPU_INLINE void add_inputs(float (&y)[2][4], const uint32_t (&x)[4]) const {
    GPU_UNROLL
    for (int part = kOutputParts - 1; part >= 0; --part) {
      GPU_UNROLL
      for (int half = 0; half < 2; ++half) gpu::mma_16816<gpu::bf16>(y[half], x, b_x[half][part]);
    }
  }
  // Computes the same as add_inputs, but the x after a position cannot make its y NaN.
  GPU_INLINE void add_inputs_step_by_step(float (&y)[2][4], const uint32_t (&x)[4]) const {
    const int t = threadIdx.x % 4;
#pragma unroll 1
    for (int last = 0; last < kBlock; ++last) {
      uint32_t until_last[4];
      GPU_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int step = t + 8 * (i / 2);
        until_last[i] = x[i] & ((step <= last ? 0xffffu : 0) | (step + 4 <= last ? 0xffff0000u : 0));
      }
      float z[2][4] = {};
      add_inputs(z, until_last);
      GPU_UNROLL
      for (int i = 0; i < 8; ++i)
        if (t + 4 * (i % 2) + 8 * (i / 4) == last) y[i / 4][i % 4] = z[i / 4][i % 4];
    }
  }
  GPU_INLINE void add_states(float (&y)[2][4], const float (&v)[groups][1][4]) const {
    GPU_UNROLL
    for (int eight = 0; eight < groups / 2; ++eight) {
      uint32_t high[4], low[4];
      GPU_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float(&pairs)[4] = v[2 * eight + i / 2][0];
        float rest[2] = {pairs[i % 2 * 2], pairs[i % 2 * 2 + 1]};
        high[i] = take_part(rest);
        low[i] = take_part(rest);
      }
      GPU_UNROLL
      for (int half = 0; half < 2; ++half) {
        gpu::mma_16816<gpu::bf16>(y[half], low, b_states[eight][half][0]);
        gpu::mma_16816<gpu::bf16>(y[half], high, b_states[eight][half][1]);
        gpu::mma_16816<gpu::bf16>(y[half], high, b_states[eight][half][0]);
      }
    }
  }
};

// The scan of 16 tiles of one channel, which is number `e` of the warp's two. N' = 4 * groups (cema_arrays.cuh).
template <int groups>
struct Channel {
  const Scan& scan;
  int64_t first, channel;  // first: the first tile
  int e;
  uint32_t* words;  // shared memory of the warp's channels
  float v[groups][1][4] = {};

  GPU_INLINE Channel(const Scan& scan_, int64_t first_, int64_t channel_, int e_, uint32_t* words_)
      : scan(scan_), first(first_), channel(channel_), e(e_), words(words_) {}

  // Calls f(tile, mode, first, second) for this lane's pairs of v.
  template <class F>
  GPU_INLINE void for_each_pair(F&& f) {
    const int g = threadIdx.x % gpu::kWarp / 4, t = threadIdx.x % 4;
    GPU_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const int64_t tile = first + g + 4 * i;
      GPU_UNROLL
      for (int n = 0; n < groups; ++n)
        if (tile < scan.tiles) f(tile, 4 * n + t, v[n][0][i], v[n][0][i + 1]);
    }
  }
  // For each block of 16 positions, calls visit(x, upper, lower) and then advances v. `x` is A; `upper` and `lower` are
  // the words of shared memory from which this lane has taken x of tiles g and g + 8.
  template <class Visit>
  GPU_INLINE void advance(Visit&& visit) {
    const int g = threadIdx.x % gpu::kWarp / 4, t = threadIdx.x % 4;
    const Powers<groups, 1> powers(scan, 0, channel);
#pragma unroll 1
    for (int block = 0; block < kMmaBlocks; ++block) {
      uint32_t* const upper = words + g * kRowPitch + block * kBlock + t;
      uint32_t* const lower = upper + 8 * kRowPitch;
      const uint32_t x[4] = {gpu::join_halves(e, upper[0], upper[4]), gpu::join_halves(e, lower[0], lower[4]),
                             gpu::join_halves(e, upper[8], upper[12]), gpu::join_halves(e, lower[8], lower[12])};
      gpu::check_a<gpu::bf16>(x, [&](int i, int k) {
        return reinterpret_cast<const gpu::bf16*>(words + i * kRowPitch + block * kBlock + step_of(k)) + e;
      });
      visit(x, upper, lower);
      float ends[groups][1][4] = {};
      powers.multiply(x, ends);
      powers.append(v, ends);
    }
  }
  GPU_INLINE void store() {
    for_each_pair([&](int64_t tile, int mode, float first_of_pair, float second) {
      gpu::st(scan.state<float>(tile, mode, channel), Pair<float>{first_of_pair, second});
    });
  }
  GPU_INLINE void make_ends() {
    advance([](auto&&...) {});
    store();
  }
  GPU_INLINE void make_outputs(float* response) {
    const OutputOperands<groups> operands(scan, channel, response);
    for_each_pair([&](int64_t tile, int mode, float& first_of_pair, float& second) {
      if (scan.stops[tile]) return;
      const auto entering = gpu::ld<Pair<float>>(scan.state<float>(tile, mode, channel));
      first_of_pair = entering.first;
      second = entering.second;
    });
    advance([&](const uint32_t(&x)[4], uint32_t* upper, uint32_t* lower) {
      float y[2][4] = {};
      if (all_finite(x)) operands.add_inputs(y, x);
      else operands.add_inputs_step_by_step(y, x);
      operands.add_states(y, v);
      __syncwarp();  // x has been read
      GPU_UNROLL
      for (int i = 0; i < 8; ++i) {
        uint32_t* const word = (i % 4 < 2 ? upper : lower) + 4 * (i % 2) + 8 * (i / 4);
        gpu::st_shared(reinterpret_cast<gpu::bf16*>(word) + e, gpu::from_real<gpu::bf16>(y[i / 4][i % 4]));
      }
    });
    if (scan.final) make_final_states();
  }
  // Stores the final states of the sequences that end with one of the tiles. Reads them back from scan.states, as the
  // loop cannot index registers.
  GPU_INLINE void make_final_states() {
    store();
    const int g = threadIdx.x % gpu::kWarp / 4, t = threadIdx.x % 4;
    const int64_t tiles_of_row = scan.sequences.row_length / kMmaTile;
#pragma unroll 1
    for (int i = 0; i < 2 * groups; ++i) {
      const int64_t tile = first + g + i % 2 * 8;
      const int mode = i / 2 * 4 + t;
      if (tile >= scan.tiles || (tile + 1) % tiles_of_row != 0 || mode >= scan.modes) continue;
      const auto pair = gpu::ld<Pair<float>>(scan.state<float>(tile, mode, channel));
      const int64_t at = (tile / tiles_of_row * scan.channels + channel) * scan.modes + mode;
      gpu::st(scan.final.as<float>() + at, Basis<float>(scan, mode, channel).final(pair));
    }
  }
};

// The tiles and channels of a thread block, in shared memory.
struct Block {
  const Scan& scan;
  uint32_t* words;
  int64_t first, first_channel, channel;  // channel: the first of the warp's two
  TileCopy<kMmaRows> copy;

  GPU_INLINE Block(const Scan& scan_, uint32_t* words_)
      : scan(scan_), words(words_), first(int64_t{blockIdx.y} * kMmaRows),
        first_channel(int64_t{blockIdx.x} * kMmaChannels),
        channel(first_channel + threadIdx.x / gpu::kWarp * 2), copy(scan_, first, first_channel) {
    copy.load(scan, scan.in, *this);
    __syncthreads();
  }
  GPU_INLINE uint32_t* operator()(int channel_pair, int tile, int step) const {
    return words + channel_pair * kRowsPitch + tile * kRowPitch + (scan.reverse ? kMmaTile - 1 - step : step);
  }
  // Calls f with each of the warp's two channels.
  template <int groups, class F>
  GPU_INLINE void for_each_channel(F&& f) const {
    if (channel >= scan.channels) return;
#pragma unroll 1
    for (int e = 0; e < 2; ++e) {
      Channel<groups> warp_channel(scan, first, channel + e, e, words + threadIdx.x / gpu::kWarp * kRowsPitch);
      f(warp_channel);
    }
  }
};

template <int groups>
__global__ void __launch_bounds__(kMmaThreads, 2) cema_mma_local_kernel(Scan scan) {
  SMEM_DYN(uint32_t, words);
  const Block block(scan, words);
  const int64_t tile = block.first + threadIdx.x, tiles_of_row = scan.sequences.row_length / kMmaTile;
  if (block.first_channel == 0 && threadIdx.x < kMmaRows && tile < scan.tiles)
    scan.stops[tile] = tile % tiles_of_row == 0;
  block.for_each_channel<groups>([](Channel<groups>& channel) { channel.make_ends(); });
}

template <int groups>
__global__ void __launch_bounds__(kMmaThreads, 2) cema_mma_output_kernel(Scan scan) {
  SMEM_DYN(uint32_t, words);
  SMEM_ARRAY(float, responses, 2 * kBlock * kMmaWarps);
  const Block block(scan, words);
  float* const response = responses + threadIdx.x / gpu::kWarp * 2 * kBlock;
  block.for_each_channel<groups>([=](Channel<groups>& channel) { channel.make_outputs(response); });
  __syncthreads();
  block.copy.store(scan, scan.out, block);
}

}  // namespace cema
}  // namespace megalodon

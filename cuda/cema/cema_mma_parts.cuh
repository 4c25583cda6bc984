// Shared by CEMA's kernels on tensor cores, cema_mma_scan.cuh and cema_mma.cuh: copies of tiles to and from shared
// memory, and products of x with powers of q, which give the states at the ends of blocks and tiles.
#pragma once

#include "cema.cuh"
#include "matrix.cuh"

namespace megalodon {
namespace cema {

constexpr int kMmaWarps = 8, kMmaThreads = kMmaWarps * gpu::kWarp, kMmaChannels = 2 * kMmaWarps;
constexpr int kMmaBlocks = kMmaTile / kBlock;
constexpr int kParts = 3;  // bf16 parts of a float

// Returns the position, within a block, of row k of B.
GPU_INLINE int step_of(int k) { return k / 8 * 8 + k % 2 * 4 + k % 8 / 2; }

// Rounds the two numbers of `rest` to bf16, subtracts the results from `rest`, and returns them.
GPU_INLINE uint32_t take_part(float (&rest)[2]) {
  const uint32_t part = gpu::pack2<gpu::bf16>(rest[0], rest[1]);
  rest[0] -= gpu::bit_cast<float>(part << 16);
  rest[1] -= gpu::bit_cast<float>(part & 0xffff0000u);
  return part;
}

// Copies tiles of 16 channels between a (T, D) tensor and shared memory. A thread copies 8 channels of some rows. A
// word of shared memory holds two neighbouring channels of a row, a channel pair.
template <int tiles>
struct TileCopy {
  // Rows that the block copies at once, that a thread copies, and that it loads at once.
  static constexpr int kBlockRows = kMmaThreads / 2, kThreadRows = tiles * kMmaTile / kBlockRows, kAtOnce = 8;
  using Eight = gpu::Pack<uint32_t, 4>;
  int64_t first_token, channel;
  int half, row;
  bool exists;

  GPU_INLINE TileCopy(const Scan& scan, int64_t first_tile, int64_t first_channel)
      : first_token(first_tile * kMmaTile), half(threadIdx.x % 2), row(threadIdx.x / 2) {
    channel = first_channel + half * 8;
    exists = channel < scan.channels;
  }
  // Copies the thread's part of `tensor` to word(channel_pair, tile, step); zeros for tokens and channels beyond.
  template <class Word>
  GPU_INLINE void load(const Scan& scan, ConstReals tensor, Word&& word) const {
#pragma unroll 1
    for (int from = 0; from < kThreadRows; from += kAtOnce) {
      Eight eight[kAtOnce];
      GPU_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t t = first_token + row + (from + i) * kBlockRows;
        eight[i] = {};
        if (t < scan.sequences.tokens && exists)
          eight[i] = gpu::ld<Eight>(tensor.as<gpu::bf16>() + t * scan.channels + channel);
      }
      GPU_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = row + (from + i) * kBlockRows;
        GPU_UNROLL
        for (int channel_pair = 0; channel_pair < 4; ++channel_pair)
          *word(half * 4 + channel_pair, at / kMmaTile, at % kMmaTile) = eight[i].element[channel_pair];
      }
    }
  }
  template <class Word>
  GPU_INLINE void store(const Scan& scan, Reals tensor, Word&& word) const {
#pragma unroll 4
    for (int i = 0; i < kThreadRows; ++i) {
      const int at = row + i * kBlockRows;
      const int64_t t = first_token + at;
      Eight eight;
      GPU_UNROLL
      for (int channel_pair = 0; channel_pair < 4; ++channel_pair)
        eight.element[channel_pair] = *word(half * 4 + channel_pair, at / kMmaTile, at % kMmaTile);
      if (t < scan.sequences.tokens && exists) gpu::st(tensor.as<gpu::bf16>() + t * scan.channels + channel, eight);
    }
  }
};

// Powers of q of one channel, for 4 * groups modes from `mode` on. kinds = 2: also their slopes.
template <int groups, int kinds>
struct Powers {
  using Sums = float[groups][kinds][4];  // D for 4 modes each: ends and, if kinds = 2, slopes
  uint32_t b[groups][kinds][kParts][2];  // B of q^j, and of j q^j
  Pair<float> left[groups], right[groups];  // columns of the matrix that multiplies by q^16, for mode 4 n + t

  GPU_INLINE Powers(const Scan& scan, int mode, int64_t channel) {
    const int g = threadIdx.x % gpu::kWarp / 4, t = threadIdx.x % 4;
    GPU_UNROLL
    for (int n = 0; n < groups; ++n) {
      GPU_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int j[2] = {kBlock - 1 - step_of(2 * t + 8 * i), kBlock - 1 - step_of(2 * t + 8 * i + 1)};
        float power[kinds][2];
        GPU_UNROLL
        for (int e = 0; e < 2; ++e) {
          power[0][e] = scan.power<float>(j[e], mode + 4 * n + g / 2, channel)[g % 2];
          if constexpr (kinds == 2) power[1][e] = static_cast<float>(j[e]) * power[0][e];
        }
        GPU_UNROLL
        for (int part = 0; part < kParts; ++part) {
          GPU_UNROLL
          for (int kind = 0; kind < kinds; ++kind) b[n][kind][part][i] = take_part(power[kind]);
        }
      }
      left[n] = gpu::ld<Pair<float>>(scan.power<float>(kBlock, mode + 4 * n + t, channel));
      right[n] = gpu::ld<Pair<float>>(scan.power<float>(kBlock + 1, mode + 4 * n + t, channel));
    }
  }
  // Adds to d the ends and slopes of 16 positions, whose x is in A.
  GPU_INLINE void multiply(const uint32_t (&a)[4], Sums& d) const {
    GPU_UNROLL
    for (int part = kParts - 1; part >= 0; --part) {  // the smallest first
      GPU_UNROLL
      for (int n = 0; n < groups; ++n) {
        GPU_UNROLL
        for (int kind = 0; kind < kinds; ++kind) gpu::mma_16816<gpu::bf16>(d[n][kind], a, b[n][kind][part]);
      }
    }
  }
  GPU_INLINE void multiply_add(int n, float first, float second, float& to_first, float& to_second) const {
    to_first = left[n].first * first + (right[n].first * second + to_first);
    to_second = left[n].second * first + (right[n].second * second + to_second);
  }
  // Appends 16 positions, with ends and slopes d, to the earlier positions, with ends e and slopes e' in `sum`: e
  // becomes q^16 e + d, and e' becomes q^16 (e' + 16 e) + d'.
  GPU_INLINE void append(Sums& sum, Sums& d) const {
    GPU_UNROLL
    for (int n = 0; n < groups; ++n) {
      GPU_UNROLL
      for (int i = 0; i < 4; i += 2) {
        const float(&end)[4] = sum[n][0];
        multiply_add(n, end[i], end[i + 1], d[n][0][i], d[n][0][i + 1]);
        if constexpr (kinds == 2) {
          const float(&slope)[4] = sum[n][1];
          multiply_add(n, slope[i] + kBlock * end[i], slope[i + 1] + kBlock * end[i + 1], d[n][1][i], d[n][1][i + 1]);
        }
      }
      GPU_UNROLL
      for (int kind = 0; kind < kinds; ++kind) {
        GPU_UNROLL
        for (int i = 0; i < 4; ++i) sum[n][kind][i] = d[n][kind][i];
      }
    }
  }
};

}  // namespace cema
}  // namespace megalodon

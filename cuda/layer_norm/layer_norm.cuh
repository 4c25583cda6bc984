// Layer norm and RMS norm, forward and backward: ops/layer_norm/layer_norm_reference.py. Launched by layer_norm.cu.
//
//   m = mean(x) (RMS norm: 0);  r = 1 / sqrt(mean((x - m)^2) + eps);  xn = (x - m) r;  y = xn (1 + weight) + bias
//   e = dy (1 + weight);  dx = r (e - mean(e) - xn mean(e xn))     RMS norm: without mean(e)
//   dweight = sum over rows of dy xn;  dbias = sum over rows of dy
//
//   x, y, dy, dx (T, D):               the call's dtype
//   weight, bias, dweight, dbias (D):  R, float or double
//
// Grid: in the forward, a block takes the rows block, block + gridDim.x, ...; in the backward, a part: neighbouring
// rows, one after the other. A thread takes the vectors thread, thread + blockDim.x, ... of each row.
// Phases for each row:
//   1. Layer norm: the mean, rounded to R, is `high`.
//   2. The sums of d = x - high and d^2 give `low`, the rest of the mean, and r. Backward: also the sums of e and e d.
//   3. Store y. Backward: store dx, and add dy xn and dy to the part's sums (its share), each thread for its channels.
// Then gpu::sum_shares adds the shares in order.
//
// If squares overflow or underflow, phases 1 and 2 are repeated with x times a power of two. The mean in two parts
// keeps a row accurate whose mean is far larger than its standard deviation.
// Vectors are 16 bytes if alignment and D allow it; otherwise they are single elements.
//
// Shared memory: at most 1 KB, and in the backward a part's sums, if they take at most kMostSums bytes; those of wider
// rows stay in global memory. Registers: at most 64 forward and 96 backward, float64 80 and 128; no spills.
// Bytes: x and y, or x, dy and dx, once, the minimum. Phases 2 and 3 read the row again, from L1 or L2. The shares
// are written and read once: 8% of the backward's bytes for T = 16384, D = 1024 in bf16.
// H100, (T 16384, D 1024) bf16: forward 67 MB, 20 us at 3.35 TB/s; backward 101 MB and 4 MB of sums twice, 33 us.
// Example: D = 1024 in bf16 are 128 vectors of 8: four warps.
#pragma once

#include "layer_norm.h"
#include "reduce.cuh"
#include "shares.cuh"
#include "vec.cuh"

namespace megalodon {
namespace layer_norm {

constexpr int kMaxThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;   // of the forward
constexpr int64_t kMaxParts = 512;        // of the backward
constexpr int64_t kLeastRows = 8;         // of a part
constexpr int64_t kMostSums = 48 * 1024;  // bytes of a share in shared memory

struct Parts {
  int64_t rows, count;  // rows of a part, number of parts
  bool in_shared;       // the sums of a block are in its shared memory until its last row
};

// Each thread of the block gets the sums over the block. All threads call it.
template <class R, int n>
GPU_INLINE void block_sums(R (&values)[n]) {
  SMEM_ARRAY(R, partial, n* gpu::kWarp);
  const int warps = static_cast<int>(blockDim.x) / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  GPU_UNROLL
  for (int i = 0; i < n; ++i) {
    values[i] = gpu::warp_sum(values[i]);
    if (lane == 0) partial[i * gpu::kWarp + threadIdx.x / gpu::kWarp] = values[i];
  }
  __syncthreads();
  GPU_UNROLL
  for (int i = 0; i < n; ++i) values[i] = gpu::warp_sum(lane < warps ? partial[i * gpu::kWarp + lane] : R{0});
  __syncthreads();  // the next call may reuse the partial sums
}

// Loads 1 + weight from channel c on, or ones.
template <bool kWhole, class R, int n>
GPU_INLINE void load_gain(R (&gain)[n], const LayerNormParams& p, int64_t c) {
  GPU_UNROLL
  for (int i = 0; i < n; ++i) gain[i] = 0;
  if (p.weight) gpu::load_wide<kWhole>(gain, static_cast<const R*>(p.weight) + c);
  GPU_UNROLL
  for (int i = 0; i < n; ++i) gain[i] += 1;
}

// What a row's sums give: x scale = xn / r + high + low.
template <class R>
struct Statistics {
  R scale, high, low, shifted;  // shifted: the variance of x scale, plus eps scale^2
  R r;                          // 1 / sqrt(shifted)
  R mean_e, projection;         // backward: the means of e (RMS norm: 0) and of e xn

  GPU_INLINE R normalize(R x) const { return ((x * scale - high) - low) * r; }
};

// Phases 1 and 2 of the row `x`, with x times `scale`. kBackward: also the sums with `dy`.
template <bool kBackward, int n, bool kWhole, class T, class R = Compute<T>>
GPU_INLINE Statistics<R> scaled_statistics(const LayerNormParams& p, const T* x, const T* dy, R scale) {
  const int64_t start = int64_t{threadIdx.x} * n, step = int64_t{blockDim.x} * n;
  const R channels = static_cast<R>(p.channels);
  Statistics<R> s{};
  s.scale = scale;
  R v[n];
  if (!p.is_rms_norm) {
    R sum[1] = {};
    for (int64_t c = start; c < p.channels; c += step) {
      gpu::load<kWhole>(v, x + c);
      GPU_UNROLL
      for (int i = 0; i < n; ++i) sum[0] += v[i] * scale;
    }
    block_sums(sum);
    s.high = sum[0] / channels;
  }
  R sums[kBackward ? 4 : 2] = {};
  for (int64_t c = start; c < p.channels; c += step) {
    R e[n] = {}, gain[n] = {};
    gpu::load<kWhole>(v, x + c);
    if constexpr (kBackward) {
      gpu::load<kWhole>(e, dy + c);
      load_gain<kWhole>(gain, p, c);
    }
    GPU_UNROLL
    for (int i = 0; i < n; ++i) {
      const R d = v[i] * scale - s.high;
      sums[0] += d;
      sums[1] += d * d;
      if constexpr (kBackward) {
        sums[2] += e[i] * gain[i];
        sums[3] += e[i] * gain[i] * d;
      }
    }
  }
  block_sums(sums);
  s.low = p.is_rms_norm ? 0 : sums[0] / channels;
  const R variance = sums[1] / channels - s.low * s.low;
  s.shifted = (variance < 0 ? 0 : variance) + static_cast<R>(p.eps) * scale * scale;
  s.r = rsqrt(s.shifted);
  if constexpr (kBackward) {
    s.mean_e = p.is_rms_norm ? 0 : sums[2] / channels;
    s.projection = s.r * ((sums[3] - s.low * sums[2]) / channels);
  }
  return s;
}

template <bool kBackward, int n, bool kWhole, class T, class R = Compute<T>>
GPU_INLINE Statistics<R> statistics(const LayerNormParams& p, const T* x, const T* dy) {
  const Statistics<R> s = scaled_statistics<kBackward, n, kWhole>(p, x, dy, R{1});
  const R scale = gpu::square_scale(s.shifted);
  return scale == 1 ? s : scaled_statistics<kBackward, n, kWhole>(p, x, dy, scale);  // the block has one scale
}

template <class T, int n, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads) layer_norm_fwd_kernel(LayerNormFwdParams p) {
  using R = Compute<T>;
  const int64_t start = int64_t{threadIdx.x} * n, step = int64_t{blockDim.x} * n;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.channels;
    T* y = static_cast<T*>(p.y) + row * p.channels;
    const Statistics<R> s = statistics<false, n, kWhole, T>(p, x, nullptr);
    for (int64_t c = start; c < p.channels; c += step) {
      R v[n], gain[n], bias[n] = {};
      gpu::load<kWhole>(v, x + c);
      load_gain<kWhole>(gain, p, c);
      if (p.bias) gpu::load_wide<kWhole>(bias, static_cast<const R*>(p.bias) + c);
      GPU_UNROLL
      for (int i = 0; i < n; ++i) v[i] = s.normalize(v[i]) * gain[i] + bias[i];
      gpu::store<kWhole>(y + c, v);
    }
  }
}

template <class T, int n, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads) layer_norm_bwd_kernel(LayerNormBwdParams p, Parts parts) {
  using R = Compute<T>;
  SMEM_DYN(R, block_sums_of_channels);
  const int64_t start = int64_t{threadIdx.x} * n, step = int64_t{blockDim.x} * n, vectors = p.channels / n;
  const int64_t begin = blockIdx.x * parts.rows, end = begin + parts.rows < p.rows ? begin + parts.rows : p.rows;
  R* const share = static_cast<R*>(p.workspace) + blockIdx.x * (2 * p.channels);
  const bool wanted = p.dweight || p.dbias;
  // The sum for dweight (k = 0) or dbias (k = 1) of channel c + i. In shared memory, neighbouring threads have
  // neighbouring words.
  const auto sum = [&](int k, int64_t c, int i) -> R& {
    return parts.in_shared ? block_sums_of_channels[(k * n + i) * vectors + c / n] : share[k * p.channels + c + i];
  };
  for (int64_t row = begin; row < end; ++row) {
    const T *x = static_cast<const T*>(p.x) + row * p.channels, *dy = static_cast<const T*>(p.dy) + row * p.channels;
    T* dx = static_cast<T*>(p.dx) + row * p.channels;
    const Statistics<R> s = statistics<true, n, kWhole>(p, x, dy);
    for (int64_t c = start; c < p.channels; c += step) {
      R v[n], d[n], gain[n];
      gpu::load<kWhole>(v, x + c);
      gpu::load<kWhole>(d, dy + c);
      load_gain<kWhole>(gain, p, c);
      GPU_UNROLL
      for (int i = 0; i < n; ++i) {
        const R xn = s.normalize(v[i]);
        v[i] = s.r * s.scale * ((d[i] * gain[i] - s.mean_e) - xn * s.projection);
        if (!wanted) continue;
        R &dweight = sum(0, c, i), &dbias = sum(1, c, i);
        dweight = row == begin ? d[i] * xn : dweight + d[i] * xn;
        dbias = row == begin ? d[i] : dbias + d[i];
      }
      gpu::store<kWhole>(dx + c, v);
    }
  }
  if (!wanted || !parts.in_shared) return;
  for (int64_t c = start; c < p.channels; c += step) {
    GPU_UNROLL
    for (int k = 0; k < 2; ++k) {
      R total[n];
      GPU_UNROLL
      for (int i = 0; i < n; ++i) total[i] = sum(k, c, i);
      if constexpr (kWhole) {
        gpu::store_wide(share + k * p.channels + c, total);
      } else {
        GPU_UNROLL
        for (int i = 0; i < n; ++i) share[k * p.channels + c + i] = total[i];
      }
    }
  }
}

}  // namespace layer_norm
}  // namespace megalodon

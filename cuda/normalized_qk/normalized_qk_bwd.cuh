// Normalized queries and keys, backward: ops/normalized_qk/normalized_qk_reference.py.
//
//   e_0, e_1 = dq, dk rotated back;  a_j = (1 + gamma_j) / sqrt(K);  dzn = e_0 a_0 + e_1 a_1;  zn = z r
//   dz = r (dzn - zn mean(dzn zn));  dgamma_j = sum over tokens of e_j zn / sqrt(K);  dbeta_j = sum over tokens of e_j
//
//   z, dq, dk, dz (T, H, K):         the call's dtype
//   gamma, dgamma, dbeta (2, H, K):  R, float or double
//   rotary (rows, K / 2, 2):         R, (cos, sin)
//
// Grid: a part is kLeastTokens or more neighbouring tokens; there are at most kMaxParts. A block takes one head of a
// part. Its sums of e and e zn are the part's share (shares.cuh) of dbeta and dgamma.
//   K <= 32 kVectors vectors: a warp takes every kWarps-th token, a lane the vectors lane, lane + 32, ...
//   larger K:                 a block takes a token at a time, a thread the vectors thread, thread + 256, ...
// Phases of a warp:
//   1. Lanes find the rows of the rotary table for the warp's next kTokens tokens. Then for each token:
//   2. compute e and dzn and, by shuffles, the sums of z^2 and of dzn z;
//   3. compute dz, and add e and e zn to the lane's sums in registers, while the next token's vectors are loaded.
//   4. At the end, the warps' sums are added in order: the share.
// Phases of a block, for each kTokens tokens:
//   1. Lanes find the tokens' rows.
//   2. The block computes the two sums of each token.
//   3. It reads the vectors again, from L1 or L2, stores dz, and adds the sums of e and e zn to the share.
// Then gpu::sum_shares adds the shares in order.
//
// Shared memory: 9 KB. Registers: at most 128, two blocks per SM (f64: 150, one block); no spills.
// Bytes: z, dq, dk and dz once, the minimum. A share has 16 K bytes per head, written and read once: 3% each in bf16 if
// parts have 64 tokens or more. The table comes from L2.
// H100, (B 8, L 2048, H 1, K 256) bf16: 33.6 MB + 2.1 MB of table + 2.1 MB of sums, 11.3 us at 3.35 TB/s;
// at least 15 us (bench.predict).
// Example: T 16384, H 1, K 256: 256 parts of 64 tokens, 8 per warp. In fp32, lane l has elements 4 l .. 4 l + 3 and
// 128 + 4 l .. 128 + 4 l + 3.
#pragma once

#include "normalized_qk.cuh"
#include "reduce.cuh"
#include "shares.cuh"
#include "vec.cuh"

namespace megalodon {
namespace normalized_qk {

constexpr int kWarps = 8;  // per block
constexpr int kThreads = kWarps * gpu::kWarp;
constexpr int kTokens = 8;  // per look-up
static_assert(kTokens <= gpu::kWarp, "a lane looks up each token");
constexpr int64_t kMaxParts = 256;
constexpr int64_t kLeastTokens = 16;  // per part

struct Parts {
  int64_t tokens, count;  // tokens per part, number of parts
};

inline Parts make_parts(const NormalizedQkBwdParams& p) {
  const int64_t per_part = (p.sequences.tokens + kMaxParts - 1) / kMaxParts;
  const int64_t rounded = per_part < kLeastTokens ? kLeastTokens : (per_part + kWarps - 1) / kWarps * kWarps;
  const int64_t tokens = LAUNCH_SIZE(qk_part, rounded);
  return {tokens, (p.sequences.tokens + tokens - 1) / tokens};
}

// Returns the address of a number of a share (4, H, K): sums for dbeta_0, dbeta_1, sqrt(K) dgamma_0, sqrt(K) dgamma_1.
template <class R>
GPU_INLINE R* share_of(const NormalizedQkBwdParams& p, int64_t part, int sum, int64_t channel) {
  return static_cast<R*>(p.workspace) + (part * 4 + sum) * p.heads * p.key_dim + channel;
}

// A thread's vector of a token, in the tensors' type.
template <class T, int n>
struct Packed {
  gpu::Pack<T, n> z, dq, dk;
};

template <bool kWhole, class T, int n>
GPU_INLINE void load_packed(Packed<T, n>& packed, const NormalizedQkBwdParams& p, int64_t at) {
  const void* const from[3] = {p.z, p.dq, p.dk};
  gpu::Pack<T, n>* const to[3] = {&packed.z, &packed.dq, &packed.dk};
  GPU_UNROLL
  for (int j = 0; j < 3; ++j) {
    const T* const vector = static_cast<const T*>(from[j]) + at;
    if constexpr (kWhole) {
      *to[j] = gpu::ld<gpu::Pack<T, n>>(vector);
    } else {
      GPU_UNROLL
      for (int i = 0; i < n; ++i) to[j]->element[i] = vector[i];
    }
  }
}

// (re, im) <- (re cos + im sin, im cos - re sin) for each pair.
template <class R, int n>
GPU_INLINE void rotate_back(R (&e)[n], const R (&rotary)[n]) {
  GPU_UNROLL
  for (int i = 0; i < n; i += 2) {
    const R re = e[i], im = e[i + 1];
    e[i] = re * rotary[i] + im * rotary[i + 1];
    e[i + 1] = im * rotary[i] - re * rotary[i + 1];
  }
}

// A thread's vector of a token in R: z, the gradients rotated back, and sqrt(K) dzn.
template <class R, int n>
struct Vectors {
  R z[n], e[2][n], dzn[n];
};

template <bool kWhole, class T, class R, int n>
GPU_INLINE void unpack(Vectors<R, n>& in, const Packed<T, n>& packed, const NormalizedQkBwdParams& p, int64_t head,
                       int64_t row, int64_t channel) {
  R rotary[n], gamma[n];
  gpu::load_wide<kWhole>(rotary, static_cast<const R*>(p.rotary) + row * p.key_dim + channel);
  GPU_UNROLL
  for (int i = 0; i < n; ++i) {
    in.z[i] = gpu::to_real(packed.z.element[i]);
    in.e[0][i] = gpu::to_real(packed.dq.element[i]);
    in.e[1][i] = gpu::to_real(packed.dk.element[i]);
    in.dzn[i] = 0;
  }
  GPU_UNROLL
  for (int j = 0; j < 2; ++j) {
    gpu::load_wide<kWhole>(gamma, static_cast<const R*>(p.gamma) + (j * p.heads + head) * p.key_dim + channel);
    rotate_back(in.e[j], rotary);
    GPU_UNROLL
    for (int i = 0; i < n; ++i) in.dzn[i] += in.e[j][i] * (1 + gamma[i]);
  }
}

// The sums of z^2 and of sqrt(K) dzn z over a head.
template <class R>
struct Sums {
  template <int n>
  GPU_INLINE void add(const Vectors<R, n>& in) {
    GPU_UNROLL
    for (int i = 0; i < n; ++i) {
      squares += in.z[i] * in.z[i];
      products += in.dzn[i] * in.z[i];
    }
  }
  R squares = 0, products = 0;
};

// Factors that follow from a head's Sums.
template <class R>
struct Scales {
  R r, projection;  // projection = sqrt(K) mean(dzn zn)
};

// All threads that share the sums call make_scales. sum_scaled(scale) returns the sum of (scale z)^2.
template <class R, class SumScaled>
GPU_INLINE Scales<R> make_scales(const NormalizedQkBwdParams& p, const Sums<R>& sums, SumScaled&& sum_scaled) {
  const R size = static_cast<R>(p.key_dim), mean = sums.squares / size + static_cast<R>(p.eps);
  const R scale = gpu::square_scale(mean), r = scale == 1 ? rsqrt(mean) : inverse_rms(p, sum_scaled(scale), scale);
  return {r, r * (sums.products / size)};
}

template <bool kWhole, class T, class R, int n>
GPU_INLINE void store_dz(const NormalizedQkBwdParams& p, int64_t at, const Vectors<R, n>& in, const Scales<R>& scales) {
  const R scale = scales.r / sqrt(static_cast<R>(p.key_dim));
  R dz[n];
  GPU_UNROLL
  for (int i = 0; i < n; ++i) dz[i] = scale * (in.dzn[i] - in.z[i] * scales.r * scales.projection);
  gpu::store<kWhole>(static_cast<T*>(p.dz) + at, dz);
}

template <bool kWhole, class T, int n>
GPU_INLINE void store_zeros(const NormalizedQkBwdParams& p, int64_t at) {
  const Compute<T> zeros[n] = {};
  gpu::store<kWhole>(static_cast<T*>(p.dz) + at, zeros);
}

// Adds a token's e_0, e_1, e_0 zn, e_1 zn to a thread's part of the share.
template <class R, int n>
GPU_INLINE void add_to_share(R (&share)[4][n], const Vectors<R, n>& in, R r) {
  GPU_UNROLL
  for (int i = 0; i < n; ++i) {
    const R zn = in.z[i] * r;
    GPU_UNROLL
    for (int j = 0; j < 2; ++j) {
      share[j][i] += in.e[j][i];
      share[2 + j][i] += in.e[j][i] * zn;
    }
  }
}

// A warp takes a token, a lane kVectors vectors of it.
template <class T, int kWidth, int kVectors, bool kWhole>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    normalized_qk_bwd_warp_kernel(NormalizedQkBwdParams p, Parts parts) {
  using R = Compute<T>;
  constexpr int kChannels = gpu::kWarp * kVectors * kWidth;
  constexpr int kPitch = kChannels + kChannels / gpu::kWarp;  // an element of padding after each 32
  SMEM_ARRAY(R, exchange, kWarps* kPitch);
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const int64_t part = blockIdx.x / p.heads, head = blockIdx.x % p.heads, begin = part * parts.tokens;
  const int64_t left = p.sequences.tokens - begin;
  const int tokens = static_cast<int>(left < parts.tokens ? left : parts.tokens);
  const auto channel = [&](int v) { return (v * gpu::kWarp + lane) * kWidth; };
  const auto address = [&](int token, int v) { return ((begin + token) * p.heads + head) * p.key_dim + channel(v); };
  Packed<T, kWidth> next[kVectors];
  const auto load_token = [&](int token) {
    GPU_UNROLL
    for (int v = 0; v < kVectors; ++v)
      if (channel(v) < p.key_dim) load_packed<kWhole>(next[v], p, address(token, v));
  };
  R share[kVectors][4][kWidth] = {};
  int64_t my_row = 0;
  if (warp < tokens) load_token(warp);
  for (int token = warp, turn = 0; token < tokens; token += kWarps, turn = (turn + 1) % kTokens) {
    if (turn == 0) my_row = table_row(p, begin + token + lane * kWarps);
    const int64_t row = __shfl_sync(gpu::kFullMask, my_row, turn);
    Vectors<R, kWidth> in[kVectors];
    Sums<R> sums;
    GPU_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (channel(v) >= p.key_dim) continue;
      unpack<kWhole>(in[v], next[v], p, head, row < 0 ? 0 : row, channel(v));
      sums.add(in[v]);
    }
    if (token + kWarps < tokens) load_token(token + kWarps);
    sums.squares = gpu::warp_sum(sums.squares);
    sums.products = gpu::warp_sum(sums.products);
    const Scales<R> scales = make_scales(p, sums, [&](R scale) {
      R squares = 0;
      GPU_UNROLL
      for (int v = 0; v < kVectors; ++v)
        if (channel(v) < p.key_dim) add_squares(squares, in[v].z, scale);
      return gpu::warp_sum(squares);
    });
    GPU_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (channel(v) >= p.key_dim) continue;
      if (row < 0) {
        store_zeros<kWhole, T, kWidth>(p, address(token, v));
      } else {
        store_dz<kWhole, T>(p, address(token, v), in[v], scales);
        add_to_share(share[v], in[v], scales.r);
      }
    }
  }

  GPU_UNROLL
  for (int sum = 0; sum < 4; ++sum) {
    GPU_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      GPU_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const int c = channel(v) + i;
        exchange[warp * kPitch + c + c / gpu::kWarp] = share[v][sum][i];
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < p.key_dim; c += kThreads) {
      R total = 0;
      for (int w = 0; w < kWarps; ++w) total += exchange[w * kPitch + c + c / gpu::kWarp];
      *share_of<R>(p, part, sum, head * p.key_dim + c) = total;
    }
    __syncthreads();
  }
}

// A block takes a token, with arbitrary K.
template <class T, int kWidth, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2) normalized_qk_bwd_block_kernel(NormalizedQkBwdParams p, Parts parts) {
  using R = Compute<T>;
  SMEM_ARRAY(R, scale, 2 * kTokens);
  const int64_t part = blockIdx.x / p.heads, head = blockIdx.x % p.heads, begin = part * parts.tokens;
  const int64_t end = begin + parts.tokens < p.sequences.tokens ? begin + parts.tokens : p.sequences.tokens;
  const int64_t start = int64_t{threadIdx.x} * kWidth, step = int64_t{kThreads} * kWidth;
  Packed<T, kWidth> packed;
  Vectors<R, kWidth> in;
  for (int64_t first = begin; first < end; first += kTokens) {
    const int tokens = end - first < kTokens ? static_cast<int>(end - first) : kTokens;
    const int64_t my_row = table_row(p, first + threadIdx.x % gpu::kWarp);
    for (int i = 0; i < tokens; ++i) {
      const int64_t row = __shfl_sync(gpu::kFullMask, my_row, i), at = ((first + i) * p.heads + head) * p.key_dim;
      Sums<R> sums;
      for (int64_t c = start; row >= 0 && c < p.key_dim; c += step) {
        load_packed<kWhole>(packed, p, at + c);
        unpack<kWhole>(in, packed, p, head, row, c);
        sums.add(in);
      }
      sums.squares = gpu::block_sum(sums.squares);
      sums.products = gpu::block_sum(sums.products);
      const Scales<R> scales = make_scales(p, sums, [&](R scale) {
        R squares = 0;
        for (int64_t c = start; row >= 0 && c < p.key_dim; c += step) {
          R z[kWidth];
          gpu::load<kWhole>(z, static_cast<const T*>(p.z) + at + c);
          add_squares(squares, z, scale);
        }
        return gpu::block_sum(squares);
      });
      if (threadIdx.x > 0) continue;  // block_sum's barriers keep thread 0 from overwriting scales in use
      scale[2 * i] = scales.r;
      scale[2 * i + 1] = scales.projection;
    }
    __syncthreads();
    for (int64_t c = start; c - start < p.key_dim; c += step) {
      const bool active = c < p.key_dim;
      R share[4][kWidth] = {};
      for (int i = 0; i < tokens; ++i) {
        const int64_t row = __shfl_sync(gpu::kFullMask, my_row, i), at = ((first + i) * p.heads + head) * p.key_dim;
        if (!active) continue;
        if (row < 0) {
          store_zeros<kWhole, T, kWidth>(p, at + c);
          continue;
        }
        load_packed<kWhole>(packed, p, at + c);
        unpack<kWhole>(in, packed, p, head, row, c);
        store_dz<kWhole, T>(p, at + c, in, Scales<R>{scale[2 * i], scale[2 * i + 1]});
        add_to_share(share, in, scale[2 * i]);
      }
      GPU_UNROLL
      for (int sum = 0; sum < 4; ++sum) {
        GPU_UNROLL
        for (int i = 0; i < kWidth && active; ++i) {
          R* const total = share_of<R>(p, part, sum, head * p.key_dim + c + i);
          *total = first == begin ? share[sum][i] : *total + share[sum][i];
        }
      }
    }
  }
}

}  // namespace normalized_qk
}  // namespace megalodon

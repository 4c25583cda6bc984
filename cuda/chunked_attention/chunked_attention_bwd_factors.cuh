// Factors of the tiles of dS in chunked attention's backward (chunked_attention_bwd.cuh), for fp16 alone.
//
// dS = P (dP - delta) may be larger than 65504, the largest fp16, where dq and dk are not. So a tile is stored times
// its factor: 1 or, if an element is 2^15 or more, a power of two that makes the largest one less than that. A sum over
// tiles has the factor of the last tile; its terms are scaled from tile to tile in float, without rounding.
// Example: tiles with largest elements 10 and 1e6 have the factors 1 and 2^-5. The sum over the first tile is
// multiplied by 2^-5 before the second tile is added, and the result by 2^5.
#pragma once

#include "block_product.cuh"
#include "reduce.cuh"

namespace megalodon {
namespace chunked_attention {

template <class Product>
GPU_INLINE void scale_by(typename Product::Sum& sum, typename Product::R factor) {
  GPU_UNROLL
  for (int r = 0; r < Product::kMicro; ++r) {
    GPU_UNROLL
    for (int c = 0; c < Product::kMicro; ++c) sum.at(r, c) *= factor;
  }
}

template <class T> constexpr bool kNeedsFactors = false;
template <> constexpr bool kNeedsFactors<gpu::fp16> = true;

// The factors of a row or a column of tiles.
template <class Product>
struct TileFactors {
  static constexpr bool kNeeded = kNeedsFactors<typename Product::T>;
  float* first;
  int64_t step;  // from a tile to the next

  GPU_INLINE float& of(int row) const { return first[row / Product::kEdge * step]; }

  // Multiplies the block's tile by its factor: 1, or the power of two with which the largest finite element is from
  // 2^14 to 2^15. All threads call it.
  GPU_INLINE void apply(typename Product::Sum& ds, int row) const {
    if constexpr (kNeeded) {
      float most = 0;
      GPU_UNROLL
      for (int e = 0; e < Product::kMicro * Product::kMicro; ++e) {
        const float size = fabsf(ds.at(e / Product::kMicro, e % Product::kMicro));
        most = size > most && size < INFINITY ? size : most;
      }
      most = gpu::block_max(most);
      const uint32_t exponent = gpu::bit_cast<uint32_t>(most) >> 23;  // biased by 127: 142 for 2^15
      const float factor = most < 0x1p15f ? 1 : gpu::bit_cast<float>((268 - exponent) << 23);
      if (threadIdx.x == 0) of(row) = factor;
      if (factor != 1) scale_by<Product>(ds, factor);
    }
  }

  // Gives a sum over the tiles before `row` the factor of the tile that begins there.
  GPU_INLINE void enter(typename Product::Sum& sum, int row) const {
    if constexpr (kNeeded) {
      const float ratio = of(row) / of(row - 1);
      if (ratio != 1) scale_by<Product>(sum, ratio);
    }
  }

  // Removes the factor of the last tile, which has `row`.
  GPU_INLINE void leave(typename Product::Sum& sum, int row) const {
    if constexpr (kNeeded) scale_by<Product>(sum, 1 / of(row));
  }
};

}  // namespace chunked_attention
}  // namespace megalodon

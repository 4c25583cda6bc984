// A scan of CEMA: its sizes, and its arrays in global memory. cema.cuh describes its phases.
#pragma once

#include "cema.h"
#include "complex.cuh"
#include "sequences.cuh"

namespace megalodon {
namespace cema {

// Planes of the table, each (N', D') or, in matrices, (D', N'); N' and D' are N and D padded (Scan). A matrix has 8
// planes: its 4 entries by rows, then the errors of rounding these to R. The bases follow the last plane.
enum Plane {
  kAlpha, kBeta, kDelta,
  kOutFirst, kOutSecond,  // y = sum of kOutFirst first + kOutSecond second
  kTileMatrix,
  kWarpMatrix = kTileMatrix + 8,
  kPlanes = kWarpMatrix + 8,
};
constexpr int kBasis = 8;      // numbers of a basis
constexpr int kMmaTile = 128;  // on tensor cores: positions of a tile (cema_mma_scan.cuh), and lags (cema_mma.cuh)
constexpr int kMmaRows = 16;   // tiles per product of cema_mma_scan.cuh
constexpr int kBlock = 16;     // positions per product
constexpr int kPowers = kBlock + 2;  // pairs in Scan::powers per mode and channel

// An array in global memory whose element type depends on the call's dtype: as<R>() points to elements Element<R>.
template <template <class> class Element, class Void = void>
struct Array {
  Void* data;

  MEGALODON_INLINE Array(Void* data_ = nullptr) : data(data_) {}
  MEGALODON_INLINE explicit operator bool() const { return data; }
  template <class R>
  MEGALODON_INLINE auto as() const {
    return static_cast<std::conditional_t<std::is_const<Void>::value, const Element<R>, Element<R>>*>(data);
  }
};

template <class R> using Real = R;

template <class R>
struct alignas(2 * sizeof(R)) Pair {  // a complex number in the basis of cema.cuh
  R first, second;
};

using Reals = Array<Real>;
using Pairs = Array<Pair>;
using Complexes = Array<gpu::Complex>;
using ConstReals = Array<Real, const void>;
using ConstComplexes = Array<gpu::Complex, const void>;

// One scan over time, of at most 32 modes. N' = `lanes` is a power of two that is at least their number, and D' =
// `width` is D or D + 1, an even number. The arrays hold zeros for modes and channels that do not exist.
struct Scan {
  Sequences sequences;
  int64_t channels, modes;  // D, N of the tensors
  int64_t first_mode;       // of the scan's group of modes
  int64_t width, lanes;     // D', N'
  int64_t tile, tiles;      // positions of a tile; number of tiles
  bool reverse;             // against time
  bool whole;               // two channels can be accessed at once
  bool loads_sums;          // continue the sums over modes in `sums`: not the first group of modes
  bool stores_sums;         // store the sums over modes in `sums`: not the last group
  bool by_mma;              // states and output by cema_mma_scan.cuh

  // The call's tensors.
  ConstReals in;           // (T, D), the call's dtype; null if zero, and then `factor` is not null
  ConstReals factor;       // (T, D), the call's dtype; null if there are no `products`
  Reals out;               // (T, D), the call's dtype
  ConstReals omega;        // (D)
  ConstComplexes initial;  // (S, D, N), or null: zero
  Complexes final;         // (S, D, N), or null: not wanted

  // Coefficients.
  Reals table;   // kPlanes planes of N' D', and (N', D', kBasis)
  Pairs powers;  // (D', kPowers, N'): q^0 .. q^16, and q^16 times the pair (0, 1); or null: not used

  // States.
  Pairs states;    // (tiles, D', N'): states at the tiles' ends, then the states that enter the tiles
  int32_t* stops;  // (tiles): nonzero if a tile's end does not depend on the state that enters it

  // Sums.
  Reals sums;               // (T, D): y of the groups of modes so far, if N > 32
  Reals products;           // (tiles, 2, N', D'): sum over a tile of factor_t times the pair after position t
  int64_t products_stride;  // from tile to tile

  // Tile k has the positions [begin(k), end(k)). Its tokens are k * tile .. (k + 1) * tile - 1, also if `reverse`.
  MEGALODON_INLINE int64_t begin(int64_t k) const {
    const int64_t T = sequences.tokens, end = (k + 1) * tile;
    return !reverse ? k * tile : end < T ? T - end : 0;
  }
  MEGALODON_INLINE int64_t end(int64_t k) const {
    const int64_t T = sequences.tokens, end = (k + 1) * tile;
    return reverse ? T - k * tile : end < T ? end : T;
  }
  MEGALODON_INLINE int64_t token(int64_t position) const {
    return reverse ? sequences.tokens - 1 - position : position;
  }
  MEGALODON_INLINE int64_t step() const { return reverse ? -channels : channels; }
  MEGALODON_INLINE int64_t sequence_begin(int64_t s) const {
    return reverse ? sequences.tokens - sequences.end(s) : sequences.begin(s);
  }
  MEGALODON_INLINE int64_t sequence_end(int64_t s) const {
    return reverse ? sequences.tokens - sequences.begin(s) : sequences.end(s);
  }
  template <class R>
  MEGALODON_INLINE R* state(int64_t k, int64_t mode, int64_t channel) const {
    return &states.as<R>()[(k * width + channel) * lanes + mode].first;
  }
  template <class R>
  MEGALODON_INLINE R* power(int index, int64_t mode, int64_t channel) const {
    return &powers.as<R>()[(channel * kPowers + index) * lanes + mode].first;
  }
  template <class R>
  MEGALODON_INLINE R* plane(int index) const { return table.as<R>() + index * lanes * width; }
};

}  // namespace cema
}  // namespace megalodon

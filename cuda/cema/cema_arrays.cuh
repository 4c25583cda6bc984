// A scan of CEMA: sizes, and arrays in global memory. Its phases: cema.cuh.
#pragma once

#include "cema.h"
#include "complex.cuh"
#include "sequences.cuh"

namespace megalodon {
namespace cema {

// Rows of the table: (N', D') each, matrices (D', N'); then the bases. A matrix is stored by rows, followed by the
// rounding errors of its entries in R.
enum Plane {
  kAlpha, kBeta, kDelta,
  kOutFirst, kOutSecond,  // y = sum of kOutFirst first + kOutSecond second
  kTileMatrix,
  kSpanMatrix = kTileMatrix + 8,
  kPlanes = kSpanMatrix + 8,
};
constexpr int kBasis = 8;  // numbers of a basis
constexpr int kMmaTile = 128;  // positions of a tile, and lags, on tensor cores: cema_mma_scan.cuh, cema_mma.cuh
constexpr int kMmaRows = 16;   // tiles per product of cema_mma_scan.cuh
constexpr int kBlock = 16, kPowers = kBlock + 2;  // positions per product; pairs per mode and channel

// An array in global memory whose element type depends on the call's dtype: of<R>() points to elements Of<R>.
template <template <class> class Of, class Void = void>
struct Array {
  Void* data;

  MEGALODON_INLINE Array(Void* data_ = nullptr) : data(data_) {}
  MEGALODON_INLINE explicit operator bool() const { return data; }
  template <class R>
  MEGALODON_INLINE auto of() const {
    return static_cast<std::conditional_t<std::is_const<Void>::value, const Of<R>, Of<R>>*>(data);
  }
};

template <class R> using Real = R;  // or T, of x and y

template <class R>
struct alignas(2 * sizeof(R)) Pair {  // basis: cema.cuh
  R first, second;
};

using Reals = Array<Real>;
using Pairs = Array<Pair>;
using Complexes = Array<gpu::Complex>;
using ConstReals = Array<Real, const void>;
using ConstComplexes = Array<gpu::Complex, const void>;

// One scan over time of up to 32 modes. Below, N' is `lanes` modes, a power of two, and D' is `width` channels, even;
// modes and channels beyond the tensors' are zero.
struct Scan {
  Sequences sequences;
  int64_t channels, modes;  // D, N of the tensors
  int64_t first_mode;       // of this group of modes
  int64_t width, lanes;     // D', N'
  int64_t tile, tiles;
  bool reverse;             // against time
  bool whole;               // two channels may be accessed at once
  bool resume, more;        // the sums over modes start from `sums`, or end in it
  bool by_mma;              // states and output by cema_mma_scan.cuh

  // The call's tensors.
  ConstReals in, factor;   // (T, D) T. in: null if zero; then `factor` is not null. factor: null without `products`
  Reals out;               // (T, D) T
  ConstReals omega;        // (D)
  ConstComplexes initial;  // (S, D, N), or null: zero
  Complexes final;         // (S, D, N), or null: not wanted

  // Coefficients.
  Reals table;   // kPlanes planes of N' D', and (N', D', kBasis)
  Pairs powers;  // (D', kPowers, N'): q^0 .. q^16, and (0, 1) times q^16; or null: not used

  // States.
  Pairs states;    // (tiles, D', N'): ends of tiles, replaced by the states that enter them
  int32_t* stops;  // (tiles): nonzero if a tile's end does not depend on the state that enters it

  // Sums.
  Reals sums;               // (T, D): y of the groups of modes so far, if N > 32
  Reals products;           // (tiles, 2, N', D'): sum over a tile of factor_t times the pair after position t
  int64_t products_stride;  // from tile to tile

  // Positions of tile k, which holds the tokens k tile .. (k + 1) tile - 1 in either direction.
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
  MEGALODON_INLINE R* pairs(int64_t k, int64_t mode, int64_t channel) const {
    return &states.of<R>()[(k * width + channel) * lanes + mode].first;
  }
  template <class R>
  MEGALODON_INLINE R* power(int index, int64_t mode, int64_t channel) const {
    return &powers.of<R>()[(channel * kPowers + index) * lanes + mode].first;
  }
  template <class R>
  MEGALODON_INLINE R* plane(int index) const { return table.of<R>() + index * lanes * width; }
};

}  // namespace cema
}  // namespace megalodon

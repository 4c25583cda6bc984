// A strip of channels as a job of the CEMA kernels works on it, tile by tile.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cema.h"
#include "cema_pass.h"
#include "cema_plan.h"
#include "parallel.h"
#include "simd.h"

namespace megalodon::MEGALODON_ISA {

// Coefficients and state of all its channels in lanes, rows of one tile, the sweep over a span.
template <class T>
struct Strip {
  using R = Compute<T>;
  static constexpr int lanes = kLanes<R>;
  static constexpr int64_t kTileSize = kTileVectors * kTileSteps * lanes;

  Strip(const CemaParams& params, const Plan& plan)
      : params(params), width(plan.channels), modes(params.modes), coefs(width * modes * kCoefs), omega(width),
        state(width * modes * 4), in(kTileSize), out(kTileSize), x(kTileSize) {}

  // Takes up strip `index`: c = gamma p where folded, else gamma; q and gamma conjugated for the backward.
  void select(int64_t index, bool folded, bool conjugated) {
    first = index * width;
    channels = static_cast<int>(std::min(width, params.channels - first));
    vectors = static_cast<int>(ceil_div(channels, lanes));
    std::fill_n(coefs.get(), width * modes * kCoefs, R(0));
    std::fill_n(omega.get(), width, R(0));
    std::copy_n(static_cast<const R*>(params.omega) + first, channels, omega.get());
    const R *p = modal(params.p), *q = modal(params.q, 2), *gamma = modal(params.gamma, 2);
    const R sign = conjugated ? -1 : 1;
    each_mode([&](int64_t i, int64_t vector, int64_t lane) {
      R* coef = coefs.get() + vector * kCoefs * lanes + lane;
      const R scale = folded ? p[i] : 1;
      coef[kQRe * lanes] = q[2 * i];
      coef[kQIm * lanes] = sign * q[2 * i + 1];
      coef[kCRe * lanes] = scale * gamma[2 * i];
      coef[kCIm * lanes] = sign * scale * gamma[2 * i + 1];
      coef[kP * lanes] = p[i];
    });
  }

  // This strip's part of a (D, N, parts) tensor, and of row `index` of an (S, D, N) complex one.
  const R* modal(const void* tensor, int parts = 1) const {
    return static_cast<const R*>(tensor) + first * modes * parts;
  }
  const R* modal_row(const void* tensor, int64_t index) const {
    return static_cast<const R*>(tensor) + (index * params.channels + first) * modes * 2;
  }
  R* modal_row(void* tensor, int64_t index) const {
    return static_cast<R*>(tensor) + (index * params.channels + first) * modes * 2;
  }
  // Its first element of a row of x, y, dy or dx; null if the tensor is.
  template <class Void, class E = std::conditional_t<std::is_const_v<Void>, const T, T>>
  E* row(Void* tensor, int64_t token) const {
    return tensor ? static_cast<E*>(tensor) + token * params.channels + first : nullptr;
  }

  // f(i, vector, lane): mode i of (channels, N) is in lane `lane` of vector `vector` of (vectors, N).
  template <class F>
  MEGALODON_INLINE void each_mode(F&& f) const {
    for (int64_t d = 0; d < channels; ++d)
      for (int64_t n = 0; n < modes; ++n) f(d * modes + n, d / lanes * modes + n, d % lanes);
  }
  // f(i, re, im) with the first complex number of each mode's `row` vectors of state.
  template <class F>
  MEGALODON_INLINE void each_state(int row, F&& f) const {
    each_mode([&](int64_t i, int64_t vector, int64_t lane) {
      R* at = state.get() + vector * row * lanes + lane;
      f(i, at[0], at[lanes]);
    });
  }
  void clear_state() { std::fill_n(state.get(), width * modes * 4, R(0)); }

  // Scans `steps` rows from `from` on, `stride` apart, to the rows of `to`; `ahead` rows exist from `from` on.
  template <Form form, bool kOutput = true>
  void sweep(const T* from, T* to, const T* x_from, int64_t stride, int64_t steps, int64_t ahead, double* sums) {
    each_tile(steps, [&](int64_t t, int count, int vector, int size) {
      const int64_t at = t * stride + vector * lanes, next = at + count * stride;
      load_rows(from + at, stride, count, size, in.get());
      if (form == Form::adjoint) load_rows(x_from + at, stride, count, size, x.get());
      const auto prefetch = [&](int64_t row) {
        if (row < ahead - t - count) prefetch_row(from + next + row * stride, size);
        if (kOutput && row < count) prefetch_row(to + at + row * stride, size);
      };
      each_pass<kScanModes>(size, prefetch, [&](int w, int64_t n, auto pass_modes) {
        const int64_t tile = w * kTileSteps * lanes, mode = (vector + w) * modes + n;
        const auto pass = [&](auto first) {
          scan_pass<form, kOutput, first, pass_modes>(
              in.get() + tile, out.get() + tile, x.get() + tile, count, load(omega.get() + (vector + w) * lanes),
              coefs.get() + mode * kCoefs * lanes, state.get() + mode * 2 * lanes,
              form == Form::adjoint ? sums + mode * kSums * lanes : nullptr);
        };
        n == 0 ? pass(std::true_type{}) : pass(std::false_type{});
      });
      if (kOutput) store_rows(out.get(), count, size, to + at, stride);
    });
  }

  // f(first step, steps, first vector, channels) for all tiles of some steps of the strip.
  template <class F>
  MEGALODON_INLINE void each_tile(int64_t steps, F&& f) const {
    for (int64_t t = 0; t < steps; t += kTileSteps)
      for (int vector = 0; vector < vectors; vector += kTileVectors)
        f(t, static_cast<int>(std::min<int64_t>(kTileSteps, steps - t)), vector,
          std::min(kTileVectors * lanes, channels - vector * lanes));
  }

  // pass(vector, first mode, modes) for all modes of a tile; in between, prefetch(row) for each of kTileSteps rows.
  template <int most, class Prefetch, class Pass>
  MEGALODON_INLINE void each_pass(int size, Prefetch&& prefetch, Pass&& pass) const {
    const int tile_vectors = (size + lanes - 1) / lanes;
    const int64_t passes = tile_vectors * ceil_div(modes, most);
    int64_t done = 0;
    for (int w = 0; w < tile_vectors; ++w)
      for_each_pass<most>(modes, [&](int64_t n, auto pass_modes) {
        for (int64_t row = kTileSteps * done / passes; row < kTileSteps * (done + 1) / passes; ++row) prefetch(row);
        ++done;
        pass(w, n, pass_modes);
      });
  }
  static MEGALODON_INLINE void prefetch_row(const T* row, int size) {
    for (int d = 0; d < size; d += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
  }

  const FlushDenormals flush;
  const CemaParams& params;
  const int64_t width, modes;
  int64_t first = 0;              // channel
  int channels = 0, vectors = 0;  // less than the width in the last strip
  const Scratch<R> coefs, omega;  // (vectors, N, kCoefs, lanes), (vectors, lanes)
  const Scratch<R> state;         // (vectors, N, 2 or 4, lanes)
  const Scratch<R> in, out, x;    // (kTileVectors, kTileSteps, lanes)
};

}  // namespace megalodon::MEGALODON_ISA

// A strip of channels: some neighbouring vectors. A job of the CEMA kernels processes its strip tile by tile.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cema.h"
#include "cema_pass.h"
#include "cema_plan.h"
#include "finite.h"
#include "parallel.h"
#include "simd.h"

namespace megalodon::MEGALODON_ISA {

// A strip's coefficients and states, with a channel in each lane, and memory for one tile. Slot v N + n of the arrays
// is mode n of vector v.
template <class T>
struct Strip {
  using R = Compute<T>;
  static constexpr int lanes = kLanes<R>;
  static constexpr int64_t kTileSize = kTileSteps * lanes;
  // Passes may read and write the rows themselves instead of copies in the tile, where a vector has all its channels.
  static constexpr bool kInPlace = std::is_same_v<T, R>;

  Strip(const CemaParams& params, const CemaPlan& plan)
      : params(params), width(plan.channels), modes(params.modes), coefs(width * modes * kCoefs), omega(width),
        state(width * modes * 4), in(kTileSize), out(kTileSize), x(kTileSize) {}

  // Loads the coefficients of strip `index`: c = gamma p if folded, else gamma. The backward conjugates q and gamma.
  void select(int64_t index, bool folded, bool conjugated) {
    first = index * width;
    channels = static_cast<int>(std::min(width, params.channels - first));
    vectors = static_cast<int>(ceil_div(channels, lanes));
    std::fill_n(coefs.get(), width * modes * kCoefs, R(0));
    std::fill_n(omega.get(), width, R(0));
    const R *p = modal(params.p), *q = modal(params.q, 2), *gamma = nullptr;
    if (params.gamma) {
      std::copy_n(static_cast<const R*>(params.omega) + first, channels, omega.get());
      gamma = modal(params.gamma, 2);
    }
    const R sign = conjugated ? -1 : 1;
    each_mode([&](int64_t i, int64_t slot, int64_t lane) {
      R* coef = coefs.get() + slot * kCoefs * lanes + lane;
      const R scale = folded ? p[i] : 1;
      coef[kQRe * lanes] = q[2 * i];
      coef[kQIm * lanes] = sign * q[2 * i + 1];
      coef[kP * lanes] = p[i];
      if (!gamma) return;
      coef[kCRe * lanes] = scale * gamma[2 * i];
      coef[kCIm * lanes] = sign * scale * gamma[2 * i + 1];
    });
  }

  // This strip's part of a (D, N, parts) tensor, and of row `index` of a complex (S, D, N) tensor.
  const R* modal(const void* tensor, int parts = 1) const {
    return static_cast<const R*>(tensor) + first * modes * parts;
  }
  const R* modal_row(const void* tensor, int64_t index) const {
    return static_cast<const R*>(tensor) + (index * params.channels + first) * modes * 2;
  }
  R* modal_row(void* tensor, int64_t index) const {
    return static_cast<R*>(tensor) + (index * params.channels + first) * modes * 2;
  }
  // The strip's first element of row `token` of x, y, dy or dx; null if the tensor is null.
  template <class Void, class E = std::conditional_t<std::is_const_v<Void>, const T, T>>
  E* row(Void* tensor, int64_t token) const {
    return tensor ? static_cast<E*>(tensor) + token * params.channels + first : nullptr;
  }

  // Calls f(i, slot, lane) for each mode of each channel: element i of a tensor (channels, N), and lane `lane` of slot
  // `slot` of the strip's arrays.
  template <class F>
  MEGALODON_INLINE void each_mode(F&& f) const {
    for (int64_t d = 0; d < channels; ++d)
      for (int64_t n = 0; n < modes; ++n) f(d * modes + n, d / lanes * modes + n, d % lanes);
  }
  // Calls f(i, re, im) with the first complex number of each mode's state, which has `size` real numbers.
  template <class F>
  MEGALODON_INLINE void each_state(int size, F&& f) const {
    each_mode([&](int64_t i, int64_t slot, int64_t lane) {
      R* at = state.get() + slot * size * lanes + lane;
      f(i, at[0], at[lanes]);
    });
  }
  void clear_state() { std::fill_n(state.get(), width * modes * 4, R(0)); }
  // Returns true if all states, of `size` real numbers per mode, are finite. A state that is not finite stays so.
  bool state_is_finite(int size) const {
    Vec<R> sum{};
    for (int64_t i = 0; i < int64_t{vectors} * modes * size * lanes; i += lanes) sum += load(state.get() + i) * R(0);
    return is_finite<R>(sum);
  }

  // Scans `steps` rows of input and writes the rows of output.
  //   from, to      the first rows of input and output. Without kInput, the input counts as zero and is not read
  //   x_from, sums  for the adjoint form alone: the first row of x, and (vectors, N, kSums, lanes), to which it adds
  //   stride        elements from row to row, negative in the backward
  //   ahead         rows that each tensor has from its first one on, which may be prefetched
  template <Form form, bool kOutput = true, bool kInput = true>
  void sweep(const T* from, T* to, const T* x_from, int64_t stride, int64_t steps, int64_t ahead, double* sums) {
    const T* const fetched = kOutput ? to : from;  // rows to write are prefetched, too
    each_tile<kScanModes>(from, fetched, stride, steps, ahead, [&](int64_t t, int count, int vector, int size) {
      const int64_t at = t * stride + vector * lanes;
      const Tile<R> tile = tile_of(from + at, x_from + at, kOutput ? to + at : nullptr, stride);
      const Vec<R> scale = load(omega.get() + vector * lanes);
      const bool in_place = kInPlace && size == lanes;
      if (!in_place) {
        if (kInput) load_rows(from + at, stride, count, size, tile.in);
        if (kOutput)
          for (int i = 0; i < count; ++i)
            store(tile.out + i * lanes, kInput ? scale * load(tile.in + i * lanes) : zeros<R>());
      }
      if (form == Form::adjoint) load_rows(x_from + at, stride, count, size, tile.x);
      // In place, the first pass reads the rows, and the last one writes them unless it is also the first. Otherwise
      // the output stays in the tile until store_rows().
      bool in_rows = false;  // the last pass wrote its output to the rows
      for_each_pass<kScanModes>(modes, [&](int64_t n, auto pass_modes) {
        const int64_t mode = vector * modes + n;
        const auto pass = [&](auto part) {
          scan_pass<form, kOutput, kInput, part, pass_modes>(
              tile, count, scale, coefs.get() + mode * kCoefs * lanes, state.get() + mode * 2 * lanes,
              form == Form::adjoint ? sums + mode * kSums * lanes : nullptr, fetch);
        };
        if constexpr (kInPlace) {
          if (in_place && n == 0) return pass(std::integral_constant<Part, Part::first>{});
          in_rows = kOutput && in_place && n + pass_modes == modes;
          if (in_rows) return pass(std::integral_constant<Part, Part::last>{});
        }
        pass(std::integral_constant<Part, Part::inner>{});
      });
      if (kOutput && !in_rows) store_rows(tile.out, count, size, to + at, stride);
    });
  }

  Tile<R> tile_of(const T* from, const T* x_from, T* to, int64_t stride) const {
    if constexpr (kInPlace) return {from, x_from, to, stride, in.get(), out.get(), x.get()};
    else return {nullptr, nullptr, nullptr, stride, in.get(), out.get(), x.get()};
  }

  // Cuts `steps` positions into tiles and calls f(first position, positions, vector, channels) for each. The passes in
  // f have at most `max_modes` modes each, and prefetch the rows of a and b at the next tile's positions.
  // Prefetches go row by row, where the hardware prefetcher helps, if a strip has at most two cache lines, at least
  // half a page or the entire row. In other strips the hardware would run past the strip's end, and take lines from the
  // thread about to write them: there they go column by column, a cache line wide each.
  template <int max_modes, class F>
  void each_tile(const T* a, const T* b, int64_t stride, int64_t steps, int64_t ahead, F&& f) {
    constexpr int64_t size = sizeof(T);
    const int64_t row = stride * size, lines = ceil_div(channels * size, kLineBytes);
    const bool by_rows = channels == params.channels || lines <= 2 || lines >= kPageBytes / kLineBytes / 2;
    fetch.set_pace(vectors * ceil_div(modes, max_modes) / lines);  // passes per line of a position
    fetch.line_step = by_rows ? kLineBytes : row;
    for (int64_t t = 0; t < steps; t += kTileSteps) {
      const int count = static_cast<int>(std::min<int64_t>(kTileSteps, steps - t));
      const int64_t rows = std::clamp<int64_t>(ahead - t - count, 0, kTileSteps);
      fetch.a = reinterpret_cast<const char*>(a + (t + count) * stride);
      fetch.b = reinterpret_cast<const char*>(b + (t + count) * stride);
      fetch.count = fetch.left = by_rows ? lines : rows;
      fetch.runs = by_rows ? rows : rows > 0 ? lines : 0;
      // A run is a row's lines, or a column's rows. From its end to the start of the next one:
      fetch.run_step = by_rows ? row - lines * kLineBytes : kLineBytes - rows * row;
      for (int vector = 0; vector < vectors; ++vector) f(t, count, vector, std::min(lanes, channels - vector * lanes));
    }
  }

  const CemaParams& params;
  const int64_t width, modes;
  int64_t first = 0;              // the strip's first channel
  int channels = 0, vectors = 0;  // may be fewer in the last strip
  Scratch<R> coefs, omega;  // (vectors, N, kCoefs, lanes), (vectors, lanes)
  Scratch<R> state;         // (vectors, N, 2 or 4, lanes)
  Scratch<R> in, out, x;    // (kTileSteps, lanes)
  FetchAhead fetch;
};

}  // namespace megalodon::MEGALODON_ISA

// CEMA of short sequences, as in decoding, for cema_cpu.cpp: one position at a time.
#pragma once

#include "cema_plan.h"
#include "simd.h"

namespace megalodon::MEGALODON_ISA {

// Advances up to kWidth channels by one position. Lanes run over the modes of (channels, N), in the order of the
// tensors, so coefficients and states are not rearranged.
template <class T>
struct Stepper {
  using R = Compute<T>;
  static constexpr int lanes = kLanes<R>;
  static constexpr int64_t kWidth = kMinStrip * lanes;  // channels

  explicit Stepper(int64_t modes)
      : modes(modes), x(kWidth), y(kWidth), drive(kWidth * modes + lanes), part(kWidth * modes + lanes),
        state(kWidth * modes * 2) {}

  // Computes to = q from + p x and y = Re(sum_n gamma to) + omega x for `channels` channels. `to` may be `from`.
  void step(const T* x_row, T* y_row, int64_t channels, const R* from, R* to, const R* p, const R* q, const R* gamma,
            const R* omega) const {
    for (int64_t d = 0; d < channels; d += lanes) store(&x[d], load_first(x_row + d, channels - d));
    // Each channel's splat may run into the next channel's elements, which are written later.
    for (int64_t d = 0; d < channels; ++d)
      for (int64_t n = 0; n < modes; n += lanes) store(&drive[d * modes + n], splat(x[d]));
    R *const parts = part.get(), *const drives = drive.get();
#pragma omp simd
    for (int64_t i = 0; i < channels * modes; ++i) {
      const R re = q[2 * i] * from[2 * i] - q[2 * i + 1] * from[2 * i + 1] + p[i] * drives[i];
      const R im = q[2 * i] * from[2 * i + 1] + q[2 * i + 1] * from[2 * i];
      to[2 * i] = re;
      to[2 * i + 1] = im;
      parts[i] = gamma[2 * i] * re - gamma[2 * i + 1] * im;
    }
    for (int64_t d = 0; d < channels; ++d) {
      R sum = omega[d] * x[d];
      for (int64_t n = 0; n < modes; ++n) sum += parts[d * modes + n];
      y[d] = sum;
    }
    for (int64_t d = 0; d < channels; d += lanes) store_first(y_row + d, load(&y[d]), channels - d);
  }

  const int64_t modes;
  Scratch<R> x, y;         // (kWidth)
  Scratch<R> drive, part;  // (kWidth, N): x of the mode's channel; Re(gamma h)
  Scratch<R> state;        // (kWidth, N, 2), for a caller without a tensor for states
};

}  // namespace megalodon::MEGALODON_ISA

#include "cema_coefficients.h"
#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"

namespace megalodon {
namespace {

constexpr const char* kCemaCoefficients = "cema_coefficients";
constexpr const char* kAsAlpha = "that of `alpha`";
constexpr const char* kComplexAsAlpha = "complex128 for a float64 `alpha`, else complex64";

// Checks and fills the parameters that the forward and the backward share; returns alpha.
TensorView fill(CemaCoefficientsParams& params, py::handle alpha_, py::handle delta, py::handle theta) {
  const TensorView alpha(kCemaCoefficients, "alpha", alpha_);
  params.dtype = alpha.rank("(D, N, 1)", 3).floating();
  alpha.dtype(real_of(params.dtype), "or float64");
  const int64_t D = params.channels = alpha.size(0), N = params.modes = alpha.size(1);
  params.alpha = alpha.shape("(D, N, 1)", {D, N, 1}).data();
  params.delta = TensorView(kCemaCoefficients, "delta", delta).like(alpha).data();
  params.theta = TensorView(kCemaCoefficients, "theta", theta)
                     .present()
                     .shape("(D, 1, 1)", {D, 1, 1})
                     .dtype(real_of(params.dtype), kAsAlpha)
                     .data();
  return alpha;
}

// A tensor of shape (D, N, 2), pairs of reals.
void* pair_data(const CemaCoefficientsParams& params, const char* name, py::handle object) {
  return TensorView(kCemaCoefficients, name, object)
      .present()
      .shape("(D, N, 2)", {params.channels, params.modes, 2})
      .dtype(real_of(params.dtype), kAsAlpha)
      .data();
}

// A tensor of shape (D, N), real or complex.
void* mode_data(const CemaCoefficientsParams& params, const char* name, py::handle object, bool is_complex) {
  return TensorView(kCemaCoefficients, name, object)
      .present()
      .shape("(D, N)", {params.channels, params.modes})
      .dtype(is_complex ? complex_of(params.dtype) : real_of(params.dtype), is_complex ? kComplexAsAlpha : kAsAlpha)
      .data();
}

MEGALODON_BINDING(cema_coefficients_fwd,
                  (py::handle alpha, py::handle delta, py::handle theta, py::handle gamma),
                  (py::handle p, py::handle q, py::handle scaled)) {
  CemaCoefficientsFwdParams params{};
  fill(params, alpha, delta, theta);
  params.gamma = pair_data(params, "gamma", gamma);
  params.p = mode_data(params, "p", p, false);
  params.q = mode_data(params, "q", q, true);
  params.scaled = mode_data(params, "scaled", scaled, true);
  MEGALODON_LAUNCH(target, cema_coefficients_fwd, params);
}

MEGALODON_BINDING(cema_coefficients_bwd,
                  (py::handle dp, py::handle dq, py::handle dscaled, py::handle alpha_, py::handle delta,
                   py::handle theta_),
                  (py::handle dalpha, py::handle ddelta, py::handle dtheta, py::handle dgamma)) {
  CemaCoefficientsBwdParams params{};
  const TensorView alpha = fill(params, alpha_, delta, theta_), theta(kCemaCoefficients, "theta", theta_);
  params.dp = mode_data(params, "dp", dp, false);
  params.dq = mode_data(params, "dq", dq, true);
  params.dscaled = mode_data(params, "dscaled", dscaled, true);
  params.dalpha = TensorView(kCemaCoefficients, "dalpha", dalpha).like(alpha).data();
  params.ddelta = TensorView(kCemaCoefficients, "ddelta", ddelta).like(alpha).data();
  params.dtheta = TensorView(kCemaCoefficients, "dtheta", dtheta).like(theta).data();
  params.dgamma = pair_data(params, "dgamma", dgamma);
  MEGALODON_LAUNCH(target, cema_coefficients_bwd, params);
}

}  // namespace

}  // namespace megalodon

#include "cema.h"
#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"

namespace megalodon {
namespace {

constexpr const char* kCemaEndState = "cema_end_state";

// Checks and fills the parameters of a scan of states; returns x.
TensorView fill_scan(const char* op, CemaParams& params, py::handle x_, py::handle p_, py::handle q_,
                     py::handle spans) {
  const TensorView x(op, "x", x_), p(op, "p", p_), q(op, "q", q_);
  params.dtype = x.rank("(B, L, D)", 3).floating();
  params.sequences = make_sequences(op, x.size(0), x.size(1), spans);
  params.channels = x.size(2);
  params.modes = p.rank("(D, N)", 2).size(1);
  if (params.modes < 1) p.fail("of at least one mode per channel, got N = 0");
  const int64_t D = params.channels, N = params.modes;
  params.x = x.data();
  params.p = p.shape("(D, N)", {D, N}).dtype(real_of(params.dtype), kRealDtype).data();
  params.q = q.present().shape("(D, N)", {D, N}).dtype(complex_of(params.dtype), kComplexDtype).data();
  return x;
}

// Checks and fills the parameters that the forward and the backward share; returns x.
TensorView fill(CemaParams& params, py::handle x_, py::handle p_, py::handle q_, py::handle gamma_, py::handle omega_,
                py::handle state_, py::handle spans) {
  const TensorView gamma("cema", "gamma", gamma_), omega("cema", "omega", omega_), state("cema", "state", state_);
  const TensorView x = fill_scan("cema", params, x_, p_, q_, spans);
  const Scalar real = real_of(params.dtype), complex = complex_of(params.dtype);
  const int64_t S = params.sequences.count, D = params.channels, N = params.modes;
  params.gamma = gamma.present().shape("(D, N)", {D, N}).dtype(complex, kComplexDtype).data();
  params.omega = omega.present().shape("(D,)", {D}).dtype(real, kRealDtype).data();
  params.state = state.shape("(S, D, N)", {S, D, N}).dtype(complex, kComplexDtype).data();
  return x;
}

MEGALODON_BINDING(cema_fwd,
                  (py::handle x_, py::handle p, py::handle q, py::handle gamma, py::handle omega, py::handle state,
                   py::handle spans),
                  (py::handle y, py::handle state_out)) {
  CemaFwdParams params{};
  const TensorView x = fill(params, x_, p, q, gamma, omega, state, spans);
  const int64_t S = params.sequences.count, D = params.channels, N = params.modes;
  params.y = TensorView("cema", "y", y).like(x).data();
  params.state_out = TensorView("cema", "state_out", state_out)
                         .shape("(S, D, N)", {S, D, N})
                         .dtype(complex_of(params.dtype), kComplexDtype)
                         .data();
  MEGALODON_LAUNCH(target, cema_fwd, params);
}

MEGALODON_BINDING(cema_bwd,
                  (py::handle x_, py::handle p, py::handle q, py::handle gamma, py::handle omega, py::handle state,
                   py::handle spans, py::handle dy, py::handle dstate_out),
                  (py::handle dx, py::handle dp, py::handle dq, py::handle dgamma, py::handle domega,
                   py::handle dstate)) {
  CemaBwdParams params{};
  const TensorView x = fill(params, x_, p, q, gamma, omega, state, spans);
  const TensorView p_view("cema", "p", p), q_view("cema", "q", q), omega_view("cema", "omega", omega);
  const int64_t S = params.sequences.count, D = params.channels, N = params.modes;
  const Scalar complex = complex_of(params.dtype);
  params.dy = TensorView("cema", "dy", dy).like(x).data();
  params.dstate_out =
      TensorView("cema", "dstate_out", dstate_out).shape("(S, D, N)", {S, D, N}).dtype(complex, kComplexDtype).data();
  params.dx = TensorView("cema", "dx", dx).like(x).data();
  params.dp = TensorView("cema", "dp", dp).like(p_view).data();
  params.dq = TensorView("cema", "dq", dq).like(q_view).data();
  params.dgamma = TensorView("cema", "dgamma", dgamma).like(q_view).data();
  params.domega = TensorView("cema", "domega", domega).like(omega_view).data();
  params.dstate =
      TensorView("cema", "dstate", dstate).shape("(S, D, N)", {S, D, N}).dtype(complex, kComplexDtype).data();
  MEGALODON_LAUNCH(target, cema_bwd, params);
}

// A state or its gradient, (S, D, N).
void* end_state(const char* name, const CemaParams& params, py::handle object) {
  return TensorView(kCemaEndState, name, object)
      .present()
      .shape("(S, D, N)", {params.sequences.count, params.channels, params.modes})
      .dtype(complex_of(params.dtype), kComplexDtype)
      .data();
}

MEGALODON_BINDING(cema_end_state_fwd,
                  (py::handle x, py::handle p, py::handle q, py::handle spans),
                  (py::handle state_out)) {
  CemaFwdParams params{};
  fill_scan(kCemaEndState, params, x, p, q, spans);
  params.state_out = end_state("state_out", params, state_out);
  params.ends_only = true;
  MEGALODON_LAUNCH(target, cema_fwd, params);
}

MEGALODON_BINDING(cema_end_state_bwd,
                  (py::handle x_, py::handle p, py::handle q, py::handle spans,
                   py::handle dstate_out),
                  (py::handle dx, py::handle dp, py::handle dq)) {
  CemaBwdParams params{};
  const TensorView x = fill_scan(kCemaEndState, params, x_, p, q, spans);
  const TensorView p_view(kCemaEndState, "p", p), q_view(kCemaEndState, "q", q);
  params.dstate_out = end_state("dstate_out", params, dstate_out);
  params.dx = TensorView(kCemaEndState, "dx", dx).like(x).data();
  params.dp = TensorView(kCemaEndState, "dp", dp).like(p_view).data();
  params.dq = TensorView(kCemaEndState, "dq", dq).like(q_view).data();
  MEGALODON_LAUNCH(target, cema_bwd, params);
}

}  // namespace

}  // namespace megalodon

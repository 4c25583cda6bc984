#include "bindings.h"
#include "gated_silu.h"
#include "target.h"
#include "tensor_view.h"

namespace megalodon {
namespace {

constexpr const char* kOp = "gated_silu";

// Checks and fills what the forward and the backward share; returns x.
TensorView fill(GatedSiluParams& params, py::handle x_, py::handle value_) {
  const TensorView x(kOp, "x", x_), value(kOp, "value", value_);
  params.dtype = x.present().floating();
  params.elements = x.elements();
  params.x = x.data();
  if (value.given()) params.value = value.like(x).data();
  return x;
}

void gated_silu_fwd(const Target& target, py::handle x_, py::handle value, py::handle y) {
  GatedSiluFwdParams params{};
  const TensorView x = fill(params, x_, value);
  params.y = TensorView(kOp, "y", y).like(x).data();
  MEGALODON_LAUNCH(target, gated_silu_fwd, params);
}

void gated_silu_bwd(const Target& target, py::handle x_, py::handle value, py::handle dy, py::handle dx,
                    py::handle dvalue) {
  GatedSiluBwdParams params{};
  const TensorView x = fill(params, x_, value);
  params.dy = TensorView(kOp, "dy", dy).like(x).data();
  params.dx = TensorView(kOp, "dx", dx).like(x).data();
  if (params.value) params.dvalue = TensorView(kOp, "dvalue", dvalue).like(x).data();
  MEGALODON_LAUNCH(target, gated_silu_bwd, params);
}

}  // namespace

void bind_gated_silu(py::module_& module) {
  define(module, "gated_silu_fwd", &gated_silu_fwd);
  define(module, "gated_silu_bwd", &gated_silu_bwd);
}

}  // namespace megalodon

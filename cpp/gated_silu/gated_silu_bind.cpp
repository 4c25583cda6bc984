#include "gated_silu.h"
#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"

namespace megalodon {
namespace {

constexpr const char* kGatedSilu = "gated_silu";

// Checks and fills the parameters that the forward and the backward share; returns x.
TensorView fill(GatedSiluParams& params, py::handle x_, py::handle value_) {
  const TensorView x(kGatedSilu, "x", x_), value(kGatedSilu, "value", value_);
  params.dtype = x.present().floating();
  params.elements = x.elements();
  params.x = x.data();
  if (value.given()) params.value = value.like(x).data();
  return x;
}

MEGALODON_BINDING(gated_silu_fwd, (py::handle x_, py::handle value), (py::handle y)) {
  GatedSiluFwdParams params{};
  const TensorView x = fill(params, x_, value);
  params.y = TensorView(kGatedSilu, "y", y).like(x).data();
  MEGALODON_LAUNCH(target, gated_silu_fwd, params);
}

MEGALODON_BINDING(gated_silu_bwd,
                  (py::handle x_, py::handle value, py::handle dy),
                  (py::handle dx, py::handle dvalue)) {
  GatedSiluBwdParams params{};
  const TensorView x = fill(params, x_, value);
  params.dy = TensorView(kGatedSilu, "dy", dy).like(x).data();
  params.dx = TensorView(kGatedSilu, "dx", dx).like(x).data();
  if (params.value) params.dvalue = TensorView(kGatedSilu, "dvalue", dvalue).like(x).data();
  MEGALODON_LAUNCH(target, gated_silu_bwd, params);
}

}  // namespace

}  // namespace megalodon

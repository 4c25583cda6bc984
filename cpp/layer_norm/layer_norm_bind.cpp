#include "layer_norm.h"
#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"

namespace megalodon {
namespace {

const char* op_name(bool is_rms_norm) { return is_rms_norm ? "rms_norm" : "layer_norm"; }

// A tensor of shape (D,), or null.
void* channel_data(const LayerNormParams& params, const char* name, py::handle object) {
  const char* op = op_name(params.is_rms_norm);
  return TensorView(op, name, object).shape("(D,)", {params.channels}).dtype(real_of(params.dtype), kRealDtype).data();
}

// Checks and fills the parameters that the forward and the backward share; returns x.
TensorView fill(LayerNormParams& params, py::handle x_, py::handle weight, double eps, bool is_rms_norm) {
  const TensorView x(op_name(is_rms_norm), "x", x_);
  params.dtype = x.present().floating();
  if (x.axes() < 1) x.rank("(..., D)", 1);
  params.channels = x.size(x.axes() - 1);
  params.rows = params.channels ? x.elements() / params.channels : 0;
  check_range(x.op(), "eps", eps, 0, "finite and at least 0");
  params.eps = eps;
  params.is_rms_norm = is_rms_norm;
  params.x = x.data();
  params.weight = channel_data(params, "weight", weight);
  return x;
}

MEGALODON_BINDING(layer_norm_fwd,
                  (py::handle x_, py::handle weight, py::handle bias, double eps, bool is_rms_norm),
                  (py::handle y)) {
  LayerNormFwdParams params{};
  const TensorView x = fill(params, x_, weight, eps, is_rms_norm);
  params.bias = channel_data(params, "bias", bias);
  params.y = TensorView(x.op(), "y", y).like(x).data();
  MEGALODON_LAUNCH(target, layer_norm_fwd, params);
}

MEGALODON_BINDING(layer_norm_bwd,
                  (py::handle x_, py::handle weight, double eps, bool is_rms_norm, py::handle dy),
                  (py::handle dx, py::handle dweight, py::handle dbias)) {
  LayerNormBwdParams params{};
  const TensorView x = fill(params, x_, weight, eps, is_rms_norm);
  params.dy = TensorView(x.op(), "dy", dy).like(x).data();
  params.dx = TensorView(x.op(), "dx", dx).like(x).data();
  params.dweight = channel_data(params, "dweight", dweight);
  params.dbias = channel_data(params, "dbias", dbias);
  MEGALODON_LAUNCH(target, layer_norm_bwd, params);
}

}  // namespace

}  // namespace megalodon

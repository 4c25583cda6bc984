#include "bindings.h"
#include "linear.h"
#include "target.h"
#include "tensor_view.h"

namespace megalodon {
namespace {

void linear_few_rows(const Target& target, py::handle x_, py::handle weight_, py::handle bias_, py::handle y_) {
  const TensorView x("linear", "x", x_), weight("linear", "weight", weight_), bias("linear", "bias", bias_);
  const TensorView y("linear", "y", y_);
  LinearFewRowsParams params{};
  params.dtype = x.rank("(T, I)", 2).floating();
  params.rows = x.size(0);
  params.inputs = x.size(1);
  params.outputs = weight.rank("(O, I)", 2).size(0);
  const Scalar scalar = scalar_of(params.dtype);
  params.x = x.data();
  params.weight = weight.shape("(O, I)", {params.outputs, params.inputs}).dtype(scalar, "as `x`").data();
  params.bias = bias.shape("(O,)", {params.outputs}).dtype(scalar, "as `x`").data();
  params.y = y.present().shape("(T, O)", {params.rows, params.outputs}).dtype(scalar, "as `x`").data();
  MEGALODON_LAUNCH(target, linear_few_rows, params);
}

void transpose(const Target& target, py::handle x_, py::handle y_) {
  const TensorView x("transpose", "x", x_), y("transpose", "y", y_);
  TransposeParams params{};
  params.rows = x.rank("(R, C)", 2).dtype(Scalar::f32, "the only one").size(0);
  params.columns = x.size(1);
  params.x = x.data_as<const float>();
  params.y = y.present()
                 .shape("(C, R)", {params.columns, params.rows})
                 .dtype(Scalar::f32, "the only one")
                 .data_as<float>();
  MEGALODON_LAUNCH(target, transpose, params);
}

}  // namespace

void bind_linear(py::module_& module) {
  define(module, "linear_few_rows", &linear_few_rows);
  define(module, "transpose", &transpose);
}

}  // namespace megalodon

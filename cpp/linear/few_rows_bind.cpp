#include "few_rows.h"
#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"

namespace megalodon {
namespace {

MEGALODON_BINDING(linear_few_rows,
                  (py::handle x_, py::handle weight_, py::handle bias_, bool silu, py::handle value, py::handle add),
                  (py::handle y_)) {
  const TensorView x("linear", "x", x_), weight("linear", "weight", weight_), bias("linear", "bias", bias_);
  LinearFewRowsParams params{};
  params.dtype = x.rank("(T, I)", 2).floating();
  params.rows = x.size(0);
  params.inputs = x.size(1);
  params.outputs = weight.rank("(O, I)", 2).size(0);
  const Scalar scalar = scalar_of(params.dtype);
  const auto like_y = [&](const TensorView& tensor) {
    return tensor.shape("(T, O)", {params.rows, params.outputs}).dtype(scalar, "as `x`").data();
  };
  params.x = x.data();
  params.weight = weight.shape("(O, I)", {params.outputs, params.inputs}).dtype(scalar, "as `x`").data();
  params.bias = bias.shape("(O,)", {params.outputs}).dtype(scalar, "as `x`").data();
  params.silu = silu;
  params.value = like_y({"linear", "value", value});
  params.add = like_y({"linear", "add", add});
  params.y = like_y(TensorView("linear", "y", y_).present());
  if (!MEGALODON_CUDA && (silu || params.value || params.add))
    x.fail("on CUDA, as what follows the product has no kernel on the CPU");
  MEGALODON_LAUNCH(target, linear_few_rows, params);
}

}  // namespace

}  // namespace megalodon

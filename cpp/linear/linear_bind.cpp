#include "linear.h"
#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"

namespace megalodon {
namespace {

bool has_amx_kernel() {
#if defined(__x86_64__)
  return active_isa == Isa::v4_amx;
#else
  return false;
#endif
}

// The tensors are matrices or, if x has 3 axes, stacks of n matrices.
MEGALODON_BINDING(linear_many_rows,
                  (py::handle x_, bool x_transposed, py::handle weight_, bool weight_transposed, py::handle bias_,
                   bool add),
                  (py::handle y_)) {
  const TensorView x("linear", "x", x_), weight("linear", "weight", weight_), bias("linear", "bias", bias_);
  const TensorView y("linear", "y", y_);
  LinearManyRowsParams params{};
  const bool batched = x.axes() == 3;
  const int first = batched ? 1 : 0, rank = batched ? 3 : 2;
  params.dtype = x.rank(batched ? "(n, T, I)" : "(T, I)", rank).floating();
  const bool has_kernel = params.dtype == DType::f32 || (params.dtype != DType::f64 && !has_amx_kernel());
  if (!has_kernel) x.fail(has_amx_kernel() ? "float32" : "float32, bfloat16 or float16");
  params.x_transposed = x_transposed;
  params.weight_transposed = weight_transposed;
  params.add = add;
  params.count = batched ? x.size(0) : 1;
  params.rows = x.size(first + (x_transposed ? 1 : 0));
  params.inputs = x.size(first + (x_transposed ? 0 : 1));
  params.outputs = weight.rank(batched ? "(n, O, I)" : "(O, I)", rank).size(first + (weight_transposed ? 1 : 0));
  const auto matrices = [&](const TensorView& tensor, const char* letters, const char* batched_letters, int64_t rows,
                            int64_t columns) -> const TensorView& {
    if (batched) return tensor.shape(batched_letters, {params.count, rows, columns});
    return tensor.shape(letters, {rows, columns});
  };
  const Scalar scalar = scalar_of(params.dtype);
  params.x = x.data();
  if (weight_transposed) matrices(weight, "(I, O)", "(n, I, O)", params.inputs, params.outputs);
  else matrices(weight, "(O, I)", "(n, O, I)", params.outputs, params.inputs);
  params.weight = weight.dtype(scalar, "as `x`").data();
  params.bias = bias.shape("(O,)", {params.outputs}).dtype(scalar, "as `x`").data();
  params.y_is_float = y.present().scalar() == Scalar::f32;
  if (!params.y_is_float) y.dtype(scalar, "as `x`, or float32");
  params.y = matrices(y, "(T, O)", "(n, T, O)", params.rows, params.outputs).data();
  MEGALODON_LAUNCH(target, linear_many_rows, params);
}

}  // namespace

}  // namespace megalodon

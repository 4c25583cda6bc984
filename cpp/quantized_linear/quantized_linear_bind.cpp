#include "quantized_weight.h"
#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"

namespace megalodon {

namespace {

DType real_dtype(const TensorView& tensor) {
  const DType dtype = tensor.floating();
  if (dtype == DType::f64) tensor.fail("float32, bfloat16 or float16, got torch.float64");
  return dtype;
}

// Reads the arguments of both kernels.
template <class Params>
Params read_product(py::handle x_, py::handle weight_, py::handle scale_, py::handle bias_, py::handle y_) {
  const TensorView x("quantized_linear", "x", x_), weight("quantized_linear", "weight", weight_);
  const TensorView scale("quantized_linear", "scale", scale_), bias("quantized_linear", "bias", bias_);
  const TensorView y("quantized_linear", "y", y_);
  Params params{};
  params.dtype = real_dtype(x.rank("(T, I)", 2));
  params.rows = x.size(0);
  read_quantized_weight(weight, scale, x.size(1), params);
  const Scalar scalar = scalar_of(params.dtype);
  params.x = x.data();
  params.bias = bias.shape("(O,)", {params.outputs}).dtype(scalar, "as `x`").data();
  params.y = y.present().shape("(T, O)", {params.rows, params.outputs}).dtype(scalar, "as `x`").data();
  return params;
}

MEGALODON_BINDING(quantized_linear, (py::handle x, py::handle weight, py::handle scale, py::handle bias),
                  (py::handle y)) {
  const auto params = read_product<QuantizedLinearParams>(x, weight, scale, bias, y);
  MEGALODON_LAUNCH(target, quantized_linear, params);
}

MEGALODON_BINDING(quantized_many_rows, (py::handle x, py::handle weight, py::handle scale, py::handle bias),
                  (py::handle y)) {
  const auto params = read_product<QuantizedManyRowsParams>(x, weight, scale, bias, y);
  MEGALODON_LAUNCH(target, quantized_many_rows, params);
}

void check_rows_and_dequantize(const DequantizeParams& p) {
  for (int64_t i = 0; p.rows && i < p.num_rows; ++i)
    if (p.rows[i] < 0 || p.rows[i] >= p.outputs)
      throw py::index_error("quantized embedding: `tokens` must be in [0, " + std::to_string(p.outputs) + "), got " +
                            std::to_string(p.rows[i]) + ".");
  launch_dequantize_cpu(p);
}

MEGALODON_BINDING(dequantize, (py::handle weight_, py::handle scale_, py::handle rows_), (py::handle y_)) {
  const TensorView weight("quantized_linear", "weight", weight_), scale("quantized_linear", "scale", scale_);
  const TensorView rows("quantized_linear", "rows", rows_), y("quantized_linear", "y", y_);
  DequantizeParams params{};
  params.dtype = real_dtype(y.rank("(T, I)", 2));
  read_quantized_weight(weight, scale, y.size(1), params);
  params.num_rows = rows.given() ? rows.rank("(T,)", 1).size(0) : params.outputs;
  params.rows = rows.dtype(Scalar::i64, "indices").data_as<const int64_t>();
  params.y = y.shape("(T, I)", {params.num_rows, params.inputs}).data();
  target.launch(params, check_rows_and_dequantize);
}

}  // namespace

}  // namespace megalodon

// Checks of quantized weights, for the bindings of the op and of the decoder.
#pragma once

#include "quantized_linear.h"
#include "sizes.h"
#include "tensor_view.h"

namespace megalodon {

// Checks a weight with `inputs` inputs, and its scale, and fills the fields of `params`.
inline void read_quantized_weight(const TensorView& weight, const TensorView& scale, int64_t inputs,
                                  QuantizedWeight& params) {
  params.is_int4 = weight.present().scalar() == Scalar::u8;
  params.inputs = inputs;
  const int64_t O = params.outputs = weight.rank("(O, ...)", 2).size(0);
  if (params.is_int4) {
    const int64_t blocks = ceil_div(inputs, kInt4Block);
    weight.shape("(O, 64 ceil(I / 128))", {O, kInt4Block / 2 * blocks});
    scale.present().shape("(O, 4 ceil(I / 128))", {O, kInt4Block / kInt4Group * blocks});
    scale.dtype(Scalar::bf16, "for a weight of uint8");
  } else {
    weight.shape("(O, I)", {O, inputs}).dtype(Scalar::i8, "or torch.uint8 for int4");
    scale.present().shape("(O,)", {O}).dtype(Scalar::f32, "for a weight of int8");
  }
  params.weight = weight.data();
  params.scale = scale.data();
}

}  // namespace megalodon

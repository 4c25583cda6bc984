// _amx_emulated: the bindings of the ops that have kernels for AMX, which run on emulated tiles.
#include <stdexcept>

#include "bindings.h"
#include "chunked_attention.h"
#include "few_rows.h"
#include "linear.h"
#include "quantized_linear.h"

namespace megalodon {

Isa active_isa = Isa::v4_amx;

// A call that AMX cannot compute takes the kernel of the lowest instruction set, so each must exist.
namespace v2 {
#define NOT_EMULATED(name, Params) \
  void name(const Params&) { throw std::logic_error(#name ": only kernels for AMX are emulated"); }
NOT_EMULATED(linear_few_rows_cpu, LinearFewRowsParams)
NOT_EMULATED(linear_many_rows_cpu, LinearManyRowsParams)
NOT_EMULATED(quantized_linear_cpu, QuantizedLinearParams)
NOT_EMULATED(quantized_many_rows_cpu, QuantizedManyRowsParams)
NOT_EMULATED(dequantize_cpu, DequantizeParams)
NOT_EMULATED(chunked_attention_fwd_cpu, ChunkedAttentionFwdParams)
NOT_EMULATED(chunked_attention_bwd_cpu, ChunkedAttentionBwdParams)
NOT_EMULATED(chunked_attention_state_cpu, ChunkedAttentionStateParams)
}  // namespace v2

}  // namespace megalodon

PYBIND11_MODULE(_amx_emulated, module) { megalodon::Registration::define_all(module); }

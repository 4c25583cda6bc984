// One bind_<name> for each part of the module.
#pragma once

#include <pybind11/pybind11.h>

namespace megalodon {

namespace py = pybind11;

void bind_isa(py::module_& module);
void bind_cema(py::module_& module);
void bind_timestep_norm(py::module_& module);
void bind_normalized_qk(py::module_& module);
void bind_chunked_attention(py::module_& module);

// These are parts of _C alone.
void bind_linear(py::module_& module);
void bind_layer_norm(py::module_& module);
void bind_gated_silu(py::module_& module);
void bind_cema_coefficients(py::module_& module);
void bind_cross_entropy(py::module_& module);
void bind_adaptive_working_memory(py::module_& module);
void bind_decoder(py::module_& module);

}  // namespace megalodon

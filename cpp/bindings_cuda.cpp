#include "bindings.h"

PYBIND11_MODULE(_cuda, module) {
  using namespace megalodon;
  module.doc() = "CUDA kernels of megalodon_ops. Use the functions of the package, which call these.";
  bind_cema(module);
  bind_timestep_norm(module);
  bind_normalized_qk(module);
  bind_chunked_attention(module);
  module.def("build_info", [] {
    py::dict info;
    info["compiler"] = MEGALODON_CUDA_COMPILER;
    info["architectures"] = MEGALODON_CUDA_ARCHITECTURES;
    return info;
  });
}

#include "bindings.h"
#include "fork.h"
#include "openmp.h"

PYBIND11_MODULE(_C, module) {
  using namespace megalodon;
  module.doc() = "Compiled kernels of megalodon_ops. Use the functions of the package, which call these.";
  end_threads_before_forks();
  bind_isa(module);
  bind_cema(module);
  bind_timestep_norm(module);
  bind_normalized_qk(module);
  bind_chunked_attention(module);
  bind_linear(module);
  bind_layer_norm(module);
  bind_gated_silu(module);
  bind_cema_coefficients(module);
  bind_cross_entropy(module);
  bind_adaptive_working_memory(module);
  bind_decoder(module);
  module.def("num_threads", [] { return omp_get_max_threads(); });
  module.def("build_info", [] {
    py::dict info;
    info["version"] = MEGALODON_VERSION;
    info["compiler"] = __VERSION__;
    return info;
  });
}

#include "bindings.h"
#include "fork.h"
#include "threads.h"

PYBIND11_MODULE(_C, module) {
  using namespace megalodon;
  module.doc() = "Compiled kernels of megalodon_ops. Use the functions of the package, which call these.";
  end_threads_before_forks();
  Registration::define_all(module);
  module.def("num_threads", [] { return num_threads(); });
  module.def("use_own_threads", use_own_threads);
  module.def("build_info", [] {
    py::dict info;
    info["version"] = MEGALODON_VERSION;
    info["compiler"] = __VERSION__;
    return info;
  });
}

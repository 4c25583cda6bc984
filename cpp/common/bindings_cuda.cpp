#include "launch.cuh"
#include "target.h"

void megalodon::use_device(int device) { gpu::use_device(device); }

PYBIND11_MODULE(_cuda, module) {
  using namespace megalodon;
  module.doc() = "CUDA kernels of megalodon_ops. Use the functions of the package, which call these.";
  Registration::define_all(module);
  module.def("build_info", [] {
    py::dict info;
    info["compiler"] = MEGALODON_CUDA_COMPILER;
    info["architectures"] = MEGALODON_CUDA_ARCHITECTURES;
    return info;
  });
  // Returns (newest version that the driver supports, or 0 without a driver; version of the linked runtime). 13000 is
  // CUDA 13.0.
  module.def("cuda_versions", [] {
    int driver = 0, runtime = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
    cudaRuntimeGetVersion(&runtime);
    return py::make_tuple(driver, runtime);
  });
}

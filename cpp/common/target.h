// Where the bindings of a module launch their kernels: _C on the CPU, _cuda (MEGALODON_CUDA = 1) on a CUDA stream.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#ifndef MEGALODON_CUDA
#define MEGALODON_CUDA 0
#endif

namespace megalodon {

namespace py = pybind11;

// Whether tensors lie in memory that this code can read. On a GPU, values are not checked: reading them would stall
// the stream and end the capture of a graph.
constexpr bool kReadable = !MEGALODON_CUDA;

#if MEGALODON_CUDA

struct Target {
  void* stream;         // cudaStream_t, of the current device
  py::handle allocate;  // bytes -> a tensor of that many bytes on the device, reusable by the stream once it is dropped

  template <class Params>
  void launch(Params& params, int64_t (&workspace)(const Params&), void (&kernel)(const Params&, void*)) const {
    py::object scratch;
    if (const int64_t bytes = workspace(params)) {
      scratch = allocate(bytes);
      params.workspace = reinterpret_cast<void*>(scratch.attr("data_ptr")().cast<uintptr_t>());
    }
    const py::gil_scoped_release unlocked;
    kernel(params, stream);
  }
};

#define MEGALODON_LAUNCH(target, name, params) (target).launch(params, workspace_##name##_cuda, launch_##name##_cuda)

// Defines module.name(stream, allocate, ...), which calls function(target, ...).
template <class... A>
void define(py::module_& module, const char* name, void (*function)(const Target&, A...)) {
  module.def(name, [function](uintptr_t stream, py::handle allocate, A... arguments) {
    function(Target{reinterpret_cast<void*>(stream), allocate}, arguments...);
  });
}

#else

struct Target {
  template <class Params>
  void launch(const Params& params, void (&kernel)(const Params&)) const {
    const py::gil_scoped_release unlocked;
    kernel(params);
  }
};

#define MEGALODON_LAUNCH(target, name, params) (target).launch(params, launch_##name##_cpu)

// Defines module.name(...), which calls function(target, ...).
template <class... A>
void define(py::module_& module, const char* name, void (*function)(const Target&, A...)) {
  module.def(name, [function](A... arguments) { function(Target{}, arguments...); });
}

#endif

}  // namespace megalodon

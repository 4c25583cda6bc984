// Bindings, and the target on which they launch kernels: the CPU in _C, a CUDA stream in _cuda (MEGALODON_CUDA = 1).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "bindings.h"

#ifndef MEGALODON_CUDA
#define MEGALODON_CUDA 0
#endif

namespace megalodon {

namespace py = pybind11;

constexpr bool kReadable = !MEGALODON_CUDA;  // this code can read the tensors' memory

#if MEGALODON_CUDA

// Does nothing: reading tensors' values would stall the stream and end the capture of a graph.
template <class Check>
void check_values(const Check&) {}

// Makes `device` the thread's current one.
void use_device(int device);

struct Target {
  int device;           // that of the tensors
  void* stream;         // a cudaStream_t of the device
  py::handle allocate;  // bytes -> a tensor of that size on the device; once dropped, the stream may reuse its memory

  template <class Params>
  void launch(Params& params, int64_t (&workspace)(const Params&), void (&kernel)(const Params&, void*)) const {
    use_device(device);  // before workspace(), whose result may depend on the device
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

// Defines module.name(device, stream, allocate, ...), which calls function(target, ...).
template <class... A>
void define(py::module_& module, const char* name, const char* doc, void (*function)(const Target&, A...)) {
  const auto call = [function](int device, uintptr_t stream, py::handle allocate, A... arguments) {
    function(Target{device, reinterpret_cast<void*>(stream), allocate}, arguments...);
  };
  module.def(name, call, doc);
}

#else

using Launches = std::vector<std::function<void()>>;
inline thread_local Launches* kept_launches = nullptr;  // those of the step that is being recorded, if any

// Calls check(), which raises an error for wrong values of tensors. While a step is recorded, the step keeps the check
// instead and calls it in each of its runs.
template <class Check>
void check_values(const Check& check) {
  if (kept_launches) kept_launches->push_back(check);
  else check();
}

struct Target {
  template <class Params>
  void launch(const Params& params, void (&kernel)(const Params&)) const {
    if (kept_launches) return kept_launches->push_back([params, &kernel] { kernel(params); });
    const py::gil_scoped_release unlocked;
    kernel(params);
  }
};

#define MEGALODON_LAUNCH(target, name, params) (target).launch(params, launch_##name##_cpu)

// Defines module.name(...), which calls function(target, ...).
template <class... A>
void define(py::module_& module, const char* name, const char* doc, void (*function)(const Target&, A...)) {
  module.def(name, [function](A... arguments) { function(Target{}, arguments...); }, doc);
}

#endif

#define MEGALODON_LIST(...) __VA_ARGS__
// MEGALODON_BINDING(name, (arguments), (results)) { ... } defines a function of the module that launches on `target`.
// Results are tensors that the caller allocates. The function's docstring is "names of arguments -> names of results",
// without a trailing underscore of a name.
#define MEGALODON_BINDING(name, arguments, results)                                                         \
  void name(const Target& target, MEGALODON_LIST arguments, MEGALODON_LIST results);                         \
  const Registration register_##name{[](py::module_& module) {                                              \
    py::options options;                                                                                    \
    options.disable_function_signatures();                                                                  \
    define(module, #name, (parameter_names(#arguments) + " -> " + parameter_names(#results)).c_str(), name); \
  }};                                                                                                       \
  void name(const Target& target, MEGALODON_LIST arguments, MEGALODON_LIST results)

}  // namespace megalodon

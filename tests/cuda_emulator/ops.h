// The ops' own bindings (cpp/<op>_bind.cpp), linked to emulated CUDA kernels in place of the CPU's.
#pragma once

#include <pybind11/pybind11.h>

namespace emulated {

void bind_ops(pybind11::module_& module);

}  // namespace emulated

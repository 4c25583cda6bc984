// The bindings call launch_<name>_cpu, which calls <isa>::<name>_cpu. In this module those are the functions below,
// which launch the emulated CUDA kernel of the same name.
#include "ops.h"

#include <stdexcept>

#include "bindings.h"
#include "normalized_qk.h"

namespace megalodon {

Isa active_isa{};

#define EMULATE_IN(isa, name, Params)                                                         \
  namespace isa {                                                                             \
  void name##_cpu(const Params& params) { launch_##name##_cuda(params, nullptr); }            \
  }
#define EMULATE(name, Params) MEGALODON_FOR_EACH_ISA(EMULATE_IN, name, Params)

#define NO_KERNEL_IN(isa, name, Params)                                                       \
  namespace isa {                                                                             \
  void name##_cpu(const Params&) { throw std::runtime_error(#name " has no CUDA kernel"); }   \
  }
#define NO_KERNEL(name, Params) MEGALODON_FOR_EACH_ISA(NO_KERNEL_IN, name, Params)

EMULATE(normalized_qk_fwd, NormalizedQkFwdParams)
NO_KERNEL(normalized_qk_bwd, NormalizedQkBwdParams)

}  // namespace megalodon

namespace emulated {

void bind_ops(pybind11::module_& module) { megalodon::bind_normalized_qk(module); }

}  // namespace emulated

// The bindings call launch_<name>_cpu, which calls <isa>::<name>_cpu. In this module those are the functions below,
// which launch the emulated CUDA kernel of the same name.
#include "ops.h"

#include <memory>
#include <stdexcept>

#include "bindings.h"
#include "cema.h"
#include "chunked_attention.h"
#include "normalized_qk.h"
#include "state.h"
#include "timestep_norm.h"

namespace megalodon {

Isa active_isa{};

// Workspace is device memory that nobody has written.
template <class Params>
void emulate(Params params, int64_t (&workspace)(const Params&), void (&launch)(const Params&, void*)) {
  const int64_t bytes = workspace(params);
  if (bytes > 0) params.workspace = emu::allocate(static_cast<size_t>(bytes), "workspace", 0);
  const std::unique_ptr<void, void (*)(void*)> owner(params.workspace, [](void* p) { emu::release(static_cast<char*>(p)); });
  launch(params, nullptr);
}

#define EMULATE_IN(isa, name, Params)                                                                                    \
  namespace isa {                                                                                                        \
  void name##_cpu(const Params& params) { emulate(params, workspace_##name##_cuda, launch_##name##_cuda); }              \
  }
#define EMULATE(name, Params) MEGALODON_FOR_EACH_ISA(EMULATE_IN, name, Params)

#define NO_KERNEL_IN(isa, name, Params)                                                       \
  namespace isa {                                                                             \
  void name##_cpu(const Params&) { throw std::runtime_error(#name " has no CUDA kernel"); }   \
  }
#define NO_KERNEL(name, Params) MEGALODON_FOR_EACH_ISA(NO_KERNEL_IN, name, Params)

NO_KERNEL(cema_fwd, CemaFwdParams)
NO_KERNEL(cema_bwd, CemaBwdParams)
NO_KERNEL(timestep_norm_fwd, TimestepNormFwdParams)
NO_KERNEL(timestep_norm_bwd, TimestepNormBwdParams)
EMULATE(normalized_qk_fwd, NormalizedQkFwdParams)
NO_KERNEL(normalized_qk_bwd, NormalizedQkBwdParams)
NO_KERNEL(chunked_attention_fwd, ChunkedAttentionFwdParams)
NO_KERNEL(chunked_attention_bwd, ChunkedAttentionBwdParams)
NO_KERNEL(chunked_attention_state, ChunkedAttentionStateParams)

}  // namespace megalodon

namespace emulated {

void bind_ops(pybind11::module_& module) {
  megalodon::bind_cema(module);
  megalodon::bind_timestep_norm(module);
  megalodon::bind_normalized_qk(module);
  megalodon::bind_chunked_attention(module);
}

}  // namespace emulated

#include "adaptive_working_memory.h"
#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"

namespace megalodon {
namespace {

constexpr const char* kMemory = "adaptive_working_memory";

// Updates memory and mass, and fills o.
MEGALODON_BINDING(working_memory_steps,
                  (py::handle q_, py::handle k, py::handle v, py::handle cache_k, py::handle cache_v,
                   py::handle position, int64_t chunk_size, int64_t visible, py::handle spans),
                  (py::handle memory, py::handle mass, py::handle o)) {
  WorkingMemoryStepsParams params{};
  const TensorView q(kMemory, "q", q_), values(kMemory, "v", v);
  params.dtype = q.rank("(B, L, H, K)", 4).floating();
  params.sequences = make_sequences(kMemory, q.size(0), q.size(1), spans);
  const int64_t B = q.size(0), L = q.size(1), H = q.size(2), K = q.size(3), C = chunk_size;
  const int64_t V = values.rank("(B, L, H, V)", 4).size(3), S = params.sequences.count;
  if (C < 1)
    throw py::value_error(std::string(kMemory) + ": `chunk_size` must be positive, got " + std::to_string(C) + ".");
  params.heads = H;
  params.key_dim = K;
  params.value_dim = V;
  params.chunk_size = C;
  params.visible = visible;
  params.q = q.data();
  params.k = TensorView(kMemory, "k", k).like(q).data();
  params.v = values.shape("(B, L, H, V)", {B, L, H, V}).dtype(q.scalar(), "as `q`").data();
  const auto state = [&](const char* name, py::handle tensor, const char* letters, std::initializer_list<int64_t> shape,
                         Scalar scalar, const char* why) {
    return TensorView(kMemory, name, tensor).present().shape(letters, shape).dtype(scalar, why).data();
  };
  const Scalar real = real_of(params.dtype);
  const int64_t rows = visible * C;
  params.cache_k = state("state.k", cache_k, "(S, visible C, H, K)", {S, rows, H, K}, q.scalar(), "as `q`");
  params.cache_v = state("state.v", cache_v, "(S, visible C, H, V)", {S, rows, H, V}, q.scalar(), "as `q`");
  params.position =
      static_cast<const int64_t*>(state("state.position", position, "(S,)", {S}, Scalar::i64, "positions"));
  params.memory = state("state.memory", memory, "(S, H, K, V)", {S, H, K, V}, real, kRealDtype);
  params.mass = state("state.mass", mass, "(S, H, K)", {S, H, K}, real, kRealDtype);
  params.o = TensorView(kMemory, "o", o).like(values).data();
  for (int64_t s = 0; s < S; ++s)
    if (params.position[s] < 0 || params.position[s] > kMaxPositions)
      throw py::value_error(std::string(kMemory) + ": `state.position` must be in [0, " +
                            std::to_string(kMaxPositions) + "], got " + std::to_string(params.position[s]) + " at " +
                            std::to_string(s) + ".");
  MEGALODON_LAUNCH(target, working_memory_steps, params);
}

}  // namespace

}  // namespace megalodon

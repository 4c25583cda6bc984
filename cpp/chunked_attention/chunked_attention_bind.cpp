#include "chunked_attention.h"
#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"

#include <limits>

namespace megalodon {
namespace {

constexpr const char* kAttention = "chunked_attention";

struct Inputs {
  TensorView k, v, cache_k, cache_v, position;
};

// Checks the keys or values of a state of S sequences, in rows of `width` numbers; returns their address.
void* cache_of(const ChunkedAttentionParams& p, const TensorView& tensor, const char* letters, int64_t S,
               int64_t width) {
  if (p.quantized_cache) {
    const std::string rows = std::string(letters) + " with 4 more elements for a scale";
    tensor.present().shape(rows.c_str(), {S, p.chunk_size, p.heads, width + 4}).dtype(Scalar::i8, "as `state.k`");
  } else {
    tensor.present().shape(letters, {S, p.chunk_size, p.heads, width}).dtype(scalar_of(p.dtype), "as `k`");
  }
  return tensor.data();
}

// Checks and fills the parameters that all three launchers share.
Inputs fill(ChunkedAttentionParams& params, py::handle k_, py::handle v_, py::handle cache_k, py::handle cache_v,
            py::handle position, int64_t chunk_size, py::handle spans) {
  const Inputs in{{kAttention, "k", k_},
                  {kAttention, "v", v_},
                  {kAttention, "state.k", cache_k},
                  {kAttention, "state.v", cache_v},
                  {kAttention, "state.position", position}};
  const TensorView &k = in.k, &v = in.v;
  params.dtype = k.rank("(B, L, H, K)", 4).floating();
  params.sequences = make_sequences(kAttention, k.size(0), k.size(1), spans);
  const int64_t B = k.size(0), L = k.size(1), H = k.size(2), K = k.size(3), S = params.sequences.count;
  const int64_t V = v.rank("(B, L, H, V)", 4).size(3), C = chunk_size;
  if (C < 1) throw py::value_error("chunked_attention: `chunk_size` must be positive, got " + std::to_string(C) + ".");
  params.heads = H;
  params.key_dim = K;
  params.value_dim = V;
  params.chunk_size = C;
  params.k = k.data();
  params.v = v.shape("(B, L, H, V)", {B, L, H, V}).dtype(k.scalar(), "as `k`").data();
  if (!in.position.given()) {
    in.cache_k.absent("a `state.position` to go with it");
    in.cache_v.absent("a `state.position` to go with it");
  } else {
    params.quantized_cache = in.cache_k.present().scalar() == Scalar::i8;
    if (params.quantized_cache && (!kReadable || params.dtype == DType::f64))
      in.cache_k.fail("of the dtype of `k`; int8 requires the CPU and a `k` of float32, bfloat16 or float16, got "
                      "torch.int8");
    params.position = in.position.shape("(S,)", {S}).dtype(Scalar::i64, "positions").data_as<const int64_t>();
    params.cache_k = cache_of(params, in.cache_k, "(S, C, H, K)", S, K);
    params.cache_v = cache_of(params, in.cache_v, "(S, C, H, V)", S, V);
    in.position.values(C - 1, "[0, " + std::to_string(C) + ")");
  }
  return in;
}

// Also fills the parameters of q, the scores and DropKey. The seed is an int64 tensor of one element.
Inputs fill(ChunkedAttentionParams& params, const TensorView& q, py::handle k, py::handle v, py::handle cache_k,
            py::handle cache_v, py::handle position, int64_t chunk_size, bool causal, double scale, double dropkey,
            py::handle dropkey_seed, py::handle spans) {
  const Inputs in = fill(params, k, v, cache_k, cache_v, position, chunk_size, spans);
  params.q = q.like(in.k).data();
  check_range(kAttention, "scale", scale, std::numeric_limits<double>::lowest(), "finite");
  params.causal = causal;
  params.scale = scale;
  params.dropkey = dropkey;
  if (!(dropkey >= 0 && dropkey < 1))
    throw py::value_error("chunked_attention: `dropkey` must be a probability in [0, 1), got " +
                          std::to_string(dropkey) + ".");
  if (dropkey > 0)
    params.seed = TensorView(kAttention, "dropkey_seed", dropkey_seed)
                      .present()
                      .shape("(1,)", {1})
                      .dtype(Scalar::i64, "a seed")
                      .data_as<const uint64_t>();
  return in;
}

MEGALODON_BINDING(chunked_attention_fwd,
                  (py::handle q_, py::handle k, py::handle v, py::handle cache_k, py::handle cache_v,
                   py::handle position, int64_t chunk_size, bool causal, double scale, double dropkey,
                   py::handle dropkey_seed, py::handle spans),
                  (py::handle o, py::handle lse)) {
  ChunkedAttentionFwdParams params{};
  const TensorView q(kAttention, "q", q_);
  const Inputs in = fill(params, q, k, v, cache_k, cache_v, position, chunk_size, causal, scale, dropkey, dropkey_seed,
                         spans);
  params.o = TensorView(kAttention, "o", o).like(in.v).data();
  params.lse = TensorView(kAttention, "lse", lse)
                   .present()
                   .shape("(B, L, H)", {q.size(0), q.size(1), q.size(2)})
                   .dtype(real_of(params.dtype), kRealDtype)
                   .data();
  MEGALODON_LAUNCH(target, chunked_attention_fwd, params);
}

MEGALODON_BINDING(chunked_attention_bwd,
                  (py::handle q_, py::handle k, py::handle v, py::handle cache_k, py::handle cache_v,
                   py::handle position, int64_t chunk_size, bool causal, double scale, double dropkey,
                   py::handle dropkey_seed, py::handle spans, py::handle o, py::handle lse,
                   py::handle do_),
                  (py::handle dq, py::handle dk, py::handle dv)) {
  ChunkedAttentionBwdParams params{};
  const TensorView q(kAttention, "q", q_);
  const Inputs in = fill(params, q, k, v, cache_k, cache_v, position, chunk_size, causal, scale, dropkey, dropkey_seed,
                         spans);
  params.o = TensorView(kAttention, "o", o).like(in.v).data();
  params.lse = TensorView(kAttention, "lse", lse)
                   .present()
                   .shape("(B, L, H)", {q.size(0), q.size(1), q.size(2)})
                   .dtype(real_of(params.dtype), kRealDtype)
                   .data();
  params.d_o = TensorView(kAttention, "do", do_).like(in.v).data();
  params.dq = TensorView(kAttention, "dq", dq).like(in.k).data();
  params.dk = TensorView(kAttention, "dk", dk).like(in.k).data();
  params.dv = TensorView(kAttention, "dv", dv).like(in.v).data();
  MEGALODON_LAUNCH(target, chunked_attention_bwd, params);
}

MEGALODON_BINDING(chunked_attention_state,
                  (py::handle k, py::handle v, py::handle cache_k, py::handle cache_v, py::handle position,
                   int64_t chunk_size, py::handle spans),
                  (py::handle cache_k_out, py::handle cache_v_out, py::handle position_out)) {
  ChunkedAttentionStateParams params{};
  const Inputs in = fill(params, k, v, cache_k, cache_v, position, chunk_size, spans);
  const TensorView k_out(kAttention, "cache_k_out", cache_k_out), v_out(kAttention, "cache_v_out", cache_v_out);
  const TensorView positions(kAttention, "position_out", position_out);
  const int64_t S = params.sequences.count;
  params.cache_k_out = cache_of(params, k_out, "(S, C, H, K)", S, params.key_dim);
  params.cache_v_out = cache_of(params, v_out, "(S, C, H, V)", S, params.value_dim);
  params.position_out = positions.present().shape("(S,)", {S}).dtype(Scalar::i64, "positions").data_as<int64_t>();
  MemoryRanges memory;
  memory.add_read(in.k);
  memory.add_read(in.v);
  memory.add_update(in.cache_k, k_out);
  memory.add_update(in.cache_v, v_out);
  memory.add_update(in.position, positions);
  memory.add_read({kAttention, "spans", spans});
  memory.check();
  MEGALODON_LAUNCH(target, chunked_attention_state, params);
}

}  // namespace

}  // namespace megalodon

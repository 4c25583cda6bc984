// Runs a few tokens through a model on the CPU, as in decoding: calls the kernels of its layers in turn, and Python
// functions for replaced linear layers. A decoder is built once, from the configuration and the model's tensors by
// name; it updates the state.

#include <deque>
#include <optional>
#include <string>

#include "adaptive_working_memory.h"
#include "bindings.h"
#include "cema.h"
#include "cema_coefficients.h"
#include "chunked_attention.h"
#include "decoder_parts.h"
#include "embedding.h"
#include "gated_silu.h"
#include "layer_norm.h"
#include "normalized_qk.h"
#include "residual.h"
#include "target.h"
#include "tensor_view.h"
#include "threads.h"
#include "timestep_norm.h"

namespace megalodon {
namespace {

TimestepNormFwdParams timestep_norm(const Sizes& s, Tensors& tensors, const std::string& name,
                                    const std::string& state) {
  TimestepNormFwdParams p{};
  p.dtype = s.dtype;
  p.channels = s.D;
  p.groups = s.G;
  p.eps = s.eps;
  p.weight = tensors.real(name + ".weight", "(D,)", {s.D});
  p.bias = tensors.real(name + ".bias", "(D,)", {s.D});
  p.count = p.count_out = tensors.integers(state + ".count", kMaxPositions + 1);
  p.mean = p.mean_out = tensors.real(state + ".mean", "(S, G)", {s.B, s.G});
  p.var = p.var_out = tensors.real(state + ".var", "(S, G)", {s.B, s.G});
  p.residual = p.residual_out = tensors.real(state + ".residual", "(S, 2, G)", {s.B, 2, s.G});
  return p;
}

LayerNormFwdParams row_norm(const Sizes& s, Tensors& tensors, const std::string& name, bool is_rms_norm, const void* x,
                            void* y) {
  LayerNormFwdParams p{};
  p.dtype = s.dtype;
  p.channels = s.D;
  p.eps = s.eps;
  p.is_rms_norm = is_rms_norm;
  p.weight = tensors.real_or_null(name + ".weight", "(D,)", {s.D});
  p.bias = tensors.real_or_null(name + ".bias", "(D,)", {s.D});
  p.x = x;
  p.y = y;
  return p;
}

// The parameters of every kernel of a block. Fields that depend on the number of tokens are filled for each call.
class Block {
 public:
  Block(const Sizes& sizes, const Activations& activations, const void* rotary, Tensors& tensors,
        const std::string& name, const std::string& state, Arena& arena)
      : s(sizes),
        a(activations),
        wz_(s, tensors, name + ".mega.wz", s.D, s.H * s.K, a.m, a.z),
        wv_(s, tensors, name + ".mega.wv", s.D, s.H * s.V, a.t, a.v),
        wr_(s, tensors, name + ".mega.wr", s.D, s.H * s.V, a.m, a.r),
        wh1_(s, tensors, name + ".mega.wh1", s.D, s.D, a.m, a.a),
        wh2_(s, tensors, name + ".mega.wh2", s.H * s.V, s.D, a.r, a.b),
        fc1_(s, tensors, name + ".nffn.fc1", s.D, s.F, a.n, a.hidden),
        fc2_(s, tensors, name + ".nffn.fc2", s.F, s.D, a.hidden, a.a) {
    const std::string mega = name + ".mega", nffn = name + ".nffn";
    if (s.gated) fc3_.emplace(s, tensors, nffn + ".fc3", s.D, s.F, a.n, a.gate);
    timenorm_ = timestep_norm(s, tensors, mega + ".timenorm", state + ".norm");
    timenorm_.y = a.t;

    cema_.dtype = s.dtype;
    cema_.channels = s.D;
    cema_.modes = s.N;
    cema_.x = a.t;
    cema_.y = a.c;
    make_coefficients(tensors, mega + ".cema", arena);
    cema_.state = cema_.state_out = tensors(state + ".cema")
                                        .present()
                                        .shape("(S, D, N)", {s.B, s.D, s.N})
                                        .dtype(complex_of(s.dtype), "complex128 for a float64 model, else complex64")
                                        .data();
    rms_norm_ = row_norm(s, tensors, mega + ".rmsnorm", true, a.c, a.m);

    const int64_t Z = s.H * s.K, affine = s.memory ? 4 : 2;
    qk_.dtype = s.dtype;
    qk_.heads = s.H;
    qk_.key_dim = s.K;
    qk_.chunk_size = qk_.table_rows = s.C;
    qk_.eps = s.eps;
    qk_.z = a.z;
    qk_.gamma = tensors.real(mega + ".gamma", "(2 or 4, H * K)", {affine, Z});
    qk_.beta = tensors.real(mega + ".beta", "(2 or 4, H * K)", {affine, Z});
    qk_.rotary = rotary;
    qk_.q = a.q;
    qk_.k = a.k;

    append_.dtype = s.dtype;
    append_.heads = s.H;
    append_.key_dim = s.K;
    append_.value_dim = s.V;
    append_.chunk_size = s.cached_rows();
    append_.scale = 1;
    append_.q = a.q;
    append_.k = a.k;
    append_.v = a.v;
    const std::string cache = state + ".attention";
    append_.cache_k = append_.cache_k_out =
        tensors.activation(cache + ".k", "(S, visible C, H, K)", {s.B, s.cached_rows(), s.H, s.K});
    append_.cache_v = append_.cache_v_out =
        tensors.activation(cache + ".v", "(S, visible C, H, V)", {s.B, s.cached_rows(), s.H, s.V});
    append_.position_out = tensors.integers(cache + ".position", s.cached_rows());
    qk_.position = append_.position = append_.position_out;
    if (s.memory) make_memory(tensors, state);

    layer_norm_ = row_norm(s, tensors, nffn + ".norm", false, a.y, a.n);
    scale_ = tensors.real_or_null(nffn + ".alpha", "(D,)", {s.D});
  }

  // x (B, L, D) to y. table: rotary table of this call's tokens if positions do not restart with each chunk, else null.
  void run(int64_t L, const void* x, void* y, const void* table) {
    T = s.B * L;
    if (table) {
      qk_.chunk_size = qk_.table_rows = T;
      qk_.rotary = table;
      qk_.position = a.first_rows;
    }
    timenorm_.sequences = cema_.sequences = qk_.sequences = append_.sequences = Sequences{s.B, T, L};
    timenorm_.x = x;
    launch_timestep_norm_fwd_cpu(timenorm_);
    launch_cema_fwd_cpu(cema_);
    run(rms_norm_);

    wz_.run(T);
    wv_.run(T);
    gate(a.v, nullptr, s.H * s.V);
    if (s.memory) read_and_write();
    launch_normalized_qk_fwd_cpu(qk_);
    ChunkedAttentionFwdParams attention{};
    static_cast<ChunkedAttentionParams&>(attention) = append_;
    attention.o = a.o;
    attention.lse = a.lse;
    launch_chunked_attention_fwd_cpu(attention);
    launch_chunked_attention_state_cpu(append_);
    wr_.run(T);
    gate(a.r, a.o, s.H * s.V);
    if (s.memory) launch_residual_cpu({s.dtype, T, s.H * s.V, a.r, a.read, nullptr, nullptr, a.r});
    wh1_.run(T);
    wh2_.run(T);
    launch_residual_cpu({s.dtype, T, s.D, x, a.a, a.b, nullptr, a.y});

    run(layer_norm_);
    fc1_.run(T);
    if (fc3_) fc3_->run(T);
    gate(a.hidden, fc3_ ? a.gate : nullptr, s.F);
    fc2_.run(T);
    launch_residual_cpu({s.dtype, T, s.D, x, a.a, nullptr, scale_, y});
  }

 private:
  // Runs once, as all tokens share the coefficients.
  void make_coefficients(Tensors& tensors, const std::string& name, Arena& arena) {
    CemaCoefficientsFwdParams p{};
    p.dtype = s.dtype == DType::f64 ? DType::f64 : DType::f32;
    p.channels = s.D;
    p.modes = s.N;
    p.alpha = tensors.real(name + ".alpha", "(D, N, 1)", {s.D, s.N, 1});
    p.delta = tensors.real(name + ".delta", "(D, N, 1)", {s.D, s.N, 1});
    p.theta = tensors.real(name + ".theta", "(D, 1, 1)", {s.D, 1, 1});
    p.gamma = tensors.real(name + ".gamma", "(D, N, 2)", {s.D, s.N, 2});
    cema_.p = p.p = arena(s.D * s.N * s.real_element());
    cema_.q = p.q = arena(s.D * s.N * 2 * s.real_element());
    cema_.gamma = p.scaled = arena(s.D * s.N * 2 * s.real_element());
    cema_.omega = tensors.real(name + ".omega", "(D, 1)", {s.D, 1});
    launch_cema_coefficients_fwd_cpu(p);
  }

  // The working memory's queries and keys also come from z, by two more rows of gamma and beta, without positions.
  void make_memory(Tensors& tensors, const std::string& state) {
    const auto later_rows = [&](const void* affine) {
      return static_cast<const char*>(affine) + 2 * s.H * s.K * s.real_element();
    };
    memory_qk_ = qk_;
    memory_qk_.chunk_size = memory_qk_.table_rows = 1;  // each position is the first of its chunk
    memory_qk_.gamma = later_rows(qk_.gamma);
    memory_qk_.beta = later_rows(qk_.beta);
    memory_qk_.position = nullptr;

    memory_append_ = append_;
    memory_append_.value_dim = 0;
    memory_append_.cache_k = memory_append_.cache_k_out =
        tensors.activation(state + ".memory_k", "(S, visible C, H, K)", {s.B, s.cached_rows(), s.H, s.K});
    memory_append_.position_out = a.ends;

    memory_.dtype = s.dtype;
    memory_.heads = s.H;
    memory_.key_dim = s.K;
    memory_.value_dim = s.V;
    memory_.chunk_size = s.C;
    memory_.visible = s.visible;
    memory_.q = a.q;
    memory_.k = a.k;
    memory_.v = a.v;
    memory_.cache_k = memory_append_.cache_k;
    memory_.cache_v = append_.cache_v;
    memory_.position = timenorm_.count;
    memory_.position_is_end = true;
    memory_.memory = tensors.real(state + ".memory", "(S, H, K, V)", {s.B, s.H, s.K, s.V});
    memory_.mass = tensors.real(state + ".memory_mass", "(S, H, K)", {s.B, s.H, s.K});
    memory_.o = a.read;
  }

  // Runs before the attention, which reuses q and k and overwrites the values of a complete chunk.
  void read_and_write() {
    memory_qk_.sequences = memory_.sequences = memory_append_.sequences = qk_.sequences;
    launch_normalized_qk_fwd_cpu(memory_qk_);
    launch_working_memory_steps_cpu(memory_);
    launch_chunked_attention_state_cpu(memory_append_);
  }

  void run(LayerNormFwdParams& p) const {
    p.rows = T;
    launch_layer_norm_fwd_cpu(p);
  }
  // x = silu(x) value
  void gate(void* x, const void* value, int64_t columns) const {
    GatedSiluFwdParams p{};
    p.dtype = s.dtype;
    p.elements = T * columns;
    p.x = p.y = x;
    p.value = value;
    launch_gated_silu_fwd_cpu(p);
  }

  const Sizes& s;
  const Activations& a;
  int64_t T = 0;
  TimestepNormFwdParams timenorm_;
  CemaFwdParams cema_{};
  LayerNormFwdParams rms_norm_, layer_norm_;
  LinearLayer wz_, wv_, wr_, wh1_, wh2_, fc1_, fc2_;
  std::optional<LinearLayer> fc3_;  // if the FFN is gated
  NormalizedQkFwdParams qk_{};
  ChunkedAttentionStateParams append_{};
  NormalizedQkFwdParams memory_qk_{};
  WorkingMemoryStepsParams memory_{};
  ChunkedAttentionStateParams memory_append_{};
  const void* scale_;  // (D) R or null: one
};

int64_t integer(py::handle config, const char* name) { return config.attr(name).cast<int64_t>(); }

Sizes sizes_of(py::handle config, DType dtype, int64_t batch, int64_t max_tokens) {
  const int64_t H = integer(config, "num_heads");
  return {dtype, batch, max_tokens, integer(config, "model_dim"), integer(config, "cema_ndim"),
          integer(config, "norm_num_groups"), H, integer(config, "z_dim") / H, integer(config, "value_dim") / H,
          integer(config, "ffn_hidden_dim"), integer(config, "chunk_size"), config.attr("swiglu").cast<bool>(),
          config.attr("working_memory").cast<bool>(), integer(config, "visible_chunks"),
          config.attr("norm_eps").cast<double>()};
}

// torch converts and samples as many logits on OpenMP's threads, which then still spin in the next call.
constexpr int64_t kTorchGrain = 32768;

// A whole model, from tokens to logits. `like` has the dtype of the matrices, `rotary` is (C, K / 2, 2).
class Decoder {
 public:
  Decoder(py::object config, py::dict tensors, py::object rotary, py::object like, int64_t batch, int64_t max_tokens)
      : tensors_(py::make_tuple(tensors, rotary)),
        s(sizes_of(config, TensorView(kDecoder, "embed.weight", like).floating(), batch, max_tokens)),
        a(s, arena_),
        vocabulary_(integer(config, "vocab_size")),
        outputs_(integer(config, "num_outputs")) {
    Tensors by_name(std::move(tensors), s);
    embedding_.dtype = s.dtype;
    embedding_.channels = s.D;
    embedding_.weight = by_name.activation("embed.weight", "(vocabulary, D)", {vocabulary_, s.D});
    embedding_.scale = config.attr("embedding_scale").cast<double>();
    embedding_.y = a.x[0];
    const TensorView table(kDecoder, "rotary", rotary);
    table.present().shape("(C, K / 2, 2)", {s.C, s.K / 2, 2}).dtype(s.real(), kRealDtype);
    for (int64_t layer = 0; layer < integer(config, "num_layers"); ++layer) {
      const std::string name = "layers." + std::to_string(layer);
      blocks_.emplace_back(s, a, table.data(), by_name, name, "state." + name, arena_);
    }
    norm_ = timestep_norm(s, by_name, "output.final_norm", "state.norm");
    norm_.y = a.n;
    output_.emplace(s, by_name, "output.output", s.D, outputs_, a.n, nullptr);
    calls_python_ = by_name.has_functions;
  }

  // Tokens (B, L) to logits (B, L, outputs). One call at a time. If attention sees two chunks, the tokens must not fill
  // the caches, and `table` is their rotary table (B L, K / 2, 2); else it is None.
  void run(py::handle tokens_, py::handle logits_, py::handle table_) {
    const TensorView tokens(kDecoder, "tokens", tokens_), logits(kDecoder, "logits", logits_);
    tokens.rank("(B, L)", 2).dtype(Scalar::i64, "tokens");
    const int64_t L = tokens.size(1), T = s.B * L;
    if (tokens.size(0) != s.B || T > s.max_tokens)
      tokens.fail("of " + std::to_string(s.B) + " rows and at most " + std::to_string(s.max_tokens) + " tokens, got " +
                  std::to_string(tokens.size(0)) + " rows of " + std::to_string(L));
    logits.present().shape("(B, L, outputs)", {s.B, L, outputs_}).dtype(s.scalar(), "as the model");
    check_tokens(tokens.data_as<const int64_t>(), T);
    const TensorView table(kDecoder, "table", table_);
    table.shape("(B L, K / 2, 2)", {T, s.K / 2, 2}).dtype(s.real(), kRealDtype);
    for (int64_t row = 0; row < s.B; ++row) a.first_rows[row] = row * L;

    const py::gil_scoped_release unlocked;
    std::optional<OwnThreads> own_threads;
    if (!calls_python_ && T * outputs_ < kTorchGrain) own_threads.emplace();
    embedding_.rows = T;
    embedding_.tokens = tokens.data_as<const int64_t>();
    launch_embedding_cpu(embedding_);
    for (size_t i = 0; i < blocks_.size(); ++i) blocks_[i].run(L, a.x[i % 2], a.x[(i + 1) % 2], table.data());
    norm_.sequences = Sequences{s.B, T, L};
    norm_.x = a.x[blocks_.size() % 2];
    launch_timestep_norm_fwd_cpu(norm_);
    output_->run(T, logits.data());
  }

 private:
  void check_tokens(const int64_t* tokens, int64_t count) const {
    for (int64_t t = 0; t < count; ++t)
      if (tokens[t] < 0 || tokens[t] >= vocabulary_)
        throw py::index_error(std::string(kDecoder) + ": `tokens` must be in [0, " + std::to_string(vocabulary_) +
                              "), got " + std::to_string(tokens[t]) + ".");
  }

  const py::tuple tensors_;  // the tensors whose memory the kernels use
  const Sizes s;
  Arena arena_;
  const Activations a;
  const int64_t vocabulary_, outputs_;
  EmbeddingParams embedding_{};
  std::deque<Block> blocks_;
  TimestepNormFwdParams norm_{};
  std::optional<LinearLayer> output_;
  bool calls_python_;
};

const Registration register_decoder{[](py::module_& module) {
  py::class_<Decoder>(module, "Decoder")
      .def(py::init<py::object, py::dict, py::object, py::object, int64_t, int64_t>(), py::arg("config"),
           py::arg("tensors"), py::arg("rotary"), py::arg("like"), py::arg("batch"), py::arg("max_tokens"))
      .def("run", &Decoder::run);
}};

}  // namespace

}  // namespace megalodon

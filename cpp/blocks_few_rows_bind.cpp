// Blocks on few rows, or a whole model on few tokens, as in decoding: the kernels that layers.py calls one by one, with
// nothing in between. The state is written in place.

#include <cstdlib>
#include <deque>
#include <memory>
#include <new>
#include <vector>

#include "bindings.h"
#include "cema.h"
#include "cema_coefficients.h"
#include "chunked_attention.h"
#include "embedding.h"
#include "gated_silu.h"
#include "layer_norm.h"
#include "linear.h"
#include "normalized_qk.h"
#include "residual.h"
#include "target.h"
#include "tensor_view.h"
#include "timestep_norm.h"

namespace megalodon {
namespace {

constexpr const char* kOp = "blocks_few_rows";
constexpr int64_t kAny = -1;

int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Memory for what one kernel hands to the next.
class Buffers {
 public:
  void* operator()(int64_t bytes) {
    void* memory = std::aligned_alloc(64, (static_cast<size_t>(bytes) + 127) / 64 * 64);
    if (!memory) throw std::bad_alloc();
    return held_.emplace_back(memory, &std::free).get();
  }

 private:
  std::vector<std::unique_ptr<void, decltype(&std::free)>> held_;
};

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(kOp) + ": `" + name + "` must " + expected + ", got " + got + ".");
}

// What goes through the blocks: (B, L, D).
struct Input {
  DType dtype;
  int64_t B, L, D;
};

// Takes the tensors of a list in order.
class Reader {
 public:
  static constexpr const char* kReal = "float64 for a float64 `x`, else float32";

  // What is written to cannot be copied where it is not contiguous.
  Reader(const char* list, py::list tensors, bool copies) : list_(list), tensors_(std::move(tensors)), copies_(copies) {}

  void set_dtype(DType dtype) { dtype_ = dtype; }

  TensorView next(const char* name) {
    if (index_ == tensors_.size())
      refuse(list_, "hold `" + std::string(name) + "`", std::to_string(index_) + " tensors");
    const py::handle tensor = tensors_[index_++];
    return TensorView(kOp, name, copies_ ? held_.emplace_back(contiguous(tensor)) : tensor);
  }
  void end() const {
    if (index_ < tensors_.size())
      refuse(list_, "hold " + std::to_string(index_) + " tensors", std::to_string(tensors_.size()));
  }
  // float64 for a float64 x, else float32.
  void* real(const char* name, const char* letters, std::initializer_list<int64_t> sizes) {
    return next(name).present().shape(letters, sizes).dtype(real_of(dtype_), kReal).data();
  }
  void* real_or_null(const char* name, const char* letters, std::initializer_list<int64_t> sizes) {
    return next(name).shape(letters, sizes).dtype(real_of(dtype_), kReal).data();
  }
  // The weight, of `inputs` columns and `outputs` rows, which may be kAny, and the bias, which may be None.
  void linear(LinearFewRowsParams& params, const char* name, int64_t rows, int64_t inputs, int64_t outputs,
              bool required = true) {
    const std::string weight_name = std::string(name) + ".weight", bias_name = std::string(name) + ".bias";
    const TensorView weight = next(weight_name.c_str()), bias = next(bias_name.c_str());
    if (!required && !weight.given()) return;
    params.outputs = outputs == kAny ? weight.rank("(outputs, inputs)", 2).size(0) : outputs;
    params.weight = weight.present()
                        .shape("(outputs, inputs)", {params.outputs, inputs})
                        .dtype(scalar_of(dtype_), "as `x`")
                        .data();
    params.bias = bias.shape("(outputs,)", {params.outputs}).dtype(scalar_of(dtype_), "as `x`").data();
    params.dtype = dtype_;
    params.rows = rows;
    params.inputs = inputs;
  }

 private:
  const char* list_;
  const py::list tensors_;
  const bool copies_;
  DType dtype_ = DType::f32;
  size_t index_ = 0;
  std::vector<py::object> held_;
};

int64_t* integers(const TensorView& view, int64_t sequences) {
  return view.present().shape("(S,)", {sequences}).dtype(Scalar::i64, "a count").data_as<int64_t>();
}

// A timestep norm with its state.
class Norm {
 public:
  Norm(const Input& x, int64_t groups) : B(x.B), D(x.D), G(groups) {
    if (G < 1 || D % G) refuse("num_groups", "be positive and divide D = " + std::to_string(D), std::to_string(G));
    params_.dtype = x.dtype;
    params_.channels = D;
    params_.groups = G;
    params_.sequences = Sequences{B, B * x.L, x.L};
  }

  void read_parameters(Reader& read, const char* weight, const char* bias) {
    params_.weight = read.real(weight, "(D,)", {D});
    params_.bias = read.real(bias, "(D,)", {D});
  }
  void read_state(Reader& read) {
    const TensorView count = read.next("count");
    params_.count = params_.count_out = integers(count, B);
    for (int64_t s = 0; s < B; ++s)
      if (params_.count[s] < 0) count.fail("non-negative, got " + std::to_string(params_.count[s]));
    params_.mean = params_.mean_out = read.real("mean", "(S, G)", {B, G});
    params_.var = params_.var_out = read.real("var", "(S, G)", {B, G});
    params_.residual = params_.residual_out = read.real("residual", "(S, 2, G)", {B, 2, G});
  }
  void run(double eps, const void* x, void* y) {
    params_.eps = eps;
    params_.x = x;
    params_.y = y;
    launch_timestep_norm_fwd_cpu(params_);
  }

 private:
  const int64_t B, D, G;
  TimestepNormFwdParams params_{};
};

// A block. Its tensors come in the order in which they are taken here.
class Block {
 public:
  Block(const Input& x, int64_t num_heads, int64_t num_groups)
      : dtype_(x.dtype), B(x.B), T(B * x.L), D(x.D), H(num_heads), timenorm_(x, num_groups) {
    cema_.sequences = qk_.sequences = append_.sequences = Sequences{B, T, x.L};
  }

  void read_parameters(Reader& read) {
    timenorm_.read_parameters(read, "timenorm.weight", "timenorm.bias");
    const TensorView alpha = read.next("cema.alpha");
    N = alpha.rank("(D, N, 1)", 3).size(1);
    if (N < 1) alpha.fail("of at least one state a channel, got N = 0");
    coefficients_.alpha = alpha.shape("(D, N, 1)", {D, N, 1}).dtype(real_of(dtype_), Reader::kReal).data();
    coefficients_.delta = read.real("cema.delta", "(D, N, 1)", {D, N, 1});
    coefficients_.theta = read.real("cema.theta", "(D, 1, 1)", {D, 1, 1});
    coefficients_.gamma = read.real("cema.gamma", "(D, N, 2)", {D, N, 2});
    cema_.omega = read.real("cema.omega", "(D, 1)", {D, 1});
    rms_norm_.weight = read.real_or_null("rmsnorm.weight", "(D,)", {D});
    read.linear(wv_, "wv", T, D, kAny);
    const int64_t values = wv_.outputs;
    read.linear(wz_, "wz", T, D, kAny);
    const int64_t Z = wz_.outputs;
    if (H < 1 || Z % H || Z / H % 2 || values % H)
      refuse("num_heads", "divide " + std::to_string(Z) + " into heads of even size, and " + std::to_string(values),
             std::to_string(H));
    K = Z / H;
    V = values / H;
    read.linear(wr_, "wr", T, D, values);
    read.linear(wh1_, "wh1", T, D, D);
    read.linear(wh2_, "wh2", T, values, D);
    qk_.gamma = read.real("gamma", "(2, H * K)", {2, Z});
    qk_.beta = read.real("beta", "(2, H * K)", {2, Z});
    layer_norm_.weight = read.real_or_null("norm.weight", "(D,)", {D});
    layer_norm_.bias = read.real_or_null("norm.bias", "(D,)", {D});
    read.linear(fc1_, "fc1", T, D, kAny);
    read.linear(fc2_, "fc2", T, fc1_.outputs, D);
    read.linear(fc3_, "fc3", T, D, fc1_.outputs, false);
    scale_ = read.real_or_null("nffn.alpha", "(D,)", {D});
  }

  // Of the attention the past; `rotary` has a row for each of the C positions of a chunk.
  void read_state(Reader& read, const TensorView& rotary) {
    timenorm_.read_state(read);
    const char* complex = "complex128 for a float64 `x`, else complex64";
    cema_.state = cema_.state_out =
        read.next("cema").present().shape("(S, D, N)", {B, D, N}).dtype(complex_of(dtype_), complex).data();
    const TensorView cache_k = read.next("cache_k"), cache_v = read.next("cache_v"), position = read.next("position");
    const int64_t C = rotary.rank("(C, K / 2, 2)", 3).size(0);
    qk_.rotary = rotary.shape("(C, K / 2, 2)", {C, K / 2, 2}).dtype(real_of(dtype_), Reader::kReal).data();
    const auto rows = [&](const TensorView& view, const char* letters, int64_t width) {
      return view.present().shape(letters, {B, C, H, width}).dtype(scalar_of(dtype_), "as `x`").data();
    };
    append_.cache_k = append_.cache_k_out = rows(cache_k, "(S, C, H, K)", K);
    append_.cache_v = append_.cache_v_out = rows(cache_v, "(S, C, H, V)", V);
    append_.position = append_.position_out = integers(position, B);
    for (int64_t s = 0; s < B; ++s)
      if (append_.position[s] < 0 || append_.position[s] >= C)
        position.fail("in [0, " + std::to_string(C) + "), got " + std::to_string(append_.position[s]));
    append_.chunk_size = qk_.chunk_size = qk_.table_rows = C;
  }

  void run(double eps, const void* x, void* y) {
    x_ = x;
    void* t = rows(D);
    timenorm_.run(eps, x_, t);

    coefficients_.dtype = dtype_ == DType::f64 ? DType::f64 : DType::f32;
    coefficients_.channels = cema_.channels = D;
    coefficients_.modes = cema_.modes = N;
    cema_.p = coefficients_.p = reals(D * N);
    cema_.q = coefficients_.q = reals(D * N * 2);
    cema_.gamma = coefficients_.scaled = reals(D * N * 2);
    launch_cema_coefficients_fwd_cpu(coefficients_);
    cema_.dtype = dtype_;
    cema_.x = t;
    cema_.y = rows(D);
    launch_cema_fwd_cpu(cema_);
    rms_norm_.is_rms_norm = true;
    const void* m = norm(rms_norm_, eps, cema_.y);

    qk_.dtype = dtype_;
    qk_.heads = H;
    qk_.key_dim = K;
    qk_.eps = eps;
    qk_.z = linear(wz_, m);
    qk_.position = append_.position;
    qk_.q = rows(H * K);
    qk_.k = rows(H * K);
    launch_normalized_qk_fwd_cpu(qk_);

    append_.dtype = dtype_;
    append_.heads = H;
    append_.key_dim = K;
    append_.value_dim = V;
    append_.scale = 1;
    append_.q = qk_.q;
    append_.k = qk_.k;
    append_.v = gate(linear(wv_, t), nullptr, H * V);
    ChunkedAttentionFwdParams attention{};
    static_cast<ChunkedAttentionParams&>(attention) = append_;
    attention.o = rows(H * V);
    attention.lse = reals(T * H);
    launch_chunked_attention_fwd_cpu(attention);
    launch_chunked_attention_state_cpu(append_);
    const void* gated = gate(linear(wr_, m), attention.o, H * V);
    void* between = rows(D);
    residual(linear(wh1_, m), linear(wh2_, gated), nullptr, between);

    const void* n = norm(layer_norm_, eps, between);
    void* hidden = linear(fc1_, n);
    gate(hidden, fc3_.weight ? linear(fc3_, n) : nullptr, fc1_.outputs);
    residual(linear(fc2_, hidden), nullptr, scale_, y);
    buffers_ = Buffers();  // whose memory the next block finds in the cache
  }

 private:
  void* rows(int64_t columns) { return buffers_(T * columns * bytes_of(dtype_)); }
  void* reals(int64_t count) { return buffers_(count * (dtype_ == DType::f64 ? 8 : 4)); }

  void* linear(LinearFewRowsParams& params, const void* x) {
    params.x = x;
    params.y = rows(params.outputs);
    launch_linear_few_rows_cpu(params);
    return params.y;
  }
  void* norm(LayerNormFwdParams& params, double eps, const void* x) {
    params.dtype = dtype_;
    params.rows = T;
    params.channels = D;
    params.eps = eps;
    params.x = x;
    params.y = rows(D);
    launch_layer_norm_fwd_cpu(params);
    return params.y;
  }
  // x = silu(x) value
  void* gate(void* x, const void* value, int64_t columns) const {
    GatedSiluFwdParams params{};
    params.dtype = dtype_;
    params.elements = T * columns;
    params.x = params.y = x;
    params.value = value;
    launch_gated_silu_fwd_cpu(params);
    return x;
  }
  // y = (the block's x) + scale (a + b)
  void residual(const void* a, const void* b, const void* scale, void* y) const {
    launch_residual_cpu({dtype_, T, D, x_, a, b, scale, y});
  }

  const DType dtype_;
  const int64_t B, T, D, H;
  int64_t N = 0, K = 0, V = 0;
  const void* x_ = nullptr;
  const void* scale_ = nullptr;  // (D) R or null
  Norm timenorm_;
  CemaCoefficientsFwdParams coefficients_{};
  CemaFwdParams cema_{};
  LayerNormFwdParams rms_norm_{}, layer_norm_{};
  LinearFewRowsParams wv_{}, wz_{}, wr_{}, wh1_{}, wh2_{}, fc1_{}, fc2_{}, fc3_{};
  NormalizedQkFwdParams qk_{};
  ChunkedAttentionStateParams append_{};
  Buffers buffers_;
};

// x (B, L, D) through as many blocks as there are eight of `state`; the lists hold their tensors one after another.
// Tokens x (B, L) go through a whole model, to logits: the first of `parameters` is the embedding, the last are those of
// the final norm, whose state comes last, and of the output.
void blocks_few_rows(const Target&, py::handle x_, py::list parameters, py::list state, py::handle rotary_,
                     int64_t num_heads, int64_t num_groups, double eps, double embedding_scale, py::handle y_) {
  constexpr size_t kStateOfBlock = 8, kStateOfNorm = 4;
  const TensorView x(kOp, "x", x_), rotary(kOp, "rotary", rotary_), y(kOp, "y", y_);
  check_range(kOp, "eps", eps, 0, "finite and at least 0");
  const bool whole = x.scalar() == Scalar::i64;
  const size_t states = state.size() - (whole ? kStateOfNorm : 0);
  if (states % kStateOfBlock)
    refuse("state", "hold 8 tensors a block and, for tokens, 4 more", std::to_string(state.size()));
  Reader parameter("parameters", std::move(parameters), true), past("state", std::move(state), false);

  EmbeddingParams embedding{};
  Input input{};
  if (whole) {
    const TensorView weight = parameter.next("embed.weight");
    weight.present().rank("(vocabulary, D)", 2);
    x.rank("(B, L)", 2);
    input = {weight.floating(), x.size(0), x.size(1), weight.size(1)};
    embedding = {input.dtype, x.elements(), input.D, x.data_as<const int64_t>(), weight.data(), embedding_scale, nullptr};
    for (int64_t t = 0; t < x.elements(); ++t)
      if (embedding.tokens[t] < 0 || embedding.tokens[t] >= weight.size(0))
        throw py::index_error("Megalodon: `tokens` must be in [0, " + std::to_string(weight.size(0)) + "), got " +
                              std::to_string(embedding.tokens[t]) + ".");
  } else {
    x.present().rank("(B, L, D)", 3);
    input = {x.floating(), x.size(0), x.size(1), x.size(2)};
  }
  parameter.set_dtype(input.dtype);
  past.set_dtype(input.dtype);
  const int64_t rows = input.B * input.L, bytes = rows * input.D * bytes_of(input.dtype);

  std::deque<Block> blocks;
  for (size_t i = 0; i < states / kStateOfBlock; ++i) {
    Block& block = blocks.emplace_back(input, num_heads, num_groups);
    block.read_parameters(parameter);
    block.read_state(past, rotary);
  }
  Norm norm(input, num_groups);
  LinearFewRowsParams output{};
  if (whole) {
    norm.read_parameters(parameter, "final_norm.weight", "final_norm.bias");
    norm.read_state(past);
    parameter.linear(output, "output", rows, input.D, kAny);
    y.present().shape("(B, L, outputs)", {input.B, input.L, output.outputs}).dtype(scalar_of(input.dtype), "as the weights");
    output.y = y.data();
  } else {
    y.like(x);
  }
  parameter.end();

  const py::gil_scoped_release unlocked;
  Buffers between;
  const void* from = x.data();
  if (whole) {
    from = embedding.y = between(bytes);
    launch_embedding_cpu(embedding);
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    void* to = i + 1 == blocks.size() && !whole ? y.data() : between(bytes);
    blocks[i].run(eps, from, to);
    from = to;
  }
  if (!whole) return;
  void* normalized = between(bytes);
  norm.run(eps, from, normalized);
  output.x = normalized;
  launch_linear_few_rows_cpu(output);
}

}  // namespace

void bind_blocks_few_rows(py::module_& module) { define(module, "blocks_few_rows", &blocks_few_rows); }

}  // namespace megalodon

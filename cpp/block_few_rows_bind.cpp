// A whole block on few rows, as in decoding: the kernels that layers.py calls one by one, with nothing in between.

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include <pybind11/stl.h>

#include "bindings.h"
#include "cema.h"
#include "cema_coefficients.h"
#include "chunked_attention.h"
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

constexpr const char* kOp = "block_few_rows";
constexpr int64_t kAny = -1;

// Memory for what one kernel hands to the next, until the end of the call.
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

// Takes the tensors of a tuple in order.
class Reader {
 public:
  Reader(const char* tuple, py::tuple tensors, DType dtype)
      : tuple_(tuple), tensors_(std::move(tensors)), dtype_(dtype) {}

  TensorView next(const char* name) {
    if (!more()) refuse(tuple_, "hold `" + std::string(name) + "`", std::to_string(index_) + " tensors");
    return TensorView(kOp, name, tensors_[index_++]);
  }
  bool more() const { return index_ < tensors_.size(); }
  // In the dtype of x.
  void* narrow(const char* name, const char* letters, std::initializer_list<int64_t> sizes) {
    return next(name).present().shape(letters, sizes).dtype(scalar_of(dtype_), "as `x`").data();
  }
  // float64 for a float64 x, else float32.
  void* real(const char* name, const char* letters, std::initializer_list<int64_t> sizes) {
    return next(name).present().shape(letters, sizes).dtype(real_of(dtype_), kReal).data();
  }
  void* real_or_null(const char* name, const char* letters, std::initializer_list<int64_t> sizes) {
    return next(name).shape(letters, sizes).dtype(real_of(dtype_), kReal).data();
  }
  // The weight of a product with `inputs` columns and `outputs` rows, which may be kAny.
  void linear(LinearFewRowsParams& params, const char* name, int64_t rows, int64_t inputs, int64_t outputs) {
    const TensorView weight = next(name);
    params.outputs = outputs == kAny ? weight.rank("(outputs, inputs)", 2).size(0) : outputs;
    params.weight = weight.present()
                        .shape("(outputs, inputs)", {params.outputs, inputs})
                        .dtype(scalar_of(dtype_), "as `x`")
                        .data();
    params.dtype = dtype_;
    params.rows = rows;
    params.inputs = inputs;
  }

 private:
  static constexpr const char* kReal = "float64 for a float64 `x`, else float32";
  const char* tuple_;
  const py::tuple tensors_;
  const DType dtype_;
  size_t index_ = 0;
};

// `parameters` and `state` hold tensors in the order in which they are taken here; `state_out` has the first five of
// `state`. The attention's cache and position are written to. `rotary` has a row for each position of a chunk. `eps` are
// those of the timestep norm, the RMS norm, the queries and keys, and the layer norm.
void block_few_rows(const Target&, py::handle x_, py::tuple parameters, py::tuple state, py::handle rotary_,
                    int64_t num_heads, int64_t num_groups, std::vector<double> eps, py::handle y_, py::tuple state_out) {
  const TensorView x(kOp, "x", x_), rotary(kOp, "rotary", rotary_);
  const DType dtype = x.rank("(B, L, D)", 3).floating();
  const int64_t B = x.size(0), D = x.size(2), T = B * x.size(1), H = num_heads, G = num_groups;
  const int64_t narrow_bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2, real_bytes = dtype == DType::f64 ? 8 : 4;
  const Sequences sequences{B, T, x.size(1)};
  if (G < 1 || D % G) refuse("num_groups", "be positive and divide D = " + std::to_string(D), std::to_string(G));
  if (eps.size() != 4) refuse("eps", "be four numbers", std::to_string(eps.size()));
  for (const double value : eps) check_range(kOp, "eps", value, 0, "finite and at least 0");

  TimestepNormFwdParams timenorm{};
  CemaCoefficientsFwdParams coefficients{};
  CemaFwdParams cema{};
  LayerNormFwdParams rms_norm{}, layer_norm{};
  LinearFewRowsParams wv{}, wz{}, wr{}, wh1{}, wh2{}, fc1{}, fc2{}, fc3{};
  NormalizedQkFwdParams qk{};
  ResidualParams fed{};
  Reader parameter("parameters", std::move(parameters), dtype);
  timenorm.weight = parameter.real("timenorm.weight", "(D,)", {D});
  timenorm.bias = parameter.real("timenorm.bias", "(D,)", {D});
  const TensorView alpha = parameter.next("cema.alpha");
  const int64_t N = alpha.rank("(D, N, 1)", 3).size(1);
  if (N < 1) alpha.fail("of at least one state a channel, got N = 0");
  coefficients.alpha = alpha.shape("(D, N, 1)", {D, N, 1}).dtype(real_of(dtype), "that of the states").data();
  coefficients.delta = parameter.real("cema.delta", "(D, N, 1)", {D, N, 1});
  coefficients.theta = parameter.real("cema.theta", "(D, 1, 1)", {D, 1, 1});
  coefficients.gamma = parameter.real("cema.gamma", "(D, N, 2)", {D, N, 2});
  cema.omega = parameter.real("cema.omega", "(D, 1)", {D, 1});
  rms_norm.weight = parameter.real_or_null("rmsnorm.weight", "(D,)", {D});
  parameter.linear(wv, "wv.weight", T, D, kAny);
  const int64_t values = wv.outputs, V = H > 0 ? values / H : 0;
  wv.bias = parameter.narrow("wv.bias", "(H * V,)", {values});
  parameter.linear(wz, "wz.weight", T, D, kAny);
  const int64_t Z = wz.outputs, K = H > 0 ? Z / H : 0;
  if (H < 1 || Z % H || K % 2 || values % H)
    refuse("num_heads", "divide " + std::to_string(Z) + " into heads of even size, and " + std::to_string(values),
           std::to_string(H));
  wz.bias = parameter.narrow("wz.bias", "(H * K,)", {Z});
  parameter.linear(wr, "wr.weight", T, D, values);
  wr.bias = parameter.narrow("wr.bias", "(H * V,)", {values});
  parameter.linear(wh1, "wh1.weight", T, D, D);
  wh1.bias = parameter.narrow("wh1.bias", "(D,)", {D});
  parameter.linear(wh2, "wh2.weight", T, values, D);
  qk.gamma = parameter.real("gamma", "(2, H * K)", {2, Z});
  qk.beta = parameter.real("beta", "(2, H * K)", {2, Z});
  layer_norm.weight = parameter.real_or_null("norm.weight", "(D,)", {D});
  layer_norm.bias = parameter.real_or_null("norm.bias", "(D,)", {D});
  parameter.linear(fc1, "fc1.weight", T, D, kAny);
  parameter.linear(fc2, "fc2.weight", T, fc1.outputs, D);
  fed.scale = parameter.real_or_null("nffn.alpha", "(D,)", {D});
  const bool has_fc3 = parameter.more();
  if (has_fc3) parameter.linear(fc3, "fc3.weight", T, D, fc1.outputs);

  Reader past("state", std::move(state), dtype), next("state_out", std::move(state_out), dtype);
  const auto count = [&](const TensorView& view) {
    return view.present().shape("(S,)", {B}).dtype(Scalar::i64, "timesteps").data_as<int64_t>();
  };
  const auto statistics = [&](Reader& from, const char* name) { return from.real(name, "(S, G)", {B, G}); };
  const auto modes = [&](Reader& from) {
    return from.next("cema").present().shape("(S, D, N)", {B, D, N}).dtype(complex_of(dtype), "complex").data();
  };
  const TensorView seen = past.next("count");
  timenorm.count = count(seen);
  timenorm.mean = statistics(past, "mean");
  timenorm.var = statistics(past, "var");
  timenorm.residual = past.real_or_null("residual", "(2, S, G)", {2, B, G});
  cema.state = modes(past);
  const TensorView cache_k = past.next("cache_k");
  const int64_t C = cache_k.rank("(S, C, H, K)", 4).size(1);
  ChunkedAttentionStateParams append{};
  append.cache_k = append.cache_k_out =
      cache_k.shape("(S, C, H, K)", {B, C, H, K}).dtype(scalar_of(dtype), "as `x`").data();
  append.cache_v = append.cache_v_out = past.narrow("cache_v", "(S, C, H, V)", {B, C, H, V});
  const TensorView position = past.next("position");
  append.position = append.position_out =
      position.present().shape("(S,)", {B}).dtype(Scalar::i64, "positions").data_as<int64_t>();
  timenorm.count_out = count(next.next("count"));
  timenorm.mean_out = statistics(next, "mean");
  timenorm.var_out = statistics(next, "var");
  timenorm.residual_out = next.real("residual", "(2, S, G)", {2, B, G});
  cema.state_out = modes(next);
  for (int64_t s = 0; s < B; ++s) {
    if (timenorm.count[s] < 0) seen.fail("non-negative, got " + std::to_string(timenorm.count[s]));
    if (append.position[s] < 0 || append.position[s] >= C)
      position.fail("in [0, " + std::to_string(C) + "), got " + std::to_string(append.position[s]));
  }
  qk.rotary = rotary.present().shape("(C, K / 2, 2)", {C, K / 2, 2}).dtype(real_of(dtype), "as the state").data();
  void* y = TensorView(kOp, "y", y_).like(x).data();

  Buffers buffers;
  const auto rows = [&](int64_t columns) { return buffers(T * columns * narrow_bytes); };
  const auto run_linear = [&](LinearFewRowsParams& p, const void* input) {
    p.x = input;
    p.y = rows(p.outputs);
    launch_linear_few_rows_cpu(p);
    return p.y;
  };
  const auto run_norm = [&](LayerNormFwdParams& p, const void* input, bool is_rms_norm, double epsilon) {
    p.dtype = dtype;
    p.rows = T;
    p.channels = D;
    p.eps = epsilon;
    p.is_rms_norm = is_rms_norm;
    p.x = input;
    p.y = rows(D);
    launch_layer_norm_fwd_cpu(p);
    return p.y;
  };
  // y = silu(input) value, in place
  const auto run_gate = [&](void* input, const void* value, int64_t columns) {
    GatedSiluFwdParams p{};
    p.dtype = dtype;
    p.elements = T * columns;
    p.x = p.y = input;
    p.value = value;
    launch_gated_silu_fwd_cpu(p);
    return input;
  };
  const auto run_residual = [&](ResidualParams& p, const void* a, const void* b, void* to) {
    p.dtype = dtype;
    p.rows = T;
    p.channels = D;
    p.x = x.data();
    p.a = a;
    p.b = b;
    p.y = to;
    launch_residual_cpu(p);
    return to;
  };
  const py::gil_scoped_release unlocked;

  timenorm.dtype = dtype;
  timenorm.sequences = sequences;
  timenorm.channels = D;
  timenorm.groups = G;
  timenorm.eps = eps[0];
  timenorm.x = x.data();
  timenorm.y = rows(D);
  timenorm.stats = buffers(3 * T * G * real_bytes);
  launch_timestep_norm_fwd_cpu(timenorm);

  coefficients.dtype = dtype == DType::f64 ? DType::f64 : DType::f32;
  coefficients.channels = D;
  coefficients.modes = N;
  coefficients.p = buffers(D * N * real_bytes);
  coefficients.q = buffers(D * N * 2 * real_bytes);
  coefficients.scaled = buffers(D * N * 2 * real_bytes);
  launch_cema_coefficients_fwd_cpu(coefficients);

  cema.dtype = dtype;
  cema.sequences = sequences;
  cema.channels = D;
  cema.modes = N;
  cema.x = timenorm.y;
  cema.p = coefficients.p;
  cema.q = coefficients.q;
  cema.gamma = coefficients.scaled;
  cema.y = rows(D);
  launch_cema_fwd_cpu(cema);
  const void* m = run_norm(rms_norm, cema.y, true, eps[1]);

  qk.dtype = dtype;
  qk.sequences = sequences;
  qk.heads = H;
  qk.key_dim = K;
  qk.chunk_size = C;
  qk.eps = eps[2];
  qk.z = run_linear(wz, m);
  qk.table_rows = C;
  qk.position = append.position;
  qk.q = rows(Z);
  qk.k = rows(Z);
  launch_normalized_qk_fwd_cpu(qk);

  append.dtype = dtype;
  append.sequences = sequences;
  append.heads = H;
  append.key_dim = K;
  append.value_dim = V;
  append.chunk_size = C;
  append.scale = 1;
  append.q = qk.q;
  append.k = qk.k;
  append.v = run_gate(run_linear(wv, timenorm.y), nullptr, values);
  ChunkedAttentionFwdParams attention{};
  static_cast<ChunkedAttentionParams&>(attention) = append;
  attention.o = rows(values);
  attention.lse = buffers(T * H * real_bytes);
  launch_chunked_attention_fwd_cpu(attention);
  launch_chunked_attention_state_cpu(append);

  const void* gated = run_gate(run_linear(wr, m), attention.o, values);
  ResidualParams attended{};
  const void* between = run_residual(attended, run_linear(wh1, m), run_linear(wh2, gated), rows(D));

  const void* n = run_norm(layer_norm, between, false, eps[3]);
  void* hidden = run_linear(fc1, n);
  run_gate(hidden, has_fc3 ? run_linear(fc3, n) : nullptr, fc1.outputs);
  run_residual(fed, run_linear(fc2, hidden), nullptr, y);
}

}  // namespace

void bind_block_few_rows(py::module_& module) { define(module, "block_few_rows", &block_few_rows); }

}  // namespace megalodon

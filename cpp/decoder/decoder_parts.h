// Contents of a decoder: sizes, the model's tensors by name, buffers between kernels, and layers.
#pragma once

#include <cstdlib>
#include <deque>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "linear.h"
#include "tensor_view.h"

namespace megalodon {

constexpr const char* kDecoder = "Decoder";

// Memory that lives as long as the decoder.
class Arena {
 public:
  void* operator()(int64_t bytes) {
    void* memory = std::aligned_alloc(64, (static_cast<size_t>(bytes) + 127) / 64 * 64);
    if (!memory) throw std::bad_alloc();
    return blocks_.emplace_back(memory, &std::free).get();
  }

 private:
  std::vector<std::unique_ptr<void, decltype(&std::free)>> blocks_;
};

struct Sizes {
  DType dtype;       // of activations and matrices
  int64_t B;         // rows, each a sequence
  int64_t max_tokens;  // in a call, all rows together
  int64_t D, N, G, H, K, V, F, C;  // F: hidden units of the FFN
  bool gated;       // the FFN, by fc3
  bool memory;      // each block has a working memory
  int64_t visible;  // chunks that attention sees
  double eps;

  Scalar scalar() const { return scalar_of(dtype); }
  Scalar real() const { return real_of(dtype); }
  int64_t element() const { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
  int64_t real_element() const { return dtype == DType::f64 ? 8 : 4; }
  int64_t cached_rows() const { return visible * C; }  // rows of a cache
};

// The model's parameters and "state.<...>" tensors by name; an absent tensor or None is a TensorView of None. The entry
// of a linear layer may be a function to call in its place.
class Tensors {
 public:
  Tensors(py::dict tensors, const Sizes& sizes) : tensors_(std::move(tensors)), sizes_(sizes) {}

  TensorView operator()(const std::string& name) {
    const char* kept = names_.emplace_back(name).c_str();
    return TensorView(kDecoder, kept, tensors_.contains(kept) ? py::object(tensors_[kept]) : py::none());
  }
  py::object function(const std::string& name) {
    if (!tensors_.contains(name.c_str())) return {};
    has_functions = true;
    return tensors_[name.c_str()];
  }
  bool has_functions = false;

  void* real(const std::string& name, const char* letters, std::initializer_list<int64_t> shape) {
    return (*this)(name).present().shape(letters, shape).dtype(sizes_.real(), kRealDtype).data();
  }
  void* real_or_null(const std::string& name, const char* letters, std::initializer_list<int64_t> shape) {
    return (*this)(name).shape(letters, shape).dtype(sizes_.real(), kRealDtype).data();
  }
  void* activation(const std::string& name, const char* letters, std::initializer_list<int64_t> shape) {
    return (*this)(name).present().shape(letters, shape).dtype(sizes_.scalar(), "as the other matrices").data();
  }
  // (S,) integers in [0, end).
  int64_t* integers(const std::string& name, int64_t end) {
    const TensorView view = (*this)(name);
    int64_t* values = view.present().shape("(S,)", {sizes_.B}).dtype(Scalar::i64, "a count").data_as<int64_t>();
    for (int64_t s = 0; s < sizes_.B; ++s)
      if (values[s] < 0 || values[s] >= end)
        view.fail("in [0, " + std::to_string(end) + "), got " + std::to_string(values[s]));
    return values;
  }

 private:
  const py::dict tensors_;
  const Sizes& sizes_;
  std::deque<std::string> names_;  // referenced by the views
};

// Buffers between kernels, for as many tokens as a call may have. All blocks share them.
struct Activations {
  Activations(const Sizes& s, Arena& arena) {
    const auto rows = [&](int64_t columns) { return arena(s.max_tokens * columns * s.element()); };
    x[0] = rows(s.D), x[1] = rows(s.D);
    t = rows(s.D), c = rows(s.D), m = rows(s.D);
    z = rows(s.H * s.K), q = rows(s.H * s.K), k = rows(s.H * s.K);
    v = rows(s.H * s.V), o = rows(s.H * s.V), r = rows(s.H * s.V);
    if (s.memory) read = rows(s.H * s.V), ends = static_cast<int64_t*>(arena(s.B * 8));
    first_rows = static_cast<int64_t*>(arena(s.B * 8));
    lse = arena(s.max_tokens * s.H * s.real_element());
    a = rows(s.D), b = rows(s.D), y = rows(s.D), n = rows(s.D);
    hidden = rows(s.F), gate = rows(s.F);
  }
  void* x[2];           // (T, D) block inputs and outputs, alternating
  void *t, *c, *m;      // (T, D) timestep_norm(x), cema(t), rms_norm(c)
  void *z, *q, *k;      // (T, H, K)
  void *v, *o, *r;      // (T, H, V) values, attention, gate
  void* read = nullptr;     // (T, H, V) output of the working memory
  int64_t* ends = nullptr;  // (S) positions after the call
  int64_t* first_rows;      // (S) row of each sequence's first token in a table with a row per token
  void* lse;            // (T, H) R
  void *a, *b, *y, *n;  // (T, D) the terms added by a half, the first half's output, layer_norm(y)
  void *hidden, *gate;  // (T, F)
};

inline LinearFewRowsParams matrix(const Sizes& s, Tensors& tensors, const std::string& name, int64_t inputs,
                                  int64_t outputs) {
  LinearFewRowsParams p{};
  p.dtype = s.dtype;
  p.inputs = inputs;
  p.outputs = outputs;
  p.weight = tensors.activation(name + ".weight", "(outputs, inputs)", {outputs, inputs});
  p.bias = tensors(name + ".bias").shape("(outputs,)", {outputs}).dtype(s.scalar(), "as the weight").data();
  return p;
}

// x (T, inputs) to y (T, outputs): the kernel of the layer's matrix, or the Python function that replaces the layer.
// The function gets the memory of x and y; like a layer's hook, it may also write to x.
class LinearLayer {
 public:
  LinearLayer(const Sizes& s, Tensors& tensors, const std::string& name, int64_t inputs, int64_t outputs, void* x,
              void* y)
      : function_(tensors.function(name)), x_row_(inputs * s.element()), y_row_(outputs * s.element()) {
    if (!function_) matrix_ = matrix(s, tensors, name, inputs, outputs);
    matrix_.x = x;
    matrix_.y = y;
  }

  // Called without the GIL.
  void run(int64_t rows) { run(rows, matrix_.y); }
  void run(int64_t rows, void* y) {
    if (function_) {
      const py::gil_scoped_acquire locked;
      function_(py::memoryview::from_memory(const_cast<void*>(matrix_.x), rows * x_row_),
                py::memoryview::from_memory(y, rows * y_row_));
      return;
    }
    matrix_.rows = rows;
    matrix_.y = y;
    launch_linear_few_rows_cpu(matrix_);
  }

 private:
  const py::object function_;
  LinearFewRowsParams matrix_{};
  int64_t x_row_, y_row_;  // bytes
};

}  // namespace megalodon

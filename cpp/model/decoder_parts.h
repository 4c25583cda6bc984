// What a decoder holds: sizes, the model's tensors by name, and memory for what one kernel hands to the next.
#pragma once

#include <cstdlib>
#include <deque>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

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
  double eps;

  Scalar scalar() const { return scalar_of(dtype); }
  Scalar real() const { return real_of(dtype); }
  int64_t element() const { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
  int64_t real_element() const { return dtype == DType::f64 ? 8 : 4; }
};

// The model's parameters and "state.<...>" tensors by name. What is absent or None is a TensorView of None.
class Tensors {
 public:
  Tensors(py::dict tensors, const Sizes& sizes) : tensors_(std::move(tensors)), sizes_(sizes) {}

  TensorView operator()(const std::string& name) {
    const char* kept = names_.emplace_back(name).c_str();
    return TensorView(kDecoder, kept, tensors_.contains(kept) ? py::object(tensors_[kept]) : py::none());
  }
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
  std::deque<std::string> names_;  // to which the views point
};

// What one kernel hands to the next, for as many tokens as a call may have. All blocks share these buffers.
struct Activations {
  Activations(const Sizes& s, Arena& arena) {
    const auto rows = [&](int64_t columns) { return arena(s.max_tokens * columns * s.element()); };
    x[0] = rows(s.D), x[1] = rows(s.D);
    t = rows(s.D), c = rows(s.D), m = rows(s.D);
    z = rows(s.H * s.K), q = rows(s.H * s.K), k = rows(s.H * s.K);
    v = rows(s.H * s.V), o = rows(s.H * s.V), r = rows(s.H * s.V);
    lse = arena(s.max_tokens * s.H * s.real_element());
    a = rows(s.D), b = rows(s.D), y = rows(s.D), n = rows(s.D);
    hidden = rows(s.F), gate = rows(s.F);
  }
  void* x[2];           // (T, D) between blocks, in turns
  void *t, *c, *m;      // (T, D) timestep_norm(x), cema(t), rms_norm(c)
  void *z, *q, *k;      // (T, H, K)
  void *v, *o, *r;      // (T, H, V) values, attention, gate
  void* lse;            // (T, H) R
  void *a, *b, *y, *n;  // (T, D) what a half adds, the first half's output, layer_norm(y)
  void *hidden, *gate;  // (T, F)
};

}  // namespace megalodon

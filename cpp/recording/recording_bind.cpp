// A recorded step: the kernel launches of a call, which can run again without Python in between. Also kernels that
// replace torch's operations between ops.

#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "elementwise.h"
#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"
#include "threads.h"

namespace megalodon {
namespace {

class Recording {
 public:
  // Keeps the launches of function(*arguments) without running them.
  void keep(const py::object& function, const py::args& arguments) {
    struct Keep {
      explicit Keep(Launches& launches) { kept_launches = &launches; }
      ~Keep() { kept_launches = nullptr; }
    } const keep(launches_);
    function(*arguments);
  }
  // Keeps a call of `function` as a launch.
  void keep_call(py::object function) {
    calls_python_ = true;
    launches_.emplace_back([function = std::move(function)] {
      const py::gil_scoped_acquire locked;
      function();
    });
  }
  // own_threads: run on OwnThreads if no launch calls Python. After Python, torch's threads would slow them.
  void run(bool own_threads) const {
    const py::gil_scoped_release unlocked;
    std::optional<OwnThreads> own;
    if (own_threads && !calls_python_) own.emplace();
    for (const auto& launch : launches_) launch();
  }

 private:
  Launches launches_;
  bool calls_python_ = false;
};

const Registration register_recording{[](py::module_& module) {
  py::class_<Recording>(module, "Recording")
      .def(py::init<>())
      .def("keep", &Recording::keep)
      .def("keep_call", &Recording::keep_call)
      .def("run", &Recording::run);
}};

constexpr const char* kElementwise = "elementwise";

// If b is None, y = scale a + shift; else y = a + b, a - b, a b or a / b, where `operation` is one of "+-*/". A tensor
// with fewer elements than y is broadcast over y's leading axes.
MEGALODON_BINDING(elementwise,
                  (py::handle a_, py::handle b_, const std::string& operation, double scale, double shift),
                  (py::handle y_)) {
  const TensorView a(kElementwise, "a", a_), b(kElementwise, "b", b_), y(kElementwise, "y", y_);
  ElementwiseParams params{};
  params.dtype = y.present().floating();
  params.a_dtype = a.present().floating();
  params.b_dtype = b.given() ? b.floating() : params.a_dtype;
  const bool is_f64 = params.dtype == DType::f64;
  if ((params.a_dtype == DType::f64) != is_f64 || (params.b_dtype == DType::f64) != is_f64)
    y.fail("float64 if and only if `a` and `b` are float64");
  // The index in this string is the Operation; "=" stands for affine.
  const size_t code = std::string("=+-*/").find(b.given() ? operation : "=");
  params.operation = static_cast<Operation>(code);
  params.channels = b.given() && b.elements() < a.elements() ? b.elements() : a.elements();
  params.rows = params.channels ? y.elements() / params.channels : 0;
  // Elements between the rows of a or b; 0 for a tensor with one row, which is broadcast.
  const auto step = [&](const TensorView& tensor) {
    if (tensor.elements() == y.elements()) return params.channels;
    if (tensor.elements() != params.channels || params.rows * params.channels != y.elements())
      tensor.fail("broadcast over the leading axes of `y`");
    return int64_t{0};
  };
  params.a_step = step(a);
  params.b_step = b.given() ? step(b) : 0;
  params.a = a.data();
  params.b = b.data();
  params.scale = scale;
  params.shift = shift;
  params.y = y.data();
  MEGALODON_LAUNCH(target, elementwise, params);
}

struct RowsParams {
  int64_t count, available, bytes;  // rows of y, rows of x, bytes of a row
  const int64_t* index;             // (count) row of x for each row of y; null: the same row
  const char* x;                    // (available, bytes)
  char* y;                          // (count, bytes)
};

void copy_rows(const RowsParams& p) {
  for (int64_t row = 0; row < p.count; ++row) {
    const int64_t from = p.index ? p.index[row] : row;
    if (from < 0 || from >= p.available)
      throw py::index_error("embedding: `input` must be in [0, " + std::to_string(p.available) + "), got " +
                            std::to_string(from) + ".");
    std::memcpy(p.y + row * p.bytes, p.x + from * p.bytes, static_cast<size_t>(p.bytes));
  }
}

MEGALODON_BINDING(embedding_rows, (py::handle weight_, py::handle index_), (py::handle y_)) {
  const TensorView weight("embedding", "weight", weight_), index("embedding", "input", index_);
  const TensorView y("embedding", "y", y_);
  const int64_t rows = weight.rank("(rows, D)", 2).size(0);
  index.present().dtype(Scalar::i64, "indices");
  if (!y.given() || y.scalar() != weight.scalar() || y.elements() != index.elements() * weight.size(1))
    y.fail("a row of `weight` for each index");
  target.launch(RowsParams{index.elements(), rows, rows ? weight.bytes() / rows : 0, index.data_as<const int64_t>(),
                           weight.data_as<const char>(), y.data_as<char>()},
                copy_rows);
}

MEGALODON_BINDING(copy_memory, (py::handle x_), (py::handle y_)) {
  const TensorView x("copy", "x", x_), y("copy", "y", y_);
  y.like(x.present());
  // All of x is one row.
  target.launch(RowsParams{1, 1, x.bytes(), nullptr, x.data_as<const char>(), y.data_as<char>()}, copy_rows);
}

}  // namespace

}  // namespace megalodon

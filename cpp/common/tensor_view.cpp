#include "tensor_view.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <sstream>

#include "dlpack_view.h"

namespace megalodon {
namespace {

// Attribute names as interned Python strings, created once.
PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

struct Names {
  PyObject* shape = interned("shape");
  PyObject* dtype = interned("dtype");
  PyObject* is_here = interned(kReadable ? "is_cpu" : "is_cuda");  // on the device of this module's kernels
  PyObject* data_ptr = interned("data_ptr");
  PyObject* is_contiguous = interned("is_contiguous");
};
const Names& names() {
  static const Names names;
  return names;
}

// In the order of Scalar.
constexpr const char* kScalarNames[] = {"float32",   "float64",    "bfloat16", "float16",
                                        "complex64", "complex128", "int64",    "int8",   "uint8", "other"};
const char* scalar_name(Scalar scalar) { return kScalarNames[static_cast<int>(scalar)]; }

// torch's dtype objects are singletons, so a dtype is identified by its address. The table keeps a reference to each.
Scalar scalar_of_object(const PyObject* dtype) {
  constexpr int kScalars = static_cast<int>(Scalar::other);
  static const std::array<const PyObject*, kScalars> objects = [] {
    const py::module_ torch = py::module_::import("torch");
    std::array<const PyObject*, kScalars> found;
    for (int i = 0; i < kScalars; ++i) found[i] = py::object(torch.attr(kScalarNames[i])).release().ptr();
    return found;
  }();
  const auto at = std::find(objects.begin(), objects.end(), dtype);
  return static_cast<Scalar>(at - objects.begin());  // Scalar::other, the last, if it is none of these
}

py::object owned(PyObject* value) {
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object attribute(py::handle object, PyObject* name) {
  return owned(PyObject_GetAttr(object.ptr(), name));
}

py::object call(py::handle object, PyObject* method) {
  return owned(PyObject_CallMethodNoArgs(object.ptr(), method));
}

Scalar scalar_of_dlpack(const DlpackTensor& tensor) {
  enum Code { integer = 0, unsigned_integer = 1, floating = 2, bfloat = 4, complex = 5 };
  const int bits = tensor.dtype.lanes == 1 ? tensor.dtype.bits : 0;
  switch (tensor.dtype.code) {
    case floating: return bits == 32 ? Scalar::f32 : bits == 64 ? Scalar::f64 : bits == 16 ? Scalar::f16 : Scalar::other;
    case bfloat: return bits == 16 ? Scalar::bf16 : Scalar::other;
    case complex: return bits == 64 ? Scalar::c64 : bits == 128 ? Scalar::c128 : Scalar::other;
    case integer: return bits == 64 ? Scalar::i64 : bits == 8 ? Scalar::i8 : Scalar::other;
    case unsigned_integer: return bits == 8 ? Scalar::u8 : Scalar::other;
  }
  return Scalar::other;
}

bool is_contiguous(const DlpackTensor& tensor) {
  int64_t stride = 1;
  bool contiguous = true;
  for (int axis = tensor.rank - 1; axis >= 0; --axis) {
    if (tensor.shape[axis] == 0) return true;
    if (tensor.shape[axis] != 1 && tensor.strides[axis] != stride) contiguous = false;
    stride *= tensor.shape[axis];
  }
  return contiguous;
}

}  // namespace

TensorView::TensorView(const char* op, const char* name, py::handle object) : op_(op), name_(name) {
  if (object.is_none()) return;
  given_ = true;
  if (!read_dlpack(object)) read_attributes(object);
  check_memory();
}

bool TensorView::read_dlpack(py::handle object) {
  constexpr int32_t kCpu = 1, kCuda = 2;
  DlpackTensor tensor;
  if (!dlpack_view(object, tensor) || tensor.rank > kMaxRank) return false;
  scalar_ = scalar_of_dlpack(tensor);
  if (scalar_ == Scalar::other || tensor.device_type != (kReadable ? kCpu : kCuda)) return false;
  if (!is_contiguous(tensor)) return false;
  rank_ = tensor.rank;
  for (int axis = 0; axis < rank_; ++axis) shape_[axis] = tensor.shape[axis];
  data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return true;
}

void TensorView::read_attributes(py::handle object) {
  const py::object dtype = attribute(object, names().dtype);
  scalar_ = scalar_of_object(dtype.ptr());
  if (scalar_ == Scalar::other) dtype_text_ = py::str(dtype);
  const py::object shape = attribute(object, names().shape);
  if (!PyTuple_Check(shape.ptr()))
    fail(std::string("a tensor whose shape is a tuple, got a ") + Py_TYPE(shape.ptr())->tp_name,
         "pass a torch.Tensor, as .as_subclass(torch.Tensor) gives");
  if (PyTuple_GET_SIZE(shape.ptr()) > kMaxRank)
    fail("of at most 8 dimensions, got " + std::to_string(PyTuple_GET_SIZE(shape.ptr())));
  rank_ = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
  for (int axis = 0; axis < rank_; ++axis) {
    shape_[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), axis));
    if (PyErr_Occurred()) throw py::error_already_set();
    if (shape_[axis] < 0) fail("of non-negative sizes, got " + shape_text());
  }
  if (attribute(object, names().is_here).ptr() != Py_True)
    fail(std::string("on ") + (kReadable ? "the CPU" : "a CUDA device") + ", got device " +
             std::string(py::str(object.attr("device"))),
         "move all tensors to one device");
  if (call(object, names().is_contiguous).ptr() != Py_True) fail("contiguous", "call .contiguous()");
  data_ = PyLong_AsVoidPtr(call(object, names().data_ptr).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
}

void TensorView::check_memory() const {
  // If a tensor's storage was freed, data_ is null plus the tensor's offset. No system maps the first 64 KiB.
  constexpr uintptr_t kLeastAddress = 1 << 16;
  if (reinterpret_cast<uintptr_t>(data_) < kLeastAddress && elements() > 0)
    fail("in memory, got a tensor whose storage was resized to 0 bytes", "resize it back first");
}

int64_t TensorView::bytes() const {
  constexpr int64_t bytes_of[] = {4, 8, 2, 2, 8, 16, 8, 1, 1, 1};
  return elements() * bytes_of[static_cast<int>(scalar_)];
}

void TensorView::fail(const std::string& expected, const std::string& fix) const {
  throw py::value_error(std::string(op_) + ": `" + name_ + "` must be " + expected + (fix.empty() ? "" : "; " + fix) +
                        ".");
}

std::string TensorView::shape_text() const {
  std::ostringstream text;
  text << '(';
  for (int axis = 0; axis < rank_; ++axis) text << (axis ? ", " : "") << shape_[axis];
  text << (rank_ == 1 ? ",)" : ")");
  return text.str();
}

// Fix for a tensor that lacks one dimension. If four are expected, (B, L, H, ...), it may lack the batch or the heads.
static const char* missing_dimension(int rank) {
  return rank == 4 ? "; add a batch dimension, or a head dimension of size 1." : "; add a batch dimension.";
}

const TensorView& TensorView::rank(const char* letters, int rank) const {
  if (given_ && rank_ == rank) return *this;
  const std::string text =
      std::string(op_) + ": `" + name_ + "` must have shape " + letters + ", got " + (given_ ? shape_text() : "None");
  throw py::value_error(text + (given_ && rank_ == rank - 1 && letters[1] == 'B' ? missing_dimension(rank) : "."));
}

const TensorView& TensorView::shape(const char* letters, std::initializer_list<int64_t> sizes) const {
  if (!given_) return *this;
  bool same = rank_ == static_cast<int>(sizes.size());
  for (int axis = 0; same && axis < rank_; ++axis) same = shape_[axis] == sizes.begin()[axis];
  if (same) return *this;
  std::ostringstream text;
  text << op_ << ": `" << name_ << "` must have shape " << letters << " = (";
  for (const int64_t* size = sizes.begin(); size != sizes.end(); ++size)
    text << (size == sizes.begin() ? "" : ", ") << *size;
  text << (sizes.size() == 1 ? ",)" : ")") << ", got " << shape_text() << ".";
  throw py::value_error(text.str());
}

const TensorView& TensorView::dtype(Scalar expected, const char* why) const {
  if (!given_ || scalar_ == expected) return *this;
  const std::string got = scalar_ == Scalar::other ? dtype_text_ : std::string("torch.") + scalar_name(scalar_);
  const bool is_narrowed = expected == Scalar::f32 && (scalar_ == Scalar::bf16 || scalar_ == Scalar::f16);
  const char* end =
      is_narrowed ? "; megalodon_ops.wide_parameters(model) lists the parameters that must stay wide." : ".";
  throw py::type_error(std::string(op_) + ": `" + name_ + "` must be torch." + scalar_name(expected) + " (" + why +
                       "), got " + got + "; convert it to " + scalar_name(expected) + end);
}

const TensorView& TensorView::present() const {
  if (!given_) fail("a tensor, got None");
  return *this;
}

void TensorView::absent(const char* needed) const {
  if (given_) fail(std::string("None without ") + needed + ", got a tensor");
}

const TensorView& TensorView::like(const TensorView& other) const {
  present();
  bool same = rank_ == other.rank_ && scalar_ == other.scalar_;
  for (int axis = 0; same && axis < rank_; ++axis) same = shape_[axis] == other.shape_[axis];
  if (!same)
    fail(std::string("like `") + other.name_ + "`, " + other.shape_text() + " torch." + scalar_name(other.scalar_) +
         ", got " + shape_text() + " torch." + scalar_name(scalar_));
  return *this;
}

DType TensorView::floating() const {
  switch (scalar_) {
    case Scalar::f32:
      return DType::f32;
    case Scalar::f64:
      return DType::f64;
    case Scalar::bf16:
      return DType::bf16;
    case Scalar::f16:
      return DType::f16;
    default:
      break;
  }
  const std::string got = scalar_ == Scalar::other ? dtype_text_ : std::string("torch.") + scalar_name(scalar_);
  throw py::type_error(std::string(op_) + ": `" + name_ + "` must be float32, float64, bfloat16 or float16, got " +
                       got + "; convert it to float32.");
}

void MemoryRanges::add(const TensorView& tensor, bool written) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data());
  const auto bytes = tensor.given() ? static_cast<uintptr_t>(tensor.bytes()) : 0;
  if (bytes > 0) ranges_.push_back({begin, begin + bytes, tensor.op(), tensor.name(), written});
}

void MemoryRanges::add_update(const TensorView& before, const TensorView& after) {
  const bool in_place = before.given() && before.data() == after.data();
  if (!in_place) add_read(before);
  add(in_place ? before : after, true);
}

void MemoryRanges::check() {
  std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  const Range* read = nullptr;     // the range with the largest end so far of those that are only read
  const Range* written = nullptr;  // and of those that are written
  for (const Range& range : ranges_) {
    // Nothing may overlap a range that is written, and a range that is written may overlap nothing.
    const Range* other = nullptr;
    if (written && range.begin < written->end) other = written;
    else if (range.written && read && range.begin < read->end) other = read;
    if (other) {
      const Range& target = range.written ? range : *other;
      const Range& source = range.written ? *other : range;
      throw py::value_error(std::string(target.op) + ": `" + target.name + "`, which is written, must not overlap `" +
                            source.name + "` in memory, got overlapping tensors; pass a copy, .clone().");
    }
    const Range*& farthest = range.written ? written : read;
    if (!farthest || range.end > farthest->end) farthest = &range;
  }
}

void check_range(const char* op, const char* name, double value, double least, const char* expected) {
  if (std::isfinite(value) && value >= least) return;
  std::ostringstream text;
  text << op << ": `" << name << "` must be " << expected << ", got " << value << '.';
  throw py::value_error(text.str());
}

void TensorView::values(int64_t most, const std::string& range) const {
  if (!given_) return;
  check_values([view = *this, most, range] {
    const auto* values = view.data_as<const int64_t>();
    for (int64_t i = 0; i < view.elements(); ++i)
      if (values[i] < 0 || values[i] > most)
        view.fail("in " + range + ", got " + std::to_string(values[i]) + " at " + std::to_string(i));
  });
}

// Raises unless the spans are in order, disjoint and within one row each. The error names the argument that the caller
// gave, as the layout of the spans tells it: spans by row are those of `lengths`, offsets in one row of `cu_seqlens`.
static void check_spans(const Sequences& sequences, const TensorView& spans) {
  const int64_t L = sequences.row_length, stride = sequences.stride;
  const auto refuse = [&](const char* name, const std::string& expected, const std::string& got, int64_t at) {
    const TensorView argument(spans.op(), name, py::none());  // only for its message
    argument.fail(expected + ", got " + got + " at " + std::to_string(at));
  };
  const std::string range = "[0, " + std::to_string(L) + "]";
  int64_t last = 0;  // end of the span before
  for (int64_t s = 0; s < sequences.count; ++s) {
    const int64_t begin = sequences.spans[s * stride], end = sequences.spans[s * stride + 1];
    const bool ordered = last <= begin && begin <= end && end <= sequences.tokens;
    const bool begins_row = begin == s * L;
    const bool fits = sequences.by_row ? begins_row && end - begin <= L : begin == end || begin / L == (end - 1) / L;
    if (ordered && fits) {
      last = end;
    } else if (sequences.by_row && begins_row) {
      refuse("lengths", "in " + range, std::to_string(end - begin), s);
    } else if (stride == 1 && sequences.tokens == L) {
      const bool begin_is_wrong = begin < last;  // else `end`, which is the next offset
      refuse("cu_seqlens", "non-decreasing offsets in " + range, std::to_string(begin_is_wrong ? begin : end),
             begin_is_wrong ? s : s + 1);
    } else {
      refuse("spans", "in order, disjoint and within one row of " + std::to_string(L) + " positions each",
             "[" + std::to_string(begin) + ", " + std::to_string(end) + ")", s);
    }
  }
}

Sequences make_sequences(const char* op, int64_t batch, int64_t length, py::handle object) {
  const TensorView spans(op, "spans", object);
  Sequences sequences{batch, batch * length, length};
  if (!spans.given()) return sequences;
  sequences.by_row = spans.axes() == 3;
  if (spans.axes() == 1 && spans.elements() > 0) {
    sequences.count = spans.size(0) - 1;
    sequences.stride = 1;
  } else if (sequences.by_row) {
    spans.shape("(B, 1, 2)", {batch, 1, 2});
  } else {
    sequences.count = spans.rank("(S, 2)", 2).size(0);
    spans.shape("(S, 2)", {sequences.count, 2});
  }
  sequences.spans = spans.dtype(Scalar::i64, "positions in the flattened batch").data_as<const int64_t>();
  static constexpr int64_t kNoSpan = 0;  // the address of a tensor without elements is null, which means a dense batch
  if (sequences.count == 0) sequences.spans = &kNoSpan;
  check_values([sequences, spans] { check_spans(sequences, spans); });
  return sequences;
}

}  // namespace megalodon

// Reads torch tensors through DLPack's C exchange API or, if torch is too old or a check fails, through Python
// attributes. So the module needs no torch header and links no torch library.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "dtype.h"
#include "sequences.h"
#include "target.h"

namespace megalodon {

enum class Scalar { f32, f64, bf16, f16, c64, c128, i64, i8, u8, other };

// A contiguous tensor on the module's target, or None. Errors name the op, the argument, the expectation and the value
// given.
class TensorView {
 public:
  TensorView(const char* op, const char* name, py::handle object);

  bool given() const { return given_; }
  Scalar scalar() const { return scalar_; }
  int axes() const { return rank_; }
  int64_t size(int axis) const { return shape_[axis]; }
  int64_t elements() const {
    int64_t count = 1;
    for (int axis = 0; axis < rank_; ++axis) count *= shape_[axis];
    return count;
  }
  int64_t bytes() const;
  void* data() const { return data_; }
  template <class T> T* data_as() const { return static_cast<T*>(data_); }

  // The functions from rank() to floating() check the tensor. They raise an error if it does not fit; most return the
  // tensor, for further checks.
  // The tensor must be given and have as many axes as `letters`, such as "(B, L, D)".
  const TensorView& rank(const char* letters, int rank) const;
  // If the tensor is given, it must have exactly this shape.
  const TensorView& shape(const char* letters, std::initializer_list<int64_t> sizes) const;
  // If the tensor is given, it must have this dtype; the error gives `why` as the reason.
  const TensorView& dtype(Scalar expected, const char* why) const;
  // The tensor must not be None.
  const TensorView& present() const;
  // The tensor must be None, because the argument that `needed` names is missing.
  void absent(const char* needed) const;
  // If the tensor is given, its int64 values must be in [0, most]; `range` is that interval as text. See check_values.
  void values(int64_t most, const std::string& range) const;
  // The tensor must have the shape and dtype of `other`.
  const TensorView& like(const TensorView& other) const;
  // The dtype must be float32, float64, bfloat16 or float16.
  DType floating() const;

  const char* op() const { return op_; }
  const char* name() const { return name_; }
  [[noreturn]] void fail(const std::string& expected, const std::string& fix = "") const;

 private:
  bool read_dlpack(py::handle object);  // returns false without the API, or if a check fails
  void read_attributes(py::handle object);
  void check_memory() const;  // fails if the storage was resized to 0 bytes
  std::string shape_text() const;

  static constexpr int kMaxRank = 8;
  const char* op_;
  const char* name_;
  bool given_ = false;
  Scalar scalar_ = Scalar::other;
  int rank_ = 0;
  int64_t shape_[kMaxRank] = {};
  void* data_ = nullptr;
  std::string dtype_text_;
};

// The memory of a kernel's tensors. A tensor that the kernel writes may overlap no other.
class MemoryRanges {
 public:
  void add_read(const TensorView& tensor) { add(tensor, false); }
  // Adds `before`, which is read, and `after`, which is written and may be the same memory (in place).
  void add_update(const TensorView& before, const TensorView& after);
  // Raises if a tensor that is written shares memory with another.
  void check();

 private:
  struct Range {
    uintptr_t begin, end;
    const char *op, *name;
    bool written;
  };
  void add(const TensorView& tensor, bool written);
  std::vector<Range> ranges_;
};

// Reasons in errors about a dtype that depends on that of the activations.
constexpr const char* kRealDtype = "float64 for float64 activations, else float32";
constexpr const char* kComplexDtype = "complex128 for float64 activations, else complex64";

// The accumulation type R of a tensor of `dtype`, and its complex counterpart.
inline Scalar real_of(DType dtype) { return dtype == DType::f64 ? Scalar::f64 : Scalar::f32; }
inline Scalar complex_of(DType dtype) { return dtype == DType::f64 ? Scalar::c128 : Scalar::c64; }
inline Scalar scalar_of(DType dtype) {
  constexpr Scalar scalars[] = {Scalar::f32, Scalar::f64, Scalar::bf16, Scalar::f16};
  return scalars[static_cast<int>(dtype)];
}

// Raises unless `value` is finite and at least `least`.
void check_range(const char* op, const char* name, double value, double least, const char* expected);

// Returns the sequences of a (B, L, ...) batch. `spans` is (S, 2); (B, 1, 2), one span at the start of each row;
// (S + 1,), offsets; or None.
// check_values() checks, now or in each run of a recorded step, that spans are in order, disjoint and within one row
// each. Errors name the argument from which python/megalodon_ops/ops/common/spans.py makes spans of this layout.
Sequences make_sequences(const char* op, int64_t batch, int64_t length, py::handle spans);

}  // namespace megalodon

// For tensor_view.cpp: reads a torch tensor through DLPack's C exchange API (dmlc/dlpack 1.2, torch 2.10, or later) by
// one call, without Python objects. The structs follow DLPack's ABI.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace megalodon {

namespace py = pybind11;

struct DlpackTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t rank;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct DlpackManagedTensor {
  DlpackTensor tensor;
  void* context;
  void (*deleter)(DlpackManagedTensor* self);
};

struct DlpackExchange {
  static constexpr uint32_t kMajor = 1;
  uint32_t major, minor;
  void* previous;
  void *allocate, *from_object, *to_object;
  int (*view)(void* object, DlpackTensor* out);  // may be null; returns 0 on success
  void* current_stream;
};

// Fills `out`; its pointers are valid as long as the tensor lives. Returns false if this torch lacks the API, or if the
// object is no torch.Tensor or Parameter or has no view.
inline bool dlpack_view(py::handle object, DlpackTensor& out) {
  static const struct Torch {
    PyTypeObject *tensor, *parameter;
    const DlpackExchange* exchange = nullptr;
    Torch() {
      const py::module_ torch = py::module_::import("torch");
      tensor = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("Tensor")).release().ptr());
      parameter = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("nn").attr("Parameter")).release().ptr());
      const py::object capsule = py::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
      if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
      const auto* found =
          static_cast<const DlpackExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (found->major == DlpackExchange::kMajor && found->view) exchange = found;
    }
  } torch;
  const PyTypeObject* type = Py_TYPE(object.ptr());
  if (!torch.exchange || (type != torch.tensor && type != torch.parameter)) return false;
  if (torch.exchange->view(object.ptr(), &out) == 0) return true;
  PyErr_Clear();
  return false;
}

}  // namespace megalodon

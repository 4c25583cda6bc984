// Whether a call of an op may pass by torch's dispatcher, which costs more than a short kernel.
#include <cstring>

#include "bindings.h"
#include "dlpack_view.h"

namespace megalodon {
namespace {

py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
bool is_true(PyObject* result) { return owned(result).ptr() == Py_True; }

// What is called of torch, looked up once.
struct Torch {
  py::module_ core = py::module_::import("torch._C");
  PyObject* included_keys = py::object(core.attr("_dispatch_tls_local_include_set")).release().ptr();
  PyObject* has_function_mode = py::object(core.attr("_is_torch_function_mode_enabled")).release().ptr();
  PyObject* is_profiling = py::object(core.attr("_autograd").attr("_profiler_enabled")).release().ptr();
  PyObject* raw_repr = PyUnicode_InternFromString("raw_repr");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* is_conj = PyUnicode_InternFromString("is_conj");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  uint64_t usual_keys = bits_of("BackendSelect") | bits_of("ADInplaceOrView");

  uint64_t bits_of(const char* key) {
    return py::cast<uint64_t>(core.attr("DispatchKeySet")(core.attr("DispatchKey").attr(key)).attr("raw_repr")());
  }
};
const Torch& torch() {
  static const Torch& torch = *new Torch;
  return torch;
}

// No mode, transformation, tracer or profiler wants to see the ops that are called.
bool unobserved() {
  const py::object keys = owned(PyObject_CallNoArgs(torch().included_keys));
  const py::object bits = owned(PyObject_CallMethodNoArgs(keys.ptr(), torch().raw_repr));
  return !(PyLong_AsUnsignedLongLong(bits.ptr()) & ~torch().usual_keys) &&
         !is_true(PyObject_CallNoArgs(torch().has_function_mode)) && !is_true(PyObject_CallNoArgs(torch().is_profiling));
}

// One of torch's own types, on the CPU, whose values are those in its memory.
bool is_plain_tensor(PyObject* object) {
  constexpr int kCpu = 1, kComplex = 5;
  DlpackTensor tensor;
  if (!dlpack_view(object, tensor) || tensor.device_type != kCpu) return false;
  if (is_true(PyObject_CallMethodNoArgs(object, torch().is_neg))) return false;
  if (tensor.dtype.code == kComplex && is_true(PyObject_CallMethodNoArgs(object, torch().is_conj))) return false;
  for (int axis = 0; axis < tensor.rank; ++axis)
    if (tensor.shape[axis] == 0) return true;
  return tensor.data != nullptr;  // torch may leave zeros without memory
}

// What an argument must be: t a tensor, o a tensor or None, i int, f float, b bool.
bool is_plain(char kind, PyObject* argument) {
  switch (kind) {
    case 'o': return argument == Py_None || is_plain_tensor(argument);
    case 't': return is_plain_tensor(argument);
    case 'i': return PyLong_CheckExact(argument);
    case 'f': return PyFloat_CheckExact(argument);
    case 'b': return PyBool_Check(argument);
  }
  return false;
}

// kinds[i] is that of argument i.
bool are_plain(const char* kinds, const py::tuple& arguments) {
  const size_t count = arguments.size();
  if (std::strlen(kinds) != count) return false;
  for (size_t i = 0; i < count; ++i)
    if (!is_plain(kinds[i], PyTuple_GET_ITEM(arguments.ptr(), static_cast<Py_ssize_t>(i)))) return false;
  return unobserved();
}

bool any_requires_grad(const py::tuple& plain_arguments) {
  for (const py::handle argument : plain_arguments) {
    const bool scalar = argument.is_none() || PyLong_Check(argument.ptr()) || PyFloat_Check(argument.ptr());
    if (!scalar && is_true(PyObject_GetAttr(argument.ptr(), torch().requires_grad))) return true;
  }
  return false;
}

}  // namespace

void bind_plain_call(py::module_& module) {
  module.def("are_plain", &are_plain);
  module.def("any_requires_grad", &any_requires_grad);
}

}  // namespace megalodon

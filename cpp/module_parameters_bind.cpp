// The parameters of torch modules, taken from the dictionaries that hold them: in Python each would go through a
// function of nn.Module, which for all those of a model takes longer than a short call.

#include <pybind11/stl.h>

#include "bindings.h"
#include "read_again.h"
#include "tensor_view.h"

namespace megalodon {
namespace {

struct Names {
  PyObject* forward_hooks = PyUnicode_InternFromString("_forward_hooks");
  PyObject* forward_pre_hooks = PyUnicode_InternFromString("_forward_pre_hooks");
  PyObject* forward = PyUnicode_InternFromString("forward");
  PyObject* modules = PyUnicode_InternFromString("_modules");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
};

ReadAgain read_again;

// Borrowed, or null where there is none.
PyObject* find(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}
PyObject* find_dict(PyObject* dict, PyObject* key) {
  PyObject* value = find(dict, key);
  if (!value || !PyDict_Check(value)) throw py::type_error("take_parameters: expected a torch module.");
  read_again.note_dict(value);
  return value;
}

bool equal(PyObject* found, PyObject* expected) {
  const int result = found ? PyObject_RichCompareBool(found, expected, Py_EQ) : 0;
  if (result < 0) throw py::error_already_set();
  return result;
}

// Of a module that may be null or None.
bool take(PyObject* module, const py::tuple& description, const py::dict& expected, py::list& out) {
  static const Names& names = *new Names;
  const py::dict children = description[1];
  const py::tuple own = description[2], attributes = description[3];
  const bool absent = !module || module == Py_None;
  py::dict inside;
  PyObject *modules = nullptr, *parameters = nullptr;
  if (!absent) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != py::object(description[0]).ptr()) return false;
    read_again.note_object(module);
    inside = py::reinterpret_steal<py::dict>(PyObject_GenericGetDict(module, nullptr));
    if (!inside) throw py::error_already_set();
    read_again.note_dict(inside.ptr());
    for (PyObject* hooks : {names.forward_hooks, names.forward_pre_hooks})
      if (PyDict_GET_SIZE(find_dict(inside.ptr(), hooks)) > 0) return false;
    if (find(inside.ptr(), names.forward)) return false;
    for (const py::handle name : attributes) {
      PyObject* value = find(expected.ptr(), name.ptr());
      if (value && !equal(find(inside.ptr(), name.ptr()), value)) return false;
    }
    modules = find_dict(inside.ptr(), names.modules);
    parameters = find_dict(inside.ptr(), names.parameters);
  }
  Py_ssize_t known = 0;
  for (const auto [name, child] : children) {
    PyObject* found = absent ? nullptr : find(modules, name.ptr());
    if (!absent && !found && find(inside.ptr(), name.ptr()) != Py_None) return false;
    known += found != nullptr;
    if (!take(found, py::reinterpret_borrow<py::tuple>(child), expected, out)) return false;
  }
  if (!absent && known < PyDict_GET_SIZE(modules)) return false;
  for (const py::handle name : own) {
    PyObject* found = absent ? Py_None : find(parameters, name.ptr());
    if (!found) return false;
    read_again.note_tensor(found);
    out.append(py::handle(found));
  }
  return true;
}

// The parameters of modules that are as their descriptions (class, {child's name: description}, names of its own
// parameters, names of attributes) say: those of its children, then its own, None for each that is absent. None: one of
// the modules is absent, or there is one of another class, with other children, hooks, a forward of its own, an attribute
// that is not as expected, or a parameter or child that has become something else.
py::object take_parameters(const py::list& described, const py::dict& expected) {
  read_again.fetch();
  py::list parameters;
  for (const py::handle pair : described) {
    const auto [module, description] = py::cast<std::pair<py::handle, py::tuple>>(pair);
    if (module.is_none() || !take(module.ptr(), description, expected, parameters)) return py::none();
  }
  return parameters;
}

// Whether none is None or must be copied to be so. Those of a call that follows take_parameters.
bool are_contiguous(const py::list& tensors) {
  for (const py::handle tensor : tensors) {
    if (tensor.is_none() || !is_contiguous(tensor)) return false;
    read_again.note_tensor(tensor.ptr());
  }
  return true;
}

}  // namespace

void bind_module_parameters(py::module_& module) {
  module.def("take_parameters", &take_parameters);
  module.def("are_contiguous", &are_contiguous);
}

}  // namespace megalodon

// The parameters of torch modules, taken from the dictionaries that hold them: in Python each would go through a
// function of nn.Module, which for all those of a model takes longer than a short call.

#include "bindings.h"

namespace megalodon {
namespace {

struct Names {
  PyObject* forward_hooks = PyUnicode_InternFromString("_forward_hooks");
  PyObject* forward_pre_hooks = PyUnicode_InternFromString("_forward_pre_hooks");
  PyObject* forward = PyUnicode_InternFromString("forward");
  PyObject* modules = PyUnicode_InternFromString("_modules");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
};

// Borrowed, or null where there is none.
PyObject* find(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}
PyObject* find_dict(PyObject* dict, PyObject* key) {
  PyObject* value = find(dict, key);
  if (!value || !PyDict_Check(value)) throw py::type_error("take_parameters: expected a torch module.");
  return value;
}

// Of a module that may be null or None.
bool take(PyObject* module, const py::tuple& description, py::list& out) {
  static const Names& names = *new Names;
  const py::dict children = description[1];
  const py::tuple own = description[2];
  const bool absent = !module || module == Py_None;
  py::dict inside;
  PyObject *modules = nullptr, *parameters = nullptr;
  if (!absent) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != py::object(description[0]).ptr()) return false;
    inside = py::reinterpret_steal<py::dict>(PyObject_GenericGetDict(module, nullptr));
    if (!inside) throw py::error_already_set();
    for (PyObject* hooks : {names.forward_hooks, names.forward_pre_hooks})
      if (PyDict_GET_SIZE(find_dict(inside.ptr(), hooks)) > 0) return false;
    if (find(inside.ptr(), names.forward)) return false;
    modules = find_dict(inside.ptr(), names.modules);
    parameters = find_dict(inside.ptr(), names.parameters);
  }
  Py_ssize_t known = 0;
  for (const auto [name, child] : children) {
    PyObject* found = absent ? nullptr : find(modules, name.ptr());
    known += found != nullptr;
    if (!take(found, py::reinterpret_borrow<py::tuple>(child), out)) return false;
  }
  if (!absent && known < PyDict_GET_SIZE(modules)) return false;
  for (const py::handle name : own) {
    PyObject* found = absent ? nullptr : find(parameters, name.ptr());
    out.append(found ? py::handle(found) : py::none());
  }
  return true;
}

// Appends to `out` the parameters of a module that is as the description (its class, {child's name: description}, names
// of its own parameters) says: those of its children, then its own, None for each that is absent. False: it is of
// another class, has other children, hooks, or a forward of its own.
bool take_parameters(py::handle module, const py::tuple& description, py::list out) {
  return take(module.ptr(), description, out);
}

}  // namespace

void bind_module_parameters(py::module_& module) { module.def("take_parameters", &take_parameters); }

}  // namespace megalodon

// Registration of a module's functions: each file of bindings adds entries to a list, and the module's entry point
// calls every entry.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace megalodon {

namespace py = pybind11;

// One entry of the list: `define` is called when the module is imported. Constructed at static initialisation.
class Registration {
 public:
  explicit Registration(void (*define)(py::module_&)) : define_(define), next_(last_) { last_ = this; }

  static void define_all(py::module_& module) {
    for (const Registration* entry = last_; entry; entry = entry->next_) entry->define_(module);
  }

 private:
  static inline const Registration* last_ = nullptr;
  void (*define_)(py::module_&);
  const Registration* next_;
};

// Returns "x chunk_size" for the parameters "(py::handle x_, int64_t chunk_size)": names for the docstring from which
// Python learns a function's arguments (target.h). A handle's name ends in _ as its TensorView has the plain name.
inline std::string parameter_names(const std::string& parameters) {
  std::string names;
  for (size_t end = parameters.find_first_of(",)"); end != std::string::npos;
       end = parameters.find_first_of(",)", end + 1)) {
    const size_t begin = parameters.rfind(' ', end) + 1;
    const std::string name = parameters.substr(begin, end - begin);
    names += (names.empty() ? "" : " ") + name.substr(0, name.find_last_not_of('_') + 1);
  }
  return names;
}

}  // namespace megalodon

#include "memory_pool.h"

#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings.h"
#include "dlpack_view.h"

namespace megalodon {
namespace {

// What owns the memory of a tensor that DLPack hands over.
struct PooledTensor {
  DlpackManagedTensor managed;
  MemoryBlock memory;
  std::vector<int64_t> shape;

  static void destroy(DlpackManagedTensor* managed) {
    auto* tensor = static_cast<PooledTensor*>(managed->context);
    give_memory(tensor->memory);
    delete tensor;
  }
};

// A "dltensor" capsule of an uninitialised tensor on the CPU; `code` and `bits` are DLPack's for the dtype.
py::capsule take(std::vector<int64_t> shape, int code, int bits) {
  constexpr int32_t kCpu = 1;
  size_t bytes = static_cast<size_t>(bits) / 8;
  for (const int64_t size : shape)
    if (size < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes)) throw std::bad_alloc();
  auto tensor = std::make_unique<PooledTensor>();
  tensor->shape = std::move(shape);
  tensor->memory = take_memory(bytes);
  tensor->managed.tensor = {tensor->memory.data, kCpu, 0, static_cast<int32_t>(tensor->shape.size()),
                            {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1}, tensor->shape.data(), nullptr, 0};
  tensor->managed.context = tensor.get();
  tensor->managed.deleter = &PooledTensor::destroy;
  return py::capsule(&tensor.release()->managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // a tensor has it
    auto* managed = static_cast<DlpackManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

}  // namespace

void bind_memory_pool(py::module_& module) {
  module.def("take_memory", &take);
  module.def("release_memory", &release_memory);
  module.def("cap_kept_memory", &cap_kept_memory);
}

}  // namespace megalodon

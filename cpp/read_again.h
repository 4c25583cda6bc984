// What the host reads of a model for each token, modules' dictionaries and tensors' sizes, is gone from the caches by
// the next token: all weights came through them in between. So the addresses are kept, and fetched all at once before
// they are read again, instead of waited for one by one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bindings.h"
#include "dlpack_view.h"

namespace megalodon {

class ReadAgain {
 public:
  // Fetches what was noted since the last call, and forgets it. Nothing is read, so it may be gone.
  void fetch() {
    constexpr int kReads = 0, kToSecondLevel = 2;
    for (const uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line), kReads, kToSecondLevel);
    lines_.clear();
  }

  void note(const void* memory, ptrdiff_t from, ptrdiff_t to) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
    for (uintptr_t line = (start + from) / kLine * kLine; line < start + to; line += kLine) lines_.push_back(line);
  }
  // A Python object with a dictionary, to which the words before it point.
  void note_object(const PyObject* object) { note(object, -32, 64); }
  // A small dictionary, with the values of its own where the keys are those of all objects of a class.
  void note_dict(PyObject* object) {
    const auto* dict = reinterpret_cast<const PyDictObject*>(object);
    note(dict, 0, sizeof *dict);
    if (dict->ma_values) note(dict->ma_values, 0, 192);
    else if (dict->ma_used) note(dict->ma_keys, 0, 192);
  }
  // What torch reads of a tensor lies around its sizes. It may be None.
  void note_tensor(const PyObject* object) {
    note(object, 0, 64);
    DlpackTensor tensor;
    if (dlpack_view(const_cast<PyObject*>(object), tensor)) note(tensor.shape, -96, 128);
  }

 private:
  static constexpr uintptr_t kLine = 64;
  std::vector<uintptr_t> lines_;
};

}  // namespace megalodon

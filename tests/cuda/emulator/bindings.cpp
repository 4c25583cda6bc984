// The module _cuda_emulated: the ops over emulated kernels, the emulator's controls, and the kernels of its own tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "bugs.h"
#include "state.h"
#include "target.h"

namespace py = pybind11;
using py::literals::operator""_a;

extern "C" {
extern int gpu_mutant;
}

void megalodon::use_device(int device) { emu::device = device; }

namespace {

// Memory of the emulated device, a writable buffer of bytes to Python. Lives as long as the tensors made from it.
class DeviceBuffer {
 public:
  DeviceBuffer(size_t bytes, const std::string& name, size_t misalignment, bool sparse, size_t item)
      : bytes_(bytes), data_(emu::allocate(bytes, name, misalignment, sparse, item)) {}
  ~DeviceBuffer() { emu::release(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  py::buffer_info buffer() { return {data_, 1, "B", 1, {static_cast<py::ssize_t>(bytes_)}, {1}}; }
  void mark_written(bool read_only) {
    if (read_only) emu::mark_read_only(data_, bytes_);
    else emu::mark_written(data_, bytes_);
  }

 private:
  size_t bytes_;
  char* data_;
};

py::tuple coordinates(uint3 c) { return py::make_tuple(c.x, c.y, c.z); }

py::list reports() {
  py::list list;
  for (const emu::Report& r : emu::last_reports())
    list.append(py::dict("kind"_a = r.kind, "message"_a = r.message, "where"_a = r.where, "other"_a = r.other,
                         "block"_a = coordinates(r.block), "thread"_a = coordinates(r.thread), "count"_a = r.count));
  return list;
}

py::dict traffic() {
  py::dict kernels;
  for (const auto& [key, t] : emu::traffic()) {
    const auto& [kernel, buffer] = key;
    if (!kernels.contains(kernel)) kernels[kernel.c_str()] = py::dict();
    py::dict buffers = kernels[kernel.c_str()];
    buffers[buffer.c_str()] =
        py::dict("load_bytes"_a = t.load_bytes, "load_requests"_a = t.load_requests, "load_sectors"_a = t.load_sectors,
                 "load_footprint"_a = t.load_footprint, "store_bytes"_a = t.store_bytes,
                 "store_requests"_a = t.store_requests, "store_sectors"_a = t.store_sectors,
                 "store_footprint"_a = t.store_footprint);
  }
  return kernels;
}

py::list sites() {
  py::list list;
  for (const emu::SiteTraffic& s : emu::sites())
    list.append(py::dict("kernel"_a = s.kernel, "where"_a = s.where, "store"_a = s.store, "shared"_a = s.shared,
                         "bytes"_a = s.bytes, "requests"_a = s.requests, "transactions"_a = s.transactions,
                         "ideal"_a = s.ideal));
  return list;
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_planted(py::module_ module) {
  using Address = uintptr_t;
  py::list names;
  for (const planted::Plant& plant : planted::plants()) names.append(plant.name);
  module.attr("bugs") = names;
  const auto launch_one_of = [](std::vector<planted::Plant> (*plants)()) {
    return [plants](const std::string& name, bool bug, Address in, Address out) {
      for (const planted::Plant& plant : plants())
        if (plant.name == name) return plant.launch(bug, pointer<const float>(in), pointer<float>(out));
      throw py::key_error(name);
    };
  };
  module.def("run_bug", launch_one_of(&planted::plants));
  module.def("run_overrun", launch_one_of(&planted::overruns));
  py::enum_<planted::Product>(module, "Product")
      .value("bf16", planted::Product::bf16)
      .value("fp16", planted::Product::fp16)
      .value("tf32", planted::Product::tf32);
  module.def("run_mma", [](planted::Product product, Address a, Address b, Address c, Address d) {
    planted::run_mma(product, pointer<uint32_t>(a), pointer<uint32_t>(b), pointer<float>(c), pointer<float>(d));
  });
  module.def("run_ldmatrix", [](int count, bool transposed, Address rows, Address registers) {
    planted::run_ldmatrix(count, transposed, pointer<uint16_t>(rows), pointer<uint32_t>(registers));
  });
  module.def("run_cp_async", [](int bytes, int valid, Address from, Address to) {
    planted::run_cp_async(bytes, valid, pointer<char>(from), pointer<char>(to));
  });
  module.def("run_narrow", [](Address x, Address bf16, Address fp16, Address packed_bf16, Address packed_fp16,
                              Address tf32, int n) {
    planted::run_narrow(pointer<float>(x), pointer<uint16_t>(bf16), pointer<uint16_t>(fp16),
                        pointer<uint32_t>(packed_bf16), pointer<uint32_t>(packed_fp16), pointer<uint32_t>(tf32), n);
  });
  module.def("run_widen", [](Address bits, Address bf16, Address fp16, int n) {
    planted::run_widen(pointer<uint16_t>(bits), pointer<float>(bf16), pointer<float>(fp16), n);
  });
  module.def("run_reduce", [](Address x, Address block_sums, Address warp_sums, Address warp_maxima, int blocks,
                              int threads) {
    planted::run_reduce(pointer<float>(x), pointer<float>(block_sums), pointer<float>(warp_sums),
                        pointer<float>(warp_maxima), blocks, threads);
  });
  module.def("run_philox", [](Address counters, uint64_t seed, Address words, int n) {
    planted::run_philox(pointer<uint32_t>(counters), seed, pointer<uint32_t>(words), n);
  });
  py::enum_<planted::Fragment>(module, "Fragment")
      .value("a", planted::Fragment::a)
      .value("a_trans", planted::Fragment::a_trans)
      .value("b", planted::Fragment::b)
      .value("b_trans", planted::Fragment::b_trans);
  module.def("run_tile_load", [](bool whole, Address from, Address to, int rows, int width, int valid, int missing) {
    planted::run_tile_load(whole, pointer<uint16_t>(from), pointer<uint16_t>(to), rows, width, valid, missing);
  });
  module.def("run_tile_fragment", [](planted::Fragment kind, Address tile, int row, int column, Address registers) {
    planted::run_tile_fragment(kind, pointer<uint16_t>(tile), row, column, pointer<uint32_t>(registers));
  });
  module.def("run_tile_store", [](Address d, int row, int column, Address tile, Address a) {
    planted::run_tile_store(pointer<float>(d), row, column, pointer<uint16_t>(tile), pointer<uint32_t>(a));
  });
  module.def("run_strided_copy", [](Address in, Address out, int stride, int width) {
    planted::run_strided_copy(pointer<float>(in), pointer<float>(out), stride, width);
  });
  module.def("run_shared_columns", [](Address in, Address out, int pitch) {
    planted::run_shared_columns(pointer<float>(in), pointer<float>(out), pitch);
  });
  module.def("run_bounded", [](Address out, int threads, bool as_template) {
    planted::run_bounded(pointer<float>(out), threads, as_template);
  });
}

}  // namespace

PYBIND11_MODULE(_cuda_emulated, module) {
  py::register_exception<emu::Error>(module, "EmulationError", PyExc_RuntimeError);
  py::class_<DeviceBuffer>(module, "DeviceBuffer", py::buffer_protocol())
      .def(py::init<size_t, const std::string&, size_t, bool, size_t>(), py::arg("bytes"), py::arg("name"),
           py::arg("misalignment"), py::arg("sparse") = false, py::arg("item") = 1)
      .def_buffer(&DeviceBuffer::buffer)
      .def("mark_written", &DeviceBuffer::mark_written, py::arg("read_only"));
  py::enum_<emu::Order>(module, "Order")
      .value("forward", emu::Order::forward)
      .value("reverse", emu::Order::reverse)
      .value("random", emu::Order::random);
  module.def("set_options", [](emu::Order order, uint64_t seed, size_t shared_limit) {
    emu::options = {order, seed, shared_limit};
  });
  module.def("set_bounds", [](bool only, size_t red_zone, unsigned ends, unsigned middle) {
    emu::bounds = {only, red_zone, ends, middle};
  }, py::arg("only"), py::arg("red_zone") = 256, py::arg("ends") = 0, py::arg("middle") = 0);
  // Returns the names of the sizes set before that no launcher has asked for.
  module.def("set_launch_sizes", [](const std::map<std::string, int64_t>& sizes) {
    std::vector<std::string> unused;
    for (const auto& [name, size] : emu::launch_sizes)
      if (!size.asked) unused.push_back(name);
    emu::launch_sizes.clear();
    for (const auto& [name, value] : sizes) emu::launch_sizes[name] = {value};
    return unused;
  });
  module.def("take_streams", [] { return std::exchange(emu::used_streams, {}); });
  module.def("launched", [] { return emu::launched; });
  module.def("set_mutant", [](int number) { gpu_mutant = number; });
  // Returns the numbers of the mutants that would have changed a value since the last call.
  module.def("mutants_that_matter", [] {
    std::vector<int> numbers;
    for (size_t i = 0; i < emu::mattered.size(); ++i)
      if (emu::mattered[i]) numbers.push_back(static_cast<int>(i));
    std::fill(emu::mattered.begin(), emu::mattered.end(), 0);
    return numbers;
  });
  module.def("reached", [] {  // fields of emu::Reached
    py::list list;
    for (const emu::Reached& r : emu::reached()) list.append(py::make_tuple(r.kernel, r.what, r.turns, r.most));
    return list;
  });
  module.def("magnitudes", [] {  // fields of emu::Magnitude
    py::list list;
    for (const emu::Magnitude& m : emu::magnitudes()) list.append(py::make_tuple(m.kernel, m.where, m.buffers, m.most));
    return list;
  });
  module.def("set_recording", [](bool on) { emu::recording = on; });
  module.def("reports", &reports);
  module.def("traffic", &traffic);
  module.def("sites", &sites);
  module.def("reset_counters", &emu::reset_counters);
  bind_planted(module.def_submodule("planted"));
  megalodon::Registration::define_all(module);
}

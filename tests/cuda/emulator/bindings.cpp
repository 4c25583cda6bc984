// The module _cuda_emulated: the ops over emulated kernels, the emulator's controls, and the kernels of its own tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "bugs.h"
#include "state.h"
#include "target.h"

namespace py = pybind11;

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
  size_t unwritten() const { return emu::count_unwritten(data_, bytes_); }

 private:
  size_t bytes_;
  char* data_;
};

py::tuple coordinates(uint3 c) { return py::make_tuple(c.x, c.y, c.z); }

py::list reports() {
  py::list list;
  for (const emu::Report& r : emu::last_reports()) {
    py::dict d;
    d["kind"] = r.kind;
    d["message"] = r.message;
    d["where"] = r.where;
    d["other"] = r.other;
    d["block"] = coordinates(r.block);
    d["thread"] = coordinates(r.thread);
    d["count"] = r.count;
    list.append(d);
  }
  return list;
}

py::dict traffic() {
  py::dict kernels;
  for (const auto& [kernel, buffer, t] : emu::traffic()) {
    if (!kernels.contains(kernel)) kernels[kernel.c_str()] = py::dict();
    py::dict d;
    d["load_bytes"] = t.load_bytes;
    d["load_requests"] = t.load_requests;
    d["load_sectors"] = t.load_sectors;
    d["load_footprint"] = t.load_footprint;
    d["store_bytes"] = t.store_bytes;
    d["store_requests"] = t.store_requests;
    d["store_sectors"] = t.store_sectors;
    d["store_footprint"] = t.store_footprint;
    py::dict buffers = kernels[kernel.c_str()];
    buffers[buffer.c_str()] = d;
  }
  return kernels;
}

py::list sites() {
  py::list list;
  for (const emu::SiteTraffic& s : emu::sites()) {
    py::dict d;
    d["kernel"] = s.kernel;
    d["where"] = s.where;
    d["store"] = s.store;
    d["shared"] = s.shared;
    d["bytes"] = s.bytes;
    d["requests"] = s.requests;
    d["transactions"] = s.transactions;
    d["ideal"] = s.ideal;
    list.append(d);
  }
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
  module.def("run_bug", [](const std::string& name, bool bug, Address in, Address out) {
    for (const planted::Plant& plant : planted::plants())
      if (plant.name == name) return plant.launch(bug, pointer<const float>(in), pointer<float>(out));
    throw py::key_error(name);
  });
  module.def("run_overrun", [](const std::string& name, bool bug, Address in, Address out) {
    for (const planted::Plant& plant : planted::overruns())
      if (plant.name == name) return plant.launch(bug, pointer<const float>(in), pointer<float>(out));
    throw py::key_error(name);
  });
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
  module.def("run_narrow", [](Address x, Address b, Address h, Address bb, Address hh, Address t, int n) {
    planted::run_narrow(pointer<float>(x), pointer<uint16_t>(b), pointer<uint16_t>(h), pointer<uint32_t>(bb),
                        pointer<uint32_t>(hh), pointer<uint32_t>(t), n);
  });
  module.def("run_widen", [](Address bits, Address b, Address h, int n) {
    planted::run_widen(pointer<uint16_t>(bits), pointer<float>(b), pointer<float>(h), n);
  });
  module.def("run_reduce", [](Address x, Address b, Address w, Address m, int blocks, int threads) {
    planted::run_reduce(pointer<float>(x), pointer<float>(b), pointer<float>(w), pointer<float>(m), blocks, threads);
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
      .def("mark_written", &DeviceBuffer::mark_written, py::arg("read_only"))
      .def("unwritten", &DeviceBuffer::unwritten);
  py::enum_<emu::Order>(module, "Order")
      .value("forward", emu::Order::forward)
      .value("reverse", emu::Order::reverse)
      .value("random", emu::Order::random);
  module.def("set_options", [](emu::Order order, uint64_t seed, size_t shared_limit) {
    emu::options = {order, seed, shared_limit};
  });
  module.def("set_bounds", [](bool only, size_t red_zone, unsigned ends, unsigned middle) {
    emu::bounds = {only, red_zone, ends, middle};
  });
  module.def("set_launch_sizes", [](const std::map<std::string, int64_t>& sizes) {  // which of the last were not used
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
  module.def("mutants_that_matter", [] {  // since the last call: which others would have changed something
    std::vector<int> numbers;
    for (size_t i = 0; i < emu::mattered.size(); ++i)
      if (emu::mattered[i]) numbers.push_back(static_cast<int>(i));
    std::fill(emu::mattered.begin(), emu::mattered.end(), 0);
    return numbers;
  });
  module.def("reached", [] {  // (offset of the kernel, what, turns, the most)
    py::list list;
    for (const emu::Reached& r : emu::reached()) list.append(py::make_tuple(r.kernel, r.what, r.turns, r.most));
    return list;
  });
  module.def("magnitudes", [] {  // (offset of the kernel, lines of the source, buffers, most)
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

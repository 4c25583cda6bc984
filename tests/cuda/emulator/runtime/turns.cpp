// Iterations of each loop of the kernel files; numbers of blocks and warps of each kernel's launches.
#include <dlfcn.h>

#include <map>

#include "state.h"

namespace emu {
namespace {

Loop* turned = nullptr;  // loops with iterations that are not in `all` yet
std::map<std::pair<const void*, std::string>, Reached> all;

constexpr unsigned kNotAll = 16;  // fewer warps than the launch bound

unsigned bit_of(int64_t turns) { return 1u << std::min<int64_t>(turns, 3); }

void record(const void* kernel, const std::string& what, unsigned turns, int64_t most) {
  if (bounds.only) return;  // results are not checked
  Reached& entry = all[{kernel, what}];
  entry.turns |= turns;
  entry.most = std::max(entry.most, most);
}

void record_loops(const void* kernel) {
  for (; turned; turned = turned->next) {
    record(kernel, std::string(turned->file) + " " + std::to_string(turned->nth), turned->turns, turned->most);
    turned->turns = 0;
    turned->most = 0;
  }
}

}  // namespace

void finish_loop(Loop& loop, int64_t turns) noexcept {
  if (!loop.turns) {
    loop.next = turned;
    turned = &loop;
  }
  loop.turns |= bit_of(turns);
  loop.most = std::max(loop.most, turns);
}

void start_turns() { record_loops(nullptr); }

void finish_turns() {
  record_loops(launch_.code);
  const auto size = [](const char* of, unsigned units) { record(launch_.code, of, bit_of(units), units); };
  size("grid.x", launch_.grid.x);
  size("grid.y", launch_.grid.y);
  size("grid.z", launch_.grid.z);
  size("warps", launch_.threads / kWarpSize);
  if (launch_.threads < launch_bound(launch_.code)) record(launch_.code, "warps", kNotAll, 0);
}

bool recording = false;

size_t offset_in_module(const void* kernel) {
  Dl_info module{};
  dladdr(kernel, &module);
  return static_cast<const char*>(kernel) - static_cast<const char*>(module.dli_fbase);
}

std::vector<Reached> reached() {
  record_loops(nullptr);
  std::vector<Reached> list;
  for (const auto& [key, entry] : all) {
    const size_t kernel = key.first ? offset_in_module(key.first) : 0;
    list.push_back({kernel, key.second, entry.turns, entry.most});
  }
  return list;
}

}  // namespace emu

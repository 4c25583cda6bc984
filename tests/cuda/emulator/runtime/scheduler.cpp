// Runs a grid block by block, and the threads of a block as fibers: one at a time, until it waits or returns.
#include <sys/mman.h>
#include <unistd.h>

#include "state.h"

namespace emu {

Options options;
Bounds bounds;
std::map<std::string, LaunchSize> launch_sizes;
Launch launch_;
int device = 0;
std::set<std::pair<int, uintptr_t>> used_streams;
std::map<std::string, int> launched;
uint3 block_;
uint32_t block_number = 0;
std::vector<Thread> threads;
Thread* current = nullptr;

namespace {

Fiber scheduler;
char* stacks = nullptr;
std::vector<int> ready;  // indices of the threads that can run
bool failed = false;
uint64_t random_state;

uint64_t next_random() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1dull >> 32;
}

void allocate_stacks() {
  if (stacks) return;
  stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) throw Error("out of memory for the stacks of the emulated threads");
  // A stack that overflows must not run into the next one.
  for (int i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * kStackBytes, getpagesize(), PROT_NONE);
}

void run_thread() {
  launch_.call(launch_.arguments);
  Thread& self = *current;
  for (const auto& group : self.copy_groups)
    for (const AsyncCopy& copy : group)
      report("copy never waited for", "the thread returned without cp_async_wait", copy.address);
  for (const AsyncCopy& copy : self.open_copies)
    report("copy never committed", "the thread returned without cp_async_commit and cp_async_wait", copy.address);
  self.finished = true;
  self.fiber.switch_to(scheduler);
}

void start_block() {
  start_shared_memory();
  reset_synchronisation();
  ready.clear();
  for (int i = 0; i < launch_.threads; ++i) {
    Thread& t = threads[i];
    const unsigned index = i;
    t.index = i;
    t.lane = i % kWarpSize;
    t.warp = i / kWarpSize;
    t.coordinates = {index % launch_.block.x, index / launch_.block.x % launch_.block.y,
                     index / (launch_.block.x * launch_.block.y)};
    t.finished = false;
    t.waits_for = nullptr;
    t.open_copies.clear();
    t.copy_groups.clear();
    t.fiber.prepare(stack_of(t), kStackBytes, run_thread);
    ready.push_back(i);
  }
  start_clocks();
}

int take_ready() {
  size_t at = 0;
  if (options.order == Order::random) at = next_random() % ready.size();
  // In order "forward" the least index, in order "reverse" the largest.
  for (size_t i = 1; options.order != Order::random && i < ready.size(); ++i)
    if ((options.order == Order::forward) == (ready[i] < ready[at])) at = i;
  const int thread = ready[at];
  ready[at] = ready.back();
  ready.pop_back();
  return thread;
}

void run_block() {
  start_block();
  while (!ready.empty() && !failed) {
    current = &threads[take_ready()];
    scheduler.switch_to(current->fiber);
    current = nullptr;
  }
  if (!failed) failed = report_waiting();
  finish_block_counts();
  finish_shared_memory();
}

void check_configuration() {
  const dim3 grid = launch_.grid, block = launch_.block;
  const uint64_t size = uint64_t{block.x} * block.y * block.z;
  const auto refuse = [](const std::string& what) { throw Error("invalid launch of " + launch_.kernel + ": " + what); };
  if (size == 0 || size > kMaxThreads || block.z > 64) refuse("a block of " + std::to_string(size) + " threads");
  if (size > static_cast<uint64_t>(launch_bound(launch_.code)))
    refuse("a block of " + std::to_string(size) + " threads, beyond its __launch_bounds__");
  if (size % kWarpSize) refuse("a block of " + std::to_string(size) + " threads is not whole warps");
  if (!grid.x || !grid.y || !grid.z) refuse("an empty grid");
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) refuse("a grid beyond (2^31 - 1, 65535, 65535)");
  if (launch_.dynamic_shared > options.shared_limit)
    refuse(std::to_string(launch_.dynamic_shared) + " bytes of shared memory");
}

// Returns true if block x of a row of `blocks` runs: it is near an end or near the middle, as in Bounds.
bool runs(unsigned x, unsigned blocks) {
  const unsigned from_middle = x < bounds.middle ? bounds.middle - x : x - bounds.middle + 1;
  return x < bounds.ends || blocks - x <= bounds.ends || from_middle <= bounds.ends;
}

// "(norm_kernel<T, 4>)" -> "norm_kernel"
std::string base_name(std::string name) {
  name = name.substr(name.find_first_not_of("( "));
  return name.substr(0, name.find_first_of("<) "));
}

}  // namespace

char* stack_of(const Thread& thread) { return stacks + thread.index * kStackBytes; }

void wait(const char* what, Place place) {
  current->waits_for = what;
  current->waits_at = place;
  current->fiber.switch_to(scheduler);
}

void wake(Thread& thread) {
  thread.waits_for = nullptr;
  ready.push_back(thread.index);
}

void end_launch() {
  failed = true;
  current->fiber.switch_to(scheduler);
  __builtin_unreachable();
}

void fail(const char* what, Place place) {
  report("invalid operation", what, place.address);
  end_launch();
}

uint3 thread_index() { return current->coordinates; }
uint3 block_index() { return block_; }
uint3 block_size() { return {launch_.block.x, launch_.block.y, launch_.block.z}; }
uint3 grid_size() { return {launch_.grid.x, launch_.grid.y, launch_.grid.z}; }
int lane() { return current->lane; }
size_t max_shared_bytes() { return options.shared_limit; }

int64_t launch_size(const char* name, int64_t chosen) {
  const auto set = launch_sizes.find(name);
  if (set == launch_sizes.end()) return chosen;
  set->second.asked = true;
  return set->second.value;
}

int launch_bound(const void* kernel) {
  const auto* code = static_cast<const unsigned char*>(kernel);
#if defined(__x86_64__)
  const unsigned char nop[] = {0x90}, landing_pad[] = {0xf3, 0x0f, 0x1e, 0xfa};  // endbr64, where CET is on
#else
  const unsigned char nop[] = {0x1f, 0x20, 0x03, 0xd5}, landing_pad[] = {0x5f, 0x24, 0x03, 0xd5};  // bti c
#endif
  if (std::memcmp(code, landing_pad, sizeof landing_pad) == 0) code += sizeof landing_pad;
  int warps = 0;
  while (std::memcmp(code + warps * sizeof nop, nop, sizeof nop) == 0) ++warps;
  return warps ? warps * kWarpSize : kMaxThreads;
}

void record_stream(void* stream) { used_streams.emplace(device, reinterpret_cast<uintptr_t>(stream)); }

void run(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared, void (*call)(const void*),
         const void* arguments) {
  initialise_memory();
  allocate_stacks();
  const uint32_t number = launch_.number + 1;
  launch_ = {base_name(name), kernel, grid, block, shared, call, arguments, number, block_number + 1,
             static_cast<int>(block.x * block.y * block.z)};
  check_configuration();
  ++launched[launch_.kernel];
  threads.resize(launch_.threads);
  random_state = options.seed * 0x9e3779b97f4a7c15ull | 1;
  failed = false;
  start_turns();
  for (block_.z = 0; block_.z < grid.z; ++block_.z)
    for (block_.y = 0; block_.y < grid.y; ++block_.y)
      for (block_.x = 0; block_.x < grid.x && !failed; ++block_.x) {
        if (bounds.ends && !runs(block_.x, grid.x)) continue;
        ++block_number;
        run_block();
      }
  finish_launch_counts();
  finish_turns();
  throw_reports();
}

}  // namespace emu

// The running launch, block and thread, and the functions that parts of the runtime call.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "builtins.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include "fiber.h"

namespace emu {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;

struct AsyncCopy {
  char* to;
  const char* from;
  int size, valid;
  const void* address;  // of the instruction
};

using Clocks = std::vector<uint32_t>;

struct Thread {
  Fiber fiber;
  int index, lane, warp;
  uint3 coordinates;
  bool finished;
  const char* waits_for;  // null: ready
  Place waits_at;

  // Vector clock (races.cpp). `clock` is the number of this thread's present interval between synchronisations. `seen`
  // and `seen_lanes` are the last intervals that it has seen of threads in other warps and of lanes in its own warp.
  uint32_t clock;
  std::shared_ptr<const Clocks> seen;
  uint32_t seen_lanes[kWarpSize];

  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> copy_groups;
};

enum class Order { forward, reverse, random };

struct Options {
  Order order = Order::random;
  uint64_t seed = 1;
  size_t shared_limit = 99 * 1024;  // of the smallest architecture that the kernels are built for
};

// For tests of inconsistent inputs. `only`: ignore races and reads of unwritten memory. `red_zone`: bytes between
// buffers. `ends`: if not 0, only the first and the last `ends` blocks of each row of a grid run, and those on both
// sides of block `middle`.
struct Bounds {
  bool only = false;
  size_t red_zone = 256;
  unsigned ends = 0, middle = 0;
};

// A size that a test has set (LAUNCH_SIZE of portable.cuh). `asked` becomes true when a launcher uses it.
struct LaunchSize {
  int64_t value;
  bool asked = false;
};
extern std::map<std::string, LaunchSize> launch_sizes;

struct Launch {
  std::string kernel;
  const void* code;
  dim3 grid, block;
  size_t dynamic_shared;
  void (*call)(const void*);
  const void* arguments;
  uint32_t number;
  uint32_t first_block;  // global number
  int threads;           // of a block
};

extern Options options;
extern Bounds bounds;
extern Launch launch_;
extern int device;                                       // the current one
extern std::set<std::pair<int, uintptr_t>> used_streams;  // of launches, with their devices
extern std::map<std::string, int> launched;               // launches by kernel, since counters were reset
extern uint3 block_;             // coordinates
extern uint32_t block_number;    // counts all blocks ever run, from 1
extern std::vector<Thread> threads;
extern Thread* current;          // null: host code is running

// scheduler.cpp
void wait(const char* what, Place place);  // runs other threads until one of them wakes this one
void wake(Thread& thread);
[[noreturn]] void end_launch();            // after a report; the running thread is abandoned
char* stack_of(const Thread& thread);
constexpr size_t kStackBytes = 256 * 1024;

// synchronise.cpp
void reset_synchronisation();
bool report_waiting();  // reports threads that wait while none can run; returns true if there are any

// races.cpp
enum class Access { read, write };
void start_clocks();
void join_clocks(const std::vector<Thread*>& participants, bool one_warp);
void check_race(size_t offset, size_t size, Access access, const void* address);

// memory.cpp
constexpr size_t kArenaBytes = size_t{1} << 30;
// Sparse buffers follow the arena: gigabytes of zeros that take no memory until they are written. Only the bounds of
// accesses to them are checked.
constexpr size_t kSparseBytes = size_t{4} << 40;
constexpr size_t kSharedWindow = size_t{1} << 20;  // the arena begins with the block's shared memory; buffers follow
extern char* arena;
inline bool is_shared(size_t offset) { return offset < kSharedWindow; }
inline bool is_sparse(size_t offset) { return offset >= kArenaBytes; }
void initialise_memory();
void start_shared_memory();
void finish_shared_memory();
void access(const void* p, size_t size, Access access, const void* address);
void set_in_flight(size_t offset, size_t size, bool in_flight);
std::string describe(size_t offset);
struct Buffer {
  size_t offset, size;
  std::string name;
  size_t item;  // bytes of an element
};
// The buffer begins `misalignment` bytes past a multiple of 256.
char* allocate(size_t bytes, const std::string& name, size_t misalignment, bool sparse, size_t item);
void release(char* p);
void mark_written(char* p, size_t bytes);
void mark_read_only(char* p, size_t bytes);
const Buffer* find_buffer(size_t offset);
std::vector<const Buffer*> live_buffers();

// counters.cpp
void count(size_t offset, size_t size, Access access, const void* address);
void finish_block_counts();
void finish_launch_counts();
void reset_counters();
void note_element(const void* address, size_t element);  // of a sparse buffer
struct Traffic {  // of one buffer in one kernel
  uint64_t load_bytes = 0, load_requests = 0, load_sectors = 0, load_footprint = 0;
  uint64_t store_bytes = 0, store_requests = 0, store_sectors = 0, store_footprint = 0;
};
struct SiteTraffic {  // of one instruction; wavefronts in shared memory, sectors in global memory
  std::string kernel, where;
  bool store, shared;
  uint64_t bytes, requests, transactions, ideal;
};
using TrafficByKernelAndBuffer = std::map<std::pair<std::string, std::string>, Traffic>;
const TrafficByKernelAndBuffer& traffic();
std::vector<SiteTraffic> sites();

// reports.cpp
struct Report {
  std::string kind, message, where, other;
  uint3 block, thread;
  uint64_t count;
};
void report(const char* kind, const std::string& message, const void* address, const void* other = nullptr);
// Source lines of the instructions before these addresses, innermost first: "reduce.cuh:21 < norm_fwd.cu:40".
std::vector<std::string> source_lines(const std::vector<const void*>& addresses);
std::string source_line(Place place);
void throw_reports();  // if there are any
std::vector<Report> last_reports();

// turns.cpp
void start_turns();   // iterations until now are the launcher's
void finish_turns();  // iterations since then are the kernel's
struct Reached {
  size_t kernel;     // offset of its code in the module; 0: a launcher
  std::string what;  // a loop, "file number", or a dimension of the launch
  unsigned turns;    // as in Loop
  int64_t most;
};
std::vector<Reached> reached();
size_t offset_in_module(const void* kernel);
extern bool recording;  // true: magnitudes are recorded

// counters.cpp
struct Magnitude {  // of an instruction that accesses global memory
  size_t kernel;        // as in Reached
  std::string where;    // as in source_lines
  std::string buffers;  // names, except of sparse buffers
  uint64_t most;        // index of an element in a sparse buffer
};
std::vector<Magnitude> magnitudes();

// mutants.cpp
extern std::vector<unsigned char> mattered;  // by mutant

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace emu

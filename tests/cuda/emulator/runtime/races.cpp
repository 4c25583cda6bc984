// Finds races: pairs of accesses, one of them a write, that no barrier orders. Vector clocks, as in FastTrack (Flanagan
// and Freund, 2009).
//
// - Each thread numbers its intervals between synchronisations. After a barrier, its participants have seen all that any
//   of them had seen. Blocks of one launch see nothing of each other; launches are ordered.
// - An access is ordered after an earlier one if its thread has seen the earlier one's interval.
// - A cell, two bytes of memory, keeps the interval of its last write and of the reads since then: one reader, or a clock
//   for each thread of the block.
// - The first of a word's two cells stands for both, until an access to one half, and again after a write of the word.
#include <sys/mman.h>

#include "state.h"

namespace emu {
namespace {

constexpr size_t kCellBytes = 2;
constexpr uint16_t kMany = 0xffff;

struct Event {
  uint32_t block;   // number; 0: no event
  uint32_t clock;   // for many readers: index in `readers`
  uint16_t thread;  // or kMany
  uint16_t site;
};
struct Cell {
  Event write, read;
  uint32_t other_block_launch;  // launch in which an earlier block than the last reader's read this cell
  uint16_t other_block_site;
};

Cell* cells = nullptr;
bool* halved = nullptr;  // by word: true if each half has its own cell
bool raced;  // true once the current access has been reported
struct Readers {
  Clocks clocks;  // of this block's threads; 0: has not read
  int unseen;     // a reader whose read the last reader had not seen
};
std::vector<Readers> readers;
std::vector<uint32_t> free_readers;

uint32_t take_readers() {
  if (free_readers.empty()) {
    readers.emplace_back();
    return static_cast<uint32_t>(readers.size() - 1);
  }
  const uint32_t index = free_readers.back();
  free_readers.pop_back();
  return index;
}

std::vector<const void*> site_addresses{nullptr};
constexpr size_t kSiteTable = 1 << 16;
std::vector<uint16_t> site_table(kSiteTable, 0);

uint16_t site_of(const void* address) {
  size_t slot = (reinterpret_cast<uintptr_t>(address) * 0x9e3779b97f4a7c15ull) >> 48;
  while (site_table[slot] && site_addresses[site_table[slot]] != address) slot = (slot + 1) % kSiteTable;
  if (!site_table[slot]) {
    if (site_addresses.size() == kSiteTable / 2) throw Error("too many instructions that access memory");
    site_table[slot] = static_cast<uint16_t>(site_addresses.size());
    site_addresses.push_back(address);
  }
  return site_table[slot];
}

bool seen(int thread, uint32_t clock) {
  const Thread& self = *current;
  if (thread == self.index) return true;
  if (thread / kWarpSize == self.warp) return clock <= self.seen_lanes[thread % kWarpSize];
  return clock <= (*self.seen)[thread];
}

// Returns true if `event`, which is not of many readers, is ordered before the current access.
bool ordered(const Event& event, bool shared) {
  if (event.block == block_number) return seen(event.thread, event.clock);
  return shared || event.block < launch_.first_block;
}

bool foreign(const Event& event) { return event.block != block_number && event.block >= launch_.first_block; }

void halve(size_t word) {
  if (std::exchange(halved[word], true)) return;
  Cell& second = cells[2 * word + 1] = cells[2 * word];
  if (second.read.block != block_number || second.read.thread != kMany) return;
  const uint32_t index = take_readers();
  readers[index] = readers[second.read.clock];
  second.read.clock = index;
}

void report_race(const char* what, size_t offset, int other_thread, bool other_block, uint16_t other_site,
                 const void* address) {
  if (std::exchange(raced, true)) return;
  const std::string who = other_block ? "a thread of another block"
                                      : (other_thread < 0 ? std::string("other threads")
                                                          : "thread " + std::to_string(other_thread));
  report("race", std::string(what) + " " + describe(offset) + ", unordered with that of " + who, address,
         site_addresses[other_site]);
}

void record_read(Cell& cell, const Event& now, bool shared) {
  Event& read = cell.read;
  if (read.block != block_number) {
    if (!shared && foreign(read)) {
      cell.other_block_launch = launch_.number;
      cell.other_block_site = read.site;
    }
    read = now;
    return;
  }
  if (read.thread != kMany) {
    if (seen(read.thread, read.clock)) {
      read = now;
      return;
    }
    const uint32_t index = take_readers();
    readers[index].clocks.assign(launch_.threads, 0);
    readers[index].clocks[read.thread] = read.clock;
    readers[index].unseen = read.thread;
    read = {block_number, index, kMany, read.site};
  }
  auto& [clocks, unseen] = readers[read.clock];
  if (clocks[now.thread] == now.clock) return;
  clocks[now.thread] = now.clock;
  // The first reader after a barrier replaces all earlier readers. Most readers have not seen `unseen` either, which
  // avoids a search of the other threads.
  if (!seen(unseen, clocks[unseen])) return;
  for (int t = 0; t < launch_.threads; ++t)
    if (clocks[t] && !seen(t, clocks[t])) {
      unseen = t;
      return;
    }
  free_readers.push_back(read.clock);
  read = now;
}

void check_reads_before_write(Cell& cell, size_t offset, bool shared, const void* address) {
  const Event& read = cell.read;
  if (read.block == block_number && read.thread == kMany) {
    const Clocks& clocks = readers[read.clock].clocks;
    for (int t = 0; t < launch_.threads; ++t)
      if (clocks[t] && !seen(t, clocks[t])) {
        report_race("write after read of", offset, t, false, read.site, address);
        break;
      }
    free_readers.push_back(read.clock);
  } else if (read.block && !ordered(read, shared)) {
    const bool many = read.thread == kMany;
    report_race("write after read of", offset, many ? -1 : read.thread, foreign(read), read.site, address);
  } else if (!shared && cell.other_block_launch == launch_.number) {
    report_race("write after read of", offset, -1, true, cell.other_block_site, address);
  }
}

}  // namespace

void start_clocks() {
  if (!cells) {
    constexpr size_t kCells = kArenaBytes / kCellBytes;
    void* mapped = mmap(nullptr, kCells * sizeof(Cell) + kCells / 2, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw Error("out of memory for the shadow of the emulated memory");
    cells = static_cast<Cell*>(mapped);
    halved = reinterpret_cast<bool*>(cells + kCells);
  }
  readers.clear();
  free_readers.clear();
  const auto nothing = std::make_shared<const Clocks>(launch_.threads, 0);
  for (Thread& thread : threads) {
    thread.clock = 1;
    thread.seen = nothing;
    std::fill_n(thread.seen_lanes, kWarpSize, 0);
  }
}

void join_clocks(const std::vector<Thread*>& participants, bool one_warp) {
  std::shared_ptr<const Clocks> joined = participants[0]->seen;
  bool same = one_warp;
  for (const Thread* thread : participants) same &= thread->seen == joined;
  if (!same) {
    auto merged = std::make_shared<Clocks>(*joined);
    const Clocks* last = joined.get();
    for (const Thread* thread : participants) {
      if (thread->seen.get() != last)
        for (int t = 0; t < launch_.threads; ++t) (*merged)[t] = std::max((*merged)[t], (*thread->seen)[t]);
      last = thread->seen.get();
      uint32_t* lanes = merged->data() + thread->warp * kWarpSize;
      for (int l = 0; l < kWarpSize; ++l) lanes[l] = std::max(lanes[l], thread->seen_lanes[l]);
      lanes[thread->lane] = std::max(lanes[thread->lane], thread->clock);
    }
    joined = merged;
  }
  uint32_t lanes[kWarpSize] = {};
  if (one_warp)
    for (const Thread* thread : participants) {
      for (int l = 0; l < kWarpSize; ++l) lanes[l] = std::max(lanes[l], thread->seen_lanes[l]);
      lanes[thread->lane] = std::max(lanes[thread->lane], thread->clock);
    }
  for (Thread* thread : participants) {
    thread->seen = joined;
    std::copy_n(one_warp ? lanes : joined->data() + thread->warp * kWarpSize, kWarpSize, thread->seen_lanes);
    ++thread->clock;
  }
}

void check_race(size_t offset, size_t size, Access access, const void* address) {
  const bool shared = is_shared(offset);
  const Event now{block_number, current->clock, static_cast<uint16_t>(current->index), site_of(address)};
  const auto same_interval = [&](const Event& event) {
    return event.block == now.block && event.clock == now.clock && event.thread == now.thread;
  };
  const size_t first = offset / kCellBytes, last = (offset + size - 1) / kCellBytes;
  raced = false;
  if (first % 2) halve(first / 2);
  if (last % 2 == 0) halve(last / 2);
  for (size_t i = first, next; i <= last; i = next) {
    next = i + (halved[i / 2] ? 1 : 2);
    Cell& cell = cells[i];
    if (access == Access::read) {
      if (same_interval(cell.read)) continue;
      if (cell.write.block && !ordered(cell.write, shared))
        report_race("read after write of", offset, cell.write.thread, foreign(cell.write), cell.write.site, address);
      record_read(cell, now, shared);
    } else {
      if (same_interval(cell.write) && !cell.read.block) continue;
      if (cell.write.block && !ordered(cell.write, shared))
        report_race("write after write of", offset, cell.write.thread, foreign(cell.write), cell.write.site, address);
      check_reads_before_write(cell, offset, shared, address);
      cell = {now, {}, 0, 0};
      if (i % 2 && i > first) halved[i / 2] = false;  // both halves have been written
    }
  }
}

}  // namespace emu

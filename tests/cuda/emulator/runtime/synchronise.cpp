// Barriers of blocks and warps, exchange of values between lanes, deadlocks.
#include <map>
#include <utility>

#include "state.h"

namespace emu {
namespace {

struct Barrier {
  std::vector<Thread*> arrived;
  Place first;
  bool vote = false;    // of the threads that have arrived
  bool result = false;  // of the last barrier
};
std::map<int, Barrier> barriers;  // by number; 0 is __syncthreads

// Lanes of a warp that meet under one mask. Two sets of values alternate: lanes read one while the next meeting fills
// the other, and no lane can be two meetings ahead.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  const char* what = nullptr;
  Place first{};
  int turn = 0;
  alignas(16) unsigned char values[2][kWarpSize * kSlotBytes];
};
std::vector<std::deque<Meeting>> meetings;  // by warp

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same_line(Place a, Place b) { return a.line == b.line && same_text(a.file, b.file); }

Meeting& meeting_of(unsigned mask) {
  auto& of_warp = meetings[current->warp];
  for (Meeting& meeting : of_warp)
    if (meeting.mask == mask) return meeting;
  of_warp.emplace_back().mask = mask;
  return of_warp.back();
}

unsigned char* meet(unsigned mask, const void* value, size_t size, const char* what, Place place) {
  if (!(mask >> current->lane & 1)) fail("a lane calls a warp operation whose mask leaves it out", place);
  Meeting& meeting = meeting_of(mask);
  if (!meeting.arrived) {
    meeting.what = what;
    meeting.first = place;
  } else if (!same_text(meeting.what, what) || (place.file && !same_line(meeting.first, place))) {
    static std::string text;
    text = std::string("lanes of a warp meet in different operations: ") + what + " and " + meeting.what + " at " +
           source_line(meeting.first);
    fail(text.c_str(), place);
  }
  unsigned char* values = meeting.values[meeting.turn];
  if (size) std::memcpy(values + current->lane * kSlotBytes, value, size);
  meeting.arrived |= 1u << current->lane;
  if (meeting.arrived != mask) {
    wait(what, place);
    return values;
  }
  Thread* const lanes = &threads[current->warp * kWarpSize];
  if (!value) {
    std::vector<Thread*> participants;
    for (int l = 0; l < kWarpSize; ++l)
      if (mask >> l & 1) participants.push_back(&lanes[l]);
    join_clocks(participants, true);
  }
  meeting.arrived = 0;
  meeting.turn ^= 1;
  for (int l = 0; l < kWarpSize; ++l)
    if ((mask >> l & 1) && &lanes[l] != current) wake(lanes[l]);
  return values;
}

void arrive(int id, size_t expected, const char* what, Place place) {
  Barrier& barrier = barriers[id];
  if (barrier.arrived.empty()) barrier.first = place;
  else if (id == 0 && !same_line(barrier.first, place))
    report("divergent barrier", "one __syncthreads meets another at " + source_line(barrier.first), place.address);
  barrier.arrived.push_back(current);
  if (barrier.arrived.size() < expected) return wait(what, place);
  const std::vector<Thread*> arrived = std::move(barrier.arrived);
  barrier.arrived.clear();
  barrier.result = std::exchange(barrier.vote, false);
  join_clocks(arrived, false);
  for (Thread* thread : arrived)
    if (thread != current) wake(*thread);
}

}  // namespace

void reset_synchronisation() {
  barriers.clear();
  meetings.clear();
  meetings.resize(launch_.threads / kWarpSize);
}

bool block_barrier(bool vote, Place place) {
  barriers[0].vote |= vote;
  arrive(0, launch_.threads, "__syncthreads", place);
  return barriers[0].result;
}

__attribute__((noinline)) void named_barrier(int id, int count) {
  const Place place{__builtin_return_address(0), nullptr, 0};
  if (id < 1 || id > 15 || count % kWarpSize || count > launch_.threads)
    fail("named_barrier takes barriers 1 to 15 and whole warps of the block", place);
  arrive(id, count, "named_barrier", place);
}

void warp_barrier(unsigned mask, Place place) { meet(mask, nullptr, 0, "__syncwarp", place); }

// An exchange of values does not order memory accesses; a barrier does.
const unsigned char* exchange(unsigned mask, const void* value, size_t size, const char* what, Place place) {
  return meet(mask, value, size, what, place);
}

unsigned ballot(unsigned mask, bool vote, Place place) {
  const unsigned char byte = vote;
  const unsigned char* votes = exchange(mask, &byte, 1, "a vote", place);
  unsigned result = 0;
  for (int l = 0; l < kWarpSize; ++l)
    if (mask >> l & 1 && votes[l * kSlotBytes]) result |= 1u << l;
  return result;
}

bool report_waiting() {
  struct Group {
    int count = 0, first = 0;
  };
  std::map<std::string, Group> groups;
  bool at_barrier = false;
  for (const Thread& thread : threads) {
    std::string what = "returned";
    if (!thread.finished) {
      if (!current) current = &threads[thread.index];  // named in the report
      at_barrier |= std::strcmp(thread.waits_for, "__syncthreads") == 0;
      what = std::string("in ") + thread.waits_for + " at " + source_line(thread.waits_at);
    }
    Group& group = groups[what];
    if (group.count++ == 0) group.first = thread.index;
  }
  if (!current) return false;
  std::string text;
  for (const auto& [what, group] : groups)
    text += (text.empty() ? "" : "; ") + std::to_string(group.count) + " threads (the first is " +
            std::to_string(group.first) + ") " + what;
  report(at_barrier ? "divergent barrier" : "deadlock", text, current->waits_at.address);
  current = nullptr;
  return true;
}

}  // namespace emu

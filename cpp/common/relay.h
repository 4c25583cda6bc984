// Jobs of one parallel_jobs() that wait for each other and pass a carry along; for attention's and timestep norm's.
#pragma once

#include <cstring>
#include <thread>

#include "parallel.h"

namespace megalodon::MEGALODON_ISA {

// Completion flags of numbered places, such as blocks of rows. A job publishes its place and waits for earlier ones.
// Jobs start in order or all at once, so a wait always ends.
class Milestones {
 public:
  explicit Milestones(int64_t places) : done_(places) { forget(places); }
  // Marks the first `places` as not done.
  void forget(int64_t places) { std::memset(done_.get(), 0, static_cast<size_t>(places) * sizeof(int64_t)); }
  void publish(int64_t place) { __atomic_store_n(&done_[place], 1, __ATOMIC_RELEASE); }
  void wait(int64_t place) const {
    for (int spins = 0; !__atomic_load_n(&done_[place], __ATOMIC_ACQUIRE);)
      if (++spins > 256) std::this_thread::yield();
  }

 private:
  Scratch<int64_t> done_;
};

// Milestones with a carry of `width` doubles that each place passes to the next.
class Relay : public Milestones {
 public:
  Relay(int64_t places, int64_t width) : Milestones(places), width_(width), carries_(places * width) {}
  double* carry(int64_t place) const { return carries_.get() + place * width_; }

 private:
  int64_t width_;
  Scratch<double> carries_;
};

}  // namespace megalodon::MEGALODON_ISA

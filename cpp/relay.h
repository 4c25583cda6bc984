// Passes a carry along an order of jobs while they run in parallel.
#pragma once

#include <cstring>
#include <thread>

#include "parallel.h"

namespace megalodon::MEGALODON_ISA {

// Hands out places 0, 1, ... of an order and passes a carry of `width` doubles from each place to the next. A place is
// taken after all earlier ones, so that waiting for an earlier one always ends.
class Relay {
 public:
  Relay(int64_t places, int64_t width) : width_(width), carries_(places * width), flags_(places) {
    std::memset(flags_.get(), 0, static_cast<size_t>(places) * sizeof(int64_t));
  }
  int64_t take() { return __atomic_fetch_add(&taken_, 1, __ATOMIC_RELAXED); }
  double* carry(int64_t place) const { return carries_.get() + place * width_; }
  void publish(int64_t place) { __atomic_store_n(&flags_[place], 1, __ATOMIC_RELEASE); }
  void wait(int64_t place) const {
    for (int spins = 0; !__atomic_load_n(&flags_[place], __ATOMIC_ACQUIRE);)
      if (++spins > 256) std::this_thread::yield();
  }

 private:
  int64_t width_, taken_ = 0;
  Scratch<double> carries_;
  Scratch<int64_t> flags_;
};

}  // namespace megalodon::MEGALODON_ISA

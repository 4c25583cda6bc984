// Passes a carry along an order of parallel_jobs().
#pragma once

#include <cstring>
#include <thread>

#include "parallel.h"

namespace megalodon::MEGALODON_ISA {

// Passes a carry of `width` doubles from each place 0, 1, ... of an order to the next. Places begin in order or all at
// once, so that waiting for an earlier one always ends.
class Relay {
 public:
  Relay(int64_t places, int64_t width) : width_(width), carries_(places * width), flags_(places) {
    std::memset(flags_.get(), 0, static_cast<size_t>(places) * sizeof(int64_t));
  }
  double* carry(int64_t place) const { return carries_.get() + place * width_; }
  void publish(int64_t place) { __atomic_store_n(&flags_[place], 1, __ATOMIC_RELEASE); }
  void wait(int64_t place) const {
    for (int spins = 0; !__atomic_load_n(&flags_[place], __ATOMIC_ACQUIRE);)
      if (++spins > 256) std::this_thread::yield();
  }

 private:
  int64_t width_;
  Scratch<double> carries_;
  Scratch<int64_t> flags_;
};

}  // namespace megalodon::MEGALODON_ISA

// OpenMP loops, the denormal mode and scratch memory for the CPU kernels.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "dtype.h"

namespace megalodon::MEGALODON_ISA {

// Treats denormals as zero while alive: a decaying state otherwise turns every multiplication into a slow one.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
 private:
  unsigned saved_;
#else
  FlushDenormals() {}
#endif
};

// 64-byte aligned, uninitialised scratch memory of `count` elements.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64))) {
    if (!data_) std::abort();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  MEGALODON_INLINE T* get() const { return data_; }
  MEGALODON_INLINE T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// Runs make() once on each thread, which returns the thread's body, and then body(job) for every job in [0, jobs).
// Jobs begin in order, so that one may wait for those before it, or from the last. If all run at once, job i is on
// thread i: what it touches may still be in that core's cache from the call before. Which thread runs a job must not
// change its result. `work` is a rough count of operations: little work stays on the caller.
template <class Make>
void parallel_jobs(int64_t jobs, double work, Make&& make, bool from_last = false) {
  constexpr double kWorkWorthAThread = 4e4;
  const int threads =
      jobs < 2 || work < kWorkWorthAThread || omp_in_parallel()
          ? 1
          : static_cast<int>(jobs < omp_get_max_threads() ? jobs : omp_get_max_threads());
  if (threads == 1) {
    auto body = make();
    for (int64_t i = 0; i < jobs; ++i) body(from_last ? jobs - 1 - i : i);
    return;
  }
  struct alignas(64) {
    int64_t count = 0;
  } begun;
#pragma omp parallel num_threads(threads)
  {
    auto body = make();
    const bool at_once = omp_get_num_threads() == jobs;
    const auto next = [&] { return __atomic_fetch_add(&begun.count, 1, __ATOMIC_RELAXED); };
    for (int64_t i = at_once ? omp_get_thread_num() : next(); i < jobs; i = at_once ? jobs : next())
      body(from_last && !at_once ? jobs - 1 - i : i);
  }
}

}  // namespace megalodon::MEGALODON_ISA

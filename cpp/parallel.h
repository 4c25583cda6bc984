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
// Which thread runs a job must not change its result. `work` is a rough count of operations: little work stays on the caller.
template <class Make>
void parallel_jobs(int64_t jobs, double work, Make&& make) {
  constexpr double kWorkWorthAThread = 4e4;
  const int threads =
      jobs < 2 || work < kWorkWorthAThread || omp_in_parallel()
          ? 1
          : static_cast<int>(jobs < omp_get_max_threads() ? jobs : omp_get_max_threads());
  if (threads == 1) {
    auto body = make();
    for (int64_t job = 0; job < jobs; ++job) body(job);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    auto body = make();
#pragma omp for schedule(dynamic, 1)
    for (int64_t job = 0; job < jobs; ++job) body(job);
  }
}

}  // namespace megalodon::MEGALODON_ISA

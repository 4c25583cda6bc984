// OpenMP loops, the denormal mode and scratch memory for the CPU kernels.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

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

// In which order jobs begin. `forward` and `backward`: that of their numbers, so that one may wait for those before it.
// `shares`: each thread has neighbouring ones, and when it is done helps the next thread. Where jobs read memory from
// end to end, processors then fetch no lines ahead that another thread reads.
enum class Order { forward, backward, shares };

// Runs make() once on each thread, which returns the thread's body, and then body(job) for every job in [0, jobs). If
// all run at once, job i is on thread i: what it touches may still be in that core's cache from the call before. Which
// thread runs a job must not change its result. `work` is a rough count of operations: little work stays on the caller.
template <class Make>
void parallel_jobs(int64_t jobs, double work, Make&& make, Order order = Order::forward) {
  constexpr double kWorkWorthAThread = 4e4;
  const int threads =
      jobs < 2 || work < kWorkWorthAThread || omp_in_parallel()
          ? 1
          : static_cast<int>(jobs < omp_get_max_threads() ? jobs : omp_get_max_threads());
  if (threads == 1) {
    auto body = make();
    for (int64_t i = 0; i < jobs; ++i) body(order == Order::backward ? jobs - 1 - i : i);
    return;
  }
  struct alignas(64) Counter {
    int64_t begun = 0;
    int64_t next() { return __atomic_fetch_add(&begun, 1, __ATOMIC_RELAXED); }
  };
  std::vector<Counter> counters(order == Order::shares ? threads : 1);
#pragma omp parallel num_threads(threads)
  {
    auto body = make();
    const int64_t count = omp_get_num_threads(), mine = omp_get_thread_num();
    if (count == jobs) {
      body(mine);
    } else if (order == Order::shares) {
      for (int64_t other = 0; other < count; ++other) {
        const int64_t share = (mine + other) % count, first = jobs * share / count, end = jobs * (share + 1) / count;
        for (int64_t i; (i = first + counters[share].next()) < end;) body(i);
      }
    } else {
      for (int64_t i; (i = counters[0].next()) < jobs;) body(order == Order::backward ? jobs - 1 - i : i);
    }
  }
}

}  // namespace megalodon::MEGALODON_ISA

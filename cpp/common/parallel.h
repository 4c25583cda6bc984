// Parallel jobs, the denormal mode and scratch memory for the CPU kernels. A job is the work that a thread takes at a
// time, independent of the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "dtype.h"
#include "threads.h"

namespace megalodon::MEGALODON_ISA {

// While alive, the thread treats denormals as zero: arithmetic with denormals is slow, and decaying states would become
// denormal.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // flushes results and inputs
  ~FlushDenormals() { _mm_setcsr(saved_); }
 private:
  unsigned saved_;
#else
  FlushDenormals() {}
#endif
};

// 64-byte aligned, uninitialised scratch memory of `count` elements. The constructor may throw std::bad_alloc, so it is
// called outside of parallel regions, which exceptions may not leave.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    constexpr int64_t kMost = (PTRDIFF_MAX - 127) / static_cast<int64_t>(sizeof(T));
    if (count > kMost) throw std::bad_alloc();
    // Rounded up, plus 64: a vector may be loaded from the end on.
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
  }
  MEGALODON_INLINE T* get() const { return data_.get(); }
  MEGALODON_INLINE T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

// The order in which jobs start. `forward` is by ascending number and `backward` by descending number; a job may wait
// for jobs that started before it. With `shares`, each thread starts with neighbouring jobs of its own, and a thread
// that has finished helps the next thread. If jobs read contiguous memory, `shares` keeps hardware prefetchers off
// memory that another thread reads.
enum class Order { forward, backward, shares };

// Calls body(job) for every job in [0, jobs), each thread with its own body = make(). The caller makes all bodies
// before the threads start, as make() may throw when it allocates; a body may neither allocate nor throw. Each thread
// constructs its own Guards and destroys them when it finishes. If there are as many jobs as threads, job i runs on
// thread i: its memory may still be in that core's cache from the previous call. A job's result must not depend on its
// thread. `work` is a rough number of operations; if it is small, all jobs run on the calling thread.
template <class... Guards, class Make>
void parallel_jobs(int64_t jobs, double work, Make&& make, Order order = Order::forward) {
  constexpr double kWorkWorthAThread = 4e4;
  const int threads = work < kWorkWorthAThread ? 1 : static_cast<int>(std::min<int64_t>(jobs, num_threads()));
  if (threads <= 1) {
    auto body = make();
    [[maybe_unused]] const std::tuple<Guards...> guards;
    for (int64_t i = 0; i < jobs; ++i) body(order == Order::backward ? jobs - 1 - i : i);
    return;
  }
  struct Worker {
    alignas(64) decltype(make()) body;
    alignas(64) int64_t num_started = 0;  // of the worker's share; without shares, workers[0] counts all jobs
    int64_t next() { return __atomic_fetch_add(&num_started, 1, __ATOMIC_RELAXED); }
  };
  std::vector<Worker> workers;
  workers.reserve(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) workers.push_back({make()});
  auto run = [&](int64_t self, int64_t count) {
    auto& body = workers[static_cast<size_t>(self)].body;
    [[maybe_unused]] const std::tuple<Guards...> guards;
    if (count == jobs) {
      body(self);  // as many jobs as threads: one each
    } else if (order == Order::shares) {
      for (int64_t other = 0; other < count; ++other) {
        const int64_t share = (self + other) % count, first = jobs * share / count, end = jobs * (share + 1) / count;
        for (int64_t i; (i = first + workers[static_cast<size_t>(share)].next()) < end;) body(i);
      }
    } else {
      for (int64_t i; (i = workers[0].next()) < jobs;) body(order == Order::backward ? jobs - 1 - i : i);
    }
  };
  const auto call = [](void* f, int self, int count) { (*static_cast<decltype(run)*>(f))(self, count); };
  run_on_threads(threads, call, &run);
}

}  // namespace megalodon::MEGALODON_ISA

#include "threads.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "fork.h"

// Functions of GCC's OpenMP runtime, which torch's wheels for Linux contain. LLVM's runtime, in the wheels for macOS,
// exports them, too. A `#pragma omp parallel` compiled by clang would call functions that only LLVM's runtime has.
extern "C" {
int omp_get_max_threads();
int omp_get_num_threads();
int omp_get_thread_num();
int omp_get_num_places();
int omp_get_place_num();
int omp_get_place_num_procs(int place);
void omp_get_place_proc_ids(int place, int* processors);
void GOMP_parallel(void (*body)(void*), void* argument, unsigned threads, unsigned flags);
}

namespace megalodon {
namespace {

thread_local bool uses_own_threads = false, is_in_body = false;
thread_local int number_of_body = 0;

struct Region {
  ThreadBody body;
  void* argument;

  void run(int number, int count) const {
    is_in_body = true;
    number_of_body = number;
    body(argument, number, count);
    number_of_body = 0;
    is_in_body = false;
  }
};

// Lets one thread wait for a condition that others make true.
class Event {
 public:
  template <class Condition>
  void wait(const Condition& holds) {
    constexpr auto kSpin = std::chrono::microseconds(50);
    constexpr int kPauses = 32;  // between two readings of the clock
    for (const auto end = Clock::now() + kSpin; Clock::now() < end;)
      for (int i = 0; i < kPauses; ++i) {
        if (holds()) return;
        pause();
      }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeps_ = true;
    change_.wait(lock, holds);
    sleeps_ = false;
  }

  // Call after each change of an atomic that the condition reads. That atomic and `sleeps_` are sequentially
  // consistent: either the waiting thread reads the change before it sleeps, or this call finds `sleeps_` set and wakes
  // the thread.
  void notify() {
    if (!sleeps_) return;
    { const std::lock_guard<std::mutex> asleep(mutex_); }
    change_.notify_one();
  }

 private:
  using Clock = std::chrono::steady_clock;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }

  std::atomic<bool> sleeps_{false};
  std::mutex mutex_;
  std::condition_variable change_;
};

// This package's threads for one calling thread. Each calling thread has its own team, as in OpenMP.
class Team {
 public:
  ~Team() { end(); }

  // The caller runs body 0, then each body that no thread has started yet. So it waits only for running bodies, never
  // for a thread that has no processor yet.
  void run(int count, const Region& region) {
    while (static_cast<int>(workers_.size()) + 1 < count) start();
    region_ = region;
    count_ = count;
    for (int i = 1; i < count; ++i) set(i, State::open);
    region.run(0, count);
    for (int i = 1; i < count; ++i)
      if (worker(i).try_change(State::open, State::idle)) region.run(i, count);
    for (int i = 1; i < count; ++i) finished_.wait([&] { return worker(i).state == State::idle; });
  }

  void end() {
    for (int i = 1; i <= static_cast<int>(workers_.size()); ++i) {
      set(i, State::ended);
      worker(i).thread.join();
    }
    workers_.clear();
  }

 private:
  enum class State { idle, open, running, ended };

  struct alignas(64) Worker {
    std::atomic<State> state{State::idle};
    Event changed;
    std::thread thread;

    // Returns true if the state was `from`, and is now `to`.
    bool try_change(State from, State to) { return state.compare_exchange_strong(from, to); }
  };

  Worker& worker(int number) { return *workers_[static_cast<size_t>(number) - 1]; }

  void set(int number, State state) {
    worker(number).state = state;
    worker(number).changed.notify();
  }

  void work(Worker& self, int number) {
    for (;;) {
      self.changed.wait([&] { return self.state != State::idle; });
      if (self.state == State::ended) return;
      if (!self.try_change(State::open, State::running)) continue;
      region_.run(number, count_);
      self.state = State::idle;
      finished_.notify();
    }
  }

  void start() {
    const int number = static_cast<int>(workers_.size()) + 1;
    const std::vector<int> processors = processors_of_thread(number);
    Worker& self = *workers_.emplace_back(std::make_unique<Worker>());
    // The new thread blocks all signals except those of faults in a kernel; the program's threads handle the others.
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (const int fault : {SIGBUS, SIGFPE, SIGILL, SIGSEGV}) sigdelset(&blocked, fault);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    std::string error;
    try {
      self.thread = std::thread([this, &self, number, processors] {
        bind_to(processors);
        work(self, number);
      });
    } catch (const std::exception& failure) {
      error = failure.what();
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (self.thread.joinable()) return;
    workers_.pop_back();
    throw std::runtime_error("megalodon_ops: thread " + std::to_string(number) + " must start, got `" + error +
                             "`; set fewer by torch.set_num_threads.");
  }

  // Processors for a new thread. If OpenMP binds its threads to places (OMP_PROC_BIND, OMP_PLACES), thread i gets the
  // i-th place after the caller's. Otherwise the result is empty: the thread inherits the caller's processors.
  static std::vector<int> processors_of_thread(int number) {
    std::vector<int> processors;
    if (const int places = omp_get_num_places(); places > 0 && omp_get_place_num() >= 0) {
      const int place = (omp_get_place_num() + number) % places;
      processors.resize(static_cast<size_t>(omp_get_place_num_procs(place)));
      omp_get_place_proc_ids(place, processors.data());
    }
    return processors;
  }

  static void bind_to([[maybe_unused]] const std::vector<int>& processors) {
#if defined(__linux__)
    if (processors.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int processor : processors) CPU_SET(static_cast<size_t>(processor), &set);
    sched_setaffinity(0, sizeof(set), &set);
#endif
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  Event finished_;
  Region region_{};
  int count_ = 0;
};

thread_local Team team;

}  // namespace

int num_threads() { return is_in_body || threads_lost ? 1 : omp_get_max_threads(); }

int body_number() { return number_of_body; }

void run_on_threads(int threads, ThreadBody body, void* argument) {
  Region region{body, argument};
  if (uses_own_threads) return team.run(threads, region);
  const auto run = [](void* region) { static_cast<Region*>(region)->run(omp_get_thread_num(), omp_get_num_threads()); };
  GOMP_parallel(run, &region, static_cast<unsigned>(threads), 0);
}

bool use_own_threads(bool on) { return std::exchange(uses_own_threads, on); }

OwnThreads::OwnThreads() : outer_(use_own_threads(true)) {}
OwnThreads::~OwnThreads() { uses_own_threads = outer_; }

void end_own_threads() { team.end(); }

}  // namespace megalodon

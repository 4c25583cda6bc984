// Threads that run a kernel's jobs: those of OpenMP, which torch also uses, or this package's own.
#pragma once

namespace megalodon {

// Number of threads for a kernel: torch.get_num_threads() of the calling thread, or 1 inside run_on_threads and if
// OpenMP's threads are lost (fork.h).
int num_threads();

// Number of the body that the calling thread runs; 0 outside run_on_threads.
int body_number();

using ThreadBody = void (*)(void* argument, int number, int count);

// Calls body(argument, i, count) once for each i in [0, count). count is `threads`, or less if OpenMP grants fewer
// threads. A body may not throw. Throws std::runtime_error before the first body if a thread cannot start.
void run_on_threads(int threads, ThreadBody body, void* argument);

// While alive, kernels that the calling thread launches run on the package's own threads. A waiting own thread spins
// for 50 us, then sleeps. OpenMP's threads spin for milliseconds: on a busy machine, they take processors from the
// threads that they wait for. After a parallel region of torch, OpenMP's threads still spin and would slow own threads.
// So own threads are for kernels that follow each other without torch in between, as in a decoded token.
class OwnThreads {
 public:
  OwnThreads();
  ~OwnThreads();

 private:
  const bool outer_;
};

// Turns own threads on or off for the calling thread's kernels; returns the previous setting. Python uses this
// function, C++ uses OwnThreads.
bool use_own_threads(bool on);

// Ends the calling thread's own threads. The next kernel that needs some starts new ones.
void end_own_threads();

}  // namespace megalodon

// The threads that run a kernel's jobs: OpenMP's, which torch's products use, too, or this package's own.
#pragma once

namespace megalodon {

// Number of threads for a kernel: torch.get_num_threads() of the calling thread. 1 inside run_on_threads, and where
// OpenMP's threads are lost (fork.h).
int num_threads();

// Number of the body that the calling thread runs, 0 outside run_on_threads.
int body_number();

using ThreadBody = void (*)(void* argument, int number, int count);

// Calls body(argument, i, count) once for each i in [0, count), on `threads` threads or, where OpenMP gives fewer, on
// as many as it gives. A body may not throw. Throws std::runtime_error before the first body if a thread cannot start.
void run_on_threads(int threads, ThreadBody body, void* argument);

// While alive, kernels that the calling thread launches run on threads of this package, which spin for 50 us while they
// wait, then sleep. OpenMP's spin for milliseconds: beside busy processes they take the processor from the threads that
// they wait for. After a parallel region of torch they are still awake and would slow own threads, so own threads are
// for kernels that follow each other without torch, as in a decoded token.
class OwnThreads {
 public:
  OwnThreads();
  ~OwnThreads();

 private:
  const bool outer_;
};

// Lets the calling thread's kernels run on own threads, or not; returns what was. For Python; see OwnThreads.
bool use_own_threads(bool on);

// Ends the calling thread's own threads; the next kernel starts new ones.
void end_own_threads();

}  // namespace megalodon

#include "fork.h"

#include <dlfcn.h>
#include <pthread.h>

#include "threads.h"

namespace megalodon {

bool threads_lost = false;

namespace {

using Pause = int (*)(int);  // omp_pause_resource_all(omp_pause_resource_t) of OpenMP 5.0; 0 on success
constexpr int kSoft = 1;     // omp_pause_soft: ends the threads but keeps their threadprivate variables

Pause pause_all = nullptr;
bool threads_ended = false;

void before_fork() {
  end_own_threads();
  threads_ended = !threads_lost && pause_all && pause_all(kSoft) == 0;
}

void in_the_child() { threads_lost = !threads_ended; }

}  // namespace

void end_threads_before_forks() {
  // Looked up at run time, as the libgomp of GCC 8, which some systems still have, lacks the function.
  pause_all = reinterpret_cast<Pause>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  pthread_atfork(before_fork, nullptr, in_the_child);
}

}  // namespace megalodon

// Threads and fork(): the child has only the thread that called fork().
#pragma once

namespace megalodon {

// True if this process is the child of one that could not end OpenMP's threads before it forked. OpenMP would wait for
// threads that do not exist in the child, so kernels run on the calling thread.
extern bool threads_lost;

// Make every fork() of this process first end the forking thread's waiting threads: OpenMP's and the own ones of
// threads.h. Parent and child start new ones when needed, so the child may use several threads, in kernels and in
// torch, which has the same OpenMP. Call this function once.
void end_threads_before_forks();

}  // namespace megalodon

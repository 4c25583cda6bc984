// OpenMP on both sides of fork(), which copies a process with one thread alone: the one that called it.
#pragma once

namespace megalodon {

// Whether this process is the child of one that could not end OpenMP's threads before it forked. OpenMP would then wait
// for threads that the child has not got, so that kernels run on the calling thread.
extern bool threads_lost;

// Has every fork() of this process first end the OpenMP threads that wait for the forking thread's next parallel
// region. Parent and child start new ones when they need them, so that the child may use several threads, in kernels
// and in torch, whose OpenMP this is. Call this function once.
void end_threads_before_forks();

}  // namespace megalodon

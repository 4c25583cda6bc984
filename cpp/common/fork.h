// Threads and fork(): the child has only the thread that called fork().
#pragma once

namespace megalodon {

// True in the child of a process that could not end OpenMP's threads before fork(). OpenMP would wait for threads that
// do not exist in the child, so kernels run on the calling thread alone.
extern bool threads_lost;

// Makes every fork() of this process first end the threads that wait for work of the forking thread: OpenMP's and the
// package's own (threads.h). Parent and child start new threads when they need them. So the child may use several
// threads, also in torch, which shares the OpenMP runtime. Call this function once.
void end_threads_before_forks();

}  // namespace megalodon

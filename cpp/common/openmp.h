// The parts of OpenMP that the kernels use.
#pragma once

#include "dtype.h"

// MEGALODON_PARALLEL(threads) { ... }; runs the block once on each of `threads` threads.
#if defined(__clang__)

// clang compiles `#pragma omp parallel` to calls of LLVM's runtime. torch's wheels for Linux contain GCC's; a second
// runtime would have threads of its own, whose number torch.set_num_threads does not set. So GCC's is called directly;
// LLVM's, in torch's wheels for macOS, has the same functions.
extern "C" {
int omp_get_max_threads();
int omp_get_num_threads();
int omp_get_thread_num();
int omp_in_parallel();
void GOMP_parallel(void (*body)(void*), void* argument, unsigned threads, unsigned flags);
}

namespace megalodon {

struct OnThreads {
  int count;
  template <class Body>
  MEGALODON_INLINE void operator=(Body body) const {
    GOMP_parallel([](void* argument) { (*static_cast<Body*>(argument))(); }, &body, static_cast<unsigned>(count), 0);
  }
};

}  // namespace megalodon

#define MEGALODON_PARALLEL(threads) megalodon::OnThreads{threads} = [&]

#else

#include <omp.h>

#define MEGALODON_PRAGMA_(text) _Pragma(#text)
#define MEGALODON_PARALLEL(threads) MEGALODON_PRAGMA_(omp parallel num_threads(threads))

#endif

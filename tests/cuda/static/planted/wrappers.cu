// Each wrapper of an instruction in cuda/common, alone in a kernel, for test_cuda_static.py, which reads the PTX.
#include "async.cuh"
#include "matrix.cuh"
#include "vec.cuh"

extern __shared__ __align__(16) unsigned char shared[];

template <int n>
using Words = gpu::Pack<uint32_t, n>;

template <class V> __global__ void loads(const V* x, V* y) { *y = gpu::ld<V>(x); }
template <class V> __global__ void stores(V x, V* y) { gpu::st(y, x); }
template <class V> __global__ void loads_shared(V* x) { *x = gpu::ld_shared<V>(shared); }
template <class V> __global__ void stores_shared(V x) { gpu::st_shared(shared, x); }
#define ACCESSES(V)                                 \
  template __global__ void loads<V>(const V*, V*);  \
  template __global__ void stores<V>(V, V*); \
  template __global__ void loads_shared<V>(V*);     \
  template __global__ void stores_shared<V>(V);
ACCESSES(uint16_t)
ACCESSES(Words<1>)
ACCESSES(Words<2>)
ACCESSES(Words<4>)

// y: bytes that are read; the others become zeros
template <int kBytes> __global__ void copies(const void* x, int y) { gpu::cp_async<kBytes>(shared, x, y); }
template __global__ void copies<4>(const void*, int);
template __global__ void copies<8>(const void*, int);
template __global__ void copies<16>(const void*, int);
__global__ void commits() { gpu::cp_async_commit(); }
template <int kPending> __global__ void waits() { gpu::cp_async_wait<kPending>(); }
template __global__ void waits<0>();
template __global__ void waits<2>();

template <int n> __global__ void matrices(Words<n>* x) { gpu::ldmatrix(x->element, shared); }
template <int n> __global__ void transposed(Words<n>* x) { gpu::ldmatrix_trans(x->element, shared); }
#define MATRICES(n)                                \
  template __global__ void matrices<n>(Words<n>*); \
  template __global__ void transposed<n>(Words<n>*);
MATRICES(1)
MATRICES(2)
MATRICES(4)

template <class T>
__global__ void multiplies(const Words<4>* x, const Words<2>* y, gpu::Pack<float, 4>* z) {
  if constexpr (sizeof(T) == 2) gpu::mma_16816<T>(z->element, x->element, y->element);
  else gpu::mma_1688_tf32(z->element, x->element, y->element);
}
template __global__ void multiplies<gpu::bf16>(const Words<4>*, const Words<2>*, gpu::Pack<float, 4>*);
template __global__ void multiplies<gpu::fp16>(const Words<4>*, const Words<2>*, gpu::Pack<float, 4>*);
template __global__ void multiplies<float>(const Words<4>*, const Words<2>*, gpu::Pack<float, 4>*);

template <int half> __global__ void joins(const uint32_t* x, uint32_t* y) { *y = gpu::join_halves<half>(x[0], x[1]); }
template __global__ void joins<0>(const uint32_t*, uint32_t*);
template __global__ void joins<1>(const uint32_t*, uint32_t*);

template <class T> __global__ void packs(const float* x, uint32_t* y) { *y = gpu::pack2<T>(x[0], x[1]); }
template <class T> __global__ void narrows(const float* x, T* y) { *y = gpu::from_real<T>(*x); }
template __global__ void packs<gpu::bf16>(const float*, uint32_t*);
template __global__ void packs<gpu::fp16>(const float*, uint32_t*);
template __global__ void narrows<gpu::bf16>(const float*, gpu::bf16*);
template __global__ void narrows<gpu::fp16>(const float*, gpu::fp16*);
__global__ void widens(const gpu::fp16* x, float* y) { *y = gpu::to_real(*x); }
__global__ void rounds(const float* x, uint32_t* y) { *y = gpu::to_tf32(*x); }

__global__ void exponential(const float* x, float* y) { *y = gpu::exp2_approx(*x); }
// x: number of the barrier; y: threads that meet there
__global__ void barrier(int x, int y) { gpu::named_barrier(x, y); }

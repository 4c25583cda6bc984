// Two floats packed into a register, for test_cuda_static.py, which reads what becomes of which.
#include "convert.cuh"

template <class T>
__global__ void packs(const float* in, uint32_t* out) {
  out[0] = gpu::pack2<T>(in[0], in[1]);
}

template __global__ void packs<gpu::bf16>(const float*, uint32_t*);
template __global__ void packs<gpu::fp16>(const float*, uint32_t*);

// Kernels that break one rule or promise each, for test_cuda_static.py.
#include "vec.cuh"

// An index that is known only at run time keeps an array in local memory.
__global__ void array_in_local_memory(const int* index, float* out) {
  float values[64] = {};
  for (int i = 0; i < 256; ++i) values[index[i]] += out[i];
  out[threadIdx.x] = values[index[threadIdx.x]];
}

// 1024 threads leave 64 registers to each, less than the sums.
__global__ void __launch_bounds__(1024) spills(const float* in, float* out, int rounds) {
  float sum[96];
  GPU_UNROLL
  for (int i = 0; i < 96; ++i) sum[i] = in[i];
  for (int round = 0; round < rounds; ++round) {
    GPU_UNROLL
    for (int i = 0; i < 96; ++i) sum[i] = sum[i] * in[96 + threadIdx.x] + sum[(i + 1) % 96];
  }
  GPU_UNROLL
  for (int i = 0; i < 96; ++i) out[threadIdx.x * 96 + i] = sum[i];
}

template <class T>
__global__ void calculates_in_double(const T* in, T* out) {
  out[threadIdx.x] = static_cast<T>(in[threadIdx.x] * 1.1);
}

__global__ void accesses_bytes(const unsigned char* in, unsigned char* out) { out[threadIdx.x] = in[threadIdx.x]; }

__global__ void adds_atomically(float* out) { atomicAdd(out, 1.0f); }

__noinline__ __device__ float not_inlined(float x) { return x * x + 1; }
__global__ void calls(const float* in, float* out) { out[threadIdx.x] = not_inlined(in[threadIdx.x]); }

// Copies by accesses of 4 kWidth bytes.
template <int kWidth>
__global__ void copies(const float* in, float* out) {
  float v[kWidth];
  gpu::load(v, in + threadIdx.x * kWidth);
  gpu::store(out + threadIdx.x * kWidth, v);
}
template __global__ void calculates_in_double<float>(const float*, float*);
template __global__ void calculates_in_double<double>(const double*, double*);
template __global__ void copies<4>(const float*, float*);
template __global__ void copies<2>(const float*, float*);

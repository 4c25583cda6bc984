// Kernels that, as <true>, overrun a local array or overflow an integer, for the sanitized build. The line that it must
// name ends in "// at <kernel>".
#include "bugs.h"

#include "portable.cuh"

namespace planted {
namespace {

template <bool kBug>
__global__ void local_array(const float* in, float* out) {
  float values[4] = {in[0], in[1], in[2], in[3]};
  const int last = kBug ? 4 : 3;
  __syncthreads();
  for (int i = 0; i <= last; ++i) values[i] += 1;  // at local_array
  out[threadIdx.x] = values[threadIdx.x % 4];
}

// Gets the array by pointer, so that the compiler does not see its size. Barriers before and after switch threads.
GPU_INLINE void shift(float* values, int count) {
  for (int i = 0; i < count; ++i) values[i] = values[i + 1];  // at local_array_by_pointer
}
template <bool kBug>
__global__ void local_array_by_pointer(const float* in, float* out) {
  float values[8];
  for (int i = 0; i < 8; ++i) values[i] = in[threadIdx.x];
  __syncthreads();
  shift(values, kBug ? 8 : 7);
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x % 8];
}

// Row 1 follows row 0, so that this stays within the array.
template <bool kBug>
__global__ void row_of_local_array(const float* in, float* out) {
  float values[2][4] = {};
  for (int i = 0; i < (kBug ? 5 : 4); ++i) values[0][i] = in[i];  // at row_of_local_array
  out[threadIdx.x] = values[1][threadIdx.x % 4] + values[0][0];
}

template <bool kBug>
__global__ void int_overflow(const float* in, float* out) {
  const int rows = 1 << (kBug ? 20 : 10), pitch = static_cast<int>(in[0]) + 4096;
  const int64_t offset = rows * pitch;  // at int_overflow
  out[threadIdx.x] = static_cast<float>(offset);
}

}  // namespace

#define PLANT(kernel)                                                     \
  {#kernel, [](bool bug, const float* in, float* out) {                   \
     if (bug) LAUNCH((kernel<true>), 1, 64, 0, nullptr, in, out);         \
     else LAUNCH((kernel<false>), 1, 64, 0, nullptr, in, out);            \
   }}

std::vector<Plant> overruns() {
  return {PLANT(local_array), PLANT(local_array_by_pointer), PLANT(row_of_local_array), PLANT(int_overflow)};
}

}  // namespace planted

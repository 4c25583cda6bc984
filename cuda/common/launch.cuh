// Launches a kernel, and raises the limit on its shared memory. portable.cuh includes this file only for nvcc.
//
// A block has at most 48 KiB of shared memory, static and dynamic together, unless its kernel is allowed more. The
// first launch of a kernel with dynamic memory on a device allows it all of the device's shared memory, permanently.
// Setting the limit before every launch would override the value set by another thread, and cudaFuncSetAttribute may
// wait for copies in progress.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace gpu {

// Throws if `error` is an error of the CUDA runtime. Clears it first, so that the next call of cudaGetLastError does
// not report it again.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Sets this thread's current device in this module's copy of the CUDA runtime.
inline void use_device(int device) { check(cudaSetDevice(device), ("cuda:" + std::to_string(device)).c_str()); }

// Shared memory that a block may use on the current device: 99 KiB on sm_120, 163 on sm_80, 227 on sm_90 and sm_100.
inline size_t max_shared_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "max_shared_bytes");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "max_shared_bytes");
  return static_cast<size_t>(bytes);
}

// Allows `kernel` all the shared memory of the current device, once in the process. After a failure, the next launch
// tries again.
inline void allow_shared_memory(const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;  // kernels and devices
  int device = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  const auto dynamic = static_cast<int>(max_shared_bytes() - attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic), name);
  allowed.insert({kernel, device});
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, void* stream,
            A&&... arguments) {
  const auto code = reinterpret_cast<const void*>(kernel);
  if (shared > 0) allow_shared_memory(code, name);
  std::tuple<P...> values{static_cast<P>(arguments)...};
  std::apply(
      [&](P&... value) {
        void* pointers[] = {&value...};
        check(cudaLaunchKernel(code, grid, block, pointers, shared, static_cast<cudaStream_t>(stream)), name);
      },
      values);
}

}  // namespace gpu

"""Limits of dynamic shared memory: cuda/common/shared_limit.cuh, compiled against a fake CUDA runtime."""

from __future__ import annotations

import shutil
import subprocess

from paths import ROOT
import pytest

CUDA = ROOT / "cuda"

RUNTIME = r"""
#include <atomic>
#include <chrono>
#include <cstddef>
#include <map>
#include <thread>
#include <vector>
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes { size_t sharedSizeBytes; };
struct Call { const void* kernel; int device, bytes; };

inline thread_local int device_of_thread = 0;
inline std::vector<Call> calls;
inline std::atomic<int> inside{0}, most_inside{0}, failures{0};

inline const char* cudaGetErrorString(cudaError_t) { return "the runtime failed"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = device_of_thread, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* bytes, int, int device) {
  return *bytes = device == 0 ? 101376 : 232448, cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  return attributes->sharedSizeBytes = *static_cast<const int*>(kernel), cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, int, int bytes) {
  if (++inside > most_inside) most_inside = inside.load();
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  if (failures > 0) return --failures, --inside, cudaErrorUnknown;
  calls.push_back({kernel, device_of_thread, bytes});
  return --inside, cudaSuccess;
}
"""
MAIN = r"""
#include "shared_limit.cuh"

#include <cstdio>

int kernels[3] = {0, 1024, 5000};  // each with so much static shared memory

int main() {
  failures = 1;
  try {
    gpu::allow_shared_memory(&kernels[0], "name of the kernel");
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([i] {
      device_of_thread = i % 2;
      for (int turn = 0; turn < 100; ++turn)
        for (int k = 0; k < 3; ++k) gpu::allow_shared_memory(&kernels[(k + i) % 3], "");
    });
  for (auto& thread : threads) thread.join();
  std::printf("%d at once\n", most_inside.load());
  for (const Call& call : calls)
    std::printf("%d %d %d\n", static_cast<int>(static_cast<const int*>(call.kernel) - kernels), call.device, call.bytes);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_kernel_is_allowed_all_shared_memory_once_on_each_device(tmp_path):
    """Calls from many threads, one repeated after a failure; static shared memory is subtracted."""
    (tmp_path / "cuda_runtime.h").write_text("#pragma once\n" + RUNTIME)
    (tmp_path / "main.cpp").write_text(MAIN)
    include = [f"-I{tmp_path}", f"-I{CUDA / 'common'}"]
    subprocess.run(["g++", "-std=c++17", "-pthread", *include, "main.cpp", "-o", "main"], cwd=tmp_path, check=True)
    output = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert output[:2] == ["name of the kernel: the runtime failed", "1 at once"]
    limits = {0: 101376, 1: 232448}
    expected = [(k, device, limits[device] - static) for k, static in enumerate((0, 1024, 5000)) for device in limits]
    assert sorted(tuple(map(int, line.split())) for line in output[2:]) == expected


def test_no_launch_sets_a_limit_itself():
    found = {file.name for file in CUDA.rglob("*.cu*") if "cudaFuncSetAttribute(" in file.read_text()}
    assert found == {"shared_limit.cuh"}

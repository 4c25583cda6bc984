"""Launches from C++ and from Python: cuda/common/launch.cuh against a fake CUDA runtime, and `_launch_cuda`."""

import contextlib
import shutil
import subprocess
import types

import pytest
import torch
from fake_graphs import tensor_on
from paths import ROOT

from megalodon_ops.ops.common import definition as library

CUDA = ROOT / "cuda"

RUNTIME = r"""
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes { size_t sharedSizeBytes; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
using cudaStream_t = void*;
struct Call { const void* kernel; int device, bytes; };

inline thread_local int device_of_thread = 0;
inline thread_local cudaError_t last_error = cudaSuccess;
inline std::vector<Call> calls;
inline std::atomic<int> inside{0}, most_inside{0};
inline const char* failing = "";  // the function that fails

inline cudaError_t result_of(const char* function) {
  return std::strcmp(function, failing) ? cudaSuccess : last_error = cudaErrorUnknown;
}
inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "the runtime failed"; }
inline cudaError_t cudaGetDevice(int* device) { *device = device_of_thread; return result_of("cudaGetDevice"); }
inline cudaError_t cudaSetDevice(int device) { device_of_thread = device; return result_of("cudaSetDevice"); }
inline cudaError_t cudaDeviceGetAttribute(int* bytes, int, int device) {
  *bytes = device == 0 ? 101376 : 232448;  // shared memory of a block
  return result_of("cudaDeviceGetAttribute");
}
int static_bytes(const void* kernel);
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  attributes->sharedSizeBytes = static_bytes(kernel);
  return result_of("cudaFuncGetAttributes");
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, int, int bytes) {
  if (++inside > most_inside) most_inside = inside.load();
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  const cudaError_t result = result_of("cudaFuncSetAttribute");
  if (result == cudaSuccess) calls.push_back({kernel, device_of_thread, bytes});
  --inside;
  return result;
}
inline cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                    cudaStream_t stream) {
  std::printf("%d %u %u %u %u %zu %zu %lld %g\n", static_bytes(kernel), grid.x, grid.y, block.x, block.y, shared,
              reinterpret_cast<size_t>(stream), *static_cast<long long*>(arguments[0]), *static_cast<double*>(arguments[1]));
  return result_of("cudaLaunchKernel");
}
"""
MAIN = r"""
#include "launch.cuh"

template <int bytes> void kernel(long long, double) {}  // with so much static shared memory
void (*const kernels[])(long long, double) = {kernel<0>, kernel<1024>, kernel<5000>};
const void* code(int k) { return reinterpret_cast<const void*>(kernels[k]); }
int static_bytes(const void* kernel) { return kernel == code(0) ? 0 : kernel == code(1) ? 1024 : 5000; }

// Runs f while `function` fails; prints its error, and what the runtime still reports afterwards.
template <class F>
void fail(const char* function, F&& f) {
  failing = function;
  try {
    f();
    std::printf("%s: no error\n", function);
  } catch (const std::runtime_error& error) {
    std::printf("%s: %s, then %d\n", function, error.what(), cudaGetLastError());
  }
  failing = "";
}

int main() {
  const auto launch = [](int k, size_t shared) {
    gpu::launch("name", kernels[k], dim3{7, 2}, dim3{64}, shared, reinterpret_cast<void*>(0x57), 1 << 30, 2.5f);
  };
  for (const char* function : {"cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncGetAttributes", "cudaFuncSetAttribute"})
    fail(function, [&] { launch(0, 640); });
  fail("cudaLaunchKernel", [&] { launch(1, 0); });
  fail("cudaSetDevice", [] { gpu::use_device(1); });
  gpu::use_device(0);
  last_error = cudaErrorUnknown;  // of another library's call
  launch(2, 640);
  std::printf("then %d\n", cudaGetLastError());
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([i] {
      gpu::use_device(i % 2);
      for (int turn = 0; turn < 100; ++turn)
        for (int k = 0; k < 3; ++k) gpu::allow_shared_memory(code((k + i) % 3), "");
    });
  for (auto& thread : threads) thread.join();
  std::printf("%d at once\n", most_inside.load());
  for (const Call& call : calls) std::printf("%d %d %d\n", static_bytes(call.kernel), call.device, call.bytes);
}
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[str]:
    """Lines that MAIN prints."""
    folder = tmp_path_factory.mktemp("runtime")
    (folder / "cuda_runtime.h").write_text("#pragma once\n" + RUNTIME)
    (folder / "main.cpp").write_text(MAIN)
    include = [f"-I{folder}", f"-I{CUDA / 'common'}"]
    subprocess.run(["g++", "-std=c++17", "-pthread", *include, "main.cpp", "-o", "main"], cwd=folder, check=True)
    return subprocess.run([folder / "main"], capture_output=True, text=True, check=True).stdout.splitlines()


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
LAUNCHED = "{} 7 2 64 1 {} 87 1073741824 2.5"  # static bytes, grid, block, shared bytes, stream, converted arguments


@needs_compiler
def test_an_error_is_reported_once(printed):
    """A failed call is cleared, so that no later call reports it; another library's error is not a launch's."""
    limits = ("cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncGetAttributes", "cudaFuncSetAttribute")
    what = {"cudaDeviceGetAttribute": "max_shared_bytes"}
    assert printed[:9] == [
        *(f"{function}: {what.get(function, 'name')}: the runtime failed, then 0" for function in limits),
        LAUNCHED.format(1024, 0),
        "cudaLaunchKernel: name: the runtime failed, then 0",
        "cudaSetDevice: cuda:1: the runtime failed, then 0",
        LAUNCHED.format(5000, 640),
        "then 1",
    ]


@needs_compiler
def test_a_kernel_is_allowed_all_shared_memory_once_on_each_device(printed):
    """Calls from many threads, after failures; static shared memory is subtracted."""
    assert printed[9] == "1 at once"
    limits = {0: 101376, 1: 232448}
    expected = [(static, device, limits[device] - static) for static in (0, 1024, 5000) for device in limits]
    assert sorted(tuple(map(int, line.split())) for line in printed[10:]) == expected


def test_no_launch_sets_a_limit_itself():
    found = {file.name for file in CUDA.rglob("*.cu*") if "cudaFuncSetAttribute(" in file.read_text()}
    assert found == {"launch.cuh"}


class Recorder:
    """Stand-ins for the functions of torch.cuda that a launch calls, and for the kernels; `events` has what they see."""

    def __init__(self, monkeypatch) -> None:
        self.events = []
        recorder = self

        class Device(contextlib.AbstractContextManager):
            def __init__(self, device: torch.device) -> None:
                self.device = device

            def __enter__(self) -> None:
                recorder.events.append(("enter", str(self.device)))

            def __exit__(self, *error: object) -> None:
                recorder.events.append(("leave", str(self.device)))

        def current_stream(device: torch.device) -> types.SimpleNamespace:
            return types.SimpleNamespace(cuda_stream=100 + device.index)

        def empty(count: int, **options: object) -> None:
            self.events.append(("allocate", count, options["dtype"], str(options["device"])))

        def kernel(device: int, stream: int, allocate, *arguments: object) -> None:
            self.events.append(("kernel", device, stream, len(arguments)))
            allocate(64)

        monkeypatch.setattr(torch.cuda, "device", Device)
        monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(library, "cuda_extension", lambda: types.SimpleNamespace(kernel=kernel))


def test_a_launch_takes_the_device_and_the_stream_of_its_tensors(monkeypatch):
    first, second = (tensor_on("cuda:2", torch.zeros(2)) for _ in range(2))
    recorder = Recorder(monkeypatch)
    library.launch("kernel", first, None, 5, second)
    assert recorder.events == [
        ("enter", "cuda:2"),
        ("kernel", 2, 102, 4),
        ("allocate", 64, torch.uint8, "cuda:2"),
        ("leave", "cuda:2"),
    ]


@pytest.mark.parametrize("other", ["cuda:1", "cpu"])
def test_a_launch_refuses_tensors_of_two_devices(monkeypatch, other):
    first, second = tensor_on("cuda:2", torch.zeros(2)), tensor_on(other, torch.zeros(2))
    recorder = Recorder(monkeypatch)
    with pytest.raises(ValueError, match=f"kernel: all tensors must be on cuda:2, got one on {other}; move it there"):
        library.launch("kernel", first, 5, None, second)
    assert not recorder.events

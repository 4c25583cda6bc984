"""CuPy arrays as arguments of the ops: results, and the order of CuPy's and torch's streams."""

import importlib.util
from typing import Any

import pytest
import torch
from assertions import assert_bit_equal, every_case
from calls import OPS, forward
from cases import BUILDERS, SMALL, WITH_STATE, Case, Tensors
from torch import Tensor

import megalodon_ops as mo

cupy = pytest.importorskip("cupy", reason="needs CuPy", exc_type=ImportError)
if not torch.cuda.is_available() or importlib.util.find_spec("megalodon_ops._cuda") is None:
    pytest.skip("needs a GPU and the CUDA kernels", allow_module_level=True)


def on_tensors(case: Case) -> Tensors:
    return {name: result.cpu() for name, result in forward(getattr(mo, case.op), case.converted(Tensor.cuda)).items()}


def to_cpu(results: dict[str, Any]) -> Tensors:
    return {name: torch.from_numpy(cupy.asnumpy(result)) for name, result in results.items()}


def delay(stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, about 0.1 s


def poison(tensors: Tensors) -> None:
    """Write NaN to the memory that torch will allocate next for tensors like these."""
    blocks = [torch.full((tensor.numel(),), torch.nan, device="cuda") for tensor in tensors.values() for _ in range(4)]
    torch.cuda.synchronize()
    del blocks


@pytest.mark.parametrize("default", ["torch", "CuPy", "none"])
@pytest.mark.parametrize("op", OPS)
def test_the_op_waits_for_arrays_cupy_for_results_and_torch_for_cupy(op, default):
    """The arrays or the op are late; CuPy reads the results at once, and again late, when torch has freed them."""
    torch_stream = torch.cuda.default_stream() if default == "torch" else torch.cuda.Stream()
    cupy_stream = cupy.cuda.Stream.null if default == "CuPy" else cupy.cuda.Stream(non_blocking=True)
    cupy_stream_of_torch = torch.cuda.ExternalStream(cupy_stream.ptr)
    case = BUILDERS[op](L=300, **WITH_STATE.get(op, {}))
    case = case.converted(lambda tensor: tensor.nan_to_num() if tensor.is_floating_point() else tensor)
    with every_case() as every, torch.cuda.stream(torch_stream), cupy_stream:
        for late in (cupy_stream_of_torch, torch_stream):
            with every(late):
                expected, writes = on_tensors(case), []

                def late_array(tensor: Tensor) -> Any:
                    source = cupy.asarray(tensor.numpy())
                    writes.append((cupy.full_like(source, cupy.nan if source.dtype.kind in "fc" else 0), source))
                    return writes[-1][0]

                arrays = case.converted(late_array)
                poison(expected)
                delay(late)
                for array, source in writes:
                    array[...] = source
                results = forward(getattr(mo, op), arrays)
                assert {type(result) for result in results.values()} == {cupy.ndarray}
                copies = {name: result.copy() for name, result in results.items()}
                delay(cupy_stream_of_torch)
                late_copies = {name: result.copy() for name, result in results.items()}
                del results
                poison(expected)
                assert_bit_equal(to_cpu(copies), expected)
                assert_bit_equal(to_cpu(late_copies), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_arrays_on_another_device_than_the_current_one():
    with cupy.cuda.Device(1):
        results = forward(mo.cema, SMALL["cema"].converted(lambda tensor: cupy.asarray(tensor.numpy())))
    assert {result.device.id for result in results.values()} == {1}
    assert_bit_equal(to_cpu(results), on_tensors(SMALL["cema"]))

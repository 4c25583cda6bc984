"""CuPy arrays as arguments of the ops: results, and the order of CuPy's and torch's streams."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from assertions import assert_bit_equal
from calls import OPS, forward
from cases import BUILDERS, SMALL, WITH_STATE, Case, Tensors
from torch import Tensor

import megalodon_ops as mo

cupy = pytest.importorskip("cupy", reason="needs CuPy", exc_type=ImportError)
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if importlib.util.find_spec("megalodon_ops._cuda") is None:
    pytest.skip("needs the CUDA kernels, which are not in this build", allow_module_level=True)

DELAY = 200_000_000  # cycles, about 0.1 s


def to_cupy(tensor: Tensor) -> Any:
    return cupy.asarray(tensor.numpy())


def to_cpu(results: dict[str, Any]) -> Tensors:
    return {name: torch.from_numpy(cupy.asnumpy(result)) for name, result in results.items()}


def on_tensors(case: Case) -> Tensors:
    return {name: result.cpu() for name, result in forward(getattr(mo, case.op), case.converted(Tensor.cuda)).items()}


def delay(stream: Any) -> None:
    """Keep a CuPy stream busy for about 0.1 s."""
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        torch.cuda._sleep(DELAY)


def poison(tensors: Tensors) -> None:
    """Write NaN to the memory that torch will allocate next for tensors like these."""
    blocks = [torch.full((tensor.numel(),), torch.nan, device="cuda") for tensor in tensors.values() for _ in range(4)]
    torch.cuda.synchronize()
    del blocks


@pytest.fixture(params=OPS)
def case(request: pytest.FixtureRequest) -> Case:
    """A call with an initial state; rows beyond its positions are finite."""
    case = BUILDERS[request.param](L=300, **WITH_STATE.get(request.param, {}))
    return case.converted(lambda tensor: tensor.nan_to_num() if tensor.is_floating_point() else tensor)


@pytest.fixture(params=["default of torch", "default of CuPy", "no default"])
def cupy_stream(request: pytest.FixtureRequest) -> Iterator[Any]:
    """CuPy's current stream; it is not ordered with torch's current stream."""
    torch_stream = torch.cuda.default_stream() if request.param == "default of torch" else torch.cuda.Stream()
    stream = cupy.cuda.Stream.null if request.param == "default of CuPy" else cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(torch_stream), stream:
        yield stream
    torch.cuda.synchronize()


def test_the_op_waits_for_the_arrays(case, cupy_stream):
    """The values arrive late on CuPy's stream; until then, their memory holds NaN (or 0 for integers)."""
    expected, pairs = on_tensors(case), []

    def late(tensor: Tensor) -> Any:
        source = to_cupy(tensor)
        pairs.append((cupy.full_like(source, cupy.nan if source.dtype.kind in "fc" else 0), source))
        return pairs[-1][0]

    arrays = case.converted(late)
    torch.cuda.synchronize()
    delay(cupy_stream)
    for target, source in pairs:
        target[...] = source
    results = forward(getattr(mo, case.op), arrays)
    assert {type(result) for result in results.values()} == {cupy.ndarray}
    assert_bit_equal(to_cpu(results), expected)


def test_cupy_waits_for_the_results_and_torch_for_cupy(case, cupy_stream):
    """The op runs late on torch's stream; its results are freed while CuPy's stream still has to copy them."""
    expected, arrays = on_tensors(case), case.converted(to_cupy)
    poison(expected)
    torch.cuda._sleep(DELAY)
    results = forward(getattr(mo, case.op), arrays)
    delay(cupy_stream)
    copies = {name: result.copy() for name, result in results.items()}
    del results
    poison(expected)
    assert_bit_equal(to_cpu(copies), expected)


@pytest.mark.parametrize("case", ["chunked_attention", "normalized_attention"], indirect=True)
def test_states_are_written_in_place_where_asked(case, cupy_stream):
    case = case.with_options(inplace_state=True)
    expected, arrays = on_tensors(case), case.converted(to_cupy)
    delay(cupy_stream)
    results = forward(getattr(mo, case.op), arrays)
    assert all(results[f"state.{field}"] is array for field, array in arrays.options["state"]._asdict().items())
    assert_bit_equal(to_cpu({name: result.copy() for name, result in results.items()}), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_arrays_on_another_device_than_the_current_one():
    with cupy.cuda.Device(1):
        results = forward(mo.cema, SMALL["cema"].converted(to_cupy))
    assert {result.device.id for result in results.values()} == {1}
    assert_bit_equal(to_cpu(results), on_tensors(SMALL["cema"]))

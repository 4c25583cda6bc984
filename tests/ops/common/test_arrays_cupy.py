"""CuPy arrays as arguments of the ops: the kind that comes back, whose memory it is, the order of streams."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from assertions import assert_bit_equal
from calls import OPS, forward
from cases import (
    Case,
    cema_case,
    cema_end_state_case,
    chunked_attention_case,
    normalized_attention_case,
    normalized_qk_case,
    timestep_norm_case,
    timestep_norm_end_state_case,
)
from torch import Tensor
from torch.utils._pytree import tree_map_only

import megalodon_ops as mo

cupy = pytest.importorskip("cupy", reason="needs CuPy", exc_type=ImportError)
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if importlib.util.find_spec("megalodon_ops._cuda") is None:
    pytest.skip("needs the CUDA kernels, which are not in this build", allow_module_level=True)

all_ops = pytest.mark.parametrize("op", OPS)
in_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
DELAY = 200_000_000  # cycles, about 0.1 s

BUILDERS = {
    "cema": lambda dtype: cema_case(B=2, L=300, D=64, state=True, dtype=dtype),
    "timestep_norm": lambda dtype: timestep_norm_case(B=2, L=300, G=4, width=16, count=2, dtype=dtype),
    "cema_end_state": lambda dtype: cema_end_state_case(B=2, L=300, D=64, dtype=dtype),
    "timestep_norm_end_state": lambda dtype: timestep_norm_end_state_case(B=2, L=300, G=4, width=16, dtype=dtype),
    "normalized_qk": lambda dtype: normalized_qk_case(B=2, L=300, H=2, K=32, C=64, position=True, dtype=dtype),
    "chunked_attention": lambda dtype: chunked_attention_case(
        B=2, L=300, H=2, K=32, V=48, C=64, state=True, dropkey=0.2, dtype=dtype
    ),
    "normalized_attention": lambda dtype: normalized_attention_case(
        B=2, L=300, H=2, K=32, V=48, C=64, state=True, dropkey=0.2, dtype=dtype
    ),
}


def converted(case: Case, convert: Callable[[Tensor], Any]) -> Case:
    """The case with something else for each of its tensors, inside states, too."""
    return case.with_tensors(**tree_map_only(Tensor, convert, case.tensors)).with_options(
        **tree_map_only(Tensor, convert, case.options)
    )


def from_cpu(tensor: Tensor) -> Any:
    return cupy.asarray(tensor.numpy())


def on_tensors(case: Case) -> dict[str, Tensor]:
    """What the op gives for CUDA tensors."""
    results = forward(getattr(mo, case.op), converted(case, Tensor.cuda))
    return {name: result.cpu() for name, result in results.items()}


def to_cpu(results: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(cupy.asnumpy(result)) for name, result in results.items()}


def delay(stream: Any) -> None:
    """Makes a CuPy stream busy for long before what comes next on it."""
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        torch.cuda._sleep(DELAY)


def poison(size: int) -> None:
    """NaN in the memory that torch hands out next."""
    blocks = [torch.full((size,), torch.nan, device="cuda") for _ in range(8)]
    torch.cuda.synchronize()
    del blocks


@pytest.fixture(params=["default", "other"])
def torch_stream(request: pytest.FixtureRequest) -> Iterator[torch.cuda.Stream]:
    """Torch's current stream."""
    stream = torch.cuda.default_stream() if request.param == "default" else torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.synchronize()


@pytest.fixture(params=["default", "other"])
def cupy_stream(request: pytest.FixtureRequest) -> Iterator[Any]:
    """CuPy's current stream; stream "other" is not ordered with the default stream."""
    stream = cupy.cuda.Stream.null if request.param == "default" else cupy.cuda.Stream(non_blocking=True)
    with stream:
        yield stream
    stream.synchronize()


@in_dtypes
@all_ops
def test_cupy_arrays_give_the_bits_of_tensors(op, dtype):
    case = BUILDERS[op](dtype)
    results = forward(getattr(mo, op), converted(case, from_cpu))
    assert {type(result) for result in results.values()} == {cupy.ndarray}
    assert_bit_equal(to_cpu(results), on_tensors(case))


@all_ops
def test_the_op_waits_for_the_arrays(op, torch_stream, cupy_stream):
    """The values arrive late on CuPy's stream; before, their memory holds NaN (or 0, within bounds as an offset)."""
    case = BUILDERS[op](torch.float32)
    expected = on_tensors(case)
    pairs = []

    def lies_empty(tensor: Tensor) -> Any:
        source = from_cpu(tensor)
        target = cupy.full_like(source, cupy.nan if source.dtype.kind in "fc" else 0)
        pairs.append((source, target))
        return target

    arguments = converted(case, lies_empty)
    torch.cuda.synchronize()
    delay(cupy_stream)
    for source, target in pairs:
        target[...] = source
    results = forward(getattr(mo, op), arguments)
    assert_bit_equal(to_cpu(results), expected)


@all_ops
def test_cupy_waits_for_the_results(op, torch_stream, cupy_stream):
    """The op runs late on torch's stream; its output's memory holds NaN before."""
    case = BUILDERS[op](torch.float32)
    expected = on_tensors(case)
    arguments = converted(case, from_cpu)
    torch.cuda.synchronize()
    poison(max(result.numel() for result in expected.values()))
    torch.cuda._sleep(DELAY)
    results = forward(getattr(mo, op), arguments)
    copies = {name: result.copy() for name, result in results.items()}
    assert_bit_equal(to_cpu(copies), expected)


@all_ops
def test_memory_is_not_reused_while_cupy_reads(op, torch_stream, cupy_stream):
    """The results are dropped while a copy of them is pending on CuPy's stream."""
    case = BUILDERS[op](torch.float32)
    expected = on_tensors(case)
    results = forward(getattr(mo, op), converted(case, from_cpu))
    torch.cuda.synchronize()
    delay(cupy_stream)
    copies = {name: result.copy() for name, result in results.items()}
    sizes = [result.size for result in results.values()]
    del results
    taken = [torch.full((size,), torch.nan, device="cuda") for size in sizes for _ in range(4)]
    torch.cuda.synchronize()
    assert_bit_equal(to_cpu(copies), expected)
    del taken


@pytest.mark.parametrize("op", ["chunked_attention", "normalized_attention"])
def test_inplace_state_writes_to_the_callers_arrays(op, torch_stream, cupy_stream):
    case = BUILDERS[op](torch.float32)
    case = case.with_options(state=mo.AttentionState(*(t.nan_to_num() for t in case.options["state"])))
    tensors = converted(case, Tensor.cuda)
    expected, state = getattr(mo, op)(**tensors.tensors, **tensors.options, inplace_state=True, return_state=True)
    arguments = converted(case, from_cpu)
    delay(cupy_stream)
    o, returned = getattr(mo, op)(**arguments.tensors, **arguments.options, inplace_state=True, return_state=True)
    mine = arguments.options["state"]
    assert all(a is b for a, b in zip(returned, mine, strict=True))
    copies = {"o": o.copy(), **{name: array.copy() for name, array in mine._asdict().items()}}
    expected = {"o": expected, **state._asdict()}
    assert_bit_equal(to_cpu(copies), {name: tensor.cpu() for name, tensor in expected.items()})


def test_errors_name_the_argument_and_the_fix():
    x, *rest = (from_cpu(tensor) for tensor in cema_case().tensors.values())
    with pytest.raises(ValueError, match="cema: `x` must not have negative strides, got .*; pass a contiguous copy"):
        mo.cema(x[:, ::-1], *rest)
    with pytest.raises(TypeError, match=r"cema: `p` must be an array, as `x` is \(cupy.*ndarray\), got a torch tensor"):
        mo.cema(x, torch.from_dlpack(rest[0]), *rest[1:])
    with pytest.raises(ValueError, match="must be on cuda:0"):
        mo.cema(x, cupy.asnumpy(rest[0]), *rest[1:])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_arrays_on_another_device_than_the_current_one():
    case = cema_case()
    with cupy.cuda.Device(1):
        results = forward(mo.cema, converted(case, from_cpu))
    assert {result.device.id for result in results.values()} == {1}
    assert_bit_equal(to_cpu(results), on_tensors(case))

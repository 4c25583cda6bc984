"""Arrays of other libraries as arguments of the ops: results, memory, errors. CuPy's are in test_arrays_cupy.py."""

from __future__ import annotations

import itertools
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_bit_equal, every_case
from calls import OPS, forward
from cases import BUILDERS, SMALL
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops.ops.common.arrays import _Result, call_with_arrays

all_ops = pytest.mark.parametrize("op", OPS)


class Bare:
    """An array with only the methods of the DLPack protocol."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Named(Bare):
    """An array with the namespace of the array API standard."""

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return SimpleNamespace(from_dlpack=lambda array: Named(np.from_dlpack(array)))


Packaged = type("Packaged", (Bare,), {"__module__": "numpy.core"})  # like old CuPy arrays, which have no namespace


def read_only(array: np.ndarray) -> np.ndarray:
    array = array[...]
    array.flags.writeable = False
    return array


KINDS = {
    "contiguous": np.asarray,
    "read-only": read_only,
    "gaps": lambda array: np.repeat(array, 2, -1)[..., ::2],
    "column-major": lambda array: read_only(np.asfortranarray(array)),
    "misaligned": lambda array: np.ndarray(array.shape, array.dtype, b"." + array.tobytes(), 1),
    "subclass": lambda array: array.view(np.memmap),
    "namespace": Named,
    "package": Packaged,
    "neither": Bare,
}
RESULTS = {"namespace": Named, "neither": Tensor}  # np.ndarray for the others


def as_tensors(results: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(getattr(result, "array", result))) for name, result in results.items()}


@all_ops
def test_results_equal_those_of_tensors_and_have_the_arrays_type(op):
    cases = [SMALL[op], BUILDERS[op](dtype=torch.float16, lengths=[4, 9]), BUILDERS[op](L=0, dtype=torch.float64)]
    with every_case() as every:
        for case, (kind, arrange) in itertools.product(cases, KINDS.items()):
            with every(case.dtype, kind):
                results = forward(getattr(mo, op), case.converted(lambda tensor: arrange(tensor.numpy())))
                assert {type(result) for result in results.values()} == {RESULTS.get(kind, np.ndarray)}
                found = results if kind == "neither" else as_tensors(results)
                assert_bit_equal(found, forward(getattr(mo, op), case))


def test_no_copies_and_arrays_live_as_long_as_their_memory():
    for arrange in (np.asarray, read_only):
        array = arrange(np.ones((2, 3)))
        row = call_with_arrays(lambda x: x[0], x=array)
        assert np.shares_memory(row, array) and row.flags.writeable
        alive = weakref.ref(array)
        del array
        assert alive() is not None
        del row
        assert alive() is None


def test_the_first_argument_of_the_signature_decides_the_type():
    arguments = {name: tensor.numpy() for name, tensor in SMALL["cema"].tensors.items()}
    mixed = arguments | {"p": Named(arguments["p"])}
    assert type(mo.cema(**dict(reversed(mixed.items())))) is np.ndarray
    assert type(mo.cema(**dict(reversed((mixed | {"x": Named(arguments["x"])}).items())))) is Named


def test_calls_run_without_gradients_and_autocast():
    def modes(x: Tensor) -> Tensor:
        return x.new_tensor([torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")])

    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not call_with_arrays(modes, x=np.ones(1)).any()


def test_states_are_written_in_place_where_asked():
    for op in ("chunked_attention", "normalized_attention"):
        function = getattr(mo, op)
        case = SMALL[op].converted(lambda tensor: tensor.nan_to_num() if tensor.is_floating_point() else tensor.clone())
        arrays = case.converted(lambda tensor: tensor.numpy().copy())
        state = arrays.options["state"]
        results = forward(function, arrays.with_options(state=tuple(state)))
        assert_bit_equal(as_tensors(results), forward(function, case))
        results = forward(function, arrays.with_options(inplace_state=True))
        assert all(results[f"state.{field}"] is array for field, array in state._asdict().items())
        assert_bit_equal(as_tensors(results), forward(function, case.with_options(inplace_state=True)))
        locked = arrays.with_options(inplace_state=True, state=state._replace(v=read_only(state.v)))
        with pytest.raises(ValueError, match=f"^{op}: `state.v` must be .* can write .*read-only.; pass a contiguous"):
            forward(function, locked)


def test_consumers_wait_for_results_and_torch_for_consumers(monkeypatch):
    """GPU memory must not be reused while a consumer still reads the tensor."""
    events = []
    tensor = SimpleNamespace(
        is_cuda=True,
        __dlpack__=lambda stream: events.append(("wait", stream)),
        record_stream=lambda stream: events.append(("keep until done", stream)),
    )
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default")
    monkeypatch.setattr(torch.cuda, "ExternalStream", hex)
    for stream, consumer in ((0x70, "0x70"), (1, "default"), (None, "default"), (-1, None)):
        events.clear()
        _Result(tensor).__dlpack__(stream=stream)
        assert events == [("keep until done", consumer)] * (stream != -1) + [("wait", stream or 1)]


IN_DLPACK = "must be an array that torch can read through DLPack, got numpy.ndarray of"
NO_ARRAY = "must be a torch tensor or an array with __dlpack__, got"
ERRORS = {  # argument of cema, function that spoils it, error
    "flipped": ("x", lambda x: x[:, ::-1], ValueError, rf"{IN_DLPACK} float32 \(its strides \(180, -20, 4\) are neg"),
    "byte order": ("x", lambda x: x.astype(">f4"), TypeError, rf"{IN_DLPACK} >f4 \(.*\); pass a contiguous copy in"),
    "objects": ("x", lambda x: x.astype(object), TypeError, f"{IN_DLPACK} object"),
    "integers": ("x", lambda x: x.astype(int), TypeError, "must be float32, float64, bfloat16 or float16, got int64"),
    "wide": ("p", lambda p: p.astype(float), TypeError, r'must be float32 .* got float64; .* \.astype\("float32"\)'),
    "shape": ("p", lambda p: p[:4], ValueError, "must have shape"),
    "list": ("x", lambda x: x.tolist(), TypeError, f"{NO_ARRAY} list; make it one, as numpy.asarray does"),
    "scalar": ("p", lambda p: p[0, 0], TypeError, f"{NO_ARRAY} numpy.float32; make it one"),
    "none": ("p", lambda p: None, TypeError, f"{NO_ARRAY} None"),
    "tensor": ("state", torch.from_numpy, TypeError, r"must be an array, as `x` is \(numpy.ndarray\), got .*; pass t"),
}


def test_errors_name_the_argument_and_the_fix():
    arrays = SMALL["cema"].converted(Tensor.numpy).tensors
    with every_case() as every:
        for name, (argument, change, error, message) in ERRORS.items():
            with every(name), pytest.raises(error, match=f"^cema: `{argument}` {message}"):
                mo.cema(**arrays | {argument: change(arrays[argument])})


@all_ops
def test_calls_on_tensors_take_no_arrays(op):
    """Replace each argument in turn by an array, including states and offsets."""
    case = SMALL[op].with_options(lengths=torch.tensor([3, 9]))
    wrong = case.converted(Tensor.numpy)
    with every_case() as every:
        for name, value in (wrong.tensors | wrong.options).items():
            if not isinstance(value, (np.ndarray, tuple)) or name == OPS[op].tokens[0]:
                continue
            mixed = case.with_tensors(**{name: value}) if name in case.tensors else case.with_options(**{name: value})
            match = rf"^{op}: `(state\.)?({name}|k)` must be a torch tensor, got numpy.ndarray; make it one"
            for mode in (torch.enable_grad(), torch.autocast("cpu")):
                with every(name, mode), mode, pytest.raises(TypeError, match=match):
                    forward(getattr(mo, op), mixed)

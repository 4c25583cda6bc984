"""Arrays of other libraries as arguments of the ops: results, memory, errors. CuPy's are in test_arrays_cupy.py."""

import itertools
import weakref
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

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=lambda array: Named(np.from_dlpack(array)))


Packaged = type("Packaged", (Bare,), {"__module__": "numpy.core"})  # like old CuPy arrays, which have no namespace


def read_only(array: np.ndarray) -> np.ndarray:
    array = array[...]
    array.flags.writeable = False
    return array


KINDS = {  # function that arranges an array, type of the results
    "contiguous": (np.asarray, np.ndarray),
    "read-only": (read_only, np.ndarray),
    "gaps": (lambda array: np.repeat(array, 2, -1)[..., ::2], np.ndarray),
    "column-major": (lambda array: read_only(np.asfortranarray(array)), np.ndarray),
    "misaligned": (lambda array: np.ndarray(array.shape, array.dtype, b"." + array.tobytes(), 1), np.ndarray),
    "subclass": (lambda array: array.view(np.memmap), np.ndarray),
    "namespace": (Named, Named),
    "package": (Packaged, np.ndarray),
    "neither": (Bare, Tensor),
}
ERRORS = {  # argument of cema, function that spoils it, error, beginning of its message after the argument
    "flipped": ("x", lambda x: x[:, ::-1], ValueError, r".* can read .* numpy.ndarray of float32 \(.* neg.*\); pass a"),
    "byte order": ("x", lambda x: x.astype(">f4"), TypeError, r".* can read .* numpy.ndarray of >f4 \(.*\); pass a"),
    "objects": ("x", lambda x: x.astype(object), TypeError, ".* can read .* of object"),
    "wide": ("p", lambda p: p.astype(float), TypeError, "must be torch.float32 .* convert it to float32"),
    "list": ("x", lambda x: x.tolist(), TypeError, r"must be .* tensor, got list; .*\(numpy.asarray in a call on arr"),
    "tensor": ("state", torch.from_numpy, TypeError, r"must be an array .* got torch.Tensor .*\(a call .* `x` is an a"),
}


def as_tensors(results: dict[str, Any]) -> dict[str, Tensor]:
    arrays = {name: np.asarray(getattr(result, "array", result)) for name, result in results.items()}
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def test_results_equal_those_of_tensors_and_have_the_arrays_type():
    with every_case() as every:
        for op, (kind, (arrange, expected)) in itertools.product(OPS, KINDS.items()):
            half = BUILDERS[op](dtype=torch.float16, lengths=[4, 9])
            for case in (SMALL[op], half, BUILDERS[op](L=0, dtype=torch.float64)):
                with every(op, case.dtype, kind):
                    results = forward(getattr(mo, op), case.converted(lambda tensor: arrange(tensor.numpy())))
                    assert {type(result) for result in results.values()} == {expected}
                    assert_bit_equal(as_tensors(results), forward(getattr(mo, op), case))


def test_the_first_array_decides_the_type():
    arrays = SMALL["cema"].converted(Tensor.numpy).tensors
    assert type(mo.cema(**arrays | {"p": Named(arrays["p"])})) is np.ndarray
    assert type(mo.cema(**arrays | {"x": Named(arrays["x"])})) is Named


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


def test_calls_run_without_gradients_and_autocast():
    def modes(x: Tensor) -> Tensor:
        return x.new_tensor([torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")])

    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not call_with_arrays(modes, x=np.ones(1)).any()


@pytest.mark.parametrize("op", ["chunked_attention", "normalized_attention"])
def test_states_are_written_in_place_where_asked(op):
    case = SMALL[op].converted(lambda tensor: tensor.nan_to_num() if tensor.is_floating_point() else tensor.clone())
    arrays = case.converted(lambda tensor: tensor.numpy().copy())
    state = arrays.options["state"]
    results = forward(getattr(mo, op), arrays.with_options(state=tuple(state)))
    assert_bit_equal(as_tensors(results), forward(getattr(mo, op), case))
    arrays = arrays.with_options(inplace_state=True).with_tensors(v=read_only(arrays.tensors["v"]))
    results = forward(getattr(mo, op), arrays)
    assert all(results[f"state.{field}"] is array for field, array in state._asdict().items())
    assert_bit_equal(as_tensors(results), forward(getattr(mo, op), case.with_options(inplace_state=True)))
    locked = arrays.with_options(state=state._replace(v=read_only(state.v)))
    with pytest.raises(ValueError, match=f"^{op}: `state.v` must be .* can write .*read-only.; pass a contiguous"):
        forward(getattr(mo, op), locked)


def test_consumers_wait_for_results_and_torch_for_consumers(monkeypatch):
    """GPU memory must not be reused while a consumer still reads the tensor."""
    events = []
    monkeypatch.setattr(_Result, "is_cuda", True)
    monkeypatch.setattr(_Result, "record_stream", lambda _, stream: events.append(f"keep until {stream} is done"))
    monkeypatch.setattr(Tensor, "__dlpack__", lambda _, stream: events.append(f"{stream} waits"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default")
    monkeypatch.setattr(torch.cuda, "ExternalStream", int)
    for stream, consumer_stream in ((0x70, 0x70), (1, "default"), (None, "default"), (-1, None)):
        consumer = SimpleNamespace(from_dlpack=lambda result: result.__dlpack__(stream=stream))
        monkeypatch.setattr(Named, "__array_namespace__", lambda _: consumer)
        events.clear()
        call_with_arrays(torch.clone, input=Named(np.ones(1)))
        kept = [f"keep until {consumer_stream} is done"] if stream != -1 else []
        assert events == [*kept, f"{stream or 1} waits"]


def test_errors_name_the_argument_and_the_fix():
    arrays = SMALL["cema"].converted(Tensor.numpy).tensors
    with every_case() as every:
        for name, (argument, spoil, error, message) in ERRORS.items():
            with every(name), pytest.raises(error, match=f"^cema: `{argument}` {message}"):
                mo.cema(**arrays | {argument: spoil(arrays[argument])})


def test_calls_on_tensors_take_no_arrays():
    with every_case() as every:
        for op, part in itertools.product(OPS, ("tensors", "options")):
            case = SMALL[op].with_options(lengths=torch.tensor([3, 9]))
            for name, value in getattr(case.converted(Tensor.numpy), part).items():
                if isinstance(value, (np.ndarray, tuple)) and name != OPS[op].tokens[0]:
                    match = rf"^{op}: `(state\.)?({name}|k)` must be a torch tensor, got numpy.ndarray; make it one"
                    replace_by = case.with_tensors if part == "tensors" else case.with_options
                    with every(op, name), pytest.raises(TypeError, match=match):
                        forward(getattr(mo, op), replace_by(**{name: value}))

"""Arrays of other libraries as arguments of the ops: what comes back, whose memory it is, what is refused.

CuPy's, which need a GPU, are in test_arrays_cupy.py.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_bit_equal
from cases import (
    BUILDERS,
    OPS,
    Case,
    cema_case,
    chunked_attention_case,
    forward,
    normalized_attention_case,
    normalized_qk_case,
    timestep_norm_case,
)
from hypothesis import given
from hypothesis import strategies as st
from programs import run_python
from strategies import CASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import megalodon_ops as mo
from megalodon_ops import arrays

all_ops = pytest.mark.parametrize("op", OPS)
IN_NUMPY = st.sampled_from([torch.float32, torch.float64, torch.float16])

SMALL = {
    "cema": cema_case(state=True),
    "timestep_norm": timestep_norm_case(count=2),
    "normalized_qk": normalized_qk_case(position=True),
    "chunked_attention": chunked_attention_case(state=True, dropkey=0.3),
    "normalized_attention": normalized_attention_case(state=True, dropkey=0.3),
}


def function(op: str) -> Callable[..., Any]:
    return getattr(mo, op)


def on_arrays(case: Case, convert: Callable[[Tensor], Any] = Tensor.numpy) -> Case:
    """The case with arrays for tensors, inside states, too."""
    return case.with_tensors(**tree_map_only(Tensor, convert, case.tensors)).with_options(
        **tree_map_only(Tensor, convert, case.options)
    )


def as_tensors(results: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(getattr(result, "array", result))) for name, result in results.items()}


class Bare:
    """The least that the protocol asks for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Named(Bare):
    """An array with a namespace, as the array API standard describes it."""

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return types.SimpleNamespace(from_dlpack=lambda array: Named(np.from_dlpack(array)))


@all_ops
@given(data=st.data())
def test_numpy_arrays_give_the_bits_of_tensors(op, data):
    case = data.draw(CASES[op](IN_NUMPY))
    results = forward(function(op), on_arrays(case))
    assert {type(result) for result in results.values()} == {np.ndarray}
    assert all(result.flags.writeable for result in results.values())
    assert_bit_equal(as_tensors(results), forward(function(op), case))


@pytest.mark.parametrize(
    "sequences", [{"lengths": [4, 9]}, {"B": 1, "cu_seqlens": [0, 4, 9]}], ids=["padded", "packed"]
)
@all_ops
def test_offsets_may_be_int32(op, sequences):
    case = BUILDERS[op](**sequences)
    narrow = {name: case.options[name].numpy().astype(np.int32) for name in sequences if name != "B"}
    results = forward(function(op), on_arrays(case).with_options(**narrow))
    assert_bit_equal(as_tensors(results), forward(function(op), case))


def read_only(array: np.ndarray) -> np.ndarray:
    array = array[...]
    array.flags.writeable = False
    return array


def with_gaps(array: np.ndarray) -> np.ndarray:
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1] + 1), array.dtype)
    wide[..., 1::2] = array
    return wide[..., 1::2]


def misaligned(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"." + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)


LAYOUTS = {
    "read-only": read_only,
    "read-only-with-gaps": lambda array: read_only(with_gaps(array)),
    "with-gaps": with_gaps,
    "column-major": np.asfortranarray,
    "misaligned-bytes": misaligned,
    "broadcast": lambda array: np.broadcast_to(array[:1], array.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@all_ops
def test_layouts_of_numpy_change_nothing(op, layout):
    case = SMALL[op]

    def results(arrange):
        return as_tensors(forward(function(op), on_arrays(case, lambda tensor: arrange(tensor.numpy()))))

    assert_bit_equal(results(layout), results(lambda array: np.ascontiguousarray(layout(array)).copy()))


@pytest.mark.parametrize(
    "shape",
    [{"B": 0, "L": 5}, {"B": 2, "L": 0}, {"B": 1, "L": 5, "cu_seqlens": [3]}, {"B": 2, "L": 5, "lengths": [0, 0]}],
    ids=["no-rows", "no-steps", "no-sequences", "empty-rows"],
)
@all_ops
def test_nothing_to_do(op, shape):
    case = BUILDERS[op](**shape)
    assert_bit_equal(as_tensors(forward(function(op), on_arrays(case))), forward(function(op), case))


class Addresses(TorchDispatchMode):
    """Where the tensors lie that registered ops are given and return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "megalodon_ops":
            self.seen |= {leaf.data_ptr() for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)}
        return result


@pytest.mark.parametrize("arrange", [np.ascontiguousarray, read_only], ids=["writable", "read-only"])
@all_ops
def test_nothing_is_copied(op, arrange):
    case = on_arrays(SMALL[op], lambda tensor: arrange(tensor.numpy()))
    with Addresses() as addresses:
        results = forward(function(op), case)
    passed = [leaf for leaf in tree_leaves((case.tensors, case.options)) if isinstance(leaf, np.ndarray)]
    assert {array.ctypes.data for array in [*passed, *results.values()]} <= addresses.seen


@pytest.mark.parametrize("arrange", [np.ascontiguousarray, read_only], ids=["writable", "read-only"])
def test_a_tensor_keeps_its_array(arrange):
    array = arrange(np.ones(3))
    alive = weakref.ref(array)
    tensor = arrays._as_tensor("op: `x`", array, write=False)
    del array
    gc.collect()
    assert alive() is not None
    del tensor
    gc.collect()
    assert alive() is None


@all_ops
def test_a_kind_with_a_namespace_comes_back(op):
    results = forward(function(op), on_arrays(SMALL[op], lambda tensor: Named(tensor.numpy())))
    assert {type(result) for result in results.values()} == {Named}
    assert_bit_equal(as_tensors(results), forward(function(op), SMALL[op]))


@all_ops
def test_a_kind_without_a_namespace_gets_tensors(op):
    results = forward(function(op), on_arrays(SMALL[op], lambda tensor: Bare(tensor.numpy())))
    assert {type(result) for result in results.values()} == {Tensor}
    assert_bit_equal(results, forward(function(op), SMALL[op]))


def test_a_kind_may_have_from_dlpack_in_its_package(monkeypatch):
    """As CuPy had, before its arrays told their namespace."""
    package = types.ModuleType("someones")
    package.Array = type("Array", (Bare,), {"__module__": "someones.core"})
    package.from_dlpack = lambda array: package.Array(np.from_dlpack(array))
    monkeypatch.setitem(sys.modules, "someones", package)
    results = forward(mo.cema, on_arrays(SMALL["cema"], lambda tensor: package.Array(tensor.numpy())))
    assert {type(result) for result in results.values()} == {package.Array}


def test_subclasses_of_numpy_come_back_as_arrays(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(1, 3, 2))
    x[:] = 1
    y = mo.timestep_norm(x, *np.zeros((2, 2), np.float32), num_groups=1)
    assert type(y) is np.ndarray


def test_the_first_argument_decides_the_kind():
    case = SMALL["cema"]
    x, *rest = (tensor.numpy() for tensor in case.tensors.values())
    arguments = dict(zip(case.tensors, [x, *map(Named, rest)], strict=True))
    assert type(mo.cema(**arguments)) is np.ndarray
    assert type(mo.cema(**arguments | {"x": Named(x)})) is Named
    assert (
        type(mo.cema(**dict(reversed((arguments | {"x": Named(x)}).items())))) is Named
    )  # not the first that is named


def test_calls_run_without_gradients_and_autocast():
    case = on_arrays(SMALL["chunked_attention"], lambda tensor: Bare(tensor.numpy()))
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        results = forward(mo.chunked_attention, case)
    assert not any(result.requires_grad for result in results.values())
    assert_bit_equal(results, forward(mo.chunked_attention, SMALL["chunked_attention"]))


@pytest.mark.parametrize("op", ["chunked_attention", "normalized_attention"])
@pytest.mark.parametrize("kind", [np.asarray, Named], ids=["numpy", "named"])
def test_inplace_state_writes_to_the_callers_arrays(op, kind, monkeypatch):
    monkeypatch.setattr(Named, "__getitem__", lambda self, key: self.array[key], raising=False)
    monkeypatch.setattr(
        Named, "__setitem__", lambda self, key, value: self.array.__setitem__(key, value), raising=False
    )
    case = SMALL[op]
    expected = function(op)(**case.tensors, **case.options, return_state=True)
    before = case.options["state"].k.numpy()
    copies = [tensor.numpy().copy() for tensor in case.options["state"]]
    arguments = on_arrays(case, lambda tensor: kind(tensor.numpy()))
    state = mo.AttentionState(*map(kind, copies))
    options = arguments.options | {"state": state, "inplace_state": True, "return_state": True}
    o, returned = function(op)(**arguments.tensors, **options)
    assert isinstance(returned, mo.AttentionState) and all(a is b for a, b in zip(returned, state, strict=True))
    valid = np.arange(case.options["chunk_size"]) < expected[1].position.numpy()[:, None]
    assert np.array_equal(copies[0][valid], expected[1].k.numpy()[valid])
    assert np.array_equal(copies[1][valid], expected[1].v.numpy()[valid])
    assert np.array_equal(copies[2], expected[1].position.numpy())
    assert not np.array_equal(copies[0], before, equal_nan=True)
    assert_bit_equal(as_tensors({"o": o}), {"o": expected[0]})


def test_inplace_state_refuses_what_cannot_be_written():
    case = on_arrays(SMALL["chunked_attention"])
    arguments = case.tensors | case.options | {"inplace_state": True}
    state = case.options["state"]
    match = r"chunked_attention: `state.v` must be writable for `inplace_state`, got a numpy.ndarray that is not \("
    with pytest.raises(ValueError, match=match):
        mo.chunked_attention(**arguments | {"state": state._replace(v=read_only(state.v))})
    with pytest.raises(ValueError, match="`state.position` must be writable .* not subscriptable.*; pass a copy"):
        mo.chunked_attention(**arguments | {"state": state._replace(position=Bare(state.position))})


def test_plain_tuples_are_states_too():
    case = on_arrays(SMALL["timestep_norm"])
    state = (case.options["count"], case.tensors["mean"], case.tensors["var"], None)
    inputs = [case.tensors[name] for name in ("x", "weight", "bias")]
    y = mo.timestep_norm(*inputs, num_groups=3, state=state)
    assert np.array_equal(y, mo.timestep_norm(*inputs, num_groups=3, state=mo.TimestepNormState(*state)))


def wrong_byte_order(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder(">"))


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        ("x", lambda x: x[:, ::-1], ValueError, r"must not have negative strides, got \(180, -20, 4\); pass a contig"),
        ("x", wrong_byte_order, TypeError, r".* got numpy.ndarray of >f4 \(.*byte order.*\); pass a contiguous copy"),
        (
            "x",
            lambda x: x.astype(object),
            TypeError,
            "must be an array that DLPack can pass on to torch, got numpy.nda",
        ),
        ("x", lambda x: x.astype(int), TypeError, "must be float32, float64, bfloat16 or float16, got int64"),
        ("x", lambda x: x.tolist(), TypeError, "must be a torch tensor or an array with __dlpack__, got list; make it"),
        ("p", lambda p: np.float32(1), TypeError, ".* got numpy.float32; make it an array, as with numpy.asarray"),
        ("p", lambda p: None, TypeError, "must be a torch tensor or an array with __dlpack__, got NoneType"),
        ("p", torch.from_numpy, TypeError, r"must be an array, as `x` is \(numpy.ndarray\), got a torch tensor; pass "),
        ("p", lambda p: p[:4], ValueError, "must have shape"),
        (
            "state",
            torch.from_numpy,
            TypeError,
            "must be an array, as `x` is .*; pass torch.from_dlpack.x. to work on t",
        ),
    ],
    ids=["flipped", "byte-order", "objects", "integers", "list", "scalar", "none", "tensor", "shape", "state"],
)
def test_errors_name_the_argument_and_the_fix(argument, change, error, message):
    tensors = on_arrays(SMALL["cema"]).tensors
    with pytest.raises(error, match=f"^cema: `{argument}` {message}"):
        mo.cema(**tensors | {argument: change(tensors[argument])})


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("change", [Tensor.numpy, Tensor.tolist], ids=["array", "list"])
@all_ops
def test_a_call_on_tensors_takes_no_arrays(op, change, gradients):
    """Each argument in turn, states and offsets included."""
    case = SMALL[op].with_options(lengths=torch.tensor([3, 9]))
    inputs = OPS[op].tokens + OPS[op].parameters
    reporter, field = (r"\w+", "position") if op == "normalized_attention" else (op, "state.k")  # made of two ops
    with torch.set_grad_enabled(gradients):
        for name, value in (case.tensors | case.options).items():
            if name == inputs[0] or not isinstance(value, (Tensor, tuple)):
                continue
            changed = tree_map_only(Tensor, change, value)
            mixed = (case.with_tensors if name in case.tensors else case.with_options)(**{name: changed})
            named = field if isinstance(value, tuple) else name
            match = rf"^{reporter}: `{named}` must be a torch tensor, as .* is, got .*; make it one"
            with pytest.raises(TypeError, match=match):
                forward(function(op), mixed)


def test_other_errors_of_tensors_stay_as_they_are():
    with pytest.raises(NotImplementedError, match="Could not run 'megalodon_ops::cema_fwd'.*Sparse"):
        mo.cema(**SMALL["cema"].tensors | {"x": torch.zeros(2, 9, 5).to_sparse()})


def test_neither_numpy_nor_anything_else_is_imported():
    code = """if True:
        import sys
        sys.modules["numpy"] = None  # importing it would raise
        import torch, megalodon_ops as mo

        class Bare:
            def __init__(self, tensor): self.tensor = tensor
            def __dlpack__(self, **options): return self.tensor.__dlpack__(**options)
            def __dlpack_device__(self): return self.tensor.__dlpack_device__()

        x, zeros = Bare(torch.tensor([[[1.0, 3.0]]])), Bare(torch.zeros(2))
        print(mo.timestep_norm(x, zeros, zeros, num_groups=1, eps=0.0).tolist())
    """
    result = run_python(code, PYTHONWARNINGS="ignore")  # torch's, that there is no NumPy
    assert result.stdout.strip() == "[[[-1.0, 1.0]]]", result.stderr


def test_producers_get_the_stream_that_torch_works_on(monkeypatch):
    """The memory is the CPU's; only what is said about it is a GPU's."""
    streams = []

    class OnDevice(Bare):
        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self, *, stream=None, **options):
            streams.append(stream)
            return super().__dlpack__(**options)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: types.SimpleNamespace(cuda_stream=0x70))
    forward(mo.cema, on_arrays(SMALL["cema"], lambda tensor: OnDevice(tensor.numpy())))
    assert streams == [0x70] * len(SMALL["cema"].tensors)


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (0x70, [("wait", 0x70), ("keep until done", "stream 0x70")]),
        (1, [("wait", 1), ("keep until done", "default stream")]),
        (None, [("wait", 1), ("keep until done", "default stream")]),
        (-1, [("wait", -1)]),
    ],
    ids=str,
)
def test_consumers_wait_for_results_and_torch_for_consumers(monkeypatch, stream, events):
    """As on a GPU, whose memory must not be reused for another tensor while its consumer still reads it."""
    happened = []
    tensor = types.SimpleNamespace(
        is_cuda=True,
        device="cuda:0",
        __dlpack__=lambda *, stream, **options: happened.append(("wait", stream)),
        record_stream=lambda stream: happened.append(("keep until done", stream)),
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default stream")
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer: f"stream {pointer:#x}")
    arrays._Result(tensor).__dlpack__(stream=stream)
    assert happened == events


def test_errors_speak_of_arrays():
    x, zeros = np.ones((1, 3, 4), np.float32), np.zeros(4)
    with pytest.raises(
        TypeError, match=r"`weight` must be float32 .* got float64; convert it with \.astype\(\"float32\"\)"
    ):
        mo.timestep_norm(x, zeros, zeros, num_groups=2)


def test_queries_without_heads_are_told_so():
    q = torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match=r"add the batch dimension, or one of a single head"):
        mo.chunked_attention(q, q, q, chunk_size=2)

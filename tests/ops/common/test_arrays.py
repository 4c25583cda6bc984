"""Arrays of other libraries as arguments of the ops: what comes back, whose memory it is.

CuPy's, which need a GPU, are in test_arrays_cupy.py; what is refused is in test_arrays_refused.py.
"""

from __future__ import annotations

import sys
import types
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from array_kinds import Bare, Named, as_tensors, function, on_arrays, read_only
from assertions import assert_bit_equal
from calls import OPS, forward
from cases import BUILDERS, SMALL
from hypothesis import given
from hypothesis import strategies as st
from programs import run_python
from strategies import CASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megalodon_ops as mo
from megalodon_ops.ops.common import arrays

all_ops = pytest.mark.parametrize("op", OPS)
IN_NUMPY = st.sampled_from([torch.float32, torch.float64, torch.float16])


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
    """Records where the tensors lie that registered ops are given and return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "megalodon_ops":
            self.seen |= {leaf.data_ptr() for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)}
        return result


@pytest.mark.parametrize("arrange", [np.ascontiguousarray, read_only], ids=["writable", "read-only"])
@pytest.mark.parametrize("op", [op for op in OPS if op not in ("adaptive_working_memory", "bidirectional_cema")])
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
    assert alive() is not None
    del tensor
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
    """CuPy had from_dlpack in its package before its arrays told their namespace."""
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
    in_reverse = dict(reversed((arguments | {"x": Named(x)}).items()))  # the signature's first decides, not the call's
    assert type(mo.cema(**in_reverse)) is Named


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


def test_plain_tuples_are_states_too():
    case = on_arrays(SMALL["timestep_norm"])
    state = (case.options["count"], case.tensors["mean"], case.tensors["var"], None)
    inputs = [case.tensors[name] for name in ("x", "weight", "bias")]
    y = mo.timestep_norm(*inputs, num_groups=3, state=state)
    assert np.array_equal(y, mo.timestep_norm(*inputs, num_groups=3, state=mo.TimestepNormState(*state)))


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
    result = run_python(code, PYTHONWARNINGS="ignore")  # torch's warning that there is no NumPy
    assert result.stdout.strip() == "[[[-1.0, 1.0]]]", result.stderr


def test_producers_get_the_stream_that_torch_works_on(monkeypatch):
    """The memory is the CPU's; only what is said about this memory is a GPU's."""
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
    """A GPU's memory must not be reused for another tensor while a consumer of the first still reads."""
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

"""Calls that pass by torch's dispatcher: which may, that observers see the others, and that both give the same."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bit_equal
from backends import every_backend
from cases import cema_case, evaluate, forward, timestep_norm_case
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import megalodon_ops as mo
from megalodon_ops import _C

CASES = {"cema": cema_case(B=3, L=11, state=True), "timestep_norm": timestep_norm_case(B=3, L=11, count=2)}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Calls(TorchDispatchMode):
    """The names of the ops that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def tensor(kind):
    x = torch.ones(2, 3)
    return {
        "tensor": x,
        "parameter": torch.nn.Parameter(x),
        "empty": x[:0],
        "strided": x.t(),
        "complex": torch.view_as_complex(torch.ones(3, 2)),
        "subclass": x.as_subclass(Subclass),
        "negated": torch._neg_view(x),
        "conjugate": torch.view_as_complex(torch.ones(3, 2)).conj(),
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
        "zeros without memory": torch._efficientzerotensor(2, 3),
        "array": x.numpy(),
    }[kind]


@pytest.mark.parametrize("kind", ["tensor", "parameter", "empty", "strided", "complex"])
def test_plain_tensors(kind):
    if not _C.are_plain("t", (torch.ones(1),)):
        pytest.skip("this torch lacks DLPack's C exchange")
    assert _C.are_plain("t", (tensor(kind),)) and _C.are_plain("o", (tensor(kind),))
    with torch.no_grad():
        assert _C.are_plain("t", (tensor(kind),))
    with torch.inference_mode():
        assert _C.are_plain("t", (tensor(kind),))


@pytest.mark.parametrize(
    "kind", ["subclass", "negated", "conjugate", "meta", "sparse", "zeros without memory", "array"]
)
def test_tensors_that_torch_must_see(kind):
    assert not _C.are_plain("t", (tensor(kind),)) and not _C.are_plain("o", (tensor(kind),))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("i", (1, True, 1.0, None)), ("f", (1.0, 1, None)), ("b", (True, 1)), ("o", (None, 1)), ("t", ()),
    ],
)  # fmt: skip
def test_scalars_are_those_of_the_schema(kind, values):
    """What torch would convert or refuse is left to it."""
    plain = [_C.are_plain(kind, (value,)) for value in values]
    assert plain == [True, False, False, False][: len(values)]
    assert not _C.are_plain(kind, ()) and not _C.are_plain(kind, (None, None))


def test_any_requires_grad():
    x, parameter = torch.ones(1), torch.ones(1, requires_grad=True)
    assert not _C.any_requires_grad((x, None, 1, 1.0, True)) and _C.any_requires_grad((None, 1, x, parameter))


@every_case
def test_modes_see_the_ops(case):
    with Calls() as calls:
        evaluate(getattr(mo, case.op), case)
    assert [name for name in calls.names if "megalodon" in name] == [
        f"megalodon_ops::{case.op}_fwd", f"megalodon_ops::{case.op}_bwd"
    ]  # fmt: skip
    with Functions() as functions:
        forward(getattr(mo, case.op), case)
    assert f"megalodon_ops.{case.op}_fwd.default" in functions.names


@every_case
def test_the_profiler_sees_the_ops(case):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        evaluate(getattr(mo, case.op), case)
    names = {event.key for event in profile.key_averages()}
    assert {f"megalodon_ops::{case.op}_fwd", f"megalodon_ops::{case.op}_bwd"} <= names


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_transformations_and_tracers_see_the_ops():
    seen = []

    def f(x):
        seen.append(_C.are_plain("t", (torch.ones(1),)))
        return 2 * x

    torch.vmap(f)(torch.ones(2))
    torch.func.functionalize(f)(torch.ones(2))
    torch.jit.trace(f, torch.ones(2), check_trace=False)
    torch.fx.experimental.proxy_tensor.make_fx(f)(torch.ones(2))
    assert seen == [False] * 4


@every_case
def test_plain_and_dispatched_calls_give_the_same_bits(case):
    op = getattr(mo, case.op)
    plain = evaluate(op, case)
    with Calls():
        dispatched = evaluate(op, case)
    assert_bit_equal(plain, dispatched)


@every_backend
@every_case
def test_an_output_is_the_same_where_no_others_are_wanted(case, backend):
    op = getattr(mo, case.op)

    def output_alone(*args, return_state, **options):
        return op(*args, **options), op(*args, **options, return_state=True)[1]

    def without_state_gradients(function):
        return evaluate(function, case, lambda name, grad: grad if name == "y" else torch.zeros_like(grad))

    assert_bit_equal(without_state_gradients(output_alone), without_state_gradients(op))
    with torch.no_grad():
        assert_bit_equal(forward(output_alone, case), forward(op, case))

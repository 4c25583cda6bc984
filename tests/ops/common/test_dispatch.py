"""Ops in torch's dispatcher and profiler; results without the flags `return_stats` and `return_state`."""

from functools import partial

import pytest
import torch
from assertions import assert_bit_equal
from backends import every_backend
from calls import evaluate, forward
from cases import cema_case, cema_end_state_case, timestep_norm_case, timestep_norm_end_state_case
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import megalodon_ops as mo
from megalodon_ops.ops.common import definition

CASES = {"cema": cema_case(B=3, L=11, state=True), "timestep_norm": timestep_norm_case(B=3, L=11, count=2)}
END_STATES = {"cema_end_state": cema_end_state_case(), "timestep_norm_end_state": timestep_norm_end_state_case()}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
end_states_too = pytest.mark.parametrize("case", [*CASES.values(), *END_STATES.values()], ids=[*CASES, *END_STATES])
NO_NORM_STATE = dict.fromkeys(("count", "mean", "var", "residual"))
ops = torch.ops.megalodon_ops


class Calls(TorchDispatchMode):
    """Record the names of dispatched ops."""

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


@end_states_too
def test_modes_see_the_ops(case):
    with Calls() as calls:
        evaluate(getattr(mo, case.op), case)
    assert [n for n in calls.names if "megalodon" in n] == [f"megalodon_ops::{case.op}_{way}" for way in ("fwd", "bwd")]
    with Functions() as functions:
        forward(getattr(mo, case.op), case)
    assert f"megalodon_ops.{case.op}_fwd.default" in functions.names


@end_states_too
def test_the_profiler_sees_the_ops(case):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        evaluate(getattr(mo, case.op), case)
    names = {event.key for event in profile.key_averages()}
    assert {f"megalodon_ops::{case.op}_fwd", f"megalodon_ops::{case.op}_bwd"} <= names


@every_backend
@every_case
def test_the_output_does_not_depend_on_return_state(case, backend):
    op = getattr(mo, case.op)

    def output_alone(*args, return_state, **options):
        y = op(*args, **options)
        _, state = op(*args, **options, return_state=True)
        return y, state

    def without_state_gradients(function):
        return evaluate(function, case, lambda name, grad: grad if name == "y" else torch.zeros_like(grad))

    assert_bit_equal(without_state_gradients(output_alone), without_state_gradients(op))
    with torch.no_grad():
        assert_bit_equal(forward(output_alone, case), forward(op, case))


def test_results_that_the_flags_leave_out_are_empty():
    B, L, D, G, N = 2, 5, 8, 4, 3
    x, zeros = torch.randn(B, L, D), torch.zeros(D)
    call = partial(ops.timestep_norm_fwd, x, zeros, zeros, num_groups=G, eps=1e-5, **NO_NORM_STATE, spans=None)
    y, stats, *state = call(return_stats=False, return_state=False)
    assert y.shape == x.shape and [t.numel() for t in (stats, *state)] == [0] * 5
    _, stats, count, mean, var, residual = call(return_stats=True, return_state=True)
    assert stats.shape == (3, B, L, G)  # mean, its residual, 1 / sqrt(var + eps)
    assert count.tolist() == [L] * B and residual.shape == (B, 2, G)
    p, q = torch.rand(D, N), torch.rand(D, N).to(torch.complex64)
    _, state = ops.cema_fwd(x, p, q, gamma=q, omega=zeros, state=None, spans=None, return_state=False)
    assert state.numel() == 0


def test_a_backward_with_unknown_names_is_refused():
    message = r"must name arguments and results of .*cema_fwd.default, .* got \['bias', 'dbias', 'dweight'.*\]"
    with pytest.raises(TypeError, match=message):
        definition._autograd_by_names(ops.cema_fwd.default, ops.layer_norm_bwd.default)


def test_a_binding_takes_what_it_names_in_its_order(monkeypatch):
    launched = []
    monkeypatch.setattr(definition, "launch", lambda *args: launched.append(args))
    # A binding that takes three of the op's arguments, in another order.
    monkeypatch.setattr(definition, "binding_names", lambda name: (["spans", "q", "x"], ["y", "state_out"]))
    kernel = definition._default_kernel(ops.cema_fwd.default, lambda *args: ("y", "state"))
    x = torch.ones(2, 3).T  # made contiguous
    spans = torch.arange(4).unfold(0, 2, 1)  # pairs of offsets, passed as they are
    q = torch.zeros(1)
    for wanted in True, False:
        # x, p, q, gamma, omega, state, spans, return_state
        assert kernel(x, None, q, None, None, None, spans, wanted) == ("y", "state")
        name, given_spans, given_q, given_x, *results = launched.pop()
        assert name == "cema_fwd" and given_spans is spans and torch.equal(given_q, q)
        assert torch.equal(given_x, x) and given_x.is_contiguous()
        assert results == ["y", "state" if wanted else None]
    # The names of this binding do not fit layer_norm.
    with pytest.raises(TypeError, match="the binding layer_norm_fwd must take arguments and results of .*layer_norm"):
        definition._default_kernel(ops.layer_norm_fwd.default, None)


def test_statistics_are_needed_for_gradients():
    x, weight, bias = torch.randn(2, 5, 8), torch.zeros(8, requires_grad=True), torch.zeros(8)
    options = dict(num_groups=2, eps=1e-5, spans=None, return_stats=False, return_state=False)
    y, *_ = ops.timestep_norm_fwd(x, weight, bias, **NO_NORM_STATE, **options)
    with pytest.raises(ValueError, match="timestep_norm: `return_stats` must be True where gradients are wanted"):
        y.sum().backward()


def test_parts_of_a_state_without_their_counter_are_refused():
    x, zeros, group = torch.randn(2, 5, 8), torch.zeros(8), torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"`state\.mean` must be None without a `state\.count`"):
        moments = NO_NORM_STATE | {"mean": group, "var": group}
        flags = {"spans": None, "return_stats": False, "return_state": False}
        ops.timestep_norm_fwd(x, zeros, zeros, num_groups=2, eps=1e-5, **moments, **flags)
    q, cache = torch.randn(2, 5, 1, 4), torch.randn(2, 8, 1, 4)
    with pytest.raises(ValueError, match=r"`state\.k` must be None without a `state\.position`"):
        options = {"chunk_size": 8, "causal": True, "scale": 1.0, "dropkey": 0.0, "dropkey_seed": None, "spans": None}
        ops.chunked_attention_fwd(q, q, q, cache_k=cache, cache_v=cache, position=None, **options)


def test_errors_of_torch_are_not_changed():
    with pytest.raises(NotImplementedError, match="Could not run 'megalodon_ops::cema_fwd'.*Sparse"):
        mo.cema(**CASES["cema"].tensors | {"x": torch.zeros(3, 11, 5).to_sparse()})

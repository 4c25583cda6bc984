"""timestep_norm: golden data, means that dwarf the spread, streams that do not drift, errors. See also test_ops.py."""

import pytest
import torch
from assertions import assert_all_as_accurate_as, assert_bit_equal, assert_close
from assertions import assert_refuses, every_case, with_references
from backends import ISA_PARAMS, each_implementation, every_backend, wide_every_backend
from calls import evaluate
from cases import generator, randn, timestep_norm_case, uniform
from golden import TOLERANCE, golden_case, golden_config
from hard_values import HARD_VALUES, SHAPES
from torch.utils._pytree import tree_map

import megalodon_ops as mo
from megalodon_ops import TimestepNormState

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("name", golden_config("timestep_norm"))
@each_implementation
def test_golden(name, implementation, backend):
    """Rows with padding are packed, since the released code skips masked positions anywhere in a row."""
    t, config = golden_case("timestep_norm", name), golden_config("timestep_norm")[name]
    padding = t.get("padding_mask_true_is_pad", torch.zeros(t["x"].shape[:2], dtype=torch.uint8)).bool()
    kept = ~padding
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    x = t["x"][kept][None].requires_grad_()
    weight, bias = (t["weight_plus1"] - 1).requires_grad_(), t["bias"].clone().requires_grad_()
    mean, var = t["prev_mean"].clone().requires_grad_(), t["prev_var"].clone().requires_grad_()
    options = dict(num_groups=config["G"], eps=config["eps"], return_state=True, cu_seqlens=cu_seqlens)
    state = TimestepNormState(t["prev_count"], mean, var)
    y, state = implementation.timestep_norm(x, weight, bias, state=state, **options)
    assert_close(y[0], t["y"][kept], tolerance=TOLERANCE)
    assert_close(state.mean, t["mean"], tolerance=TOLERANCE)
    assert_close(state.var, t["var"], tolerance=TOLERANCE)
    assert torch.equal(state.count, t["count"])
    incoming = (t["grad_y"][kept][None], t["grad_mean"], t["grad_var"])
    torch.autograd.backward((y, state.mean, state.var), incoming)
    assert_close(x.grad[0], t["dx"][kept], tolerance=TOLERANCE)
    assert_close(weight.grad, t["dweight"], tolerance=TOLERANCE)
    assert_close(bias.grad, t["dbias"], tolerance=TOLERANCE)
    assert_close(mean.grad, t["dprev_mean"], tolerance=TOLERANCE)
    assert_close(var.grad, t["dprev_var"], tolerance=TOLERANCE)


@with_references
def hard_case(shape, values):
    """The reference computes statistics in float64, so an op that cancels digits exceeds the bounds."""
    return timestep_norm_case(**SHAPES[shape], **HARD_VALUES[values])


@wide_every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_hard_values(shape, backend):
    with every_case() as each:
        for values in HARD_VALUES:
            with each(values):
                case, same, exact = hard_case(shape, values)
                assert_all_as_accurate_as(evaluate(mo.timestep_norm, case), same, exact, factor=4, floor=8)


@pytest.mark.parametrize("backend", ISA_PARAMS, indirect=True)
def test_large_outputs_have_the_bits_of_small_ones(backend):
    """Outputs of 32 MiB and more are stored past the caches."""
    x, dy = torch.randn(2, 1, 8192, 1024, generator=generator(0))
    half = x.shape[1] // 2
    dy[:, half:] = 0
    weight, bias = torch.randn(2, 1024, generator=generator(1))
    results = []
    for L in (2 * half, half):
        leaf = x[:, :L].clone().requires_grad_()
        y = mo.timestep_norm(leaf, weight, bias, num_groups=32)
        y.backward(dy[:, :L])
        results.append({"y": y.detach()[:, :half], "dx": leaf.grad[:, :half]})
    assert_bit_equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constant_input_gives_the_bias(dtype):
    x = torch.full((1, 40, 6), 12345.678, dtype=dtype)
    weight, bias = torch.ones(6, dtype=dtype), torch.arange(6, dtype=dtype)
    y, state = mo.timestep_norm(x, weight, bias, num_groups=2, return_state=True)
    assert_close(y, bias.expand(y.shape), tolerance=1e-6)
    assert (state.var.abs() < 1e-12).all()


@every_backend
def test_bfloat16_results_round_as_torch_rounds(backend):
    """With a gain of zero, y is the bias: ties, denormals, infinities, NaNs, values that round up to infinity."""
    # The upper 16 bits of float32: its largest finite one, 0, a denormal, 1, infinity, NaN; then the lower
    edges = torch.tensor([0x7F7F, 0x0000, 0x007F, 0x3F80, 0x7F80, 0x7FFF])
    bits = torch.cat([torch.arange(0, 0x8000, 5), edges]).repeat_interleave(4)
    low = torch.tensor([0x0001, 0x7FFF, 0x8000, 0x8001])[torch.arange(bits.numel()) % 4]
    bias = (bits << 16 | low).int().view(torch.float32)
    bias = torch.cat([bias, -bias])
    x = torch.randn(1, 3, bias.numel(), generator=generator(0)).bfloat16()
    y = mo.timestep_norm(x, torch.full_like(bias, -1.0), bias, num_groups=1)
    assert torch.equal(y.isnan(), bias.isnan().expand(y.shape))
    expected = bias.bfloat16().expand(y.shape)
    assert torch.equal(y[~y.isnan()].view(torch.int16), expected[~y.isnan()].view(torch.int16))


def test_values_of_a_fresh_state_do_not_matter():
    case = timestep_norm_case(B=2, L=9, G=3, width=4)
    count, mean, var = torch.zeros(2, dtype=torch.int64), torch.full((2, 3), torch.nan), torch.full((2, 3), torch.inf)
    state = TimestepNormState(count, mean, var, torch.ones(2, 2, 3))
    expected = mo.timestep_norm(**case.tensors, num_groups=3)
    assert torch.equal(mo.timestep_norm(**case.tensors, num_groups=3, state=state), expected)


@pytest.mark.parametrize("L", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_stream_of_single_tokens_does_not_drift(L):
    x = (1e4 + 1e-2 * randn(generator(0), 1, L, 4)).float()
    weight, bias, state = torch.zeros(4), torch.zeros(4), None
    with torch.inference_mode():
        for t in range(x.shape[1]):
            y, state = mo.timestep_norm(x[:, t : t + 1], weight, bias, num_groups=2, state=state, return_state=True)
    exact = x.double().unflatten(-1, (2, 2))[0]
    exact_mean, exact_var = exact.mean((0, 2)), exact.var((0, 2), unbiased=False)
    held_mean = state.mean.double() + state.residual[:, 0].double()
    held_var = state.var.double() + state.residual[:, 1].double()
    assert int(state.count) == x.shape[1]
    assert ((held_mean[0] - exact_mean).abs() < 1e-6 * exact_var.sqrt()).all()
    assert ((held_var[0] / exact_var - 1).abs() < 1e-6).all()
    last = ((exact[-1] - exact_mean[:, None]) / (exact_var[:, None] + 1e-5).sqrt()).flatten()
    assert_close(y[0, 0].double(), last, tolerance=1e-6)


def test_a_residual_counts():
    """The mean is mean + residual, even if the residual is less than half a unit in the mean's last place."""
    case = timestep_norm_case(B=1, L=5, G=1, width=4, mean=1e4, std=1e-2, count=1000)
    residual = torch.tensor([[[4e-4], [0.0]]])
    exact = evaluate(mo.reference.timestep_norm, case.with_options(residual=residual).double())["y"]
    with_residual = evaluate(mo.timestep_norm, case.with_options(residual=residual))["y"].double()
    without = evaluate(mo.timestep_norm, case.with_options(residual=None))["y"].double()
    assert_close(with_residual, exact, tolerance=1e-6)
    assert (without - exact).abs().min() > 1e-2


@every_backend
def test_rows_of_a_state_are_those_of_its_sequences(backend):
    """Row s of each tensor, including the residual, is the state of sequence s."""
    case = timestep_norm_case(B=3, L=5, G=2, width=4, mean=1e4, std=1e-2, count=1000)
    x, weight, bias, mean, var = case.tensors.values()
    residual = torch.tensor([[4e-4], [2e-5]]) * uniform(generator(0), -1, 1, 3, 2, 2).float()
    states = TimestepNormState(case.options["count"], mean, var, residual)

    def run(x, state):
        return mo.timestep_norm(x, weight, bias, num_groups=2, state=state, return_state=True)

    results = run(x, states)
    for s in range(3):
        one, expected = tree_map(lambda tensor: tensor[s : s + 1], ((x, states), results))
        torch.testing.assert_close(run(*one), expected, rtol=0, atol=5e-14)  # CUDA: var's residual, by 3e-14


def _state(count=(1, 1), mean=(2, 3), var=(2, 3), residual=(2, 2, 3), dtype=torch.float32):
    shapes = [None if s is None else torch.ones(s, dtype=dtype) for s in (mean, var, residual)]
    return TimestepNormState(torch.tensor(count), *shapes)


ERRORS = {  # numbers out of range are in test_wrong_calls.py
    "no-batch": (ValueError, "x", {"x": torch.zeros(9, 12)}),
    "x-bool": (TypeError, "x", {"x": torch.zeros(2, 9, 12, dtype=torch.bool)}),
    "weight-shape": (ValueError, "weight", {"weight": torch.zeros(11)}),
    "weight-dtype": (TypeError, "weight", {"weight": torch.zeros(12, dtype=torch.bfloat16)}),
    "bias-shape": (ValueError, "bias", {"bias": torch.zeros(1, 12)}),
    "bias-dtype": (TypeError, "bias", {"bias": torch.zeros(12, dtype=torch.float64)}),
    "count-shape": (ValueError, "state.count", {"state": _state(count=(1, 1, 1))}),
    "count-negative": (ValueError, "state.count", {"state": _state(count=(1, -1))}),
    "count-float": (TypeError, "state.count", {"state": _state(count=(1.0, 1.0))}),
    "mean-shape": (ValueError, "state.mean", {"state": _state(mean=(2, 4))}),
    "mean-dtype": (TypeError, "state.mean", {"state": _state(dtype=torch.float64)}),
    "var-shape": (ValueError, "state.var", {"state": _state(var=(3,))}),
    "residual-shape": (ValueError, "state.residual", {"state": _state(residual=(2, 3))}),
    "lengths-too-long": (ValueError, "lengths", {"lengths": torch.tensor([3, 10])}),
    "packed-batch": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 9])}),
}


@pytest.mark.parametrize(("error", "argument", "changes"), ERRORS.values(), ids=ERRORS)
def test_errors(error, argument, changes):
    arguments = {**timestep_norm_case(B=2, L=9, G=3, width=4).tensors, "num_groups": 3, **changes}
    assert_refuses(error, "timestep_norm", argument, lambda: mo.timestep_norm(**arguments))

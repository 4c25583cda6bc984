"""Infinities and NaN, and values near the ends of float32's range: right within stated bounds, NaN beyond."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from assertions import assert_all_as_accurate_as, assert_all_close, assert_as_accurate_as, assert_close
from assertions import assert_matches_reference, every_case, references, with_references
from backends import DEVICES, each_isa, each_isa_with_amx, every_backend, isa
from calls import OPS, evaluate, forward
from cases import BUILDERS, cema_case, chunked_attention_case, generator, normalized_qk_case, randn, timestep_norm_case
from hypothesis import assume, given
from hypothesis import strategies as st

import megalodon_ops as mo
from megalodon_ops import _C, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TENSORS, RESULTS = ("q", "k", "v", "do"), ("o", "dq", "dk", "dv")  # of attention
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 0.03, torch.float16: 0.004}


# Attention.
def dependent_results(name, position, t):
    """Masks of positions `t` of a chunk whose results depend on the value of `name` at `position`."""
    same, earlier, later = t == position, t <= position, t >= position
    everywhere, nowhere = torch.ones_like(same), torch.zeros_like(same)
    return {
        "q": {"o": same, "dq": same, "dk": earlier, "dv": earlier},
        "k": {"o": later, "dq": later, "dk": everywhere, "dv": everywhere},
        "v": {"o": later, "dq": later, "dk": everywhere, "dv": nowhere},
        "do": {"o": nowhere, "dq": same, "dk": earlier, "dv": earlier},
    }[name]


def with_values(tensor, places):
    """The tensor with one value replaced in some heads, {head: (row, value)}."""
    changed = tensor.detach().clone()
    for head, (row, value) in places.items():
        changed[0, row, head, 1] = value
    return changed


def assert_reaches_only_dependent_results(run, case, do, clean, cached, name, places):
    """Compare the results `clean` of run(case, do) with those after values of q, k, v or do, by `name`, are replaced.

    cached: positions in the state; places: see with_values.
    """
    if name == "do":
        dirty = run(case, with_values(do, places))
    else:
        dirty = run(case.with_tensors(**{name: with_values(case.tensors[name], places)}), do)
    C, tolerance = case.options["chunk_size"], TOLERANCE[case.dtype]
    t = cached + torch.arange(do.shape[1])
    for head in range(do.shape[2]):
        found, expected = ({key: results[key][:, :, head] for key in RESULTS} for results in (dirty, clean))
        if head not in places:
            assert_all_close(found, expected, tolerance=tolerance)
            continue
        row, value = places[head]
        in_chunk = t // C == t[row] // C
        for result, where in dependent_results(name, t[row], t).items():
            kept = ~(in_chunk & where)
            title = f"{result} at positions of head {head} that do not depend on it"
            assert_close(found[result][:, kept], expected[result][:, kept], tolerance=tolerance, name=title)
        if name == "v":
            o = found["o"][0]
            seen = in_chunk & (t >= t[row])
            assert not o[seen, 1].isfinite().any(), "a value that a row sees was lost"
            others = torch.arange(o.shape[-1]) != 1
            assert_close(o[:, others], expected["o"][0][:, others], tolerance=tolerance, name="other channels")
        elif name in ("q", "k"):  # a score may also be -inf, whose weight is 0
            assert value == value or not found["o"][0, row].isfinite().any(), "NaN was lost"
        else:
            assert not found["dq"][0, row].isfinite().all(), "a gradient was lost"


def run_op(case, do):
    return evaluate(mo.chunked_attention, case, lambda _, grad: do)


def run_reference(case, do):
    o = reference.chunked_attention(**case.tensors, **case.options)
    gradients = reference.chunked_attention_bwd(do, *case.tensors.values(), **case.options)
    return {"o": o} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def gradient_of_o(case):
    return randn(generator(1), *case.tensors["v"].shape, dtype=case.dtype)


def attention_case(cached, L, K, V, C, dtype):
    case = chunked_attention_case(B=1, L=L, H=2, K=K, V=V, C=C, dtype=dtype, state=cached > 0, scale=K**-0.5)
    if cached:
        state = case.options["state"]
        clean = (t.nan_to_num(0.5) for t in state[:2])
        case = case.with_options(state=mo.AttentionState(*clean, torch.tensor([cached])))
    return case


def assert_every_place_reaches_only_dependent_results(run, case, cached, rows, values):
    """Replace a value of each tensor at each row; `values` take turns."""
    do = gradient_of_o(case)
    clean = run(case, do)
    with every_case() as each:
        for i, tensor in enumerate(TENSORS):
            for j, row in enumerate(rows):
                value = values[(i + j) % len(values)]
                with each(tensor, row, value):
                    places = {0: (row, value)}
                    assert_reaches_only_dependent_results(run, case, do, clean, cached, tensor, places)


ATTENTION = {
    "one-block": {"cached": 0, "L": 90, "K": 32, "V": 48, "C": 64},
    "narrow": {"cached": 0, "L": 70, "K": 5, "V": 7, "C": 67},
    "many-blocks": {"cached": 0, "L": 430, "K": 16, "V": 20, "C": 400},
    "on-a-cache": {"cached": 150, "L": 140, "K": 16, "V": 64, "C": 256},
    "few-queries": {"cached": 21, "L": 4, "K": 16, "V": 24, "C": 64},
}


@each_isa_with_amx
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", ATTENTION.values(), ids=ATTENTION)
def test_attention_passes_values_on_to_dependent_results(shape, dtype, name):
    case, L = attention_case(**shape, dtype=dtype), shape["L"]
    rows = sorted({0, 1, L // 3, L // 2 + 1, L - 2, L - 1})
    with isa(name):
        assert_every_place_reaches_only_dependent_results(
            run_op, case, shape["cached"], rows, (torch.nan, torch.inf, -torch.inf)
        )


@given(data=st.data())
def test_attention_of_random_shapes_passes_values_on_to_dependent_results(data):
    C = data.draw(st.sampled_from([2, 16, 17, 48, 64, 100, 200]))
    cached, L = data.draw(st.integers(0, C - 1)), data.draw(st.integers(1, 2 * C))
    K, V = (data.draw(st.sampled_from([2, 3, 16, 33, 64])) for _ in range(2))
    case = attention_case(cached, L, K, V, C, data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    do = gradient_of_o(case)
    tensor = data.draw(st.sampled_from(TENSORS))
    places = {0: (data.draw(st.integers(0, L - 1)), torch.nan)}
    assert_reaches_only_dependent_results(run_op, case, do, run_op(case, do), cached, tensor, places)


# Kernels on tensor cores of each width, kernels without, and the one for few queries; chunks end within tiles.
ON_CUDA = {
    "64-columns": ({"cached": 0, "L": 75, "K": 40, "V": 24, "C": 67}, torch.bfloat16),
    "256-columns": ({"cached": 7, "L": 40, "K": 16, "V": 136, "C": 21}, torch.float16),
    "float": ({"cached": 0, "L": 70, "K": 20, "V": 24, "C": 67}, torch.float32),
    "float-512-columns": ({"cached": 0, "L": 40, "K": 16, "V": 260, "C": 33}, torch.float32),
    "double": ({"cached": 3, "L": 24, "K": 18, "V": 10, "C": 32}, torch.float64),
    "two-blocks": ({"cached": 0, "L": 140, "K": 8, "V": 8, "C": 140}, torch.bfloat16),
    "few-queries": ({"cached": 21, "L": 4, "K": 16, "V": 24, "C": 64}, torch.bfloat16),
}


@pytest.mark.parametrize("backend", DEVICES[1:], indirect=True)
@pytest.mark.parametrize("tensor", ["v", *(pytest.param(name, marks=pytest.mark.slow) for name in ("q", "k", "do"))])
@pytest.mark.parametrize(("shape", "dtype"), ON_CUDA.values(), ids=ON_CUDA)
def test_attention_on_cuda_passes_values_on_to_dependent_results(shape, dtype, tensor, backend):
    """NaN in the middle of one head, infinity at the end of the other; all else equals the reference."""
    case, L = attention_case(**shape, dtype=dtype), shape["L"]
    do = gradient_of_o(case)
    places = {0: (L // 2 + 1, torch.nan), 1: (L - 1, torch.inf)}
    exact = evaluate(reference.chunked_attention, case.double(), lambda _, grad: do.double())
    clean = {name: value.to(dtype) for name, value in exact.items()}
    assert_reaches_only_dependent_results(run_op, case, do, clean, shape["cached"], tensor, places)


def test_the_references_attention_passes_values_on_to_dependent_results():
    case = attention_case(cached=5, L=30, K=4, V=6, C=16, dtype=torch.float64)
    rows, values = (0, 9, 10, 11, 20, 29), (torch.nan, torch.inf)
    assert_every_place_reaches_only_dependent_results(run_reference, case, 5, rows, values)


@each_isa
def test_products_that_overflow_stay_with_their_pairs(name):
    """dO v overflows for a query and a later key, which it does not see."""
    case = attention_case(cached=0, L=40, K=4, V=6, C=64, dtype=torch.float32)
    do = randn(generator(1), 1, 40, 2, 6, dtype=torch.float32)
    do[:, :20] *= 1e25
    early, late = case.tensors["v"].split(20, 1)
    with isa(name):
        dirty = run_op(case.with_tensors(v=torch.cat([early, 1e25 * late], 1)), do)
        clean = run_op(case.with_tensors(v=torch.cat([early, 0 * late], 1)), do)
    assert_close(dirty["dq"][:, :20], clean["dq"][:, :20], tolerance=1e-5)


# CEMA.
def assert_cema_is_right(case, incoming=None):
    assert_all_as_accurate_as(
        evaluate(mo.cema, case, incoming), *references(case, partial(evaluate, incoming=incoming)), factor=4, floor=8
    )


@each_isa
@pytest.mark.parametrize("L", [1, 8, 400])
@pytest.mark.parametrize("D", [3, 70])
def test_cema_of_states_whose_quotient_by_p_overflows(D, L, name):
    case = cema_case(B=2, L=L, D=D, N=4, state=True)
    tensors = {"p": case.tensors["p"] * 1e-11, "state": case.tensors["state"] * 1e30}
    with isa(name):
        assert_cema_is_right(case.with_tensors(**tensors, gamma=case.tensors["gamma"] * 1e-10))


@each_isa
@pytest.mark.parametrize("sequences", [{"B": 2, "L": 20}, {"B": 1, "L": 2003}], ids=["short", "split"])
def test_cema_of_inputs_whose_sum_is_beyond_the_range(sequences, name):
    case = cema_case(**sequences, D=5, N=4, radius=(0.999, 1.0), angle=(0.0, 0.01))
    tensors = {"x": case.tensors["x"].abs() * 1e37, "p": case.tensors["p"] * 1e-9}
    tensors["omega"] = case.tensors["omega"] * 1e-9
    with isa(name):
        assert_cema_is_right(case.with_tensors(**tensors), lambda _, grad: grad * 1e-10)


@each_isa
@pytest.mark.parametrize("sequences", [{"B": 2, "L": 20}, {"B": 1, "L": 2003}], ids=["short", "split"])
def test_cema_of_gradients_whose_sum_is_beyond_the_range(sequences, name):
    case = cema_case(**sequences, D=5, N=4, radius=(0.999, 1.0), angle=(0.0, 0.01))
    tensors = {"x": case.tensors["x"] * 1e-9, "gamma": case.tensors["gamma"] * 1e-9}
    tensors["omega"] = case.tensors["omega"] * 1e-9
    with isa(name):
        incoming = lambda name, grad: grad.abs() * 1e37 if name == "y" else grad  # noqa: E731
        assert_cema_is_right(case.with_tensors(**tensors), incoming)


def test_cema_in_place_recomputes_from_its_initial_state():
    case = cema_case(B=2, L=40, D=5, N=4, state=True)
    tensors = case.tensors | {"p": case.tensors["p"] * 1e-11, "state": case.tensors["state"] * 1e30}
    y, state = torch.empty_like(tensors["x"]), tensors["state"].clone()
    expected, expected_state = mo.cema(**tensors, return_state=True)
    inputs = [tensors[name] for name in ("x", "p", "q", "gamma", "omega")]
    _C.cema_fwd(*inputs, state, None, y, state)
    assert torch.equal(y, expected) and torch.equal(state, expected_state)
    assert state.isfinite().all()


@given(data=st.data())
def test_cema_while_results_are_in_range(data):
    """h, g, y, gradients and the terms of their sums are in range; quotients like h / p may overflow.

    Tensors are scaled by powers of ten, whose exponents are drawn.
    """
    x = data.draw(st.integers(-30, 36))
    p = data.draw(st.integers(-30, 0))
    gamma = data.draw(st.integers(-30, 30))
    dy = data.draw(st.integers(-30, 36))
    state = data.draw(st.integers(-30, 34))
    h = max(x + p, state)
    products = [x + p, h + gamma, gamma + dy, x + gamma + dy, h + dy, h + gamma + dy]
    assume(max(*products, x + dy) <= 33 and min(*products, x + dy) >= -30)
    case = cema_case(
        B=1, L=data.draw(st.sampled_from([6, 33, 90])), D=3, N=3, state=True, seed=data.draw(st.integers(0, 99))
    )
    scales = {"x": x, "p": p, "gamma": gamma, "omega": 0 if x <= 33 and dy <= 33 else -4, "state": state}
    tensors = {name: case.tensors[name] * 10.0**scale for name, scale in scales.items() if name in case.tensors}
    incoming = lambda name, grad: grad * 10.0**dy if name == "y" else grad * 0  # noqa: E731
    assert_cema_is_right(case.with_tensors(**tensors), incoming)


@pytest.mark.parametrize("backend", DEVICES[1:], indirect=True)
@given(data=st.data())
def test_cema_on_cuda_within_its_bounds(backend, data):
    """States up to 1e15, inputs up to 1e38 / n^2, p above 2^-32, all phases."""
    L = data.draw(st.sampled_from([66, 130]))
    p = data.draw(st.sampled_from([2.0**-28, 1e-5, 1.0]))
    phase = data.draw(st.sampled_from([0.0, 1e-20, 1e-6, 3.0]))
    state, x = data.draw(st.integers(-10, 15)), data.draw(st.integers(-10, 33))
    case = cema_case(B=1, L=L, D=2, N=3, radius=(0.9, 1.0), angle=(-phase, phase), state=True)
    scales = {"p": p, "x": 10.0**x, "state": 10.0**state, "gamma": 1e-3, "omega": p}
    case = case.with_tensors(**{name: case.tensors[name] * scale for name, scale in scales.items()})
    exact, same = (forward(mo.reference.cema, c) for c in (case.double(), case))
    assert_all_as_accurate_as(forward(mo.cema, case), same, exact, factor=4, floor=64)


# Norms.
SCALES = [1e-36, 1e-30, 1e-21, 1e-12, 1.0, 1e12, 1e19, 1e21, 1e30, 1e36]


@every_backend
def test_normalized_qk_of_every_scale(backend):
    with every_case() as each:
        for i, scale in enumerate(SCALES):
            epsilons = (0.0, 1e-5) if i % 2 == 0 else (1e-5, 0.0)
            for K, eps in zip((6, 130), epsilons, strict=True):
                with each(scale, K, eps):
                    case = normalized_qk_case(B=2, L=5, H=2, K=K, size=scale, eps=eps)
                    assert_all_as_accurate_as(evaluate(mo.normalized_qk, case), *references(case), factor=4, floor=8)


@every_backend
def test_norms_of_rows_of_zeros_and_constants(backend):
    """In rows of zeros, or of one constant, eps alone is under the root. All rows are such, or one is.

    Initial states have the constant as mean; the first one has variance 0.
    """
    norms = [
        ("timestep_norm", {}),
        ("timestep_norm", {"count": 3}),
        ("sequence_norm", {}),
        ("normalized_qk", {}),
        ("normalized_qk", {"B": 1, "L": 5, "H": 1, "K": 520}),
    ]
    with every_case() as each:
        for (op, sizes), value, rows in itertools.product(norms, (0.0, 0.7), (slice(None), slice(4, 5))):
            with each(op, sizes, value, rows):
                case = BUILDERS[op](**sizes)
                (name,) = OPS[op].tokens
                changed = {name: case.tensors[name].clone()}
                changed[name][:, rows] = value
                if "count" in sizes:
                    changed["mean"] = torch.full_like(case.tensors["mean"], value)
                    changed["var"] = case.tensors["var"].clone()
                    changed["var"][0] = 0
                    case = case.with_options(residual=None)
                case = replace(case.with_tensors(**changed), terms=300.0)
                assert_matches_reference(evaluate(getattr(mo, op), case), case)


@every_backend
def test_normalized_qk_of_every_scale_in_float64(backend):
    """Scaling z by a power of two changes no digit, as eps is 0."""
    case = normalized_qk_case(B=1, L=3, K=6, eps=0.0, dtype=torch.float64)
    expected = evaluate(mo.normalized_qk, case)
    for size in (2.0**-900, 2.0**900):
        found = evaluate(mo.normalized_qk, case.with_tensors(z=case.tensors["z"] * size))
        assert_all_close(found | {"dz": found["dz"] * size}, expected, tolerance=1e-13)


@each_isa
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norms_of_rows_of_every_scale(norm, name):
    with every_case() as each, isa(name):
        for D, scale, eps in itertools.product((7, 300), SCALES, (0.0, 1e-5)):
            with each(D, scale, eps):
                assert_norm_is_right(norm, D, scale, eps)


def assert_norm_is_right(norm, D, scale, eps):
    gen = generator(0)
    x, dy = (randn(gen, 5, D, dtype=torch.float32) for _ in range(2))
    x = (x + 0.5) * scale
    weight = randn(gen, D, dtype=torch.float32)

    def results(function, x, dy, weight):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = function(*leaves, eps=eps)
        return {"y": y.detach()} | dict(zip(("dx", "dweight"), torch.autograd.grad(y, leaves, dy), strict=True))

    plain = getattr(reference, norm)
    exact = results(plain, x.double(), dy.double(), weight.double())
    same = results(plain, x, dy, weight)
    assert_all_as_accurate_as(results(getattr(mo, norm), x, dy, weight), same, exact, factor=4, floor=8)


@every_backend
@given(data=st.data())
def test_timestep_norm_within_its_bounds(backend, data):
    """With eps 0, standard deviations from 1e-18 to 1e19 divided by the channels of a group."""
    G, width = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([2, 8, 17, 64]))
    exponent = data.draw(st.floats(-18, 19))
    std = min(10.0**exponent, 1e19 / width) / 4  # normal values beyond 4 std are rare
    case = timestep_norm_case(
        B=1, L=data.draw(st.sampled_from([1, 5, 40])), G=G, width=width, mean=0.0, std=std, eps=0.0
    )
    case = case.with_tensors(x=case.tensors["x"].clamp(-4 * std, 4 * std))
    incoming = lambda name, grad: grad if name == "y" else 0 * grad  # noqa: E731
    same, exact = references(case, partial(evaluate, incoming=incoming))
    for name, value in evaluate(mo.timestep_norm, case, incoming).items():
        terms = {"dx": 1 / std, "mean": std}.get(name, 0.0)
        assert_as_accurate_as(value, same[name], exact[name], factor=4, floor=8, terms=terms, name=name)


@every_backend
@pytest.mark.parametrize("implementation", [mo, reference], ids=["kernel", "reference"])
def test_timestep_norm_beyond_its_bounds_is_nan(implementation, backend):
    case = timestep_norm_case(B=1, L=9, G=2, width=8, mean=0.0, std=1e30)
    assert evaluate(implementation.timestep_norm, case)["y"].isnan().all()


@with_references
def slow_poles():
    return cema_case(B=1, L=4500, D=2, N=2, radius=(1.0, 1.0), angle=(-0.01, 0.01), state=True)


# Without fused multiply-adds, errors of one sign would add up.
@every_backend
def test_slow_poles_are_as_accurate_as_the_direct_form(backend):
    case, same, exact = slow_poles()
    assert_all_as_accurate_as(evaluate(mo.cema, case), same, exact, factor=1, floor=4)

"""What every op promises: accuracy, any layout, any cut or packing of sequences, determinism, autograd, compilation."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_all_close, assert_as_accurate_as, assert_bit_equal
from backends import FAST, every_backend, wide_every_device
from cases import (
    BUILDERS,
    OPS,
    WITH_STATE,
    carried,
    cema_case,
    cema_end_state_case,
    chunked_attention_case,
    evaluate,
    forward,
    normalized_attention_case,
    normalized_qk_case,
    packed,
    streamed,
    timestep_norm_case,
    timestep_norm_end_state_case,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import CASES, pieces
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import megalodon_ops as mo

pytestmark = pytest.mark.usefixtures("poisoned_memory", "backend")
all_ops = pytest.mark.parametrize("op", OPS)

# (factor, floor) of assert_as_accurate_as: sums of float32 may be taken in any order, a 16-bit result is rounded once.
LIMITS = {
    torch.float32: (4, 8),
    torch.complex64: (4, 8),
    torch.bfloat16: (2, 0.5),
    torch.float16: (2, 0.5),
    torch.int64: (0, 0),
}
TOLERANCE = 1e-10  # of float64 against float64

SMALL = {
    "cema": cema_case(B=3, L=11, state=True),
    "timestep_norm": timestep_norm_case(B=3, L=11, count=2),
    "cema_end_state": cema_end_state_case(B=3, L=11),
    "timestep_norm_end_state": timestep_norm_end_state_case(B=3, L=11),
    "normalized_qk": normalized_qk_case(B=3, L=11, position=True),
    "chunked_attention": chunked_attention_case(B=3, L=11, state=True, dropkey=0.3),
    "normalized_attention": normalized_attention_case(B=3, L=11, state=True, dropkey=0.3),
}


def function(op):
    return getattr(mo, op)


def assert_matches_reference(actual, case):
    reference = getattr(mo.reference, case.op)
    exact = evaluate(reference, case.double())
    if case.dtype == torch.float64:
        assert_all_close(actual, exact, tolerance=TOLERANCE, terms=case.terms)
        return
    same = evaluate(reference, case)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        factor, floor = LIMITS[value.dtype]
        terms = case.terms if name.startswith("d") else 0.0
        if case.op == "normalized_attention" and value.is_floating_point():  # q, k are rounded to the dtype in between
            floor = max(2 * floor, 0.5 * torch.finfo(case.dtype).eps / torch.finfo(value.dtype).eps)
        assert_as_accurate_as(value, same[name], exact[name], factor=factor, floor=floor, terms=terms, name=name)


@every_backend
@all_ops
@given(data=st.data())
def test_results_and_gradients_match_the_reference(op, backend, data):
    case = data.draw(CASES[op]())
    assert_matches_reference(evaluate(function(op), case), case)


@wide_every_device
@all_ops
@given(data=st.data())
def test_pieces_give_the_whole(op, data):
    """Gradients, which flow back through the states from piece to piece, are those of the whole, too."""
    case = data.draw(CASES[op](st.just(torch.float64), kinds=("dense", "padded")))
    if "dropkey" in case.options:  # its mask counts from the start of the call
        case = case.with_options(dropkey=0.0)
    whole = evaluate(getattr(mo.reference, op), case)
    length = case.tensors[OPS[op].tokens[0]].shape[1]
    cut = evaluate(streamed(function(op), op, data.draw(pieces(length))), case)
    assert_all_close(carried(op, cut), carried(op, whole), tolerance=TOLERANCE, terms=case.terms)


@wide_every_device
@all_ops
@given(data=st.data())
def test_packed_equals_separate(op, data):
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    case = BUILDERS[op](B=len(lengths), L=max(lengths), lengths=lengths, dtype=torch.float64)
    before, after = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    together = evaluate(packed(function(op), op, before, after), case)
    separate = evaluate(function(op), case)
    assert_all_close(together, separate, tolerance=TOLERANCE, terms=case.terms)


@wide_every_device
@pytest.mark.parametrize("filler", [torch.nan, torch.inf, -1e4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sequences", [{"B": 3, "lengths": [5, 0, 11]}, {"B": 1, "cu_seqlens": [2, 5, 5, 9]}], ids=["padded", "packed"]
)
@all_ops
def test_padding_changes_nothing(op, sequences, dtype, filler):
    case = BUILDERS[op](L=11, dtype=dtype, **sequences)
    if "lengths" in sequences:
        padding = torch.arange(11) >= torch.tensor(sequences["lengths"])[:, None]
    else:
        padding = (torch.arange(11)[None] < 2) | (torch.arange(11)[None] >= 9)

    def filled(token, value):
        return torch.where(padding.view(*padding.shape, *[1] * (token.dim() - 2)), value, token)

    def results(value):
        tokens = {name: filled(case.tensors[name], value) for name in OPS[op].tokens}
        incoming = lambda name, grad: filled(grad, value) if name in OPS[op].outputs else grad  # noqa: E731
        return evaluate(function(op), case.with_tensors(**tokens), incoming)

    clean = results(0.0)
    assert_bit_equal(results(filler), clean)
    for name in [*OPS[op].outputs, *(f"d{name}" for name in OPS[op].tokens)]:
        assert torch.equal(clean[name], filled(clean[name], 0.0)), f"{name} is not zero at the padding"


def with_gaps(t):
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan if t.is_floating_point() else 0)
    wide[..., 1::2] = t
    return wide[..., 1::2]


def misaligned(t):
    buffer = t.new_zeros(t.numel() + 1)
    buffer[1:] = t.flatten()
    return buffer[1:].view(t.shape)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "with-gaps": with_gaps,
    "misaligned": misaligned,
    "expanded-first": lambda t: t[:1].expand(t.shape),
    "expanded-last": lambda t: t[..., :1].expand(t.shape),
    "scalar": lambda t: t.flatten()[0].expand(t.shape),
    "conjugate": lambda t: t.conj().clone().conj() if t.is_complex() else t,
}


@wide_every_device
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@all_ops
def test_layouts_change_nothing(op, layout):
    """Inputs, states and incoming gradients that are strided, misaligned or broadcast."""
    case = SMALL[op]

    def results(arrange):
        tensors = {name: arrange(tensor) for name, tensor in case.tensors.items()}
        arranged = case.with_tensors(**tensors)
        if isinstance(case.options.get("state"), mo.AttentionState):
            k, v, position = case.options["state"]
            state = mo.AttentionState(arrange(k.nan_to_num()), arrange(v.nan_to_num()), with_gaps(position))
            arranged = arranged.with_options(state=state)
        return evaluate(function(op), arranged, lambda _, grad: arrange(grad))

    assert_bit_equal(results(layout), results(lambda t: layout(t).resolve_conj().contiguous().clone()))


@all_ops
def test_a_call_leaves_its_arguments_alone(op):
    case, twin = SMALL[op], SMALL[op].double()
    evaluate(function(op), case)
    assert_bit_equal(case.double().tensors, twin.tensors)
    for name, value in case.double().options.items():
        for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (value, twin.options[name])), strict=True):
            same = torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a == b
            assert same, f"{name} changed"


LARGE = {
    "cema": {"one-long": cema_case(B=1, L=3000, D=40, N=8), "many": cema_case(B=9, L=100, D=67, N=8)},
    "timestep_norm": {
        "one-long": timestep_norm_case(B=1, L=5000, G=4, width=8),
        "many": timestep_norm_case(B=9, L=200, G=8, width=9),
    },
    "cema_end_state": {
        "one-long": cema_end_state_case(B=1, L=3000, D=40, N=8),
        "many": cema_end_state_case(B=9, L=100, D=67, N=8),
    },
    "timestep_norm_end_state": {
        "one-long": timestep_norm_end_state_case(B=1, L=5000, G=4, width=8),
        "many": timestep_norm_end_state_case(B=9, L=200, G=8, width=9),
    },
    "normalized_qk": {
        "one-long": normalized_qk_case(B=1, L=3000, H=2, K=32, C=64),
        "many": normalized_qk_case(B=9, L=300, H=2, K=32, C=64),
    },
    "chunked_attention": {
        "one-long": chunked_attention_case(B=1, L=700, H=1, K=32, V=48, C=512, dropkey=0.1),
        "many": chunked_attention_case(B=9, L=100, H=3, K=32, V=48, C=64, dropkey=0.1),
    },
    "normalized_attention": {
        "one-long": normalized_attention_case(B=1, L=700, H=1, K=32, V=48, C=512, dropkey=0.1),
        "many": normalized_attention_case(B=9, L=100, H=3, K=32, V=48, C=64, dropkey=0.1),
    },
}


@pytest.mark.parametrize("backend", FAST, indirect=True)  # the emulator: test_cuda_<op>.py
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["one-long", "many"])
@all_ops
def test_runs_and_thread_counts_give_equal_bits(op, shape, dtype, two_threads):
    case = LARGE[op][shape]
    tokens = {name: case.tensors[name].to(dtype) for name in OPS[op].tokens}
    case = case.with_tensors(**tokens)
    first = evaluate(function(op), case)
    assert_bit_equal(evaluate(function(op), case), first)
    torch.set_num_threads(1)
    assert_bit_equal(evaluate(function(op), case), first)


@all_ops
def test_without_gradients_the_outputs_are_the_same(op):
    expected = {name: v for name, v in evaluate(function(op), SMALL[op]).items() if not name.startswith("d")}
    with torch.inference_mode():
        assert_bit_equal(forward(function(op), SMALL[op]), expected)


@wide_every_device
@all_ops
def test_each_gradient_alone_is_the_same(op):
    """One input at a time takes a gradient, one output at a time gives one."""
    case = SMALL[op]
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    outputs = forward(function(op), case.with_tensors(**inputs))
    outputs = {name: output for name, output in outputs.items() if output.requires_grad}
    assert outputs.keys() >= set(OPS[op].outputs)
    for name, output in outputs.items():
        loss = output.abs().sum()
        together = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True, materialize_grads=True)
        for (leaf, tensor), expected in zip(inputs.items(), together, strict=True):
            alone = tensor.detach().clone().requires_grad_()
            result = forward(function(op), case.with_tensors(**{leaf: alone}))[name]
            if result.requires_grad:
                (grad,) = torch.autograd.grad(result.abs().sum(), alone, materialize_grads=True)
                assert torch.equal(grad, expected), f"gradient of {name} with respect to {leaf}"


@pytest.mark.parametrize(
    "sequences",
    [{}, {"B": 3, "lengths": [3, 0, 5]}, {"B": 1, "cu_seqlens": [1, 3, 3, 5]}],
    ids=["dense", "padded", "packed"],
)
@all_ops
def test_gradcheck(op, sequences, backend):
    """Numerical derivatives, on the emulator along random directions.

    There is no gradgradcheck: second derivatives are refused.
    """
    state = WITH_STATE.get(op, {})
    case = BUILDERS[op](**{"B": 2, "L": 5} | sequences, **state, dtype=torch.float64)

    def run(*values):
        outputs = forward(function(op), case.with_tensors(**dict(zip(case.tensors, values, strict=True))))
        return tuple(output for output in outputs.values() if output.requires_grad)

    inputs = tuple(t.detach().requires_grad_() for t in case.tensors.values())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=backend == "cuda-emulated")


@all_ops
def test_second_derivatives_are_refused(op):
    case = SMALL[op]
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    output = next(iter(forward(function(op), case.with_tensors(**inputs)).values()))
    grad, *_ = torch.autograd.grad(
        output.abs().square().sum(), list(inputs.values()), create_graph=True, allow_unused=True
    )
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
@all_ops
@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_is_refused(op, gradients):
    case = SMALL[op]
    name, tensor = next(iter(case.tensors.items()))
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode derivatives are not supported"):
            forward(function(op), case.with_tensors(**{name: forward_ad.make_dual(tensor, torch.ones_like(tensor))}))
        forward(function(op), case)  # no tangent, no complaint


class RecordOps(TorchDispatchMode):
    """Keeps the arguments of every call of a registered op."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "megalodon_ops":
            self.calls[func] = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args)
        return func(*args, **(kwargs or {}))


def recorded_calls():
    recorder = RecordOps()
    with recorder:
        for op, case in SMALL.items():
            evaluate(function(op), case)
        case = chunked_attention_case(state=True, dtype=torch.float32)
        state = mo.AttentionState(*(t.nan_to_num().clone() for t in case.options["state"]))
        mo.chunked_attention(**case.tensors, chunk_size=4, state=state, inplace_state=True)
    return recorder.calls


@wide_every_device
def test_opcheck():
    """Schema, fake kernel, autograd registration and tracing of every op that is registered."""
    calls = recorded_calls()
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("megalodon_ops::")}
    names = """
        linear_fwd linear_few_rows linear_cross_entropy_fwd linear_cross_entropy_sum layer_norm_fwd layer_norm_bwd
        gated_silu_fwd gated_silu_bwd cema_coefficients_fwd cema_coefficients_bwd
    """
    elsewhere = {f"megalodon_ops::{name}" for name in names.split()}  # tested in a file of its own each
    assert {func.name() for func in calls} | elsewhere == registered
    for func, args in calls.items():
        if func.name().endswith("_fwd"):
            floating = lambda t: t.requires_grad_(t.is_floating_point() or t.is_complex())  # noqa: E731
            args = torch.utils._pytree.tree_map_only(torch.Tensor, floating, args)
        torch.library.opcheck(func, args)


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
@all_ops
def test_compiles_into_one_graph(op):
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    compiled = torch.compile(function(op), fullgraph=True)
    assert_bit_equal(evaluate(compiled, SMALL[op]), evaluate(function(op), SMALL[op]))


@pytest.mark.parametrize(
    "shape",
    [{"B": 0, "L": 5}, {"B": 2, "L": 0}, {"B": 1, "L": 5, "cu_seqlens": [3]}, {"B": 2, "L": 5, "lengths": [0, 0]}],
    ids=["no-rows", "no-steps", "no-sequences", "empty-rows"],
)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "state"])
@all_ops
def test_nothing_to_do(op, shape, fresh):
    state = WITH_STATE.get(op, {})
    case = BUILDERS[op](**shape, **({} if fresh else state))
    assert_matches_reference(evaluate(function(op), case), case)


NO_ELEMENTS = {
    "cema": [{"D": 0}],
    "timestep_norm": [{"width": 0}],
    "cema_end_state": [{"D": 0}],
    "timestep_norm_end_state": [{"width": 0}],
    "normalized_qk": [{"K": 0}],
    "chunked_attention": [{"K": 0, "C": 140}, {"V": 0, "C": 140}, {"K": 0, "V": 0}, {"H": 0}],
    "normalized_attention": [{"K": 0}, {"V": 0}, {"K": 0, "V": 0}],
}


@wide_every_device
@pytest.mark.parametrize(
    "sequences",
    [
        {"B": 0, "L": 5}, {"B": 2, "L": 0}, {"B": 2, "L": 5}, {"B": 2, "L": 70},
        {"B": 3, "L": 19, "lengths": [19, 0, 3]}, {"B": 1, "L": 11, "cu_seqlens": [2, 5, 5, 9]},
        {"B": 1, "L": 5, "cu_seqlens": [3]},
    ],
    ids=["no-rows", "no-steps", "few-steps", "dense", "padded", "packed", "no-sequences"],
)  # fmt: skip
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "sizes"),
    [pytest.param(op, sizes, id="-".join([op, *sizes])) for op, shapes in NO_ELEMENTS.items() for sizes in shapes],
)
def test_axes_without_elements(op, sizes, dtype, fresh, sequences):
    """Results that have elements nevertheless are right, counts and positions too. Statistics of 0 channels are NaN."""
    state = WITH_STATE.get(op, {})
    case = BUILDERS[op](**sequences, **sizes, **({} if fresh else state), dtype=dtype)
    results, reference = evaluate(function(op), case), evaluate(getattr(mo.reference, op), case)
    if op.startswith("timestep_norm"):
        for name, value in reference.items():
            assert torch.equal(results[name].isnan(), value.isnan()), name
            assert torch.equal(results[name].nan_to_num(), value.nan_to_num()), name
    else:
        assert_matches_reference(results, case)


@all_ops
def test_autocast_lowers_attention_and_leaves_the_rest(op):
    case = SMALL[op].with_options(state=None) if "attention" in op else SMALL[op]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = evaluate(function(op), case)
    expected = torch.float32 if op in ("cema", "timestep_norm") else torch.bfloat16
    assert all(results[name].dtype == expected for name in OPS[op].outputs)
    assert all(results[f"d{name}"].dtype == tensor.dtype for name, tensor in case.tensors.items())

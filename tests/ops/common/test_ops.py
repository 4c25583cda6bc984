"""Promises of every op: accuracy, layouts, sequences in pieces or packed, determinism, autograd, compilation."""

import itertools
from dataclasses import replace

import pytest
import torch
from assertions import TOLERANCE, assert_all_close, assert_bit_equal, assert_matches_reference, every_case
from backends import DEVICES, EMULATED_AMX, EMULATES_AMX, EVERY_BACKEND, FAST, WIDE_DEVICES
from calls import OPS, invariant_results, evaluate, forward, packed, separate, streamed
from cases import BUILDERS, SMALL, WITH_STATE, chunked_attention_case
from drawing import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from strategies import CASES, POISONS, pieces
from test_threads import CASES as LARGE
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import megalodon_ops as mo
from megalodon_ops.ops.normalized_qk.normalized_qk import rotary_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory", "backend")

TWO_CHUNKS = {"visible_chunks": 2}
SEE_TWO_CHUNKS = ("chunked_attention", "adaptive_working_memory")
COMPOSED = [name for name, op in OPS.items() if op.cuda is None]


def each_op_on(backends, ops=tuple(OPS)):
    """Each op on each backend, except on an emulator that has no kernels of the op."""
    calls = []
    for op, backend in itertools.product(ops, backends):
        param = pytest.param(backend) if isinstance(backend, str) else backend
        (name,) = param.values
        without_cuda = name == "cuda-emulated" and op in COMPOSED
        without_amx = name == "v4_amx" and EMULATES_AMX and op != "chunked_attention"
        if not (without_cuda or without_amx):
            calls.append(pytest.param(op, name, marks=param.marks, id=f"{op}-{name}"))
    return pytest.mark.parametrize(("op", "backend"), calls, indirect=["backend"])


# For tests of the Python around a kernel; the emulator gets contiguous copies and would add nothing.
each_op_around_a_kernel = each_op_on(FAST)
fast_devices = pytest.mark.parametrize("backend", FAST, indirect=True)


def function(op):
    return getattr(mo, op)


@each_op_on([*EVERY_BACKEND, *EMULATED_AMX])
@given(data=st.data())
def test_results_and_gradients_match_the_reference(op, data):
    case = data.draw(CASES[op]())
    assert_matches_reference(evaluate(function(op), case), case)


@each_op_on(WIDE_DEVICES, [op for op in OPS if not OPS[op].whole])
@given(data=st.data())
def test_pieces_give_the_whole(op, data):
    """Results, and gradients that flow back through the states."""
    case = data.draw(CASES[op](st.just(torch.float64), kinds=("dense", "padded")))
    if "attention" in op:  # DropKey's mask starts at the call; non-causal chunks have no pieces
        case = case.with_options(dropkey=0.0, causal=True)
    whole = evaluate(getattr(mo.reference, op), case)
    length = case.tensors[OPS[op].tokens[0]].shape[1]
    cut = evaluate(streamed(function(op), op, data.draw(pieces(length))), case)
    assert_all_close(invariant_results(op, cut), invariant_results(op, whole), tolerance=TOLERANCE, terms=case.terms)


@each_op_on(WIDE_DEVICES)
@given(data=st.data())
def test_every_form_equals_its_spans(op, data):
    case = data.draw(CASES[op](kinds=("padded", "packed", "left-padded")))
    assert_bit_equal(evaluate(function(op), case), evaluate(function(op), case.below_the_public_function()))


@each_op_on(WIDE_DEVICES)
@given(data=st.data())
def test_each_span_gives_what_its_sequence_gives_alone(op, backend, data):
    """Outputs, states, and gradients of tokens and states, to the bit; parameters' gradients are sums over sequences.

    CEMA, both norms, the memory and CUDA divide their work by the call's sizes, which changes the rounding.
    """
    by_size = "cuda" in backend or any(name in op for name in ("cema", "memory", "timestep_norm", "sequence_norm"))
    case = data.draw(CASES[op](st.just(torch.float64) if by_size else DTYPES, kinds=("spans",)))
    if "attention" in op:  # DropKey's mask depends on the sequence's number
        case = case.with_options(dropkey=0.0)
    if not len(case.options["spans"]):
        return
    alone = evaluate(separate(function(op), op), case)
    together = evaluate(function(op), case)
    if by_size:
        assert_all_close(together, alone, tolerance=TOLERANCE, terms=case.terms)
        return
    for name in OPS[op].parameters:
        del alone[f"d{name}"], together[f"d{name}"]
    assert_bit_equal(together, alone)


@each_op_on(WIDE_DEVICES)
@given(data=st.data())
def test_packed_equals_separate(op, data):
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    case = BUILDERS[op](B=len(lengths), L=max(lengths), lengths=lengths, dtype=torch.float64)
    before, after = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    together = evaluate(packed(function(op), op, before, after), case)
    assert_matches_reference(together, case)  # which computes the sequences separately


@each_op_on(WIDE_DEVICES)
@pytest.mark.parametrize(
    "sequences", [{"B": 3, "lengths": [5, 0, 11]}, {"B": 1, "cu_seqlens": [2, 5, 5, 9]}], ids=["padded", "packed"]
)
def test_padding_changes_nothing(op, sequences):
    """Neither tokens nor incoming gradients of padding count; outputs and gradients are zero there."""
    with every_case() as each:
        for start, dtype in itertools.product(starts(op), (torch.float32, torch.bfloat16)):
            case = BUILDERS[op](L=11, dtype=dtype, **start, **sequences)
            clean = evaluate(function(op), replace(case, poison=0.0))
            for name in [*OPS[op].outputs, *(f"d{name}" for name in OPS[op].tokens)]:
                with each(dtype, name, *start):
                    zeroed = replace(case, poison=0.0).poisoned(clean[name])
                    assert torch.equal(clean[name], zeroed), "not zero at the padding"
            for poison in POISONS:
                with each(dtype, poison, *start):
                    assert_bit_equal(evaluate(function(op), replace(case, poison=poison)), clean)


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


@each_op_around_a_kernel
def test_layouts_change_nothing(op):
    """Inputs, states and incoming gradients that are strided, misaligned or broadcast."""
    case = SMALL[op]

    def results(arrange):
        arranged = case.with_tensors(**{name: arrange(tensor) for name, tensor in case.tensors.items()})
        if isinstance(case.options.get("state"), mo.AttentionState):
            k, v, position = case.options["state"]
            state = mo.AttentionState(arrange(k.nan_to_num()), arrange(v.nan_to_num()), with_gaps(position))
            arranged = arranged.with_options(state=state)
        return evaluate(function(op), arranged, lambda _, grad: arrange(grad))

    with every_case() as each:
        for name, layout in LAYOUTS.items():
            with each(name):
                copied = lambda t, layout=layout: layout(t).resolve_conj().contiguous().clone()  # noqa: E731
                assert_bit_equal(results(layout), results(copied))


@each_op_around_a_kernel
def test_a_call_does_not_change_its_arguments(op):
    case = SMALL[op]
    before = case.converted(torch.clone)
    evaluate(function(op), case)
    assert_bit_equal(case.tensors, before.tensors)
    for a, b in zip(tree_leaves(case.options), tree_leaves(before.options), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a == b


@fast_devices
def test_two_runs_give_equal_bits():
    """test_threads.py compares numbers of threads."""
    with every_case() as each:
        for name, case in LARGE.items():
            with each(name):
                first, second = (evaluate(function(case.op), case) for _ in range(2))
                assert_bit_equal(second, first)


@each_op_on(DEVICES)
def test_without_gradients_the_outputs_are_the_same(op):
    expected = {name: v for name, v in evaluate(function(op), SMALL[op]).items() if not name.startswith("d")}
    with torch.inference_mode():
        assert_bit_equal(forward(function(op), SMALL[op]), expected)


@each_op_on(WIDE_DEVICES)
def test_each_gradient_alone_is_the_same(op):
    """Differentiate each output with respect to each input, one at a time."""
    case = SMALL[op]
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    outputs = forward(function(op), case.with_tensors(**inputs))
    outputs = {name: output for name, output in outputs.items() if output.requires_grad}
    assert outputs.keys() >= set(OPS[op].outputs)
    for name, output in outputs.items():
        loss = output.abs().sum()
        together = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True, materialize_grads=True)
        for (leaf, tensor), expected in zip(inputs.items(), together, strict=True):
            single = tensor.detach().clone().requires_grad_()
            result = forward(function(op), case.with_tensors(**{leaf: single}))[name]
            if result.requires_grad:
                (grad,) = torch.autograd.grad(result.abs().sum(), single, materialize_grads=True)
                assert torch.equal(grad, expected), f"gradient of {name} with respect to {leaf}"


@each_op_around_a_kernel
def test_gradcheck(op):
    """Numerical derivatives along random directions. No gradgradcheck: second derivatives are refused."""
    with every_case() as each:
        for sequences in ({}, {"B": 3, "lengths": [3, 0, 5]}, {"B": 1, "cu_seqlens": [1, 3, 3, 5]}):
            for form in ({}, TWO_CHUNKS) if op in SEE_TWO_CHUNKS else ({},):
                start = WITH_STATE.get(op, {}) | form
                case = BUILDERS[op](**{"B": 2, "L": 5} | sequences, **start, dtype=torch.float64)

                def run(*values, case=case):
                    outputs = forward(function(op), case.with_tensors(**dict(zip(case.tensors, values, strict=True))))
                    return tuple(output for output in outputs.values() if output.requires_grad)

                with each(sequences, *form):
                    inputs = tuple(t.detach().requires_grad_() for t in case.tensors.values())
                    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@each_op_around_a_kernel
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
@each_op_around_a_kernel
@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_is_refused(op, gradients):
    case = SMALL[op]
    name, tensor = next(iter(case.tensors.items()))
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode derivatives are not supported"):
            forward(function(op), case.with_tensors(**{name: forward_ad.make_dual(tensor, torch.ones_like(tensor))}))
        forward(function(op), case)  # without a tangent


class RecordOps(TorchDispatchMode):
    """Record the arguments of the last call of each registered op."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "megalodon_ops":
            self.calls[func] = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args)
        return func(*args, **(kwargs or {}))


def recorded_calls():
    recorder = RecordOps()
    with recorder:
        for op, case in SMALL.items():
            evaluate(function(op), case)
        evaluate(mo.chunked_attention, chunked_attention_case(state=True, **TWO_CHUNKS))
        for chunks in ({}, TWO_CHUNKS):
            case = chunked_attention_case(state=True, dtype=torch.float32, **chunks)
            state = mo.AttentionState(*(t.nan_to_num().clone() for t in case.options["state"]))
            mo.chunked_attention(**case.tensors, chunk_size=4, state=state, inplace_state=True, **chunks)
        for length in (2, 20):
            rotary_rows(torch.tensor([70, 30]), torch.ones(3, dtype=torch.float64), length, False)
    return recorder.calls


@fast_devices
def test_opcheck():
    """Schema, fake kernel, autograd registration and tracing of every op that is registered."""
    calls = recorded_calls()
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("megalodon_ops::")}
    names = """
        linear_fwd linear_few_rows linear_cross_entropy_fwd linear_cross_entropy_sum layer_norm_fwd layer_norm_bwd
        gated_silu_fwd gated_silu_bwd cema_coefficients_fwd cema_coefficients_bwd quantized_linear_fwd dequantize_fwd
    """
    elsewhere = {f"megalodon_ops::{name}" for name in names.split()}  # tested in a file of its own each
    assert {func.name() for func in calls} | elsewhere == registered
    for func, args in calls.items():
        if func.name().endswith("_fwd"):
            floating = lambda t: t.requires_grad_(t.is_floating_point() or t.is_complex())  # noqa: E731
            args = tree_map_only(torch.Tensor, floating, args)
        torch.library.opcheck(func, args)


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
@each_op_around_a_kernel
def test_compiles_into_one_graph(op):
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    # The inductor would compile the torch operations in these functions.
    backend = "aot_eager" if op in COMPOSED else "inductor"
    compiled = torch.compile(function(op), fullgraph=True, backend=backend)
    assert_bit_equal(evaluate(compiled, SMALL[op]), evaluate(function(op), SMALL[op]))


BATCHES = {
    "no-rows": {"B": 0, "L": 5},
    "no-positions": {"B": 2, "L": 0},
    "no-sequences": {"B": 1, "L": 5, "cu_seqlens": [3]},
    "empty-rows": {"B": 2, "L": 5, "lengths": [0, 0]},
    "few-positions": {"B": 2, "L": 5},
    "several-tiles": {"B": 1, "L": 70},
    "padded": {"B": 3, "L": 19, "lengths": [19, 0, 3]},
    "packed": {"B": 1, "L": 11, "cu_seqlens": [2, 5, 5, 9]},
}


def starts(op):
    """Arguments of builders for a fresh start, an initial state, two visible chunks and non-causal chunks."""
    whole = [{"causal": False}] if "attention" in op else []
    fresh_or_not = [{}, *([WITH_STATE[op]] if op in WITH_STATE else [])]
    to_two = [start | TWO_CHUNKS for start in fresh_or_not if op in SEE_TWO_CHUNKS]
    return [*fresh_or_not, *to_two, *whole]


@each_op_on(DEVICES)
def test_batches_of_every_kind(op):
    """Empty batches, few positions, several tiles, empty sequences; with and without an initial state."""
    with every_case() as each:
        for name, batch in BATCHES.items():
            for state in starts(op):
                with each(name, *state):
                    case = BUILDERS[op](**batch, **state, dtype=torch.float64)
                    assert_matches_reference(evaluate(function(op), case), case)


@each_op_on(WIDE_DEVICES)
def test_axes_without_elements(op):
    """Results that have elements are right, including counts and positions. Statistics of 0 channels are NaN."""
    dtypes = torch.float32, torch.bfloat16
    with every_case() as each:
        for n, sizes in enumerate(OPS[op].without_elements):
            for i, (name, batch) in enumerate(BATCHES.items()):
                for j, state in enumerate(starts(op)):
                    dtype = dtypes[(i + j + n) % 2]  # in turn
                    with each(*sizes, name, dtype, *state):
                        assert_right_without_elements(BUILDERS[op](**batch, **sizes, **state, dtype=dtype))


def assert_right_without_elements(case):
    results = evaluate(function(case.op), case)
    if not case.op.startswith("timestep_norm"):
        assert_matches_reference(results, case)
        return
    for name, value in evaluate(getattr(mo.reference, case.op), case).items():
        assert torch.equal(results[name].isnan(), value.isnan()), name
        assert torch.equal(results[name].nan_to_num(), value.nan_to_num()), name


@each_op_around_a_kernel
def test_autocast_lowers_attention_and_leaves_the_rest(op):
    case = BUILDERS[op]() if "attention" in op or "memory" in op else SMALL[op]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = evaluate(function(op), case)
    lowered = ("normalized_qk", "chunked_attention", "normalized_attention", "adaptive_working_memory")
    expected = torch.bfloat16 if op in lowered else torch.float32
    assert all(results[name].dtype == expected for name in OPS[op].outputs)
    assert all(results[f"d{name}"].dtype == tensor.dtype for name, tensor in case.tensors.items())

"""cema_end_state and timestep_norm_end_state against cema and timestep_norm; hard values; saved tensors.

test_ops.py has the promises of every op, and shows that states of pieces merge to the state of the whole.
"""

import pytest
import torch
from assertions import assert_all_as_accurate_as, assert_all_close, assert_bit_equal
from assertions import every_case, references, with_references
from backends import ISA_PARAMS, SLOW_EMULATED, every_backend, wide_every_backend
from calls import evaluate, forward
from cases import BUILDERS, Case, cema_end_state_case, timestep_norm_end_state_case
from hard_values import HARD_POLES, HARD_SHAPES, HARD_VALUES, SHAPES

import megalodon_ops as mo

pytestmark = pytest.mark.usefixtures("poisoned_memory")

END_STATES = ("cema_end_state", "timestep_norm_end_state")
# Pieces of a sequence, strips, groups of sequences; longer than what cema computes token by token.
SEQUENCES = {
    "one": {"B": 1, "L": 1100},
    "rows": {"B": 3, "L": 77},
    "padded": {"B": 4, "L": 80, "lengths": [80, 0, 33, 64]},
    "packed": {"B": 1, "L": 400, "cu_seqlens": [3, 5, 5, 90, 254, 391]},
}
FRESH_VALUES = {name: HARD_VALUES[name] for name in ("mean-1e4-std-1e-2", "mean-1e6-std-1", "tiny", "huge")}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def whole_case(case: Case) -> Case:
    """The call of the op that also has an output, on the same inputs."""
    op = case.op.removesuffix("_end_state")
    B, L, D = case.tensors["x"].shape
    if op == "cema":
        sizes = {"D": D, "N": case.tensors["p"].shape[1]}
    else:
        G = case.options["num_groups"]
        sizes = {"G": G, "width": D // G}
    whole = BUILDERS[op](B=B, L=L, dtype=case.dtype, **sizes)
    return whole.with_tensors(**case.tensors).with_options(**case.options)


def gradients_of_states(case: Case) -> tuple[dict, dict]:
    """Results of the op and of the op with an output, for equal gradients of the states and zero gradients of y."""
    incoming = {}

    def state_gradients(name, grad):
        return torch.zeros_like(grad) if name == "y" else incoming.setdefault(name, grad)

    found = evaluate(getattr(mo, case.op), case, state_gradients)
    whole = whole_case(case)
    expected = evaluate(getattr(mo, whole.op), whole, state_gradients)
    return found, {name: expected[name] for name in found}


def cases_of(op, **sizes):
    """Calls by name: each kind of batch in each dtype, then hard values."""
    cases = {
        (name, dtype): BUILDERS[op](**sequences, **sizes, dtype=dtype)
        for name, sequences in SEQUENCES.items()
        for dtype in DTYPES
    }
    hard_values, shape = (HARD_POLES, HARD_SHAPES["odd"]) if op == "cema_end_state" else (FRESH_VALUES, SHAPES["odd"])
    return cases | {(name,): BUILDERS[op](**shape, **values) for name, values in hard_values.items()}


@every_backend
@pytest.mark.parametrize(("op", "sizes"), [("cema_end_state", {"D": 19, "N": 5}), ("timestep_norm_end_state", {})])
def test_states_have_the_bits_of_the_op_with_an_output(op, sizes, backend):
    with every_case() as each:
        for name, case in cases_of(op, **sizes).items():
            with each(*name):
                whole = whole_case(case)
                expected = forward(getattr(mo, whole.op), whole)
                assert_bit_equal(forward(getattr(mo, op), case), {k: v for k, v in expected.items() if k != "y"})


@pytest.mark.parametrize("D", [19, 300])
@pytest.mark.parametrize("backend", ISA_PARAMS, indirect=True)
def test_gradients_of_cema_have_the_bits_of_those_without_dy(D, backend):
    """CPU only: the scan without dy skips additions of zeros."""
    with every_case() as each:
        for name, case in cases_of("cema_end_state", D=D, N=5).items():
            with each(*name):
                assert_bit_equal(*gradients_of_states(case))


@every_backend
def test_gradients_of_timestep_norm_are_those_without_dy(backend):
    with every_case() as each:
        for name, sequences in SEQUENCES.items():
            with each(name):
                case = timestep_norm_end_state_case(**sequences, G=3, width=8, dtype=torch.float64)
                assert_all_close(*gradients_of_states(case), tolerance=1e-12)


@pytest.mark.parametrize("lengths", [None, [9, 0]], ids=["dense", "padded"])
def test_counts_and_residuals_are_those_of_timestep_norm(lengths):
    case = timestep_norm_end_state_case(B=2, L=9, mean=1e4, **({"lengths": lengths} if lengths else {}))
    x = case.tensors["x"].requires_grad_()
    state = mo.timestep_norm_end_state(x, **case.options)
    zeros = torch.zeros(x.shape[2])
    _, expected = mo.timestep_norm(x, zeros, zeros, **case.options, return_state=True)
    assert isinstance(state, mo.TimestepNormState)
    assert all(torch.equal(*parts) for parts in zip(state, expected))
    assert state.residual.abs().max() > 0
    assert [part.requires_grad for part in state] == [False, True, True, False]


@pytest.mark.parametrize("backend", SLOW_EMULATED, indirect=True)
@pytest.mark.parametrize("shape", HARD_SHAPES)
def test_hard_poles_on_long_sequences(shape, backend):
    """CUDA only: the CPU's results have the bits of cema's, which test_cema.py covers."""
    with every_case() as each:
        for poles, numbers in HARD_POLES.items():
            with each(poles):
                case = cema_end_state_case(**HARD_SHAPES[shape], **numbers)
                results = evaluate(mo.cema_end_state, case)
                assert_all_as_accurate_as(results, *references(case), factor=4, floor=8)


@with_references
def hard_norm_case(shape, values):
    return timestep_norm_end_state_case(**SHAPES[shape], **FRESH_VALUES[values])


@wide_every_backend
def test_hard_values(backend):
    """Each shape with two kinds of values, and each kind with two shapes; test_timestep_norm.py has all pairs."""
    with every_case() as each:
        for i, shape in enumerate(SHAPES):
            for values in list(FRESH_VALUES)[i % 2 :: 2]:
                with each(shape, values):
                    case, same, exact = hard_norm_case(shape, values)
                    results = evaluate(mo.timestep_norm_end_state, case)
                    assert_all_as_accurate_as(results, same, exact, factor=4, floor=8)


@pytest.mark.parametrize("L", [40, 4000], ids=["whole", "pieces"])
@pytest.mark.parametrize("backend", ISA_PARAMS, indirect=True)
def test_a_state_whose_quotient_by_p_overflows(L, backend):
    """The op scans h / p, but h where h / p may overflow. Forward only: the gradient of p is out of range."""
    case = cema_end_state_case(B=1, L=L, D=3, N=4, radius=(0.99, 0.99), angle=(0.0, 0.0))
    x, p = torch.full_like(case.tensors["x"], 1e38), torch.full_like(case.tensors["p"], 1e-3)
    case = case.with_tensors(x=x, p=p)
    assert_all_as_accurate_as(forward(mo.cema_end_state, case), *references(case, forward), factor=4, floor=8)


@pytest.mark.parametrize("name", END_STATES)
def test_only_inputs_and_states_are_saved_for_the_backward(name):
    case = BUILDERS[name](B=2, L=50, lengths=[50, 7])
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in case.tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        results = forward(getattr(mo, name), case.with_tensors(**leaves))
    known = {tensor.data_ptr() for tensor in (*leaves.values(), *case.options.values()) if hasattr(tensor, "data_ptr")}
    others = [tensor for tensor in kept if tensor.data_ptr() not in known]
    state_elements = 3 * sum(t.numel() for n, t in results.items() if n in ("state", "mean"))
    span_elements = case.spans().numel()  # made from the lengths
    assert sum(tensor.numel() for tensor in others) <= state_elements + span_elements < leaves["x"].numel() / 2

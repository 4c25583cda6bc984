"""Offsets, lengths and positions out of range, which cannot be checked before a CUDA kernel reads them.

Kernels never leave their buffers. Offsets beyond a row count as its end, sequences with a wrong position as padding.
"""

import pytest
import torch
from assertions import assert_bit_equal
from cases import BUILDERS, OPS, WITH_STATE, Case
from emulated import run_emulated as run
from emulated_attention import update_state
from emulator.device import Emulator
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_ops import AttentionState

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SMALL = {name: op.cuda.odd for name, op in OPS.items() if op.cuda}
WITH_POSITIONS = ("normalized_qk", "chunked_attention")
FAR = [7, 100, 1000, 2**20, 2**31 - 1, 2**31, 2**32 + 3, 2**40, 2**62, 2**63 - 1]
WRONG = st.sampled_from(FAR) | st.sampled_from(FAR).map(lambda n: -n) | st.just(-(2**63))


def build(op: str, **options) -> Case:
    """A case with a state, and a position where the op has one."""
    state = WITH_STATE.get(op, {})
    return BUILDERS[op](**SMALL[op], **state, **options)


def at_positions(case: Case, position: torch.Tensor) -> Case:
    if case.op == "normalized_qk":
        return case.with_options(position=position)
    k, v, _ = (t.nan_to_num() for t in case.options["state"])
    return case.with_options(state=AttentionState(k, v, position))


@st.composite
def wrong_cases(draw: st.DrawFn, op: str) -> Case:
    """Cases whose numbers are right, slightly wrong or far out of range."""
    L = draw(st.sampled_from([1, 3, 8, 40] if op in WITH_POSITIONS else [1, 3, 8, 70, 140]))
    numbers = st.integers(0, L) | st.integers(-3, L + 3) | WRONG
    kinds = ["packed", "padded", "spans", "dense"] if op in WITH_POSITIONS else ["packed", "padded", "spans"]
    kind = draw(st.sampled_from(kinds))
    B = 1 if kind == "packed" else 3
    dtype = draw(st.sampled_from([BF16, F32, F64]))
    if kind == "packed":
        S = draw(st.integers(0, 7))
        case = build(op, B=B, L=L, dtype=dtype, cu_seqlens=[0] * (S + 1))
        offsets = draw(st.lists(numbers, min_size=S + 1, max_size=S + 1))
        case = case.with_options(cu_seqlens=torch.tensor(offsets))
    elif kind == "spans":
        S = draw(st.integers(0, 6))
        case = build(op, B=B, L=L, dtype=dtype, spans=[(0, 0)] * S)
        bounds = draw(st.lists(st.tuples(numbers, numbers), min_size=S, max_size=S))
        case = case.with_options(spans=torch.tensor(bounds, dtype=torch.int64).view(-1, 2))
    else:
        S = B
        case = build(op, B=B, L=L, dtype=dtype)
        if kind == "padded":
            case = case.with_options(lengths=torch.tensor(draw(st.lists(numbers, min_size=B, max_size=B))))
    if op in WITH_POSITIONS:
        positions = st.integers(0, 5) | st.sampled_from([-1, 6]) | WRONG
        case = at_positions(case, torch.tensor(draw(st.lists(positions, min_size=S, max_size=S)), dtype=torch.int64))
    return case


@pytest.mark.parametrize("op", SMALL)
def test_kernels_stay_inside_their_buffers(emulated_module, op):
    emulator = Emulator(emulated_module)

    @settings(max_examples=15)
    @given(case=wrong_cases(op))
    def check(case):
        with emulator.only_bounds():
            run(emulator, case)

    check()


@pytest.mark.parametrize("L", [2, 9, 75])
@pytest.mark.parametrize("op", SMALL)
def test_offsets_beyond_the_row_count_as_its_end(emulator, op, L):
    """With few tokens, attention takes other kernels, which do not divide the batch into blocks of rows."""
    padded = build(op, B=4, L=L, lengths=[L, 0, 0, 1])
    wrong = padded.with_options(lengths=torch.tensor([L + 1, -1, -(2**63), 1]))
    assert_bit_equal(run(emulator, wrong), run(emulator, padded))
    packed = build(op, B=1, L=L, cu_seqlens=[0, 1, 1, L, L])
    wrong = packed.with_options(cu_seqlens=torch.tensor([-5, 1, 1, 2**40, L + 1]))
    assert_bit_equal(run(emulator, wrong), run(emulator, packed))


@pytest.mark.parametrize(("L", "dtype"), [(2, F32), (9, BF16)], ids=str)
@pytest.mark.parametrize("op", WITH_POSITIONS)
def test_a_sequence_with_a_wrong_position_counts_as_padding(emulator, op, L, dtype):
    """As if the sequence were empty, except that its end state has position -1."""
    positions = torch.tensor([2, -1, 6, 2**62, 5])
    case = at_positions(build(op, B=5, L=L, dtype=dtype), positions)
    right = at_positions(case.with_options(lengths=torch.tensor([L, 0, 0, 0, L])), positions % 6)
    actual, expected = run(emulator, case), run(emulator, right)
    outputs = [name for name in actual if "state" not in name]
    assert_bit_equal({name: actual[name] for name in outputs}, {name: expected[name] for name in outputs})
    if op == "chunked_attention":
        assert actual["state.position"][1:4].tolist() == [-1, -1, -1]
        for name in ("state.k", "state.v"):
            assert (actual[name][1:4] == 0).all()
            assert torch.equal(actual[name][::4], expected[name][::4])


def test_a_state_in_place_with_a_wrong_position_is_not_changed(emulator):
    case = at_positions(build("chunked_attention", B=3, L=4), torch.tensor([6, 1, -7]))
    state = AttentionState(*(t.clone() for t in case.options["state"]))
    update_state(emulator, case, state, state)
    assert state.position.tolist() == [-1, 5, -1]
    for new, old in zip(state[:2], case.options["state"][:2], strict=True):
        assert torch.equal(new[::2], old[::2])

"""Spans from each public form, and the errors that name the argument given."""

import pytest
import torch
from torch import tensor

import megalodon_ops as mo
from megalodon_ops.ops.common.spans import as_spans, num_positions, read_spans, token_sequences

X, ROW = torch.zeros(2, 5, 8), torch.zeros(1, 5, 8)
FORMS = {
    "dense": (X, {}, [(0, 5), (5, 10)]),
    "lengths": (X, dict(lengths=tensor([3, 0])), [(0, 3), (5, 5)]),
    "starts": (X, dict(starts=tensor([1, 5])), [(1, 5), (10, 10)]),
    "starts-and-lengths": (X, dict(starts=tensor([2, 1]), lengths=tensor([3, 2])), [(2, 5), (6, 8)]),
    "offsets": (ROW, dict(cu_seqlens=tensor([1, 1, 4])), [(1, 1), (1, 4)]),
    "no-offsets": (ROW, dict(cu_seqlens=tensor([4])), []),
    "spans": (X, dict(spans=tensor([[0, 2], [3, 5], [6, 9]])), [(0, 2), (3, 5), (6, 9)]),
    "offsets-in-two-rows": (X, dict(spans=tensor([1, 5, 8, 8])), [(1, 5), (5, 8), (8, 8)]),
    "int32": (X, dict(lengths=tensor([3, 0], dtype=torch.int32)), [(0, 3), (5, 5)]),
}


@pytest.mark.parametrize(("x", "where", "expected"), FORMS.values(), ids=FORMS)
def test_spans_of_each_form(x, where, expected):
    spans = as_spans("cema", x, *(where.get(name) for name in ("cu_seqlens", "lengths", "starts", "spans")))
    assert read_spans("cema", x, spans) == expected
    assert num_positions(x, spans).tolist() == [end - begin for begin, end in expected]
    sequences = [len(expected)] * x[..., 0].numel()  # of a token outside of all spans
    for s, (begin, end) in enumerate(expected):
        sequences[begin:end] = [s] * (end - begin)
    assert token_sequences(x, spans).flatten().tolist() == sequences


WRONG = [
    (X, dict(lengths=tensor([6, 0])), r"`lengths` must be in \[0, 5\], got 6 at 0"),
    (X, dict(lengths=tensor([1, -2])), r"`lengths` must be in \[0, 5\], got -2 at 1"),
    (X, dict(starts=tensor([0, -1])), r"`starts` must be in \[0, 5\], got -1 at 1"),
    (X, dict(starts=tensor([0, 3]), lengths=tensor([1, 3])), r"`lengths` must be in \[0, 2\] .* got 3 at 1"),
    (ROW, dict(cu_seqlens=tensor([0, 4, 3])), r"`cu_seqlens` must be non-decreasing offsets in \[0, 5\], got 3 at 2"),
    (ROW, dict(cu_seqlens=tensor([-1, 4])), r"`cu_seqlens` must be .* got -1 at 0"),
    (X, dict(cu_seqlens=tensor([0, 4])), r"`cu_seqlens` must have shape \(S \+ 1,\) for a batch of one row"),
    (X, dict(spans=tensor([[0, 3], [2, 5]])), r"`spans` must be in order, disjoint .* got \[2, 5\) at 1"),
    (X, dict(spans=tensor([[3, 7]])), r"`spans` must be .* within one row of 5 positions each, got \[3, 7\) at 0"),
    (X, dict(spans=tensor([[8, 11]])), r"`spans` must be .* got \[8, 11\) at 0"),
    (X, dict(spans=tensor([[0], [3]])), r"`spans` must have shape \(S, 2\), \(B, 1, 2\) or \(S \+ 1,\), got \(2, 1\)"),
    (X, dict(spans=tensor([3, 7])), r"`spans` must be .* within one row of 5 positions each, got \[3, 7\) at 0"),
    (X, dict(spans=tensor([[0, 3]]), lengths=tensor([1, 1])), "`lengths` must be None where `spans` is given"),
    (X, dict(starts=tensor([0, 1.0])), "`starts` must be int64 or int32, got torch.float32"),
    (X, dict(starts=[0, 1]), "`starts` must be a torch tensor, got list"),
    (X, dict(spans=tensor([[0, 3]], device="meta")), "`spans` must be on cpu as the others, got meta"),
]


@pytest.mark.parametrize(("x", "where", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_sequences_are_named(x, where, message):
    with pytest.raises((ValueError, TypeError), match=f"timestep_norm_end_state: {message}"):
        mo.timestep_norm_end_state(x, num_groups=2, **where)

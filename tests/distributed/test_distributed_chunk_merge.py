"""The algebra of chunk parallel, in one process: the merged end states of pieces are that of the whole sequence."""

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import megalodon_ops as mo
from megalodon_ops.distributed.merge import merged_cema, merged_norm, norm_in_float64
from megalodon_ops.distributed.pieces import pieces_of
from megalodon_ops.distributed.split import columns

D, N, G = 4, 3, 2  # channels, states of cema, groups of the norm
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@given(LENGTHS, st.booleans(), st.sampled_from([0.0, 1e6]), st.integers(0, 1000))
def test_norm_of_merged_pieces(lengths, has_past, offset, seed):
    gen = torch.Generator().manual_seed(seed)
    x = (offset + torch.randn(2, sum(lengths), D, generator=gen, dtype=torch.float64)).requires_grad_()
    affine = dict(weight=torch.zeros(D, dtype=torch.float64), bias=torch.zeros(D, dtype=torch.float64), num_groups=G)
    start = None
    if has_past:
        mean, var = torch.randn(2, 2, G, generator=gen, dtype=torch.float64)
        start = mo.TimestepNormState(torch.tensor([0, 5]), mean.requires_grad_(), var.abs().requires_grad_())
    _, whole = mo.timestep_norm(x, **affine, state=start, return_state=True)
    pieces = [mo.timestep_norm(piece, **affine, return_state=True)[1] for piece in x.split(lengths, 1)]
    ends = torch.stack([norm_in_float64(end) for end in pieces])
    given_state = dict(start=norm_in_float64(start), count=start.count) if has_past else {}
    merged = merged_norm(ends, range(len(lengths)), lengths, dtype=x.dtype, **given_state)
    assert torch.equal(merged.count, whole.count)
    leaves = [x, *([start.mean, start.var] if has_past else [])]
    weights = torch.randn(2, 2, G, generator=gen, dtype=torch.float64)
    values = [(state.mean, state.var) for state in (merged, whole)]
    totals = [(weights[0] * mean + weights[1] * var).sum() for mean, var in values]
    grads = [torch.autograd.grad(total, leaves, allow_unused=True) for total in totals]
    for a, b in zip((*values[0], *grads[0]), (*values[1], *grads[1]), strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + b.abs().max() + offset * 1e-3)


def test_200_000_positions_are_exact():
    p, angle = torch.rand(2, D, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.polar(1 - 10 ** (-4 * p), 6 * angle).to(torch.complex64)
    ends = torch.zeros(2, 1, D, N, dtype=torch.complex64)
    merged = merged_cema(q, ends, [0, 1], [200_000, 7], torch.ones(1, D, N) + 0j)
    for value, pole in zip(merged.flatten().tolist(), q.flatten().tolist()):
        exact = math.exp(200_007 * math.log(abs(pole)))  # |q^n| by logarithms of float64
        assert abs(value) == pytest.approx(exact, rel=1e-6, abs=1e-40)


def test_a_pole_at_zero():
    q = torch.zeros(1, 1, dtype=torch.complex64, requires_grad=True)
    ends = torch.tensor([2.0, 3.0]).view(2, 1, 1, 1) + 0j
    h = merged_cema(q, ends, [0, 1], [1, 1])
    (dq,) = torch.autograd.grad(h.real.sum(), q)
    assert h.item() == 3 and dq.item() == 2


def test_no_piece_before_stays_in_the_graph():
    q = torch.ones(1, 1) + 0j
    ends = torch.ones(2, 1, 1, 1, requires_grad=True)
    (dends,) = torch.autograd.grad(merged_cema(q, ends + 0j, [], []).real.sum(), ends)
    assert torch.equal(dends, torch.zeros_like(ends))
    ends = torch.ones(2, 1, 2, G, dtype=torch.float64, requires_grad=True)
    (dends,) = torch.autograd.grad(merged_norm(ends, [], []).mean.sum(), ends)
    assert torch.equal(dends, torch.zeros_like(ends))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_sources_of_a_packed_row(chunks, data):
    """Each rank's sources and its own piece together have all positions of the open sequence."""
    chunk_size = 4
    lengths = [chunk_size * n for n in chunks]
    total = sum(lengths)
    grid = st.sampled_from(range(0, total + 1, chunk_size))
    offsets = sorted(data.draw(st.lists(grid, min_size=2, max_size=6)))
    ending = []
    for rank, end in enumerate(accumulate(lengths)):
        begin = end - lengths[rank]
        pieces = pieces_of(rank, lengths, rows=1, chunk_size=chunk_size, cu_seqlens=offsets)
        inside = [(a, b) for a, b in zip(offsets, offsets[1:]) if a < b and a < end and b > begin and begin < end]
        assert pieces.is_continuation == (bool(inside) and inside[0][0] < begin)
        assert sum(pieces.source_lengths) == (begin - inside[0][0] if pieces.is_continuation else 0)
        assert all(lengths[source] for source in pieces.sources)
        open_at_end = inside and inside[-1][1] > end
        assert pieces.tail[1] - pieces.tail[0] == (end - max(inside[-1][0], begin) if open_at_end else 0)
        own = [(a, b) for a, b in pieces.own_spans if a < b]
        assert own == [(max(a, begin) - begin, min(b, end) - begin) for a, b in inside]
        ending += pieces.ending_sequences
    assert ending == [s for s, (a, b) in enumerate(zip(offsets, offsets[1:])) if a < b]


OFFSETS = st.lists(st.integers(0, 60), min_size=2, max_size=5).map(sorted)


@given(st.integers(1, 6), st.integers(1, 9), OFFSETS, st.integers(0, 8), st.booleans())
def test_split_cuts_at_chunk_boundaries(ranks, chunk_size, offsets, position, packed):
    length = offsets[-1] + 3
    position = 0 if packed else position % chunk_size
    offsets = offsets if packed else [0, length]
    cuts = [columns(rank, ranks, length, chunk_size, offsets, position) for rank in range(ranks)]
    assert cuts[0][0] == 0 and cuts[-1][1] == length and all(a[1] == b[0] for a, b in zip(cuts, cuts[1:]))
    lengths = [b - a for a, b in cuts]
    packing = dict(cu_seqlens=offsets if packed else None, positions=[position] * (len(offsets) - 1))
    pieces_of(0, lengths, rows=1, chunk_size=chunk_size, **packing)
    if not packed and position == 0 and length % chunk_size == 0:  # whole chunks are shared out evenly
        counts = [(b - a) // chunk_size for a, b in cuts]
        assert max(counts) - min(counts) <= 1

"""Chunk parallel gives what one process gives: logits, losses, gradients, states."""

from dataclasses import replace

import pytest
import torch
from assertions import every_case
from chunk_parallel import Work, compare, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st

EXACT, FLOAT32 = 1e-10, 1e-5
C = 8  # the tiny model's chunk

FORMS = {
    "two chunks": dict(visible_chunks=2),
    "memory": dict(working_memory=True),
    "memory, two chunks": dict(working_memory=True, visible_chunks=2),
}
FORM_CASES = {
    "dense": dict(pieces=(16, 8, 11), rows=2),
    "padded, a state": dict(pieces=(13, 8, 13), rows=4, lengths=(34, 14, 0, 24), past=(3, C + 3, 3, 2 * C + 3)),
    "packed, a state, recomputed": dict(pieces=(12, 8, 8, 10), cu_seqlens=(1, 6, 6, 37), past=(3, 5, C + 2)),
    "short pieces, a state": dict(pieces=(5, 8, 0, 2), rows=2, past=(3, 2 * C + 3)),
}
ALL = dict(swiglu=True, rescale_nffn=True, share_emb=True, scale_emb=True)
# Work: columns of each rank, then rows; sequences' `lengths` or `cu_seqlens`; tokens that each has read in the `past`.
CASES = {
    "dense": Work((16, 8, 11), rows=2),
    "dense, one head": Work((16, 13), rows=2, config=dict(num_heads=1), reduction="sum"),
    "padded, swiglu, tied": Work((16, 8, 11), rows=4, lengths=(35, 20, 16, 0), config=ALL),
    "packed, recomputed": Work((16, 8, 11), cu_seqlens=(0, 5, 8, 8, 33), config=dict(layerwise_ckpt=True)),
    "state, no affine norms, one state": Work(
        (8, 16, 5), rows=2, past=(C, 3 * C), config=dict(norm_affine=False, cema_ndim=1, norm_num_groups=32)
    ),
    "state within a chunk, recomputed": Work((5, 16, 5), rows=2, past=(3, C + 3), config=dict(layerwise_ckpt=True)),
    "padded with a state": Work((13, 8, 5), rows=3, lengths=(26, 14, 0), past=(3, C + 3, 2)),
    "packed with a state": Work((12, 8, 10), cu_seqlens=(1, 6, 6, 29), past=(3, 5, 2)),
    "packed with a state, recomputed": Work(
        (12, 8, 10), cu_seqlens=(1, 6, 6, 29), past=(3, 5, 2), config=dict(layerwise_ckpt=True)
    ),
    "ranks without columns": Work((0, 16, 0, 3), rows=2),
    "the last rank without columns": Work((24, 0), rows=2),
    "only the last rank has columns": Work((0, 0, 5), rows=2),
    **{
        f"{form}, {case}": Work(config=FORMS[form] | {"layerwise_ckpt": "recomputed" in case}, **batch)
        for form in FORMS
        for case, batch in FORM_CASES.items()
    },
    "without gradients": Work((16, 13), rows=2, past=(0, 8), grad=False),
}


# Nearly covered by other cases of the default tier.
SLOW = ("dense, one head", "packed with a state", "the last rank without columns")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
def test_equals_one_process(ranks, case):
    error, where = worst_error(ranks.run(compare, len(CASES[case].pieces), CASES[case]))
    assert error < EXACT, where


def test_a_model_of_numbers_equals_one_process(ranks):
    config = dict(num_features=2, output_size=3)
    works = {
        "dense": Work((16, 8, 11), rows=2, config=config),
        "padded with a state": Work((13, 8, 5), rows=3, lengths=(26, 14, 0), past=(3, C + 3, 2), config=config),
        "packed with a state": Work((12, 8, 10), cu_seqlens=(1, 6, 6, 29), past=(3, 5, 2), config=config),
    }
    with every_case() as case:
        for name, work in works.items():
            with case(name):
                error, where = worst_error(ranks.run(compare, 3, work))
                assert error < EXACT, where


def test_equals_one_process_in_float32(ranks):
    error, where = worst_error(ranks.run(compare, 3, replace(CASES["packed with a state"], dtype=torch.float32)))
    assert error < FLOAT32, where


def test_16_bit_parameters_differ_by_their_rounding_alone(ranks):
    error, where = worst_error(ranks.run(compare, 2, Work((16, 13), rows=2, dtype=torch.bfloat16)))
    assert error < 0.1, where  # two roundings of bfloat16 are 0.008


@pytest.mark.slow
@settings(max_examples=20)
@given(data=st.data())
def test_equals_one_process_at_random_cuts(ranks, data):
    ends = st.integers(0, 6)
    count = data.draw(st.integers(2, 4))
    cuts = sorted(data.draw(st.lists(ends, min_size=count - 1, max_size=count - 1)))
    rest = data.draw(st.integers(0, 2 * C))
    kind = data.draw(st.sampled_from(["dense", "padded", "packed"]))
    bounds = [0, *(C * cut for cut in cuts), C * cuts[-1] + rest]
    total = bounds[-1]
    rows = data.draw(st.integers(1, 3))
    options = {}
    if kind == "padded":
        options["lengths"] = tuple(data.draw(st.lists(st.integers(0, total), min_size=rows, max_size=rows)))
    if kind == "packed":  # sequences of whole chunks; arbitrary ones after the last cut
        grid = [C * n for n in range(cuts[-1] + 1)]
        offsets = data.draw(st.lists(st.sampled_from([*grid, *range(bounds[-2], total + 1)]), min_size=2, max_size=5))
        options["cu_seqlens"] = tuple(sorted(offsets))
        rows = 1
    work = Work(tuple(b - a for a, b in zip(bounds, bounds[1:])), rows=rows, **options)
    if data.draw(st.booleans()):
        past = st.integers(0, 3).map(lambda n: C * n)
        work = replace(work, past=tuple(data.draw(past) for _ in range(work.sequences)))
    config = data.draw(st.sampled_from([{}, *FORMS.values()])) | dict(layerwise_ckpt=data.draw(st.booleans()))
    work = replace(work, config=config, grad=data.draw(st.booleans()))
    error, where = worst_error(ranks.run(compare, count, work))
    assert error < EXACT, where

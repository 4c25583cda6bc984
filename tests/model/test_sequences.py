"""Sequences of a call: wherever they lie in the batch, they give what they give alone, and padding reaches nothing."""

import itertools

import pytest
import torch
from assertions import assert_close
from case import sequence_options
from drawing import sequences
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model, tokens_of
from torch.utils._pytree import tree_leaves

import megalodon_ops as mo

VARIANTS = {
    "plain": {},
    "working memory": dict(working_memory=True),
    "two visible chunks": dict(visible_chunks=2, chunk_size=5),
    "both": dict(working_memory=True, visible_chunks=2, chunk_size=5),
}
FORMS = ("packed", "padded", "left-padded", "spans")


def pairs_of(B, L, cu_seqlens=None, spans=None, starts=None, lengths=None) -> list[tuple[int, int]]:
    """First and last-plus-one position of each sequence in the flattened batch."""
    if cu_seqlens is not None or spans is not None:
        return [*itertools.pairwise(cu_seqlens)] if spans is None else spans
    starts = [0] * B if starts is None else starts
    ends = [L] * B if lengths is None else [start + n for start, n in zip(starts, lengths, strict=True)]
    return [(row * L + start, row * L + end) for row, (start, end) in enumerate(zip(starts, ends, strict=True))]


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_sequences_give_what_they_give_alone(fields):
    """Logits, states, the outputs of layers as hooks see them, the next token's logits, the loss and its gradients."""
    model, without_hooks = tiny_model(**fields), tiny_model(**fields)
    outputs = []  # of the model's layers, since the list was cleared
    for layer in model.layers:
        layer.register_forward_hook(lambda _, args, x: outputs.append(x.detach().flatten(0, 1)))

    @settings(max_examples=10)
    @given(sequences(st.integers(1, 30), FORMS))
    def check(rows):
        pairs, tokens = pairs_of(**rows), tokens_of(rows.pop("B"), rows.pop("L"))
        if "cu_seqlens" in rows and rows["cu_seqlens"][-1] < tokens.numel():  # a model takes such offsets as spans
            rows = {"spans": pairs}
        where = sequence_options(**rows)
        flat, targets = tokens.view(1, -1), tokens.flip(0, 1)
        following = tokens_of(len(pairs), 1)
        outputs.clear()
        logits, state = model(tokens, return_state=True, **where)
        together = [logits.flatten(0, 1), *outputs]
        with torch.no_grad():
            decoded = mo.Decoder(without_hooks, state.detach())(following) if pairs else None
        model.zero_grad()
        loss = model.loss(tokens, targets, reduction="sum", **where)
        loss.backward()
        grads = [parameter.grad for parameter in model.parameters()]
        total = 0.0
        model.zero_grad()
        for s, (begin, end) in enumerate(pairs):
            if begin == end:
                continue
            outputs.clear()
            logits, single = model(flat[:, begin:end], return_state=True)
            for found, expected in zip(together, [logits[0], *outputs], strict=True):
                assert_close(found[begin:end], expected, tolerance=1e-10)
            for found, expected in zip(tree_leaves(state[[s]]), tree_leaves(single), strict=True):
                assert_close(found, expected, tolerance=1e-10)
            with torch.no_grad():
                assert_close(decoded[[s]], model(following[[s]], state=single), tolerance=1e-10)
            alone = model.loss(flat[:, begin:end], targets.view(1, -1)[:, begin:end], reduction="sum")
            alone.backward()
            total += alone.detach()
        if any(begin < end for begin, end in pairs):
            assert_close(loss.detach(), total, tolerance=1e-10)
            for found, parameter in zip(grads, model.parameters(), strict=True):
                assert_close(found, parameter.grad, tolerance=1e-10)

    check()


def test_dropkey_depends_on_a_sequence_and_not_on_where_it_lies():
    model = tiny_model(attention_dropout=0.4).train()
    lengths, L = [20, 7, 13], 20
    tokens = [tokens_of(length) for length in lengths]
    right = torch.stack([torch.nn.functional.pad(row, (0, L - len(row))) for row in tokens])
    left = torch.stack([torch.nn.functional.pad(row, (L - len(row), 0)) for row in tokens])
    flat = torch.cat(tokens)
    forms = {  # batch, where its sequences lie, and where they begin in the flattened batch
        "padded": (right, dict(lengths=torch.tensor(lengths)), [0, 20, 40]),
        "left-padded": (left, dict(starts=L - torch.tensor(lengths)), [0, 33, 47]),
        "packed": (flat[None], dict(cu_seqlens=torch.tensor([0, 20, 27, 40])), [0, 20, 27]),
        "two rows": (flat.view(2, L), dict(spans=torch.tensor([[0, 20], [20, 27], [27, 40]])), [0, 20, 27]),
    }
    results = {}
    for seed in (0, 1):
        for name, (batch, where, begins) in forms.items():
            torch.manual_seed(seed)
            logits = model(batch, **where).flatten(0, 1)
            results[name, seed] = torch.cat([logits[at : at + length] for at, length in zip(begins, lengths)])
    for name, seed in results:
        assert_close(results[name, seed], results["padded", seed], tolerance=1e-10)
    assert (results["padded", 0] - results["padded", 1]).abs().max() > 1e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e20])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_values_at_padding_reach_nothing(fields, value):
    model = tiny_model(num_features=3, output_size=5, **fields)
    where = dict(starts=torch.tensor([0, 6, 20]), lengths=torch.tensor([13, 9, 0]))
    x = torch.randn(3, 20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = torch.zeros(3, 20, dtype=torch.bool)
    inside[0, :13] = inside[1, 6:15] = True
    results = []
    for padding in (0.0, value):
        given_x = x.masked_fill(~inside[..., None], padding).requires_grad_()
        y, state = model(given_x, return_state=True, **where)
        grads = torch.autograd.grad(y[inside].square().sum(), [given_x, *model.parameters()], allow_unused=True)
        assert (grads[0][~inside] == 0).all() and grads[0][inside].abs().min() > 0
        results.append([y[inside], *tree_leaves(state), *(grad for grad in grads if grad is not None)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))

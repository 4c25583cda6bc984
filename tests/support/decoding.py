"""Bitwise comparison of a decoder with the layers of its model."""

import re

import pytest
import torch
from models import tiny_model, tokens_of
from torch.utils._pytree import tree_leaves, tree_map_only

import megalodon_ops as mo

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def model_and_state(dtype=torch.float32, rows=1, seen=5, **overrides):
    """A model in evaluation mode and its state after `seen` tokens."""
    model = tiny_model(dtype, **overrides).eval()
    with torch.no_grad():
        _, state = model(tokens_of(rows, seen), return_state=True)
    return model, state


def by_layers(model, state, pieces):
    """Logits of the pieces and the state after them, by the model's layers."""
    outputs = []
    state = tree_map_only(torch.Tensor, torch.clone, state)
    with torch.no_grad():
        for piece in pieces:
            logits, state = model(piece, state=state, return_state=True, inplace_state=True)
            outputs.append(logits)
    return tree_leaves((outputs, state))


def by_decoder(decoder, pieces):
    return tree_leaves(([decoder(piece) for piece in pieces], decoder.state))


def assert_bits_of_layers(model, state, rows=1, length=1, *, fused=True, pieces=None):
    """Assert that decoder and layers give the same bits, by default in five calls, during which a new chunk begins."""
    pieces = tokens_of(rows, 5 * length).split(length, 1) if pieces is None else pieces
    decoder = mo.Decoder(model, state)
    assert_same_bits(by_decoder(decoder, pieces), by_layers(model, state, pieces))
    assert decoder.fused is fused


def assert_same_bits(found, expected):
    """Assert equal bits; fails where both have NaN."""
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True))


def assert_error_of_the_layers(model, state, token):
    """Assert that the decoder's first call raises the error that the model raises."""
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        by_layers(model, state, [token])
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        mo.Decoder(model, state)(token)


def assert_equal(found, expected, tolerance=0.0):
    """Assert equal values; takes NaN as equal, as rows of a cache that nothing has written are NaN."""
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Tolerance for a decoder's products on a GPU, which are rounded once with what follows them"""


def assert_decodes(decoder, model, tokens, length=1):
    """Assert that the decoder's next logits and its state are those of the layers, on the CPU bit for bit."""
    state, pieces = decoder.state, tokens.split(length, 1)
    found = by_decoder(decoder, pieces)
    tolerance = ROUNDING[state.layers[0].attention.v.dtype] if tokens.is_cuda else 0.0
    assert_equal(found, by_layers(model, state, pieces), tolerance)
    assert all(logits.isfinite().all() for logits in found[: len(pieces)])


class Wrapped(torch.nn.Module):
    """A layer in the place of another one, as an adapter is."""

    def __init__(self, layer, change):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x):
        return self.change(self.layer(x))

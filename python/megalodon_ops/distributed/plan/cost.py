"""What one process computes in a step, op by op: operations as `ops/flops.py` counts them, and bytes of memory moved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .share import WIDE, Share


class Op(NamedTuple):
    """One op of the model, for all of a process's tokens."""

    name: str
    part: str
    forward: int
    """operations"""
    backward: int
    forward_moves: int
    """bytes read and written, each tensor once"""
    backward_moves: int
    is_product: bool
    """whether matrix units compute it"""


PARTS = ("matrix products", "attention", "CEMA", "norms, gates, rotary", "output and loss")


def block_ops(share: Share) -> Iterator[Op]:
    """The ops of one block, in the order of its forward."""
    config, T, e, r = share.config, share.tokens, share.narrow, share.residual
    D, N = config.model_dim, config.cema_ndim
    d, _, h, z, v, f = share.widths
    affine, swiglu = config.norm_affine, config.swiglu
    yield _elementwise("timestep norm", T * d, 8, 13, r)
    yield _coefficients(d * N)
    yield _product(share, "wv", D, v)
    yield _elementwise("gate of v", T * v, 4, 8, e)
    yield _elementwise("CEMA", T * d, 12 * N + 2, 34 * N + 4, r, part="CEMA")
    yield _elementwise("RMS norm", T * D, 3 + affine, 8 + 3 * affine, r, by_torch=share.device == "cuda")
    yield _product(share, "wz", D, z)
    yield _elementwise("queries and keys", T * z, 13, 23, e, writes=2)
    yield _attention(share, h, z, v)
    yield _product(share, "wr", D, v)
    yield _elementwise("gate of attention", T * v, 5, 11, e, reads=2)
    yield _product(share, "wh1", D, d)
    yield _product(share, "wh2", v, D)
    yield _elementwise("layer norm", T * D, 5 + 2 * affine, 12 + 4 * affine, r, by_torch=share.device == "cuda")
    for name in ("fc1", *(["fc3"] if swiglu else [])):
        yield _product(share, name, D, f)
    yield _elementwise("gate of feed-forward", T * f, 5 if swiglu else 4, 11 if swiglu else 8, e, reads=1 + swiglu)
    yield _product(share, "fc2", f, D)
    yield _elementwise("residuals", 2 * T * d, 0, 0, r, reads=2)


def ops_around_blocks(share: Share) -> Iterator[Op]:
    """The embedding, the final norm and the loss; the loss makes its gradients in the same pass."""
    config, T = share.config, share.tokens
    d = share.widths[0]
    yield Op("embedding", "output and loss", 0, 0, 2 * T * d * share.narrow, 2 * T * d * share.narrow, False)
    yield _elementwise("final norm", T * d, 8, 13, share.residual)
    loss = _product(share, "output", config.model_dim, share.classes, share.loss_tokens)
    logits = share.loss_tokens * share.classes * (share.narrow + WIDE)
    yield loss._replace(
        part="output and loss",
        forward_moves=loss.forward_moves + logits,
        backward_moves=loss.backward_moves + logits,
    )


def ops_computed_again(share: Share) -> list[Op]:
    """The ops of a block's second forward, where it is recomputed: torch ends it when all that is kept exists again."""
    return [op for op in block_ops(share) if op.name != "fc2" or share.keeps_fc2]


def _product(share: Share, name: str, inputs: int, outputs: int, tokens: int | None = None) -> Op:
    T, e, weight = share.tokens if tokens is None else tokens, share.narrow, inputs * outputs
    moved = (T * (inputs + outputs) + weight) * e
    cast = (WIDE + e) * weight * share.autocast
    return Op(name, "matrix products", 2 * T * weight, 4 * T * weight, moved + cast, 2 * moved + cast, True)


def _elementwise(
    name: str, size: int, forward: int, backward: int, width: int, *, part: str = "norms, gates, rotary", reads: int = 1,
    writes: int = 1, by_torch: bool = False,
) -> Op:  # fmt: skip
    """An op that reads and writes arrays of `size` numbers; its backward also reads the gradients and writes others."""
    casts = 2 * (width + WIDE) * size * (by_torch and width < WIDE)  # to float32 and back, by torch
    moved, moved_back = (reads + writes) * size * width, (2 * reads + writes) * size * width
    return Op(name, part, size * forward, size * backward, moved + casts, moved_back + casts, False)


def _coefficients(size: int) -> Op:
    return Op("coefficients", "CEMA", 15 * size, 31 * size, 9 * WIDE * size, 18 * WIDE * size, False)


def _attention(share: Share, h: int, z: int, v: int) -> Op:
    """Scores and values forward; scores again, their gradients, and those of q, k and v backward."""
    T, e, pairs = share.tokens, share.narrow, share.pairs
    forward, backward = 2 * pairs * (z + v), 2 * pairs * (3 * z + 2 * v)
    moved = T * (2 * z + 2 * v) * e + T * h * WIDE
    return Op("attention", "attention", forward, backward, moved, 2 * moved, True)


class Flops(NamedTuple):
    """Operations of one process in a step, by part; forward and backward, and those that recomputation adds."""

    by_part: dict[str, int]
    recomputed: int

    @property
    def total(self) -> int:
        """What the model needs, without what is computed twice."""
        return sum(self.by_part.values())


def flops(share: Share, recompute: bool) -> Flops:
    """The operations of a step, exactly those that `torch.utils.flop_counter` counts on the CPU."""
    by_part = dict.fromkeys(PARTS, 0)
    for op, times in step_ops(share):
        by_part[op.part] += times * (op.forward + op.backward)
    again = sum(op.forward for op in ops_computed_again(share))
    return Flops(by_part, share.config.num_layers * again * recompute)


def step_ops(share: Share) -> Iterator[tuple[Op, int]]:
    """Every op of the model, and how often a forward runs it."""
    for op in block_ops(share):
        yield op, share.config.num_layers
    for op in ops_around_blocks(share):
        yield op, 1

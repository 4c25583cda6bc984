"""How much memory a training step takes at its peak, beside parameters, optimizer and batch."""

from __future__ import annotations

from typing import NamedTuple

from .activations import block_input, kept_around_blocks, kept_by_block
from .share import WIDE, Share

_SLAB = 1 << 20  # numbers of the output matrix's gradient that the CPU makes at a time: ops/loss.py


class Gradients(NamedTuple):
    """Bytes of parameters' gradients, and of what sharding gathers."""

    of_block: int
    """what stays of a block's gradients until the optimizer's step"""
    of_output: int
    """gradients of the final norm and the output matrix; with shards whole until the backward ends"""
    of_embedding: int
    after: int
    """all gradients, after the backward"""
    passing: int = 0
    """a block's whole gradients, which are reduced to shards while the backward of the block before it runs"""
    gathered: int = 0
    """parameters that are gathered at one time"""


class Peak(NamedTuple):
    """The moment at which a step takes most memory."""

    when: str
    activations: int
    """bytes that are kept for the backward, then"""
    gradients: int
    """bytes of gradients that stay until the optimizer's step, then"""
    gathered: int
    """bytes of gathered parameters and of gradients that are being reduced, then"""
    temporary: int
    """bytes of all else: gradients of activations, logits"""

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.gathered + self.temporary


def peak(share: Share, recompute: bool, gradients: Gradients) -> Peak:
    """The largest of the moments of a step: the loss, the backward of each block, the optimizer's step."""
    layers, kept = share.config.num_layers, kept_by_block(share)
    block, stream = sum(kept.values()), block_input(share)
    each, around = (stream if recompute else block), kept_around_blocks(share)
    final_norm, loss = around["final norm"], around["loss"]
    gathered, all_blocks = gradients.gathered, layers * gradients.of_block
    around_blocks = gradients.of_output + gradients.of_embedding
    stays, passes = (0, around_blocks) if gradients.passing else (around_blocks, 0)
    moments = [
        Peak("the loss", layers * each + final_norm, 0, gathered, _of_loss(share, loss)),
        Peak("the loss's backward", layers * each + final_norm, 0, gathered, _of_loss_backward(share, loss)),
        Peak("the embedding's backward", 0, all_blocks + stays, gathered + passes, stream),
        Peak("the optimizer's step", 0, gradients.after, 0, 0),
    ]
    for layer in (layers - 1, 0):
        done, passing = (layers - 1 - layer) * gradients.of_block, gradients.passing * (layer < layers - 1)
        if gradients.passing:
            passing += gradients.of_output
        else:
            done += gradients.of_output
        temporary = _largest_of_block(share, kept) - block
        when = f"the backward of block {layer + 1} of {layers}"
        moments.append(Peak(when, layer * each + block, done, gathered + passing, temporary))
    return max(moments, key=lambda moment: moment.total)


def _of_loss(share: Share, loss: int) -> int:
    """Bytes that the loss takes at most, what it keeps included."""
    logits, stream = share.loss_rows * share.classes, share.tokens * share.config.model_dim * share.residual
    if share.loss_is_one_block:  # logits in their dtype and in float32, or in float32 and their logarithms
        return max(loss - logits * WIDE + logits * (share.narrow + WIDE * (share.narrow < WIDE)), loss + logits * WIDE)
    if share.device == "cuda":  # torch's logarithms of probabilities
        return loss + stream + logits * (share.narrow + WIDE) + share.gathered_output
    product = min(_SLAB, share.classes * share.config.model_dim) * share.narrow
    return loss + stream + logits * share.narrow + product + share.gathered_output


def _of_loss_backward(share: Share, loss: int) -> int:
    logits, D = share.loss_rows * share.classes, share.config.model_dim
    if share.loss_is_one_block:  # the gradient of the logarithms, and of the logits
        return loss + 2 * logits * WIDE
    hidden, weight = share.loss_tokens * D, share.classes * D
    scaled_weight = weight * (WIDE + share.narrow * (share.narrow < WIDE))
    return loss + max(hidden * (WIDE + share.narrow * (share.narrow < WIDE)), hidden * share.narrow + scaled_weight)


def _largest_of_block(share: Share, kept: dict[str, int]) -> int:
    """The most bytes that exist in a block's backward, of what it keeps and of the gradients that take its place.

    The list is of ops' backwards in the order in which they run: what each makes, and what nobody needs after it.
    """
    config, T, e, r = share.config, share.tokens, share.narrow, share.residual
    D, by_torch = config.model_dim, share.device == "cuda"
    d, _, _, z, v, f = share.widths
    of_parameter = WIDE if share.autocast else e
    weight = {p.name.split(".")[-2]: p.size * of_parameter for p in share.matrices_of_block()}
    stream, narrow, wide = T * d * r, T * D * e, T * D * r
    hidden, value, key = T * f * e, T * v * e, T * z * e
    inputs = hidden * (1 + config.swiglu)
    cast = T * D * (2 * WIDE if by_torch else 0)  # torch's norms compute in float32, in and out
    steps: list[tuple[int, int]] = []

    def step(*, makes: int, frees: int, keeps: tuple[str, ...] = ()) -> None:
        """`keeps`: what was kept for this op alone."""
        steps.append((makes, frees + sum(kept[name] for name in keeps)))

    df = T * d * max(e, (e + WIDE) * config.rescale_nffn) if config.rescale_nffn or share.autocast else 0
    step(makes=df, frees=0, keeps=("f",))
    step(makes=hidden + weight["fc2"], frees=df, keeps=("hidden",))
    step(makes=inputs, frees=hidden, keeps=("hidden_inputs", "silu_hidden"))
    if config.swiglu:
        step(makes=wide + weight["fc3"], frees=hidden)
    step(makes=wide + weight["fc1"], frees=hidden + wide * config.swiglu, keeps=("n",))
    step(makes=wide + cast, frees=wide + cast, keeps=("layer_input", "norm_extras"))
    step(
        makes=value + narrow * share.autocast + weight["wh2"],
        frees=wide - narrow if share.autocast else 0,
        keeps=("gated",),
    )
    step(makes=wide + weight["wh1"], frees=narrow)
    step(makes=2 * value, frees=value, keeps=("r_input", "silu_r"))
    step(makes=wide + weight["wr"], frees=value + wide)
    step(makes=2 * key + value, frees=value, keeps=("q_and_k", "v", "o"))
    step(makes=key, frees=2 * key, keeps=("z",))
    step(makes=wide + weight["wz"], frees=key + wide, keeps=("m",))
    step(makes=wide + cast, frees=wide + cast, keeps=("rms_input",))
    step(makes=stream, frees=wide, keeps=("coefficients",))
    step(makes=value, frees=value, keeps=("v_input",))
    step(makes=wide + weight["wv"], frees=value + wide, keeps=("t", "t_gathered", "cast_weights", "masks"))
    step(makes=stream, frees=2 * stream, keeps=("x", "norm_stats"))

    live = largest = sum(kept.values()) + stream
    for made, freed in steps:
        largest = max(largest, live + made)
        live += made - freed
    return largest

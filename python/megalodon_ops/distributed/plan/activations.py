"""What a training step keeps for its backward. The figures are those of the package's code, byte for byte.

`tests/test_plan_memory.py` compares them with what torch keeps.
"""

from __future__ import annotations

from collections.abc import Mapping

from .share import WIDE, Share

KINDS = {
    "norms": ("norm_stats", "rms_input", "layer_input", "norm_extras"),
    "residual stream": ("x",),
    "CEMA": ("t", "coefficients"),
    "queries and keys": ("z", "q_and_k"),
    "values, attention, gates": ("v_input", "v", "o", "r_input", "silu_r", "gated"),
    "inputs of products": ("t_gathered", "m"),
    "feed-forward": ("n", "hidden_inputs", "silu_hidden", "hidden", "f"),
    "dropout masks": ("masks",),
    "cast weights": ("cast_weights",),
}
"""What the tables show, and which of a block's tensors it is made of"""


def kept_by_block(share: Share) -> dict[str, int]:
    """Bytes of each tensor, or group of tensors, that one block keeps without recomputation.

    With tensor parallelism, what every process reads of all channels is gathered, and the gathered copy is kept: t where
    v is made, CEMA's output, and the input of the feed-forward half.
    """
    config, T, e, r = share.config, share.tokens, share.narrow, share.residual
    D, N = config.model_dim, config.cema_ndim
    d, g, h, z, v, f = share.widths
    by_torch = share.device == "cuda"  # on a GPU torch computes norms, gates and coefficients, and keeps more
    affine = WIDE * D * config.norm_affine
    readers_of_m, readers_of_n = 3, 1 + config.swiglu
    return {
        "x": T * d * r,
        "norm_stats": 3 * T * g * WIDE,
        "t": T * d * r,
        "t_gathered": T * D * e * (share.autocast or share.tensor > 1),
        "v_input": T * v * e,
        "coefficients": d * N * (4 + 8 + 8) + (4 * (d * N + d + N) if by_torch else 0),
        "rms_input": T * D * (WIDE if by_torch else r),
        "m": T * D * e * (readers_of_m if share.autocast else 1),
        "z": T * z * e,
        "q_and_k": 2 * T * z * e,
        "v": T * v * e,
        "o": T * v * e + T * h * WIDE + 8 * (config.attention_dropout > 0),
        "r_input": T * v * e,
        "silu_r": T * v * e * by_torch,
        "gated": T * v * e,
        "layer_input": T * D * (WIDE if by_torch else r),
        "norm_extras": (3 * T * WIDE + 2 * affine) * by_torch,  # 1 / rms, mean, 1 / std; gains
        "n": T * D * e * (readers_of_n if share.autocast else 1),
        "hidden_inputs": T * f * e * (1 + config.swiglu),
        "silu_hidden": T * f * e * (config.swiglu and by_torch),
        "hidden": T * f * e,
        "f": T * d * e * config.rescale_nffn,
        "masks": _masks(share),
        "cast_weights": e * sum(p.size for p in share.matrices_of_block()) * share.autocast,
    }


def by_kind(kept: Mapping[str, int]) -> dict[str, int]:
    """The bytes of :func:`kept_by_block` under the names of the table; a kind that keeps nothing is left out."""
    sums = {kind: sum(kept[name] for name in names) for kind, names in KINDS.items()}
    return {kind: size for kind, size in sums.items() if size}


def _masks(share: Share) -> int:
    """What dropout keeps: on the CPU a number in the dtype of what is dropped, on a GPU a byte."""
    config, T = share.config, share.tokens
    d, _, _, _, v, f = share.widths
    e, r = (1, 1) if share.device == "cuda" else (share.narrow, share.residual)
    inside = T * (config.model_dim * r + v * e + f * e) * (config.hidden_dropout > 0)
    return inside + 2 * T * d * e * (config.dropout > 0)


def kept_around_blocks(share: Share) -> dict[str, int]:
    """Bytes that the final norm and the loss keep."""
    config, T = share.config, share.tokens
    d, g, *_ = share.widths
    D, classes = config.model_dim, share.classes
    if share.loss_is_one_block:
        loss = T * D * share.narrow + share.loss_tokens * classes * WIDE + WIDE  # logits' logarithms of probabilities
        loss += share.gathered_output
        loss += classes * D * share.narrow * share.autocast
    else:
        loss = WIDE * (share.loss_tokens + classes) * D  # gradients, made in the same pass as the loss
    return {"final norm": T * d * share.residual + 3 * T * g * WIDE, "loss": loss}


def block_input(share: Share) -> int:
    """Bytes of the residual stream between two blocks: all that a block keeps which is computed again."""
    return share.tokens * share.widths[0] * share.residual

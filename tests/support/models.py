"""A small model and tokens for it."""

import torch

import megalodon_ops as mo

TINY = dict(num_layers=2, model_dim=32, z_dim=16, value_dim=24, num_heads=2, ffn_hidden_dim=40, cema_ndim=4)
TINY |= dict(chunk_size=8, vocab_size=31, norm_num_groups=4)
SMALLEST = dict(num_layers=1, model_dim=4, z_dim=2, value_dim=2, ffn_hidden_dim=2, cema_ndim=1, chunk_size=2)
SMALLEST |= dict(vocab_size=9, norm_num_groups=1)
SAVED = {
    "plain": {},
    "gated, rescaled": dict(swiglu=True, rescale_nffn=True, scale_emb=True),
    "shared": dict(share_emb=True),
    "no affine norms": dict(norm_affine=False, output_size=29),
    "other base": dict(rope_base=1e5, norm_eps=1e-3),
}
"""Configurations that files must hold"""


def tiny_model(dtype=torch.float64, **overrides) -> mo.Megalodon:
    """A model with random parameters, offsets included, which are initially zero."""
    torch.manual_seed(0)
    model = mo.Megalodon(mo.MegalodonConfig(**{**TINY, **overrides})).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("weight", "bias", "gamma", "beta")) and parameter.dim() == 1 or "mega." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def numbers_of(*shape: int, mean: float = 100.0, missing: bool = True) -> torch.Tensor:
    """Numbers with a large mean, a constant feature and, if asked for, missing ones."""
    x = mean + torch.randn(*shape, dtype=torch.float64)
    x[0, :, 0] = 0.1
    return x.where(torch.rand(shape) > (0.3 if missing else 0.0), torch.nan)


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(1))

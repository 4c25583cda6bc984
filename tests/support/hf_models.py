"""Small transformers models and batches for the tests of `megalodon_ops.hf`."""

import pytest
import torch
from torch import Tensor, nn

import megalodon_ops as mo

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("megalodon_ops.hf", exc_type=ImportError)

QUIET = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]
"""Marks for tests of transformers, which warns about itself"""
SIZES = dict(num_layers=2, model_dim=32, z_dim=16, value_dim=32, num_heads=2, ffn_hidden_dim=32, cema_ndim=4)
SIZES |= dict(chunk_size=8, norm_num_groups=4, vocab_size=50)
VARIANTS = {
    "plain": {},
    "released": dict(share_emb=True, scale_emb=True, swiglu=True, rescale_nffn=True),
    "bytes": dict(vocab_size=51, output_size=50),
    "no affine norms": dict(norm_affine=False),
}
LENGTHS = (21, 3, 13)


def build_model(dtype: torch.dtype = torch.float32, **fields) -> hf.MegalodonForCausalLM:
    """Build a model with no zero parameter, as after some training, so that each matters."""
    core = mo.Megalodon(mo.MegalodonConfig(**{**SIZES, **fields})).to(dtype).eval()
    return hf.MegalodonForCausalLM.from_megalodon(randomized(core))


def randomized(model: nn.Module) -> nn.Module:
    """Add noise to all parameters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def prompts() -> list[Tensor]:
    return [torch.randint(50, (length,)) for length in LENGTHS]


def padded(rows: list[Tensor], side: str, value: int = 0) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns] = row
        mask[i, columns] = 1
    return dict(input_ids=ids, attention_mask=mask)


def close(a: Tensor | list[Tensor], b: Tensor | list[Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

"""The encoder: features of one long row of numbers and the gradients of its parameters, from 16k to 256k positions.

Flops per position: 6 per weight of every linear layer, (8 K + 6 V) C per layer for attention to a chunk of C, and twice
those of `bench_cema`, for two directions. Bytes: the weights three times. Other work on activations is not counted.

The rival is the same encoder in plain torch. Two models of about the same size do other work and are shown for
comparison:

- torch's Transformer encoder, with attention to all positions;
- mambapy's Mamba, if it is installed: a selective scan in plain torch, in one direction.

A path is skipped beyond its length in LONGEST, where a call would take many minutes or more memory than most machines
have.
"""

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import megalodon_ops as mo

from . import plain_models
from .harness import OURS, Case, Outputs, Path

LENGTHS = (1 << 14, 1 << 16, 1 << 18)
LONGEST = {OURS: 1 << 18, "plain torch": 1 << 16, "Transformer encoder": 1 << 16, "Mamba": 1 << 14}
TOLERANCE = 1e-3
SIZES = dict(num_layers=2, model_dim=64, z_dim=32, value_dim=128, ffn_hidden_dim=128, norm_num_groups=4, chunk_size=128)
CONFIG = mo.MegalodonEncoderConfig(**SIZES, num_features=1, scale_inputs=False)  # unscaled, as the plain model


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    if gpu:
        return
    for length in LENGTHS:
        yield _case(length >> 6 if quick else length, [name for name, longest in LONGEST.items() if length <= longest])


def _case(length: int, names: list[str]) -> Case:
    torch.manual_seed(0)
    x, dfeatures = torch.randn(1, length, 1), torch.randn(1, length, CONFIG.model_dim)
    encoder = mo.MegalodonEncoder(CONFIG)
    transformer = plain_models.TransformerEncoder(CONFIG)
    calls: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
        OURS: (encoder, encoder.features),
        "plain torch": (encoder, lambda x: plain_models.megalodon_encoder(encoder, x)),
        "Transformer encoder": (transformer, transformer.features),
    }
    if importlib.util.find_spec("mambapy"):
        from mambapy.mamba import Mamba, MambaConfig

        layers = nn.Sequential(nn.Linear(1, CONFIG.model_dim), Mamba(MambaConfig(CONFIG.model_dim, 4)))
        calls["Mamba"] = (layers, layers)

    def path(name: str) -> Path:
        model, call = calls[name]
        same = model is encoder  # else other work, whose results cannot be compared

        def run() -> Outputs:
            features = call(x)
            grads = torch.autograd.grad(features, [*model.parameters()], dfeatures)
            return (features.detach(), *grads) if same else ()

        return Path(name, run, rival=same, checked=same)

    paths = {name: path(name) for name in names if name in calls}
    weights = sum(m.weight.numel() for m in encoder.modules() if isinstance(m, nn.Linear))
    attention = (8 * CONFIG.z_dim + 6 * CONFIG.value_dim) * CONFIG.chunk_size
    cema = 2 * (48 * CONFIG.cema_ndim + 6) * CONFIG.model_dim
    return Case(
        name="encoder forward + backward",
        shape=f"{encoder.num_parameters() / 1e3:.0f}k L {length}",
        dtype="fp32",
        paths=list(paths.values()),
        expected=paths["plain torch"].call if "plain torch" in paths else None,
        tolerance=TOLERANCE,
        units=length,
        unit="token",
        flops=length * (6 * weights + CONFIG.num_layers * (attention + cema)),
        bytes=3 * 4 * weights,
        cold=False,
        fewer_threads=False,
        all_peaks=True,
    )

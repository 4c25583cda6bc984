"""Loads checkpoints in the format of the released code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from .config import MegalodonConfig
from .memory import in_huge_pages
from .model import Megalodon

# How a model-parallel checkpoint splits its parameters: along dim 1, along dim 0, or not at all.
_SPLIT_DIM_1 = re.compile(r"embed\.weight|.*\.mega\.(gamma|beta)|.*\.(wh2|fc2)\.weight|output\.output\.weight")
_SPLIT_DIM_0 = re.compile(
    r".*\.cema\.\w+|.*\.(timenorm|final_norm)\.(weight|bias)|.*\.(wv|wz|wr|wh1)\.(weight|bias)|.*\.(fc1|fc3)\.weight"
)
_BUFFERS = re.compile(r"(.*\.)?(rope\.freqs|prior_(count|mean|logv))")


def load_official(
    directory: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Megalodon:
    """A model from a folder that the released code wrote, in evaluation mode.

    Args:
        directory: holds `config.json` ({"model": {...}}) and `consolidated.pth`, or the shards
            `consolidated.00.pth`, `consolidated.01.pth`, ... of a model-parallel run, which are joined.
        dtype: of the linear layers and the embedding. Parameters that stay wide keep float32 under a 16-bit dtype.
        device: where the parameters go.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a parameter is missing, unknown or of the wrong shape, or the
        number of shards is not the one that `consolidate_config.json` names.

    Files are unpickled with `weights_only=True`.
    """
    directory = Path(directory)
    fields = json.loads((directory / "config.json").read_text()).get("model")
    if not isinstance(fields, dict):
        raise ValueError(f"load_official: `config.json` must hold an object `model`, got {fields}.")
    weights = _read_weights(directory)
    _check_names({"embed.weight"}, {"embed.weight"} & set(weights))
    if fields.get("vocab_size", -1) < 1:
        fields["vocab_size"] = weights["embed.weight"].shape[0]
    config = MegalodonConfig.from_dict(fields)
    with torch.device("meta"):
        model = Megalodon(config).to(dtype)
    if config.share_emb:
        weights.setdefault("output.output.weight", weights["embed.weight"])
    wanted = model.state_dict()
    _check_names(set(wanted), set(weights))
    for name, parameter in wanted.items():
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"load_official: `{name}` must have shape {tuple(parameter.shape)}, got {tuple(weights[name].shape)}."
            )
        weights[name] = in_huge_pages(weights[name].to(device=device, dtype=parameter.dtype, copy=True))
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """Every parameter by name, shards joined and buffers dropped."""
    shards = sorted(directory.glob("consolidated.[0-9][0-9].pth"))
    paths = shards or [directory / "consolidated.pth"]
    parallel = directory / "consolidate_config.json"
    if parallel.exists():
        expected = json.loads(parallel.read_text()).get("model_parallel_size", 1)
        if expected != len(paths):
            raise ValueError(f"load_official: expected {expected} shards in {directory}, got {len(paths)}.")
    parts = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in paths]
    parts = [{name: tensor for name, tensor in part.items() if not _BUFFERS.fullmatch(name)} for part in parts]
    weights = {}
    for name in sorted(set().union(*parts)):
        for path, part in zip(paths, parts, strict=True):
            if name not in part:
                raise ValueError(f"load_official: `{name}` must be in every shard, got none in {path.name}.")
        dim = 1 if _SPLIT_DIM_1.fullmatch(name) else 0 if _SPLIT_DIM_0.fullmatch(name) else None
        weights[name] = parts[0][name] if dim is None else torch.cat([part[name] for part in parts], dim)
    return weights


def _check_names(expected: set[str], got: set[str]) -> None:
    for names, problem in ((expected - got, "missing"), (got - expected, "unknown")):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise ValueError(f"load_official: {len(names)} {problem} parameters: {shown}.")

"""Data made with the released Megalodon code, in float64 (tests/data)."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-11


def golden_case(op: str, case: str) -> dict[str, Tensor]:
    """The tensors of one case of ops.json, by name."""
    tensors = load_file(DATA / f"op_{op}_f64.safetensors")
    return {name.split("/")[1]: tensor for name, tensor in tensors.items() if name.split("/")[0] == case}


def golden_config(op: str) -> dict[str, dict]:
    """The cases of an op and their sizes."""
    return json.loads((DATA / "ops.json").read_text())[op]

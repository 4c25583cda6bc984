"""Data made with the released Megalodon code, in float64 (tests/data)."""

import json

from paths import DATA
from safetensors.torch import load_file
from torch import Tensor

import megalodon_ops as mo

TOLERANCE = 1e-11
MODEL = json.loads((DATA / "official_c.json").read_text())
_BUFFERS = ("rope.freqs", "prior_count", "prior_mean", "prior_logv")


def golden_case(op: str, case: str) -> dict[str, Tensor]:
    """The tensors of one case of ops.json, by name."""
    tensors = load_file(DATA / f"op_{op}_f64.safetensors")
    prefix = f"{case}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def golden_config(op: str) -> dict[str, dict]:
    """The cases of an op and their sizes."""
    return json.loads((DATA / "ops.json").read_text())[op]


def golden_model() -> tuple[mo.Megalodon, dict[str, Tensor]]:
    """A model in float64 with the released code's parameters, and its inputs and outputs."""
    model = mo.Megalodon(mo.MegalodonConfig.from_dict(MODEL["config"])).double()
    weights = load_file(DATA / "official_c_state.safetensors")
    model.load_state_dict({name: weights[name] for name in weights if not name.endswith(_BUFFERS)}, strict=True)
    return model, load_file(DATA / "official_c_io_f64.safetensors")

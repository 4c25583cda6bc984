"""Predicted cost of the launches of a decoded token, with Python between them and in a CUDA graph. For predict.py."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megalodon_ops as mo
from megalodon_ops.inference.decoding_model import decoding_model
from megalodon_ops.model.model_state import as_real

from .predict_cards import Card

# Kernels of an op for one token of each sequence, in a chunk of more than 64 keys.
ONE = "timestep_norm_fwd cema_fwd normalized_qk_fwd chunked_attention_state_ linear_few_rows layer_norm_fwd"
OPS = dict.fromkeys(ONE.split(), 1)
OPS["chunked_attention_fwd"] = 2
# Assumed microseconds; a pair is a range.
BY_PYTHON = (4.0, 8.0)  # a launch with Python before it
GRAPH = 10.0  # the launch of a graph, with its copies
IN_GRAPH = (1.0, 1.5)  # a kernel in a graph


class _Launches(TorchDispatchMode):
    """Counts launches by function; views and new tensors launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "megalodon_ops":
            self.counts[name] += OPS[name]
        elif not (func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "detach"))):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def launches_of_a_token(config: mo.MegalodonConfig) -> Counter[str]:
    """Launches of a call of a Decoder's model in bfloat16 with one token, and of the copies into its state.

    Tensors are on the device meta, which runs the functions of torch that CUDA would run.
    """
    with torch.device("meta"), torch.no_grad():
        model = mo.Megalodon(config).to(torch.bfloat16).eval()
        state = mo.MegalodonState.fresh(config, 1, dtype=torch.bfloat16, device="meta")
        token = torch.zeros((1, 1), dtype=torch.int64)
        run = decoding_model(model, model, [], fused_dtype=torch.bfloat16)
        with _Launches() as launches:
            _, after = run(token, state=state, return_state=True, inplace_state=True)
        copied = {
            as_real(old).dtype
            for old, new in zip(tree_leaves(state), tree_leaves(after), strict=True)
            if old is not new
        }
    launches.counts["_foreach_copy_"] = len(copied)  # a launch for each dtype
    return launches.counts


def rows(preset: str, cards: dict[str, Card]) -> list[tuple[str, ...]]:
    """Rows of a table: milliseconds of a token's launches beside those that its weights take."""
    config = mo.MegalodonConfig.preset(preset)
    count = launches_of_a_token(config).total()
    weights = 2 * config.num_parameters()  # bytes

    def range_of(low: float, high: float) -> str:
        return f"{low / 1e3:.2f} to {high / 1e3:.2f}"

    head = ("card", "launches", "one by one ms", "in a graph ms", "reading the weights ms")
    by_python = range_of(*(count * us for us in BY_PYTHON))
    in_graph = range_of(*(GRAPH + count * us for us in IN_GRAPH))
    times = ((name, f"{weights / card.memory / 1e6:.2f}") for name, card in cards.items())
    return [head, *((name, str(count), by_python, in_graph, time) for name, time in times)]

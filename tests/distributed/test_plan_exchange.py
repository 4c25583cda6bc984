"""The bytes that a plan says are exchanged, against those of the collectives that a parallel model really runs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megalodon_ops as mo
from megalodon_ops.distributed import make_mesh, parallelize, split
from megalodon_ops.distributed.measure import measure
from megalodon_ops.distributed.plan import plan

MODEL = dict(
    num_layers=2, model_dim=32, z_dim=16, value_dim=24, num_heads=2, ffn_hidden_dim=40, cema_ndim=4, chunk_size=8,
    vocab_size=31, norm_num_groups=4,
)  # fmt: skip
KINDS = {
    "_allgather_base_": "gathered", "all_gather_into_tensor": "gathered", "_reduce_scatter_base_": "scattered",
    "reduce_scatter_tensor": "scattered", "alltoall_base_": "to all", "allreduce_": "reduced", "all_reduce": "reduced",
    "all_gather_single": "gathered", "reduce_scatter_single": "scattered",
}  # fmt: skip
NO_EXCHANGE = ("wait_tensor", "_wrap_tensor_autograd")
WHOLE_BATCH, LONG_BATCH = (2, 32), (2, 1024)
VOTES = 512
"""Bytes, at most, of the small integers that ranks agree on, and of the loss's sum"""


class Collectives(TorchDispatchMode):
    """Counts the bytes of the largest tensor of each collective, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, result = func.name().split("::")[1].split(".")[0], func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and name not in NO_EXCHANGE:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.bytes[KINDS.get(name, name)] += max(tensor.nbytes for tensor in tensors)
        return result


def counted(sizes: dict[str, int], fields: dict, options: dict) -> dict[str, int]:
    """What the collectives of a step move, on this rank."""
    torch.manual_seed(0)
    mesh = make_mesh(sizes, device_type="cpu")
    model = parallelize(mo.Megalodon(mo.MegalodonConfig(**{**MODEL, **fields})), mesh, **options).train()
    piece = split(torch.zeros(WHOLE_BATCH, dtype=torch.int64), mesh, chunk_size=MODEL["chunk_size"])
    with Collectives() as collectives:
        model.loss(piece, piece).backward()
    return dict(collectives.bytes)


def saved(sizes: dict[str, int], fields: dict, options: dict) -> int:
    """Bytes that autograd keeps on this rank for the backward of a longer batch, parameters and tokens apart."""
    torch.manual_seed(0)
    mesh = make_mesh(sizes, device_type="cpu")
    model = parallelize(mo.Megalodon(mo.MegalodonConfig(**{**MODEL, **fields})), mesh, **options).train()
    piece = split(torch.zeros(LONG_BATCH, dtype=torch.int64), mesh, chunk_size=MODEL["chunk_size"])
    found = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.loss(piece, piece)
    given = {t.untyped_storage()._cdata for t in (piece, *model.buffers())}
    size = sum(t.untyped_storage().nbytes() for name, t in found.items() if name not in given)
    loss.backward()  # ranks leave together
    return size


CASES = {
    "sharded": ({"data": 2}, {}, {}),
    "sharded, uneven": ({"data": 2}, dict(cema_ndim=3), {}),
    "sharded, recomputed, bfloat16": ({"data": 2}, dict(layerwise_ckpt=True), dict(param_dtype=torch.bfloat16)),
    "replicated": ({"data": 2}, {}, dict(data="replicate")),
    "chunk": ({"chunk": 2}, {}, {}),
    "chunk, recomputed": ({"chunk": 2}, dict(layerwise_ckpt=True), {}),
    "chunk, two visible": ({"chunk": 2}, dict(visible_chunks=2), dict(param_dtype=torch.bfloat16)),
    "chunk, two visible, memory": ({"chunk": 2}, dict(visible_chunks=2, working_memory=True), {}),
    "chunk, memory, recomputed": ({"chunk": 2}, dict(working_memory=True, layerwise_ckpt=True), {}),
    "tensor": ({"tensor": 2}, {}, {}),
    "tensor, recomputed, gain kept": ({"tensor": 2}, dict(layerwise_ckpt=True, rescale_nffn=True), {}),
    "tensor, one head, bfloat16": ({"tensor": 2}, dict(num_heads=1), dict(param_dtype=torch.bfloat16)),
}


# Each has a case with more in it beside it.
SLOW = ("sharded", "chunk", "chunk, two visible", "tensor")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
def test_bytes_are_those_of_the_collectives(ranks, case):
    sizes, fields, options = CASES[case]
    found = ranks.run(counted, 2, sizes, fields, options)
    rows, context = WHOLE_BATCH
    config = mo.MegalodonConfig(**{**MODEL, **fields})
    foreseen = plan(
        config, sizes, context=context, batch=rows, dtype=options.get("param_dtype", torch.float32),
        data=options.get("data", "shard"),
    )  # fmt: skip
    expected = Counter()
    kinds = {
        "all-gather": "gathered", "reduce-scatter": "scattered", "all-reduce": "reduced", "states, forward": "gathered",
        "states, backward": "to all", "handed on": "to all",
    }  # fmt: skip
    for name, received in foreseen.exchange.items():  # by one of two devices: half of what is gathered
        kind = next(kind for words, kind in kinds.items() if name.endswith(words))
        expected[kind] += received if kind == "reduced" else 2 * received
    for counts in found:
        if "tensor" in sizes:
            del counts["reduced"]  # gradients of what is whole on every device, which the plan leaves out
        assert counts.keys() >= expected.keys()
        for kind, size in counts.items():
            assert 0 <= size - expected[kind] <= VOTES, (case, kind, counts, dict(expected))


@pytest.mark.parametrize("case", ["sharded", "chunk", "tensor"])
def test_what_is_kept_on_several_processes(ranks, case):
    """Within 5 %: exchanged states and copies of CEMA's coefficients are not all foreseen."""
    sizes, fields, options = CASES[case]
    rows, context = LONG_BATCH
    config = mo.MegalodonConfig(**{**MODEL, **fields})
    rows, length = rows // sizes.get("data", 1), context // sizes.get("chunk", 1)
    dtype = options.get("param_dtype", torch.float32)
    block, end = measure(config, rows, length, sizes.get("tensor", 1), dtype, on_cpu=True)
    expected = config.num_layers * sum(block.kept) + sum(end.kept)
    assert ranks.run(saved, 2, sizes, fields, options) == pytest.approx([expected] * 2, rel=0.05)

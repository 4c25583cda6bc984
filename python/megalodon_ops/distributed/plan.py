"""What a training run on many devices will take, before there are any: memory, operations, bytes exchanged, time.

Activations and operations are measured while the model's code runs without memory (measure.py); the rest is arithmetic,
and time a roofline of a card's peak rates. docs/plan.md says how far to trust each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..model.config import MegalodonConfig, check_config
from ..model.megalodon import Megalodon
from ..ops.linear_cross_entropy import linear_cross_entropy as loss
from ..ops.common.checks import check_size, shown
from .measure import AGAIN, OTHERS, PRODUCTS, measure
from .mesh import DIMENSIONS, check_can_cut


@dataclass(frozen=True)
class Card:
    """One device: peak rates a second, memory, and what joins the device to others."""

    name: str
    """of which "cpu" takes the CPU's way through the package, and any other a GPU's"""
    bfloat16: float
    """operations of dense matrix products in bfloat16"""
    float32: float
    """operations in float32, by the vector units, as torch computes matrix products unless told otherwise"""
    memory: float
    """bytes; a vendor's GB is read as 1e9, which is less than a card has and leaves room for the driver's context"""
    bandwidth: float
    """bytes of that memory"""
    link: float
    """bytes that a device receives from others of its node"""
    network: float
    """bytes that a device receives from other nodes: the node's adapters over its devices"""
    node: int = 8
    """devices that links join"""


CARDS = {
    card.name: card
    for card in (
        Card("a100-40", 312e12, 19.5e12, 40e9, 1555e9, 300e9, 25e9),
        Card("a100-80", 312e12, 19.5e12, 80e9, 2039e9, 300e9, 25e9),
        Card("h100", 989.5e12, 67e12, 80e9, 3350e9, 450e9, 50e9),
        Card("h200", 989.5e12, 67e12, 141e9, 4800e9, 450e9, 50e9),
        Card("b200", 2250e12, 80e12, 180e9, 8000e9, 900e9, 50e9),
    )
}
"""Cards by name, with their makers' figures; docs/plan.md names the sources"""


@dataclass(frozen=True)
class Plan:
    """A training step on a mesh, as :func:`plan` foresees it; figures are of one device, but for the first ones."""

    config: MegalodonConfig
    card: Card
    mesh: dict[str, int]
    devices: int
    tokens: int
    """of a step, on all devices"""
    memory: dict[str, int]
    """bytes by what takes them, at the moment of the step when their sum is largest"""
    bytes: int
    """their sum"""
    fits: bool
    operations: dict[str, int]
    """by kind, as `torch.utils.flop_counter` counts them"""
    exchange: dict[str, int]
    """bytes that a device receives, by kind: of an all-gather to S bytes over n devices S (n - 1) / n"""
    seconds: dict[str, float]
    """of a step, by what takes them"""
    step: float
    """seconds of a step: operations and activations, or the exchange beside them where it takes longer, and the rest"""


def plan(
    config: MegalodonConfig,
    mesh: Mapping[str, int],
    *,
    context: int,
    batch: int | None = None,
    card: str | Card = "a100-80",
    dtype: torch.dtype = torch.bfloat16,
    autocast: bool = False,
    param_dtype: torch.dtype = torch.float32,
    data: str = "shard",
    recompute: bool | None = None,
    efficiency: float = 0.5,
) -> Plan:
    """Foresees the memory, the operations, the exchanged bytes and the time of a training step with AdamW.

    Args:
        config: the model.
        mesh: how many devices `data`, `chunk` and `tensor` have, such as {"data": 128, "chunk": 2}.
        context: tokens of a sequence. More than one `chunk` device must divide its chunks evenly.
        batch: sequences of a step, of all devices; None: one for each `data` device.
        card: a name in :data:`CARDS`, or a :class:`Card` of one's own.
        dtype: of matrix products and activations; CEMA, norms and states are float32 beside 16-bit ones.
        autocast: float32 parameters and residual stream around products in `dtype`, as torch.autocast computes.
        param_dtype: in which matrices, their gradients and Adam's moments are stored. Where `dtype` is another, and
            without `autocast`, a block's matrices are cast when they are gathered, as `parallelize(param_dtype=)` does.
        data: "shard" or "replicate": whether a device keeps its shards of the parameters or all of them.
        recompute: compute each block again in the backward; None: as the configuration says.
        efficiency: how much of the peak rates is assumed to be reached, above 0 and at most 1.

    Raises:
        ValueError: the mesh does not divide the model or the batch. TypeError: the configuration is an encoder's, whose
        activations are others. KeyError: `card` or `data` is unknown.

    Example:
        >>> import megalodon_ops as mo
        >>> from megalodon_ops.distributed.plan import plan
        >>> found = plan(mo.MegalodonConfig.preset("paper7B"), {"data": 128, "chunk": 2}, context=32768, recompute=True)
        >>> found.tokens, found.fits
        (4194304, True)
    """
    check_config("plan", config)
    for name in mesh:
        if name not in DIMENSIONS:
            raise ValueError(f"plan: `mesh` must have dimensions named data, chunk or tensor, got {shown(name)}.")
    mesh = {name: check_size("plan", "mesh", mesh.get(name, 1)) for name in DIMENSIONS}
    context = check_size("plan", "context", context)
    batch = mesh["data"] if batch is None else check_size("plan", "batch", batch)
    card = card if isinstance(card, Card) else CARDS[card]
    if param_dtype != torch.float32 and (autocast or dtype != param_dtype):
        raise ValueError(f"plan: `param_dtype` must be float32, or `dtype` without autocast, got {param_dtype}.")
    check_can_cut("plan", config, mesh)
    _check_division(config, mesh, context, batch)

    recompute = config.layerwise_ckpt if recompute is None else recompute
    stream = torch.float32 if autocast else dtype  # of the residual stream
    layers, rows, length, tensor = config.num_layers, batch // mesh["data"], context // mesh["chunk"], mesh["tensor"]
    is_cpu = card.name == "cpu"
    block, end = measure(config, rows, length, tensor, dtype, autocast, is_cpu, recompute)
    operations = {kind: layers * count + end.operations.get(kind, 0) for kind, count in block.operations.items()}
    shards = {"shard": mesh["data"] * mesh["chunk"], "replicate": 1}[data]
    (stored_block, stored_ends), (used_block, used_ends) = (
        _bytes_of_shards(config, kind, shards, tensor) for kind in (param_dtype, stream)
    )
    stored, used, gathered = layers * stored_block + stored_ends, layers * used_block + used_ends, 0
    if shards > 1 or stored != used:  # whole are the ends, this block and the next one, and the gradients of a block
        gathered = shards * (used_ends + min(2, layers) * used_block + used_block + stored_block)

    of_block, of_end, channels = sum(block.kept), sum(end.kept), rows * length * config.model_dim * stream.itemsize
    before, working = channels // tensor if recompute else of_block, max(block.kept) + 2 * channels
    logits = min(rows * length * config.num_outputs // tensor, loss._block(torch.device("cpu" if is_cpu else "cuda")))
    activations, gradients, working = max(
        (layers * before + of_end, 0, logits * (dtype.itemsize + 4)),  # the loss
        ((layers - 1) * before + of_block, stored_block + stored_ends, working),  # the backward of the last block
        (of_block, stored, working),  # the backward of the first block, which comes last
        key=sum,
    )
    memory = {
        "parameters": stored, "Adam's moments": 2 * stored, "gradients": gradients,
        "gathered parameters, whole gradients": gathered, "activations": activations, "working memory": working,
    }  # fmt: skip

    group = mesh["data"] * mesh["chunk"], tensor
    beside = [("gradients, all-reduce", 2 * stored, *group)]
    if data == "shard":
        beside = [
            ("parameters, all-gather", 2 * shards * used, *group),
            ("gradients, reduce-scatter", shards * stored, *group),
        ]
    waited_for = _waited_for(config, mesh, rows, length, stream, dtype, recompute)
    exchange = {
        name: total * (devices - 1) // devices for name, total, devices, _ in (*beside, *waited_for) if devices > 1
    }
    rate = card.float32 if dtype == torch.float32 else card.bfloat16
    # Each forward writes and reads an activation; the backward reads it, and writes and reads its gradient.
    moved = (5 + 2 * recompute) * layers * of_block + 5 * of_end
    peak = {
        "operations": (operations[PRODUCTS] + operations[AGAIN]) / rate + operations[OTHERS] / card.float32,
        "activations in memory": moved / card.bandwidth,
        "optimizer in memory": 7 * stored / card.bandwidth,  # of four numbers a parameter, three are written, too
        "exchange beside computation": sum(_seconds(*one[1:], card) for one in beside),
        "exchange that is waited for": sum(_seconds(*one[1:], card) for one in waited_for),
    }
    seconds = {name: value / efficiency for name, value in peak.items()}
    computing, moving, optimizing, beside, waiting = seconds.values()
    return Plan(
        config, card, mesh, math.prod(mesh.values()), batch * context,
        memory, sum(memory.values()), sum(memory.values()) <= card.memory, operations,
        exchange, seconds, max(computing + moving, beside) + optimizing + waiting,
    )  # fmt: skip


def _check_division(config: MegalodonConfig, mesh: dict[str, int], context: int, batch: int) -> None:
    heads = config.num_heads
    for dimension, what, size in (
        ("data", "the batch's sequences", batch),
        ("chunk", "the chunks of the context", context / config.chunk_size if mesh["chunk"] > 1 else 1),
        ("tensor", "the norm groups", config.norm_num_groups),
        ("tensor", "the width of values", config.value_dim),
        ("tensor", "the hidden units", config.ffn_hidden_dim),
        ("tensor", "the heads", heads if mesh["tensor"] % heads else mesh["tensor"]),  # or devices have one together
    ):
        if size % mesh[dimension]:
            wanted = f"a size of {dimension} that divides {what} ({size:,.9g})"
            raise ValueError(f"plan: `mesh` must have {wanted}, got {mesh[dimension]}.")


def _bytes_of_shards(config: MegalodonConfig, dtype: torch.dtype, shards: int, tensor: int) -> tuple[int, int]:
    """Of a block's parameters, and of those around blocks: FSDP2 pads shards along the first dimension."""
    with torch.device("meta"):
        model = Megalodon(dataclasses.replace(config, num_layers=1)).to(dtype)
    sizes = {name: math.ceil(len(p) / shards) * p[0].nbytes // tensor for name, p in model.named_parameters()}
    block = sum(size for name, size in sizes.items() if name.startswith("layers."))
    return block, sum(sizes.values()) - block


def _waited_for(
    config: MegalodonConfig, mesh: dict[str, int], rows: int, length: int, stream: torch.dtype, dtype: torch.dtype,
    recompute: bool,
) -> list[tuple[str, int, int, int]]:  # fmt: skip
    """The exchanges inside of a sequence: name, bytes gathered or reduced in a step, devices, their stride in ranks.

    Of states, one all-gather a layer and op brings what the devices of a sequence end with, of a working memory two; the
    backward sends as much. Where attention sees two chunks, each device but the first receives the keys and values of one
    chunk, the memory's too, and each but the last their gradients.
    The devices of `tensor` gather, in a block, t, CEMA's output and the feed-forward half's input, and scatter the sums
    of wh2 and fc2; for the loss they gather the last layer and the output matrix. The backward is the opposite of each.
    A block that is computed again stops before fc2's sum, unless the backward needs the sum.
    """
    layers, dim, again = config.num_layers, config.model_dim, 1 + recompute
    chunk, tensor = mesh["chunk"], mesh["tensor"]
    of_norm = 2 * config.norm_num_groups * 8  # float64
    of_block = of_norm + 2 * dim * config.cema_ndim * 4
    if config.working_memory:
        K, V = config.z_dim // config.num_heads, config.value_dim // config.num_heads
        of_block += config.num_heads * K * (1 + V + K) * 4
    forward, backward = (chunk * rows * (n * layers * of_block + of_norm) // tensor for n in (again, 1))
    last_chunk = (
        (1 + config.working_memory) * rows * config.chunk_size * (config.z_dim + config.value_dim) * dtype.itemsize
    )
    handed_on = (config.visible_chunks - 1) * layers * (again + 1) * last_chunk
    channels, summed = (rows * length * dim * kind.itemsize for kind in (stream, dtype))
    ends = channels + config.num_outputs * dim * stream.itemsize
    sums_again = recompute * (1 + config.rescale_nffn)
    gathers, sums = 3 * again * channels + 2 * summed, 3 * channels + (2 + sums_again) * summed
    return [
        ("states, forward", forward, chunk, tensor),
        ("states, backward", backward, chunk, tensor),
        *[("keys and values, handed on", handed_on, chunk, tensor)] * (config.visible_chunks > 1),
        ("channels and output matrix, all-gather", layers * gathers + ends, tensor, 1),
        ("channels and output matrix, reduce-scatter", layers * sums + ends, tensor, 1),
    ]  # fmt: skip


def _seconds(total: int, devices: int, stride: int, card: Card) -> float:
    """Devices of a node are joined by links, and from other nodes each fetches another part of what the node lacks."""
    together = max(min(devices, card.node // stride), 1)
    rate = card.link if together == devices else min(card.link, card.network * together)
    return total * (devices - 1) / devices / rate

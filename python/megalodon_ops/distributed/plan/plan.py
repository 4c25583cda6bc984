"""From a model, a mesh and a card to a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .activations import block_input, by_kind, kept_around_blocks, kept_by_block
from .cards import CARDS, Card
from .cost import Flops, flops, ops_computed_again, step_ops
from .exchange import Exchange, Layout, exchanges, gathered_bytes, state_bytes, stored_bytes
from .peak import Gradients, Peak, peak
from .share import WIDE, Parameter, Share
from ...model.config import MegalodonConfig, check_config
from ...ops.values import check_flag, check_number, check_size, described, shown

DIMENSIONS = ("data", "chunk", "tensor")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Memory(NamedTuple):
    """Bytes on the device that has most of them."""

    parameters: int
    optimizer: int
    """Adam's two moments"""
    batch: int
    """tokens and targets"""
    rotary: int
    """tables of sines and cosines"""
    states: int
    """end states of all pieces of the sequences, which each process gathers"""
    gradients: int
    """of all parameters, after the backward; of these, as many as exist at the peak are in `peak`"""
    kept: dict[str, int]
    """what the backward needs, by kind, without recomputation"""
    kept_recomputing: dict[str, int]
    """the same where each block is computed again in the backward"""
    peak: Peak
    """beside the above but `kept`, which is in it: at the moment when it is most"""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.parameters + self.optimizer + self.batch + self.rotary + self.states + self.peak.total


class Time(NamedTuple):
    """Seconds of a step, if every device reaches the assumed shares of its peak rates."""

    compute: float
    """of ops that are bound by operations a second"""
    bandwidth: float
    """of ops that are bound by the memory's bytes a second"""
    hidden_exchange: float
    """of exchanges that run beside computation: only what is longer than it delays the step"""
    exposed_exchange: float
    optimizer: float

    @property
    def step(self) -> float:
        busy = self.compute + self.bandwidth
        return max(busy, self.hidden_exchange) + self.exposed_exchange + self.optimizer

    @property
    def bound(self) -> str:
        """What takes longest."""
        links = self.exposed_exchange + self.hidden_exchange
        longest = {"compute": self.compute, "memory bandwidth": self.bandwidth + self.optimizer, "links": links}
        return max(longest, key=longest.__getitem__)


@dataclass(frozen=True)
class Plan:
    """A training step on a mesh, as :func:`plan` foresees it. All figures are those of one device unless they say more."""

    config: MegalodonConfig
    card: Card
    mesh: dict[str, int]
    context: int
    batch: int
    recompute: bool
    memory: Memory
    flops: Flops
    exchange: list[Exchange]
    at_peak: Time
    """at the card's peak rates, which no run passes"""
    estimate: Time
    """at the assumed efficiencies"""
    efficiency: tuple[float, float, float]

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.context

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.card.memory

    def tokens_per_second(self, time: Time) -> float:
        """Of all devices together."""
        return self.tokens / time.step

    def utilization(self, time: Time, dtype: torch.dtype) -> float:
        """The share of the peak that the model's own operations are, without those of recomputation."""
        return self.flops.total / time.step / self.card.peak(dtype)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON types."""
        found = {
            name: getattr(self, name) for name in ("mesh", "context", "batch", "recompute", "devices", "tokens", "fits")
        }
        memory = {**self.memory._asdict(), "peak": self.memory.peak._asdict(), "total": self.memory.total}
        times = {
            name: {
                **time._asdict(),
                "step": time.step,
                "bound": time.bound,
                "tokens_per_second": self.tokens_per_second(time),
            }
            for name, time in (("at_peak", self.at_peak), ("estimate", self.estimate))
        }
        exchange = [
            {"name": e.name, "received": e.received, "processes": e.group.size, "hidden": e.hidden}
            for e in self.exchange
        ]
        return {
            "config": self.config.to_dict(), "card": dataclasses.asdict(self.card), **found, "memory": memory,
            "flops": {"by_part": self.flops.by_part, "recomputed": self.flops.recomputed, "total": self.flops.total},
            "exchange": exchange, "efficiency": list(self.efficiency), **times,
        }  # fmt: skip


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
    optimizer_dtype: torch.dtype | None = None,
    data: str = "shard",
    reshard: bool = True,
    recompute: bool | None = None,
    node: int = 8,
    efficiency: float | Sequence[float] = 0.5,
) -> Plan:
    """Foresees the memory, the operations, the exchanged bytes and the time of a training step with AdamW.

    Args:
        config: the model.
        mesh: how many processes `data`, `chunk` and `tensor` have, such as {"data": 128, "chunk": 2}; one device each.
        context: tokens of a sequence. More than one `chunk` process must divide its chunks evenly.
        batch: sequences of a step, of all devices; None: one for each `data` process.
        card: a name in :data:`CARDS`, or a :class:`Card` of one's own.
        dtype: of matrix products and activations; CEMA, norms and states are float32 beside 16-bit ones.
        autocast: float32 parameters and residual stream around products in `dtype`, as torch.autocast computes.
        param_dtype: in which matrices and their gradients are stored. Where `dtype` is another, and without `autocast`, a
            block's matrices are cast when they are gathered, as `parallelize(param_dtype=)` does.
        optimizer_dtype: of Adam's moments; None: the parameters'.
        data: "shard" or "replicate": whether a device keeps a part of the parameters or all of them.
        reshard: free gathered parameters after the forward, and gather them again.
        recompute: compute each block again in the backward; None: as the configuration says.
        node: devices that fast links join.
        efficiency: the share of the peak rates that is assumed to be reached: one number, or one each for operations,
            memory and links.

    Raises:
        ValueError: the mesh does not divide the model or the batch, or a value is wrong. TypeError: a wrong type.

    Example:
        >>> import megalodon_ops as mo
        >>> from megalodon_ops.distributed.plan import plan
        >>> found = plan(mo.MegalodonConfig.preset("paper7B"), {"data": 128, "chunk": 2}, context=32768, recompute=True)
        >>> found.tokens, found.fits
        (4194304, True)
    """
    check_config("plan", config)
    sizes = _checked_mesh(mesh)
    context = check_size("plan", "context", context)
    batch = sizes["data"] if batch is None else check_size("plan", "batch", batch)
    node, shares = check_size("plan", "node", node), _checked_efficiency(efficiency)
    card = _checked_card(card)
    for name, value in (
        ("dtype", dtype),
        ("param_dtype", param_dtype),
        ("optimizer_dtype", optimizer_dtype or param_dtype),
    ):
        if value not in _DTYPES:
            raise ValueError(f"plan: `{name}` must be torch.float32, bfloat16 or float16, got {shown(value)}.")
    for name, flag in ("autocast", autocast), ("reshard", reshard):
        check_flag("plan", name, flag)
    if not isinstance(data, str) or data not in ("shard", "replicate"):
        raise ValueError(f'plan: `data` must be "shard" or "replicate", got {described(data)}.')
    if autocast and (dtype == torch.float32 or param_dtype != torch.float32):
        raise ValueError("plan: `autocast` must go with a 16-bit `dtype` and a float32 `param_dtype`.")
    recompute = config.layerwise_ckpt if recompute is None else recompute
    check_flag("plan", "recompute", recompute)
    _check_division(config, sizes, context, batch)

    share = Share(
        config, batch // sizes["data"], context // sizes["chunk"], sizes["tensor"], dtype, autocast, card.kind
    )  # fmt: skip
    layout = Layout(sizes["data"], sizes["chunk"], sizes["tensor"], data == "shard", reshard, param_dtype.itemsize)
    found = exchanges(share, layout, recompute)
    times = [_time(share, layout, recompute, found, card, node, by) for by in ((1.0, 1.0, 1.0), shares)]
    return Plan(
        config, card, sizes, context, batch, recompute, _memory(share, layout, recompute, optimizer_dtype),
        flops(share, recompute), found, *times, shares,
    )  # fmt: skip


def _memory(share: Share, layout: Layout, recompute: bool, optimizer_dtype: torch.dtype | None) -> Memory:
    config, parameters = share.config, list(share.parameters())
    ranks = layout.of_parameters.size if layout.shards else 1
    own = stored_bytes(parameters, layout)
    moments = 2 * own
    if optimizer_dtype is not None:
        moments = 2 * sum(p.shard(ranks) for p in parameters) * optimizer_dtype.itemsize
    around, blocks = kept_around_blocks(share), by_kind(kept_by_block(share))
    kept = {**{kind: config.num_layers * size for kind, size in blocks.items()}, **around}
    recomputing = {"residual stream": config.num_layers * block_input(share), **around}
    rotary = config.num_layers * config.chunk_size * (config.z_dim // config.num_heads) * WIDE
    tables = rotary if share.device == "cuda" else rotary // config.num_layers  # on the CPU all layers share one
    states = layout.chunk * share.rows * sum(state_bytes(share)) if layout.chunk > 1 else 0
    return Memory(
        own, moments, 2 * share.tokens * torch.int64.itemsize, tables, states, own, kept, recomputing,
        peak(share, recompute, _gradients(share, layout, own)),
    )  # fmt: skip


def _gradients(share: Share, layout: Layout, all_stored: int) -> Gradients:
    """Gradients as they come in the backward, and gathered parameters: of the whole around the blocks, of two blocks."""
    block, around = share.of_block(), share.around_blocks()
    width = WIDE if share.autocast else share.narrow

    def whole(parameters: list[Parameter]) -> int:
        return sum(p.size * (WIDE if p.is_wide else width) for p in parameters)

    gathers = layout.shards and layout.of_parameters.size > 1
    if not gathers and width == layout.stored:
        own = [stored_bytes(part, layout) for part in (block, around[1:], around[:1])]
        return Gradients(*own, after=all_stored)
    ranks = layout.of_parameters.size if layout.shards else 1
    blocks_at_once = share.config.num_layers if not layout.reshard else min(2, share.config.num_layers)
    gathered = gathered_bytes(around, share, ranks) + blocks_at_once * gathered_bytes(block, share, ranks)
    summed = sum(p.shard(ranks) * ranks * (WIDE if p.is_wide else layout.stored) for p in block)
    return Gradients(
        stored_bytes(block, layout), whole(around[1:]), whole(around[:1]), after=all_stored,
        passing=whole(block) + summed, gathered=gathered,
    )  # fmt: skip


def _time(
    share: Share, layout: Layout, recompute: bool, found: list[Exchange], card: Card, node: int,
    efficiency: tuple[float, float, float],
) -> Time:  # fmt: skip
    operations, bandwidth, links = efficiency
    by_compute = by_bandwidth = 0.0
    again = set(ops_computed_again(share)) if recompute else set()
    for op, times in step_ops(share):
        rate = (card.peak(share.dtype) if op.is_product else card.float32) * operations
        passes = [(op.forward, op.forward_moves)] * (2 if op in again else 1) + [(op.backward, op.backward_moves)]
        for work, moved in passes:
            computing, moving = work / rate, moved / (card.bandwidth * bandwidth)
            by_compute += times * computing * (computing >= moving)
            by_bandwidth += times * moving * (computing < moving)
    own = stored_bytes(list(share.parameters()), layout)
    seconds = {
        hidden: sum(e.group.seconds(e.total, card, node) for e in found if e.hidden is hidden) / links
        for hidden in (True, False)
    }
    return Time(by_compute, by_bandwidth, seconds[True], seconds[False], 7 * own / (card.bandwidth * bandwidth))


def _checked_mesh(mesh: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(mesh, Mapping):
        raise TypeError(
            f'plan: `mesh` must be sizes of data, chunk and tensor, such as {{"data": 2}}, got {described(mesh)}.'
        )
    for name in mesh:
        if name not in DIMENSIONS:
            raise ValueError(f"plan: `mesh` must have dimensions named data, chunk or tensor, got {shown(name)}.")
    return {name: check_size("plan", "mesh", mesh.get(name, 1)) for name in DIMENSIONS}


def _checked_card(card: str | Card) -> Card:
    if isinstance(card, Card):
        return card
    if not isinstance(card, str) or card not in CARDS:
        raise ValueError(f"plan: `card` must be a Card, or one of {', '.join(CARDS)}, got {described(card)}.")
    return CARDS[card]


def _checked_efficiency(efficiency: float | Sequence[float]) -> tuple[float, float, float]:
    several = list(efficiency) if isinstance(efficiency, (list, tuple)) else [efficiency] * 3
    if len(several) != 3:
        raise ValueError(f"plan: `efficiency` must be one number or three, got {len(several)}.")
    of_compute, of_memory, of_links = (
        check_number("plan", "efficiency", share, "above 0 and at most 1", 1e-6, 1.0) for share in several
    )
    return of_compute, of_memory, of_links


def _check_division(config: MegalodonConfig, mesh: dict[str, int], context: int, batch: int) -> None:
    def check(divisor: str, what: str, size: int) -> None:
        if size % mesh[divisor]:
            raise ValueError(
                f"plan: `mesh` must have a size of {divisor} that divides {what} ({size:,}), got {mesh[divisor]}."
            )

    check("data", "the batch's sequences", batch)
    for what, size in (
        ("the norm groups", config.norm_num_groups), ("the width of values", config.value_dim),
        ("the hidden units", config.ffn_hidden_dim),
    ):  # fmt: skip
        check("tensor", what, size)
    if mesh["tensor"] % config.num_heads:  # otherwise processes share heads
        check("tensor", "the heads", config.num_heads)
    if mesh["chunk"] > 1:
        if context % config.chunk_size:
            raise ValueError(
                f"plan: `context` must be whole chunks of {config.chunk_size:,} where chunk = {mesh['chunk']}, got {context:,}."
            )
        check("chunk", "the chunks of the context", context // config.chunk_size)

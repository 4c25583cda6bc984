"""What one process receives from others in a step, in closed form, and over which links.

A collective over n processes counts what each receives: of an all-gather to S bytes, or a reduce-scatter of S bytes,
S (n - 1) / n; of an all-reduce both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .cards import Card
from .share import WIDE, Parameter, Share


class Group(NamedTuple):
    """Processes that exchange: `size` of them, `stride` ranks apart."""

    size: int
    stride: int

    def seconds(self, total: int, card: Card, node: int) -> float:
        """At least so long takes an all-gather to `total` bytes, or a reduce-scatter, over links at their peak.

        Inside a node each process receives what it lacks over its link; from other nodes the members in a node fetch
        what the node lacks, each its part, at the same time.
        """
        together = max(min(self.size, node // self.stride), 1)  # members in a node
        nodes = math.ceil(self.size / together)
        inside = total * (self.size - 1) / self.size / card.link if together > 1 else 0.0
        between = total * (nodes - 1) / nodes / together / card.network
        return max(inside, between)


class Exchange(NamedTuple):
    """One kind of exchange in a step."""

    name: str
    total: int
    """bytes that the collectives gather to, or reduce"""
    group: Group
    hidden: bool
    """whether computation that needs nothing of it can run meanwhile"""

    @property
    def received(self) -> int:
        """Bytes that a process receives in a step."""
        return self.total * (self.group.size - 1) // self.group.size


class Layout(NamedTuple):
    """How parameters are kept on a mesh: see `parallelize`."""

    data: int
    chunk: int
    tensor: int
    shards: bool
    """False: every process keeps all parameters"""
    reshard: bool
    """whether gathered parameters are freed after the forward, and gathered again for the backward"""
    stored: int
    """bytes of a number of a matrix, of its gradient; parameters that are wide have 4"""

    @property
    def of_parameters(self) -> Group:
        return Group(self.data * self.chunk, self.tensor)


def gathered_bytes(parameters: list[Parameter], share: Share, ranks: int) -> int:
    """Bytes of all shards together, in the dtype that the parameters are computed with in; shards are padded alike."""
    width = WIDE if share.autocast else share.narrow
    return sum(p.shard(ranks) * ranks * (WIDE if p.is_wide else width) for p in parameters)


def stored_bytes(parameters: list[Parameter], layout: Layout) -> int:
    """Bytes of this process's shards of parameters, or of their gradients."""
    ranks = layout.of_parameters.size if layout.shards else 1
    return sum(p.shard(ranks) * (WIDE if p.is_wide else layout.stored) for p in parameters)


def exchanges(share: Share, layout: Layout, recompute: bool) -> list[Exchange]:
    """Every exchange of a step; those of groups of one process are left out."""
    found = [
        *_of_parameters(share, layout),
        *_of_states(share, layout, recompute),
        *_of_tensors(share, layout, recompute),
    ]
    return [exchange for exchange in found if exchange.group.size > 1 and exchange.total]


def _of_parameters(share: Share, layout: Layout) -> list[Exchange]:
    group, parameters = layout.of_parameters, list(share.parameters())
    reduced = stored_bytes(parameters, layout)
    if not layout.shards:
        return [Exchange("gradients, all-reduce", 2 * reduced, group, True)]
    gathered = gathered_bytes(parameters, share, group.size)
    return [
        Exchange("parameters, all-gather forward", gathered, group, True),
        Exchange("parameters, all-gather backward", gathered * layout.reshard, group, True),
        Exchange("gradients, reduce-scatter", reduced * group.size, group, True),
    ]


def state_bytes(share: Share) -> tuple[int, int]:
    """What a process sends of one sequence in a forward: in all blocks, and for the final norm.

    A norm's 2 G numbers are float64, a CEMA's 2 D N float32.
    """
    d, g, *_ = share.widths
    of_norm, of_cema = 2 * g * 2 * WIDE, 2 * d * share.config.cema_ndim * WIDE
    return share.config.num_layers * (of_norm + of_cema), of_norm


def _of_states(share: Share, layout: Layout, recompute: bool) -> list[Exchange]:
    """One all-gather a layer and op of every process's end states; in its backward as much goes the other way."""
    group, (blocks, final_norm) = Group(layout.chunk, layout.tensor), state_bytes(share)
    sequences = layout.chunk * share.rows
    return [
        Exchange("states, forward", sequences * (blocks * (1 + recompute) + final_norm), group, False),
        Exchange("states, backward", sequences * (blocks + final_norm), group, False),
    ]


def _of_tensors(share: Share, layout: Layout, recompute: bool) -> list[Exchange]:
    """What the processes that share blocks exchange: see distributed/tensor.py.

    In a block t, CEMA's output and the feed-forward half's input are gathered, and the sums of wh2 and fc2 scattered; the
    last layer is gathered for the loss, and so is the output matrix. The backward does the opposite of each. A block that
    is computed again stops before the sum of fc2.
    """
    group, layers = Group(layout.tensor, 1), share.config.num_layers
    size = share.tokens * share.config.model_dim
    gathered, summed = size * share.residual, size * share.narrow
    whole = sum(p.size * (WIDE if p.is_wide or share.autocast else share.narrow) for p in share.whole_in_block())
    found = {
        "activations, all-gather forward": gathered * (3 * layers * (1 + recompute) + 1),
        "activations, reduce-scatter forward": summed * layers * (2 + (1 + share.keeps_fc2) * recompute),
        "activations, reduce-scatter backward": gathered * (3 * layers + 1),
        "activations, all-gather backward": summed * 2 * layers,
        "output matrix, all-gather": share.gathered_output,
        "output matrix, reduce-scatter": share.gathered_output,
        "gradients of what is whole, all-reduce": 2 * whole * layers,
    }
    return [Exchange(name, total, group, False) for name, total in found.items()]

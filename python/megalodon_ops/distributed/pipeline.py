"""Pipeline parallel: a contiguous run of a model's blocks for each rank, for torch.distributed.pipelining.

A stage is an ordinary module of one tensor in and one tensor out, so torch's `PipelineStage` and its schedules move
activations forward and gradients back; nothing of that is done here. Parameters keep the names that they have in the
whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .model import ParallelMegalodon
from ..model.layers import reset_all_parameters
from ..model.model import Megalodon, at_least_float32
from ..ops.loss import linear_cross_entropy
from ..ops.values import check_integer, check_size, described, is_whole, shown


def pipeline_stage(
    model: Megalodon, index: int, stages: int, *, blocks: Sequence[int] | None = None
) -> PipelineStageModule:
    """A stage of a model: some blocks, in the first with the embedding, in the last with the final norm and the output.

    This exchanges nothing. Give the stage to `torch.distributed.pipelining.PipelineStage`, and its :meth:`loss
    <PipelineStageModule.loss>` to a schedule.

    Args:
        model: the whole model, in either mode; it may be on `meta`. The stage has its modules, not copies.
        index: which stage, from 0.
        stages: how many there are.
        blocks: how many blocks each stage has; None: as equally many as can be, later stages having fewer.

    Returns:
        a module that takes tokens (B, L) in the first stage, activations (B, L, D) else, and gives activations:
        those of the last stage are the normalized ones that the output matrix reads.

    Raises:
        ValueError: there are more stages than blocks, `blocks` does not add up, or embedding and output matrix are one.
        TypeError: `model` is no Megalodon, or a parallel one.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> from megalodon_ops.distributed import pipeline_stage
        >>> config = mo.MegalodonConfig(num_layers=3, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> model, tokens = mo.Megalodon(config), torch.randint(9, (2, 20))
        >>> first, last = (pipeline_stage(model, index, 2) for index in range(2))
        >>> list(first.layers), list(last.layers)
        (['0', '1'], ['2'])
        >>> torch.equal(last.logits(last(first(tokens))), model(tokens))
        True
    """
    if not isinstance(model, Megalodon) or isinstance(model, ParallelMegalodon):
        raise TypeError(f"pipeline_stage: `model` must be a Megalodon of one process, got {described(model)}.")
    total = len(model.layers)
    stages = check_size("pipeline_stage", "stages", stages)
    index = check_integer("pipeline_stage", "index", index, f"an integer in [0, {stages})", 0, stages - 1)
    if stages > total:
        raise ValueError(f"pipeline_stage: `stages` must be at most num_layers = {total}, got {stages}.")
    if model.config.share_emb and stages > 1:
        raise ValueError(
            "pipeline_stage: `model` must have share_emb = False for more than one stage, got True: the first "
            "and the last would each have a part of one matrix's gradient."
        )
    if blocks is None:
        blocks = [total // stages + (stage < total % stages) for stage in range(stages)]
    blocks = list(blocks)
    if len(blocks) != stages or not all(is_whole(count, 1, total) for count in blocks) or sum(blocks) != total:
        got = blocks if len(blocks) <= 16 else shown(blocks)
        raise ValueError(
            f"pipeline_stage: `blocks` must be {stages} positive numbers with the sum num_layers = {total}, got {got}."
        )
    end = list(accumulate(blocks))[index]
    return PipelineStageModule(model, range(end - blocks[index], end), is_first=index == 0, is_last=index == stages - 1)


class PipelineStageModule(nn.Module):
    """A stage of a :class:`megalodon_ops.Megalodon`, made by :func:`pipeline_stage`."""

    def __init__(self, model: Megalodon, blocks: range, *, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.config = model.config
        self.embed = model.embed if is_first else None
        self.layers = nn.ModuleDict({str(number): model.layers[number] for number in blocks})
        self.output = model.output if is_last else None
        self.train(model.training)

    def reset_parameters(self) -> None:
        """Initialises every parameter, for a stage of a model on `meta`; stages draw as their processes are seeded."""
        reset_all_parameters(self)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """Tokens (B, L) integers, in the first stage, or activations (B, L, D), to activations; without options."""
        if options:
            raise ValueError(
                f"pipeline_stage: a stage must be called with a plain batch alone, got {', '.join(options)}; "
                f"states, packed and padded sequences go through parallelize's dimensions data, chunk and tensor."
            )
        if self.embed is not None:
            x = self.embed(x)
            x = x * self.config.embedding_scale if self.config.scale_emb else x
        recompute = self.config.layerwise_ckpt and self.training and torch.is_grad_enabled()
        for block in self.layers.values():
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x if self.output is None else self.output.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, L, num_outputs), as of :meth:`megalodon_ops.Megalodon.forward`, of what the last stage gives."""
        return at_least_float32(self._last("logits").output(hidden))

    def loss(self, hidden: Tensor, targets: Tensor, *, reduction: str = "mean", ignore_index: int = -100) -> Tensor:
        """The loss, as of :func:`megalodon_ops.linear_cross_entropy`, of what the last stage gives.

        Schedules average over micro-batches what this gives for each: with "mean", micro-batches in which other numbers
        of targets count get the same weight. Use "sum" and the schedule's `scale_grads=False` where this matters.
        """
        weight = self._last("loss").output.weight
        return linear_cross_entropy(hidden, weight, targets, reduction=reduction, ignore_index=ignore_index)

    def _last(self, method: str) -> nn.Module:
        if self.output is None:
            raise ValueError(
                f"pipeline_stage: `{method}` must be called on the last stage, got blocks {', '.join(self.layers)}."
            )
        return self.output

"""`ParallelMegalodon`: a model on several ranks, which split its batch, its sequence, its layers or its parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate

from ..model.encoder import MegalodonEncoder
from ..model.generation import TokenStream
from ..model.megalodon import Megalodon, masked_targets
from ..model.model_state import MegalodonState
from ..model.sequences import Sequences
from ..ops.linear_cross_entropy.linear_cross_entropy import check_reduction, has_integers
from .rank_checks import check_same_on_ranks
from .chunk import ShardedSequences
from .exchange import TotalLoss
from .fsdp import gathered, whole_model
from .pieces import pieces_of
from .shard_states import whole_state
from .tensor import joined_state, split_state
from .tensor_layers import CHANNELS, exchanged


@dataclass(frozen=True)
class Ranks:
    """Who shares what with this rank (None: nobody does), and how it computes."""

    batch: ProcessGroup | None = None  # the ranks whose losses are one loss
    chunk: ProcessGroup | None = None  # the ranks with the pieces of one sequence, in order
    tensor: DeviceMesh | None = None  # the ranks with the parts of every layer
    param_dtype: torch.dtype | None = None  # in which matrices are computed with; None: as they are


class _ParallelModel:
    """Base of models on several ranks, in front of the class of the model in one process."""

    def __init__(self, model: Megalodon | MegalodonEncoder, ranks: Ranks) -> None:
        """Take the modules, the mode and the hooks of a model, which is left without modules."""
        self.__dict__.update(vars(model), _ranks=ranks)
        model._modules = {}

    @contextmanager
    def _anew_after_errors(self) -> Iterator[None]:
        """Has FSDP2 take the call after one that failed for another one, not for a part of it."""
        try:
            yield
        except Exception:
            if hasattr(self, "reset_iter_state"):
                self.reset_iter_state()
            raise

    def alone(self) -> Megalodon | MegalodonEncoder:
        """A model of this process with all parameters, for whole sequences; no rank waits for another in its calls.

        It serves what every rank does alike or by itself, such as :func:`megalodon_ops.evaluation.evaluate`, without
        gradients. Parameters that are sharded are gathered, in the dtypes that they are computed with in: every rank
        must call this, and holds the whole model while it keeps the result. Others are shared, not copied.
        """
        return gathered(self, self._ranks.param_dtype)

    def save(self, directory: str | os.PathLike, **options: Any) -> None:
        """Writes the whole model as :meth:`megalodon_ops.Megalodon.save` does, by rank 0; the others wait.

        Every rank must call this.
        """
        values = get_model_state_dict(self, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            whole_model(self, values).save(directory, **options)
        dist.barrier()


class ParallelMegalodon(_ParallelModel, Megalodon):
    """A model on several ranks, as :func:`parallelize` makes it; all call it at once, each with its piece of the batch.

    `tokens` and `targets` are the rank's rows and its piece of their columns; `lengths`, `cu_seqlens` and `state` are
    of the whole sequences, equal on all ranks of a chunk group, and so is the state that is returned. A piece ends at a
    chunk boundary of the sequence that it cuts, except at the end of the sequence.

    Logits and features are the piece's. The loss is, with reduction "mean" or "sum", that of the targets of all ranks,
    the same on every rank, and its gradients, averaged over the ranks, are exactly those of one process; "none" gives
    the piece's.

    How it works: the model's own forward runs on every rank, on what the rank has. FSDP2 (fsdp.py) gathers a block's
    parameters before the block and averages gradients after it. On a chunk group, a block asks the sequences that it is
    called with (chunk.py) for the states that the rank's piece begins with. On a tensor group, layers (tensor.py) hold a
    part of their parameters and exchange activations. This class cuts lengths and adds up losses and states.

    Every rank must make every call. Ranks that share a sequence or layers compare what they are called with, by one
    small exchange, and raise the same ValueError where it differs.
    """

    def _compute(
        self, tokens: Tensor, targets: Tensor | None, features: bool, reduction: str, ignore_index: int,
        state: MegalodonState | None, return_state: bool, inplace_state: bool, sequences: Sequences,
    ) -> tuple[Tensor, MegalodonState | None]:  # fmt: skip
        """Features or logits of the piece, or the loss, and the state of the whole sequences; see the class."""
        check_reduction(reduction)
        ranks, own = self._ranks, state
        wanted = f"loss, {reduction} without {ignore_index}"
        wanted = "features" if features else "logits" if targets is None else wanted
        facts = {"call": wanted, "return_state": return_state, **_facts_of(state, len(tokens), sequences)}
        with self._anew_after_errors():
            if ranks.chunk is not None:
                widths = check_same_on_ranks("Megalodon", facts, ranks.chunk, own=tokens.shape[1])
                sequences = self._sharded(widths, state, tokens, sequences)
            if ranks.tensor is not None:
                content = {"tokens": tokens, "targets": targets}
                check_same_on_ranks("Megalodon", facts | content, ranks.tensor.get_group())
                own = None if own is None else split_state(own, ranks.tensor, self.config.num_heads)
            result, after = super()._compute(
                tokens, targets, features, reduction, ignore_index, own, return_state, inplace_state, sequences
            )
            if features and ranks.tensor is not None:
                result = exchanged(result, ranks.tensor, CHANNELS, Replicate())
            if return_state and ranks.tensor is not None:
                after = joined_state(after, ranks.tensor, self.config.num_heads)
            if return_state and ranks.chunk is not None:
                after = whole_state(after, state, sequences.pieces, self.config, ranks.chunk)
            return result, after

    def _cross_entropy(
        self, hidden: Tensor, targets: Tensor, reduction: str, ignore_index: int, sequences: Sequences
    ) -> Tensor:
        """The loss of all ranks, or with "none" this rank's losses."""
        targets = masked_targets(targets, ignore_index, sequences)
        part = "none" if reduction == "none" else "sum"
        if self._ranks.tensor is not None:
            loss = self.output.output.cross_entropy(hidden, targets, part, ignore_index)
        else:
            loss = super()._cross_entropy(hidden, targets, part, ignore_index, Sequences())
        if reduction == "none":
            return loss
        return TotalLoss.apply(loss, (targets != ignore_index).sum(), self._ranks.batch, reduction == "mean")

    def stream(self, prompt: Tensor, **options: Any) -> TokenStream:
        """The continuation of this rank's own prompts, whole on a chunk group too, as :meth:`Megalodon.stream` makes it.

        The model that :meth:`alone` gives makes it: every rank calls this, and each may stop at any token. The ranks of
        a chunk group give the same prompts; for others of its own, a rank calls the model that :meth:`alone` gives.
        """
        if self._ranks.chunk is not None:
            fix = "each rank has the whole prompts, not a piece of them"
            check_same_on_ranks("generate", {"prompt": prompt}, self._ranks.chunk, fix=fix)
        return self.alone().stream(prompt, **options)

    def _sharded(
        self, widths: list[int], state: MegalodonState | None, tokens: Tensor, whole: Sequences
    ) -> ShardedSequences:
        """The sequences in this rank's piece, by those in the pieces of all ranks, of `widths` columns each."""
        for name, values in whole.keywords.items():
            if values is not None and (not has_integers(values) or values.dim() != 1):
                raise ValueError(
                    f"Megalodon: `{name}` must be integers (n,), got {values.dtype} {tuple(values.shape)}."
                )
        pieces = pieces_of(
            dist.get_rank(self._ranks.chunk), widths, rows=len(tokens), chunk_size=self.config.chunk_size,
            **{name: None if values is None else values.tolist() for name, values in whole.keywords.items()},
            positions=None if state is None else state.layers[0].attention.position.tolist(),
        )  # fmt: skip
        integers = partial(torch.tensor, dtype=torch.int64, device=tokens.device)
        own = (None if values is None else integers(values) for values in (pieces.cu_seqlens, pieces.lengths))
        return ShardedSequences(*own, pieces=pieces, group=self._ranks.chunk)


class ParallelMegalodonEncoder(_ParallelModel, MegalodonEncoder):
    """An encoder on several ranks, as :func:`parallelize` makes it; all call it at once, each with its rows of the batch.

    Gradients are averaged over the ranks: those of each rank's mean loss are the whole batch's where all ranks have as
    many rows. Every rank must make every call.
    """

    def forward(self, inputs: Tensor, **options: Any) -> Tensor:
        """Logits or features of the rank's rows, as :meth:`megalodon_ops.MegalodonEncoder.forward` gives them."""
        with self._anew_after_errors():
            return super().forward(inputs, **options)


def _facts_of(state: MegalodonState | None, rows: int, sequences: Sequences) -> dict[str, Any]:
    """Names and values of a call's whole sequences, for ranks to compare."""
    facts = {"rows of tokens": rows, **sequences.keywords, "state": "None" if state is None else "given"}
    if state is None:
        return facts
    return facts | {"state.norm.count": state.norm.count, "position in state": state.layers[0].attention.position}

"""`ParallelMegalodon`: a model on several ranks, which split its batch, its sequence, its layers or its parameters."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..inference.generation import TokenStream
from ..model.megalodon import Wanted, masked_targets
from ..public_models import Megalodon, MegalodonEncoder, MegalodonState
from ..model.model_state import CallOptions
from ..model.sequences import Sequences
from ..ops.linear_cross_entropy.linear_cross_entropy import check_reduction
from ..ops.common.spans import argument_of
from .rank_checks import check_same_on_ranks
from .chunk import ShardedSequences
from .exchange import Tied, TotalLoss
from .fsdp import gather_model, whole_model
from .pieces import pieces_of
from .shard_states import whole_state
from .tensor import gather_state, split_state
from .tensor_layers import CHANNELS, redistribute, take_over


@dataclass(frozen=True)
class Ranks:
    """Process groups of this rank (None: nothing is split), and the dtype of matrix products."""

    batch: ProcessGroup  # ranks whose losses are summed
    chunk: ProcessGroup | None = None  # ranks with the pieces of one sequence, in order
    tensor: DeviceMesh | None = None  # ranks with the parts of every layer
    param_dtype: torch.dtype | None = None  # None: the parameters' dtype


class _ParallelModel:
    """Mixin that runs a model on several ranks; the next base class is the model for one process."""

    def __init__(self, model: Megalodon | MegalodonEncoder, ranks: Ranks) -> None:
        """Take over the modules, the mode and the hooks of a model, which is left without modules."""
        nn.Module.__init__(self)
        take_over(self, model)
        self.config, self._ranks = model.config, ranks
        for name in [*model._modules]:
            delattr(model, name)

    @contextmanager
    def _reset_after_exception(self) -> Iterator[None]:
        """Reset FSDP2 after an exception; otherwise FSDP2 would take the next call for a part of the failed one."""
        try:
            yield
        except Exception:
            if hasattr(self, "reset_iter_state"):
                self.reset_iter_state()
            raise

    def alone(self) -> Megalodon | MegalodonEncoder:
        """Return a model with all parameters in this process, for whole sequences; its calls exchange nothing.

        The model is for calls without gradients, such as :func:`megalodon_ops.evaluation.evaluate`. Every rank must
        call this method, which gathers sharded parameters and casts matrices to `param_dtype`. A rank holds the whole
        model while it keeps the result. Parameters that are neither sharded nor cast are shared, not copied.
        """
        return gather_model(self, self._ranks.param_dtype)

    def save(self, directory: str | os.PathLike, **options: Any) -> None:
        """Let rank 0 write the whole model, as :meth:`megalodon_ops.Megalodon.save` does; every rank must call this."""
        values = get_model_state_dict(self, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            whole_model(self, values).save(directory, **options)
        dist.barrier()


class ParallelMegalodon(_ParallelModel, Megalodon):
    """A model on several ranks, made by :func:`parallelize`; every rank calls it with its piece of the batch.

    `tokens` and `targets` are the rank's rows and its piece of their columns. `lengths`, `cu_seqlens`, `state` and the
    returned state describe whole sequences, and are equal on all ranks of a chunk group. A piece that ends inside a
    sequence ends at the end of one of the sequence's chunks.

    Logits and features are those of the piece. With reduction "mean" or "sum", the loss covers the targets of all ranks
    and is the same on every rank. Its gradients, averaged over the ranks, are exactly those of one process. With
    "none", a rank gets the losses of its piece.

    Every rank must make every call. Ranks that share a sequence or layers compare the arguments, by one small exchange,
    and raise the same ValueError if they differ.
    """

    @property
    def _reads_pieces(self) -> bool:
        return self._ranks.chunk is not None

    def forward(self, tokens: Tensor, *others: Any, starts: Tensor | None = None, **options: Any) -> Any:
        """Compute the piece's logits, features or loss, as :meth:`megalodon_ops.Megalodon.forward` does for the whole."""
        if starts is not None and self._ranks.chunk is not None:
            raise ValueError(
                "Megalodon: `starts` must be None where ranks hold pieces of rows, got a tensor; in one row, pass `spans`."
            )
        return super().forward(tokens, *others, starts=starts, **options)

    def _compute(self, tokens: Tensor, wanted: Wanted, options: CallOptions) -> tuple[Tensor, MegalodonState | None]:
        """Compute the piece's features or logits, or the loss, and the state of the whole sequences; see the class."""
        check_reduction(wanted.reduction)
        ranks, config = self._ranks, self.config
        state, return_state, _, sequences = options
        own_state = state
        result_kind = f"loss, {wanted.reduction} without {wanted.ignore_index}"
        if wanted.features or wanted.targets is None:
            result_kind = "features" if wanted.features else "logits"
        arguments = {"call": result_kind, "return_state": return_state, **_arguments(state, len(tokens), sequences)}
        with self._reset_after_exception():
            if ranks.chunk is not None:
                widths = check_same_on_ranks("Megalodon", arguments, ranks.chunk, number=tokens.shape[1])
                sequences = self._shard_sequences(widths, state, tokens, sequences)
            if ranks.tensor is not None:
                content = {"tokens": tokens, "targets": wanted.targets}
                check_same_on_ranks("Megalodon", arguments | content, ranks.tensor.get_group())
                own_state = None if state is None else split_state(state, ranks.tensor, config.num_heads)
            own_options = options._replace(state=own_state, sequences=sequences)
            result, after = super()._compute(tokens, wanted, own_options)
            if wanted.features and ranks.tensor is not None:
                result = redistribute(result, ranks.tensor, CHANNELS, Replicate())
            if return_state and ranks.tensor is not None:
                after = gather_state(after, ranks.tensor, config.num_heads)
            if return_state and ranks.chunk is not None:
                after = whole_state(after, state, sequences.pieces, config, ranks.chunk)
            return result, after

    def _tied(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Let FSDP2, whose hook is on x, gather the block's parameters for gradients of the new state alone, too."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x, state
        leaves, structure = tree_flatten(state)
        with_gradients = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        x, *tied = Tied.apply(x, *(leaves[i] for i in with_gradients))
        for i, leaf in zip(with_gradients, tied):
            leaves[i] = leaf
        return x, tree_unflatten(leaves, structure)

    def _cross_entropy(self, hidden: Tensor, wanted: Wanted, sequences: Sequences) -> Tensor:
        """Return the loss of all ranks or, with "none", this rank's losses."""
        reduction, ignore_index = wanted.reduction, wanted.ignore_index
        targets = masked_targets(wanted.targets, ignore_index, sequences)
        own_reduction = "none" if reduction == "none" else "sum"
        if self._ranks.tensor is not None:
            loss = self.output.output.cross_entropy(hidden, targets, own_reduction, ignore_index)
        else:
            own = Wanted(targets=targets, reduction=own_reduction, ignore_index=ignore_index)
            loss = super()._cross_entropy(hidden, own, Sequences())
        if reduction == "none":
            return loss
        return TotalLoss.apply(loss, (targets != ignore_index).sum(), self._ranks.batch, reduction == "mean")

    def stream(self, prompt: Tensor, **options: Any) -> TokenStream:
        """Continue this rank's prompts, as :meth:`Megalodon.stream` does; every rank must call this.

        The ranks of a chunk group pass the same whole prompts. The model of :meth:`alone` generates the tokens, so a
        rank may stop at any token. A rank of a chunk group continues other prompts by calling that model itself.
        """
        if self._ranks.chunk is not None:
            fix = "pass the same whole prompts on each rank"
            check_same_on_ranks("generate", {"prompt": prompt}, self._ranks.chunk, fix=fix)
        return self.alone().stream(prompt, **options)

    def _shard_sequences(
        self, widths: list[int], state: MegalodonState | None, tokens: Tensor, whole: Sequences
    ) -> ShardedSequences:
        """Return the sequences in this rank's piece; `widths`: number of columns of each rank's piece."""
        arguments = {name: values.tolist() for name, values in _sequence_argument(whole).items()}
        arguments["positions"] = None if state is None else state.layers[0].attention.position.tolist()
        rank, chunk_size = dist.get_rank(self._ranks.chunk), self.config.chunk_size
        pieces = pieces_of(rank, widths, rows=len(tokens), chunk_size=chunk_size, **arguments)
        integers = partial(torch.tensor, dtype=torch.int64, device=tokens.device)
        if pieces.is_packed:
            own = Sequences(integers(pieces.own_spans).view(-1, 2))
        else:
            lengths = None if pieces.lengths is None else integers(pieces.lengths)
            own = Sequences.of("Megalodon", tokens, lengths=lengths)
        return ShardedSequences(own.spans, pieces=pieces, group=self._ranks.chunk)


class ParallelMegalodonEncoder(_ParallelModel, MegalodonEncoder):
    """An encoder on several ranks, made by :func:`parallelize`; every rank calls it with its rows of the batch.

    Gradients are averaged over the ranks. If each rank computes the mean loss of its rows, and all have the same number
    of rows, the averages are the gradients of the whole batch's mean loss. Every rank must make every call.
    """

    def forward(self, inputs: Tensor, **options: Any) -> Tensor:
        """Logits or features of the rank's rows, as :meth:`megalodon_ops.MegalodonEncoder.forward` gives them."""
        with self._reset_after_exception():
            return super().forward(inputs, **options)


def _sequence_argument(sequences: Sequences) -> dict[str, Tensor]:
    """Return the argument that says where the whole sequences lie, by name; nothing for a dense batch."""
    return {} if sequences.spans is None else dict([argument_of(sequences.spans)])


def _arguments(state: MegalodonState | None, rows: int, sequences: Sequences) -> dict[str, Any]:
    """Return a call's arguments that describe whole sequences, by name; the ranks compare them."""
    values = {"rows of tokens": rows, **dict.fromkeys(("cu_seqlens", "lengths", "spans"))}
    values |= {**_sequence_argument(sequences), "state": "None" if state is None else "given"}
    if state is None:
        return values
    if state.cache_dtype == torch.int8:
        raise ValueError(
            "Megalodon: `state` must have keys and values in the dtype of the activations, on several ranks "
            "of chunk or tensor, got torch.int8."
        )
    return values | {"state.norm.count": state.norm.count, "position in state": state.layers[0].attention.position}

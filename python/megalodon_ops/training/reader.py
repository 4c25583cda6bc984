"""A model that reads consecutive batches."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .batches import Batch
from ..public_models import Megalodon, MegalodonState
from ..ops.common.checks import check_integer, check_size, describe


class Reader:
    """A model that reads consecutive batches and carries each row's state from batch to batch.

    With carries=False every batch starts from fresh states, as packed batches do.

    Example:
        >>> import megalodon_ops as mo
        >>> from megalodon_ops.training import Batches, Reader
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=257)
        >>> reader = Reader(mo.Megalodon(config))
        >>> for batch in Batches([b"to be or not to be"], rows=1, length=8, seed=None):
        ...     print(batch.tokens.shape, reader.loss(batch).shape)
        torch.Size([1, 8]) torch.Size([])
        torch.Size([1, 8]) torch.Size([])
        torch.Size([1, 3]) torch.Size([])
    """

    def __init__(self, model: Megalodon, carries: bool = True, *, rank: int = 0, ranks: int = 1):
        """rank: this process's rank among the `ranks` processes that split the sequences."""
        if not hasattr(model, "loss"):
            raise TypeError(f"Reader: `model` must be a Megalodon, got {describe(model)}.")
        self.model, self.carries = model, carries
        self.ranks = check_size("Reader", "ranks", ranks)
        self.rank = check_integer("Reader", "rank", rank, f"an integer in [0, {ranks}), below `ranks`", 0, ranks - 1)
        self.state: MegalodonState | None = None  # of each sequence in the previous batch
        self.last: Tensor | None = None  # (R,) each row's last sequence in that batch

    def loss(self, batch: Batch, reduction: str = "mean") -> Tensor:
        """Return the mean loss in nats, float32; with reduction "none" the loss of every target, (1, T)."""
        tokens, targets, bounds, carry, last = (tensor.to(next(self.model.parameters()).device) for tensor in batch)
        options = dict(reduction=reduction, cu_seqlens=bounds)
        state = None
        if self.state is not None and self.last is not None:
            state = select(self.state, torch.where(carry < 0, -1, self.last[carry]))
        if self.ranks > 1:
            columns = self._columns(bounds, state)
            tokens, targets = tokens[:, columns], targets[:, columns]
        if not self.carries:
            return self.model.loss(tokens, targets, **options)
        loss, self.state = self.model.loss(tokens, targets, state=state, return_state=True, **options)
        self.state, self.last = self.state.detach(), last
        return loss

    def _columns(self, bounds: Tensor, state: MegalodonState | None) -> slice:
        """Return the columns of the batch that this process reads."""
        from ..distributed.split import columns

        positions = 0 if state is None else state.layers[0].attention.position.tolist()
        offsets = bounds.tolist()
        return slice(*columns(self.rank, self.ranks, offsets[-1], self.model.config.chunk_size, offsets, positions))

    def rows(self) -> MegalodonState | None:
        """Return the state of each row, for a checkpoint; None before the first batch."""
        return None if self.state is None or self.last is None else select(self.state, self.last)

    def seek(self, rows: MegalodonState | None) -> None:
        """Continue from the states that :meth:`rows` returned."""
        self.state = rows
        self.last = None if rows is None else torch.arange(rows.num_sequences, device=rows.norm.count.device)


def split_batch(batch: Batch, count: int) -> Iterator[Batch]:
    """Split a batch of full rows into `count` batches of equally many rows, in order, one for each Reader."""
    rows, columns = len(batch.last) // count, batch.tokens.shape[1] // count
    first = 0  # sequence of a part
    for part in range(count):
        begin = part * columns
        text = slice(begin, begin + columns)
        last = batch.last[part * rows : (part + 1) * rows]
        end = int(last[-1]) + 1
        carry = batch.carry[first:end]
        yield Batch(
            batch.tokens[:, text],
            batch.targets[:, text],
            batch.cu_seqlens[first : end + 1] - begin,
            torch.where(carry < 0, -1, carry - part * rows),
            last - first,
        )
        first = end


def select(state: MegalodonState, rows: Tensor) -> MegalodonState:
    """Return the states of the sequences `rows`, and fresh states for -1; all sequences in order are not copied."""
    if torch.equal(rows, torch.arange(state.num_sequences, device=rows.device)):
        return state
    picked, fresh = state[rows.clamp(min=0)], rows < 0
    return picked.reset(fresh) if bool(fresh.any()) else picked

"""A model that reads batch after batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .batches import Batch
from ..model.megalodon import Megalodon
from ..model.model_state import MegalodonState
from ..ops.common.checks import check_integer, check_size, described


class Reader:
    """A model that reads batch after batch, each row going on from the state the batch before left it in.

    With carries=False every batch starts afresh, which is all that packed batches ask for.

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
        """rank, ranks: of the processes that share the batches' sequences, which this one is, and how many there are."""
        if not hasattr(model, "loss"):
            raise TypeError(f"Reader: `model` must be a Megalodon, got {described(model)}.")
        self.model, self.carries = model, carries
        self.ranks = check_size("Reader", "ranks", ranks)
        self.rank = check_integer("Reader", "rank", rank, f"an integer in [0, {ranks}), below `ranks`", 0, ranks - 1)
        self.state: MegalodonState | None = None  # of each sequence of the last batch
        self.last: Tensor | None = None  # (R,) the sequence that ended each row

    def loss(self, batch: Batch, reduction: str = "mean") -> Tensor:
        """Nats a target, float32; with reduction "none" those of every target, (1, T)."""
        tokens, targets, bounds, going_on, last = (tensor.to(next(self.model.parameters()).device) for tensor in batch)
        options = dict(reduction=reduction, cu_seqlens=bounds)
        state = None
        if self.state is not None and self.last is not None:
            state = select(self.state, torch.where(going_on < 0, -1, self.last[going_on]))
        if self.ranks > 1:
            columns = self._columns(bounds, state)
            tokens, targets = tokens[:, columns], targets[:, columns]
        if not self.carries:
            return self.model.loss(tokens, targets, **options)
        loss, self.state = self.model.loss(tokens, targets, state=state, return_state=True, **options)
        self.state, self.last = self.state.detach(), last
        return loss

    def _columns(self, bounds: Tensor, state: MegalodonState | None) -> slice:
        """The columns of the batch that the model reads here."""
        from ..distributed.split import columns

        positions = 0 if state is None else state.layers[0].attention.position.tolist()
        offsets = bounds.tolist()
        return slice(*columns(self.rank, self.ranks, offsets[-1], self.model.config.chunk_size, offsets, positions))

    def rows(self) -> MegalodonState | None:
        """The state of each row, for a checkpoint; None before the first batch."""
        return None if self.state is None or self.last is None else select(self.state, self.last)

    def seek(self, rows: MegalodonState | None) -> None:
        """Goes on from the state of each row that :meth:`rows` gave."""
        self.state = rows
        self.last = None if rows is None else torch.arange(rows.num_sequences, device=rows.norm.count.device)


def parts(batch: Batch, count: int) -> Iterator[Batch]:
    """A batch of full rows as `count` batches of equally many of them, in order, each for a Reader of its own."""
    rows, columns, first = len(batch.last) // count, batch.tokens.shape[1] // count, 0
    for part in range(count):
        begin, last = part * columns, batch.last[part * rows : (part + 1) * rows]
        end, text = int(last[-1]) + 1, slice(begin, begin + columns)
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
    """The state of the sequences `rows`; a row of -1 becomes a fresh state. Where all rows go on, nothing is copied."""
    if torch.equal(rows, torch.arange(state.num_sequences, device=rows.device)):
        return state
    picked, fresh = state[rows.clamp(min=0)], rows < 0
    return picked.reset(fresh) if bool(fresh.any()) else picked

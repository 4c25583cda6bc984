"""Convert transformers' padding, packing and labels to the arguments of the model's ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.config import MegalodonConfig
from ..model.layers import NO_STATE
from ..model.sequences import Sequences
from ..ops.linear_cross_entropy.linear_cross_entropy import has_integers
from ..ops.common.checks import check_rank, check_tensor, describe
from ..ops.common.spans import pairs_of
from .cache import MegalodonCache

IGNORED = -100
"""Label that the loss ignores"""
_PACKED_CACHE = "`cache` and `use_cache` must not be given with packed documents, which end here"


def select(rows: Tensor, columns: Tensor) -> Tensor:
    """Select columns of rows (B, L) or (B, L, D); `columns`: (K,) for all rows, or (B, K)."""
    if columns.dim() == 1:
        return rows[:, columns]
    return rows.gather(1, columns if rows.dim() == 2 else columns[..., None].expand(-1, -1, rows.shape[2]))


def _read_mask(op: str, attention_mask: Tensor, shape: tuple[int, int], past: int) -> Tensor | None:
    """Return (B, L) bool, True for tokens, from the last columns of the mask; None if it has no padding."""
    batch, length = shape
    if tuple(attention_mask.shape) not in (shape, (batch, past + length)):
        past_too = f" or, with the cache's {past} past columns, ({batch}, {past + length})" if past else ""
        expected = f"({batch}, {length}){past_too}"
        raise ValueError(f"{op}: `attention_mask` must be {expected}, got {tuple(attention_mask.shape)}.")
    mask = attention_mask[:, attention_mask.shape[1] - length :]
    present = mask != 0
    if not torch.compiler.is_compiling():  # compiled programs do not read the mask's values
        if bool((mask == 1).all()):
            return None
        if bool((present & (mask != 1)).any()):
            raise ValueError(f"{op}: `attention_mask` must hold 1 for a token and 0 for padding, got other values.")
    return present


def check_labels(op: str, labels: Tensor, shape: tuple[int, int], name: str = "labels") -> None:
    """Raise unless there is an integer label for each token."""
    check_tensor(op, name, labels)
    if labels.shape != shape:
        raise ValueError(f"{op}: `{name}` must be {shape} as the tokens, got {tuple(labels.shape)}.")
    if not has_integers(labels):
        raise TypeError(f"{op}: `{name}` must be integers, got {labels.dtype}.")


def targets_of(op: str, labels: Tensor, are_shifted: bool, config: MegalodonConfig, batch: Batch) -> Tensor:
    """Return the target of each token (B, W): the label of the token after it or, if labels `are_shifted`, its own.

    A sequence's last token has the target IGNORED, unless labels `are_shifted`. So have tokens before one that a model
    reads but never predicts, such as a start token. At padding, targets are arbitrary.
    """
    check_labels(op, labels, batch.shape, "shift_labels" if are_shifted else "labels")
    targets = (labels if batch.columns is None else select(labels, batch.columns)).long()
    if not are_shifted:
        targets = nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORED)
        if batch.spans is not None:
            targets.view(-1)[pairs_of(batch.spans)[:, 1] - 1] = IGNORED  # end 0 gives -1, the last row's end
    return targets.masked_fill((targets >= config.num_outputs) & (targets < config.vocab_size), IGNORED)


def map_columns(head: nn.Module, hidden: Tensor, positions: Tensor | None) -> Tensor:
    """Return head(hidden) (B, K, num_outputs) at `positions` (K,) or (B, K); None: all. hidden: (B, W, D).

    If there are as many positions as tokens, or more, the head maps the tokens before the selection: padding then has
    the bits of the token before it, which a product of equal rows may not give.
    """
    if positions is None:
        return head(hidden)
    if hidden.shape[1] <= positions.shape[-1]:
        return select(head(hidden), positions)
    return head(select(hidden, positions))


@dataclass
class Batch:
    """Checked arguments of one call."""

    name: str
    """Name of the argument `inputs` in transformers"""
    inputs: Tensor
    """Tokens (B, L), numbers (B, L, F) for some encoders, or embeddings (B, L, D)"""
    cache: MegalodonCache | None
    returns_cache: bool
    present: Tensor | None = None
    """(B, L) bool, True for columns with a token; None: no padding"""
    columns: Tensor | None = None
    """(B, W) columns that the model reads: each row's tokens, then its last one up to W. None: all, W = L"""
    positions: Tensor | None = None
    """(B, L) index among the columns read of the one whose result a column gets; None: its own"""
    spans: Tensor | None = None
    """Sequences in the columns read, as the model takes them"""
    is_packed: bool = False
    """True if documents share rows"""

    @property
    def shape(self) -> tuple[int, int]:
        """B and L."""
        return tuple(self.inputs.shape[:2])

    @property
    def width(self) -> int:
        """W, the number of columns that the model reads."""
        return self.shape[1] if self.columns is None else self.columns.shape[1]

    @property
    def holds_embeddings(self) -> bool:
        """True if the inputs are embeddings."""
        return self.name == "inputs_embeds"

    def read_sequences(self, op: str, offsets: Tensor | None, **indices: Tensor | None) -> dict[str, Tensor]:
        """Set `columns` and `positions`; return the sequences, as keywords of a model.

        Given offsets (S + 1,) in the flattened rows take precedence over `indices` (B, L): a document begins where
        `position_ids` do not increase by one from a column to the next, or where `seq_idx` changes.

        Padding before and after a row's tokens stays where it is; padding between tokens is left out. A compiled program
        selects columns without reading the mask, so that it serves all masks.
        """
        B, L = self.shape
        present = self.present
        if offsets is not None:
            if present is not None:
                raise ValueError(f"{op}: `attention_mask` must have no padding where `cu_seq_lens_q` is given.")
            return {"cu_seqlens" if B == 1 else "spans": offsets}
        indices = {name: values for name, values in indices.items() if values is not None and L > 1}
        if present is None and not indices:
            return {}
        column, row = (torch.arange(size, device=self.inputs.device) for size in (L, B))
        tokens = (column >= 0).expand(B, L) if present is None else present
        starts, lengths = tokens.int().argmax(1), tokens.sum(1)  # starts: 0 in a row without a token
        last = torch.where(tokens, column, starts[:, None]).cummax(1).values  # the token at or before each column
        are_adjacent = ((last[:, -1] - starts + 1 == lengths) | (lengths == 0)).all()
        cut = torch.zeros_like(tokens[:, 1:])  # True where a document begins behind a column
        for name, values in indices.items():
            if values.dim() != 2 or values.shape[0] not in (1, B) or values.shape[1] < L:
                raise ValueError(f"{op}: `{name}` must be {(B, L)} as the tokens, got {tuple(values.shape)}.")
            is_cut = values[:, -L:].expand(B, L).gather(1, last).diff() != (name == "position_ids")
            cut |= is_cut & (tokens[:, :-1] | (name == "seq_idx"))  # `generate` restarts position_ids after padding
        cut = cut & tokens[:, 1:]
        is_compiling = torch.compiler.is_compiling()
        if is_compiling and self.returns_cache and indices:  # such a program holds no packed documents: see read_batch
            torch._assert_async(~cut.any(), f"{op}: {_PACKED_CACHE}")
        elif indices and bool(cut.any()):
            if not bool(are_adjacent):
                raise ValueError(f"{op}: `attention_mask` must have padding only before and after a row's documents.")
            cuts = nn.functional.pad(cut, (1, 0)).flatten().nonzero()[:, 0]
            edges = (row * L + starts, row * L + starts + lengths)
            return {"spans": torch.stack([torch.cat((edge, cuts)).sort().values for edge in edges], 1)}
        if present is None:
            return {}
        if not is_compiling and bool(are_adjacent):
            self.positions = None if bool(present[:, -1].all()) else last
            return {"lengths": lengths} if not bool(starts.any()) else {"starts": starts, "lengths": lengths}
        # Move tokens together: in a compiled program behind their row's first one, which moves no row without holes,
        # and otherwise to the row's begin, so that the layers read as few columns as possible.
        width = L if is_compiling else max(int(lengths.max()), 1)
        first = starts[:, None] if is_compiling else 0
        count = present.cumsum(1)
        self.positions = (first + count - 1).clamp(min=0)
        self.columns = torch.searchsorted(count, (column[:width] + 1 - first).clamp(min=1).minimum(lengths[:, None]))
        if is_compiling:
            return {"starts": starts, "lengths": lengths}
        return {"lengths": lengths} if bool((lengths < width).any()) else {}

    def without_padding(self) -> Tensor:
        """Return the columns of `inputs` that the model reads, (B, W, ...), zero at padding.

        Padding may hold invalid ids, and NaN at padding would reach the gradients of weights.
        """
        inputs = self.inputs if self.columns is None else select(self.inputs, self.columns)
        if self.spans is None:
            return inputs
        outside = ~Sequences(self.spans).mask(inputs)
        return inputs.masked_fill(outside.view(*outside.shape, *[1] * (inputs.dim() - 2)), 0)

    def zero_padding(self, hidden: Tensor) -> Tensor:
        """Return hidden states (B, L, D) with zeros at padding."""
        return hidden if self.present is None else hidden.masked_fill(~self.present[..., None].to(hidden.device), 0)

    def spans_of(self, begin: int, end: int) -> Tensor | None:
        """Return the spans of the columns [begin, end) of rows that hold one sequence each."""
        if self.spans is None or end - begin == self.width:
            return self.spans
        row = torch.arange(self.shape[0], device=self.spans.device)[:, None]
        columns = (self.spans.view(-1, 2) - row * self.width).clamp(begin, end) - begin
        return (columns + row * (end - begin)).view(self.spans.shape)

    @property
    def token_columns(self) -> tuple[int, int] | None:
        """Columns [begin, end) of the tokens among those that the model reads; None if rows differ or hold none."""
        if self.spans is None:
            return 0, self.width
        row = torch.arange(self.shape[0], device=self.spans.device)[:, None]
        (begin, end), *others = (pairs_of(self.spans) - row * self.width).tolist()
        return (begin, end) if begin < end and all(other == [begin, end] for other in others) else None

    @property
    def is_for_decoder(self) -> bool:
        """True if a decoder can compute the call: tokens without gradients, a single one unless the cache can undo."""
        if self.cache is None or self.holds_embeddings or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if self.cache.undo:
            return self.token_columns is not None
        return self.cache.is_initialized and self.shape[1] == 1 and self.present is None


def read_batch(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: MegalodonCache | None = None,
    past_key_values: MegalodonCache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **others: Any,
) -> Batch:
    """Check the arguments of a model's call; `inputs` is the argument that `model.main_input_name` names."""
    op, config = type(model).__name__, model.config
    is_causal = model._core_class.config_type.causal
    name = model.main_input_name
    letters = "(B, L)" if name == "input_ids" else "(B, L, F)"
    accepted = dict(is_causal=is_causal, output_router_logits=False)
    for other, value in others.items():
        if other not in _IGNORED_ARGUMENTS and value is not None and value is not accepted.get(other):
            raise TypeError(f"{op}: unexpected argument `{other}`, got {describe(value)}; leave it out.")
    if not is_causal:
        for other, value in dict(cache=cache, past_key_values=past_key_values, use_cache=use_cache or None).items():
            if value is not None:
                raise ValueError(f"{op}: `{other}` must be None, got {describe(value)}; {NO_STATE}.")
    if (inputs is None) == (inputs_embeds is None):
        raise ValueError(f"{op}: exactly one of `{name}` and `inputs_embeds` must be given.")
    if output_attentions or (output_attentions is None and config.output_attentions):
        raise ValueError(f"{op}: `output_attentions` must be False, as the kernels keep no attention weights.")
    for past in (cache, past_key_values):
        if past is not None and not isinstance(past, MegalodonCache):
            raise TypeError(
                f"{op}: `cache` must be a megalodon_ops.hf.MegalodonCache or None, got {describe(past)}; keys and "
                "values of prefix tuning are no recurrent state: use prompt tuning."
            )
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError(f"{op}: `cache` and `past_key_values` are two names of one argument; give one of them.")
    cache = past_key_values if cache is None else cache
    if inputs is None:
        name, inputs, letters = "inputs_embeds", inputs_embeds, "(B, L, D)"
    check_tensor(op, name, inputs)
    check_rank(op, name, inputs, letters, letters.count(",") + 1)
    if cache is not None and (rows := cache.batch_size) not in (-1, len(inputs)):
        raise ValueError(f"{op}: `cache` must have {len(inputs)} rows, as `{name}` has, got {rows}.")
    batch = Batch(name, inputs, cache, cache is not None or bool(use_cache))
    if batch.shape[1] == 0:
        raise ValueError(f"{op}: `{name}` must have at least one token, got shape {batch.shape}.")
    past = 0 if cache is None else cache.get_seq_length()
    batch.present = None if attention_mask is None else _read_mask(op, attention_mask, batch.shape, past)
    if not (is_causal or batch.present is None or torch.compiler.is_compiling() or bool(batch.present.any(1).all())):
        raise ValueError(f"{op}: `attention_mask` must have a token in every row, got a row without one.")
    where = batch.read_sequences(op, cu_seq_lens_q, position_ids=position_ids, seq_idx=seq_idx)
    batch.is_packed = bool(where) and "lengths" not in where
    if batch.is_packed and batch.returns_cache:
        raise ValueError(f"{op}: {_PACKED_CACHE}.")
    batch.spans = Sequences.of(op, inputs[:, : batch.width], **where).spans
    if use_cache is None and not batch.is_packed and not model.training:
        batch.returns_cache |= config.use_cache
    return batch


_IGNORED_ARGUMENTS = set("tokenizer cache_position cu_seq_lens_k max_length_q max_length_k token_type_ids".split())


def kept_positions(op: str, logits_to_keep: int | Tensor | None, batch: Batch) -> Tensor | None:
    """Return the positions of the wanted logits: (K,), or (B, K) if rows are padded; None: all positions."""
    columns = torch.arange(batch.shape[1], device=batch.inputs.device)
    if isinstance(logits_to_keep, Tensor):
        kept = columns.to(logits_to_keep.device)[logits_to_keep]  # checks bounds, counts from the end
    elif logits_to_keep:
        kept = columns[-logits_to_keep:]
    else:
        return batch.positions
    return kept if batch.positions is None else batch.positions[:, kept]

"""Convert transformers' padding, packing and labels to the arguments of the model's ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.config import MegalodonConfig
from ..model.layers import NO_STATE
from ..ops.linear_cross_entropy.linear_cross_entropy import has_integers
from ..ops.common.checks import check_rank, check_tensor, describe
from .cache import MegalodonCache

IGNORED = -100
"""Label that the loss ignores"""


class Padding(NamedTuple):
    """Padding in arbitrary columns of rows (B, L). The ops read rows without padding, which begin in column 0."""

    present: Tensor
    """(B, L) bool, True for columns with a token"""
    columns: Tensor
    """(B, W) columns of each row's tokens; shorter rows repeat the last one. W: the most tokens of a row, at least 1"""
    lengths: Tensor | None
    """(B,) number of tokens in each row, which may be 0. None: all rows have W"""

    def remove(self, rows: Tensor) -> Tensor:
        """Remove the padding from rows (B, L) or (B, L, D); repeat the last token up to W."""
        return select(rows, self.columns)

    def positions(self) -> Tensor:
        """(B, L) index of each column's token among its row's tokens; at padding, that of the token before, or 0."""
        return (self.present.cumsum(1) - 1).clamp(min=0)


def select(rows: Tensor, columns: Tensor) -> Tensor:
    """Select columns of rows (B, L) or (B, L, D); `columns`: (K,) for all rows, or (B, K)."""
    if columns.dim() == 1:
        return rows[:, columns]
    return rows.gather(1, columns if rows.dim() == 2 else columns[..., None].expand(-1, -1, rows.shape[2]))


def _read_padding(op: str, attention_mask: Tensor | None, shape: tuple[int, int], past: int) -> Padding | None:
    """Return a call's padding, from the last columns of the mask; None if the call has no padding."""
    if attention_mask is None:
        return None
    batch, length = shape
    if tuple(attention_mask.shape) not in (shape, (batch, past + length)):
        past_too = f" or, with the cache's {past} past columns, ({batch}, {past + length})" if past else ""
        got = tuple(attention_mask.shape)
        raise ValueError(f"{op}: `attention_mask` must be ({batch}, {length}){past_too}, got {got}.")
    mask = attention_mask[:, attention_mask.shape[1] - length :]
    present, is_compiling = mask != 0, torch.compiler.is_compiling()  # compiled programs do not read the mask's values
    if not is_compiling:
        if bool((mask == 1).all()):
            return None
        if bool((present & (mask != 1)).any()):
            raise ValueError(f"{op}: `attention_mask` must hold 1 for a token and 0 for padding, got other values.")
    lengths = present.sum(1)
    tokens = torch.arange(1, length + 1, device=mask.device).minimum(lengths[:, None])
    columns = torch.searchsorted(present.cumsum(1), tokens)
    if is_compiling:
        return Padding(present, columns, lengths)
    shortest, longest = torch.stack(lengths.aminmax()).tolist()
    width = max(longest, 1)
    return Padding(present, columns[:, :width], None if shortest == width else lengths)


def _read_packing(
    op: str, shape: tuple[int, int], offsets: Tensor | None, padding: Padding | None, **indices: Tensor | None
) -> Tensor | None:
    """Return offsets (S + 1,) of the documents in one row (1, L), or None if each row is one document.

    Given offsets take precedence over `indices` (B, L): a document begins where `position_ids` do not increase by one
    from a column to the next, or where `seq_idx` changes.
    """
    if offsets is None:
        begins = []
        for name, values in indices.items():
            if values is None or shape[1] == 1:
                continue
            if values.dim() != 2 or values.shape[0] not in (1, shape[0]) or values.shape[1] < shape[1]:
                raise ValueError(f"{op}: `{name}` must be {shape} as the tokens, got {tuple(values.shape)}.")
            values = values[:, -shape[1] :].expand(shape)
            changes = (values if padding is None else padding.remove(values)).diff()
            starts = changes != (1 if name == "position_ids" else 0)
            if name == "position_ids" and padding is not None:
                starts &= padding.columns.diff() == 1  # `generate` restarts its positions after padding
            begins.append(starts)
        if not begins or not bool((begins := torch.stack(begins).any(0)).any()):
            return None
        offsets = nn.functional.pad(begins[0].nonzero().squeeze(1) + 1, (1, 0))
        offsets = nn.functional.pad(offsets, (0, 1), value=shape[1])
    if shape[0] != 1 or padding is not None:
        raise ValueError(f"{op}: documents must be packed into one row (1, L) without padding, got {shape}.")
    return offsets


def check_labels(op: str, labels: Tensor, shape: tuple[int, int], name: str = "labels") -> None:
    """Raise unless there is an integer label for each token."""
    check_tensor(op, name, labels)
    if labels.shape != shape:
        raise ValueError(f"{op}: `{name}` must be {shape} as the tokens, got {tuple(labels.shape)}.")
    if not has_integers(labels):
        raise TypeError(f"{op}: `{name}` must be integers, got {labels.dtype}.")


def targets_of(op: str, labels: Tensor, are_shifted: bool, config: MegalodonConfig, batch: Batch) -> Tensor:
    """Return the target of each token (B, W): its own label if labels `are_shifted`, else that of the token after it.

    The target is IGNORED at the ends of rows and documents, and where it is a token that the model reads but never
    predicts (such as a start token without a logit). In a padded row of n tokens, only the first n - 1
    targets are defined, or the first n if labels `are_shifted`.
    """
    check_labels(op, labels, batch.shape, "shift_labels" if are_shifted else "labels")
    targets = (labels if batch.padding is None else batch.padding.remove(labels)).long()
    if not are_shifted:
        targets = nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORED)
        if batch.cu_seqlens is not None:
            targets[:, batch.cu_seqlens.long() - 1] = IGNORED  # offset 0 gives -1, the row's end
    return targets.masked_fill((targets >= config.num_outputs) & (targets < config.vocab_size), IGNORED)


def map_columns(head: nn.Module, hidden: Tensor, positions: Tensor | None) -> Tensor:
    """Return head(hidden) (B, K, num_outputs) at `positions` (K,) or (B, K); None: all. hidden: (B, W, D).

    If there are more positions than tokens, the head maps the tokens before the selection, so that padding does not
    change its rounding.
    """
    if positions is None:
        return head(hidden)
    if hidden.shape[1] < positions.shape[-1]:
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
    padding: Padding | None = None
    cu_seqlens: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """B and L."""
        return tuple(self.inputs.shape[:2])

    @property
    def width(self) -> int:
        """W, the most tokens of a row."""
        return self.shape[1] if self.padding is None else self.padding.columns.shape[1]

    @property
    def holds_embeddings(self) -> bool:
        """True if the inputs are embeddings."""
        return self.name == "inputs_embeds"

    @property
    def lengths(self) -> Tensor | None:
        """(B,) number of tokens in each row of :meth:`without_padding`; None: all rows have W."""
        return None if self.padding is None else self.padding.lengths

    def without_padding(self) -> Tensor:
        """Return `inputs` (B, W, ...) without padding before and between tokens."""
        return self.inputs if self.padding is None else self.padding.remove(self.inputs)

    @property
    def is_for_decoder(self) -> bool:
        """True if a decoder can compute the call: tokens without gradients, a single one unless the cache can undo."""
        if self.cache is None or self.holds_embeddings or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if self.cache.undo:
            return self.lengths is None and self.cu_seqlens is None
        return self.cache.is_initialized and self.shape[1] == 1 and self.padding is None


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
    name, letters = model.main_input_name, "(B, L)" if model.main_input_name == "input_ids" else "(B, L, F)"
    settings = dict(is_causal=model._core_class.config_type.causal, output_router_logits=False)
    for other, value in others.items():
        if other not in _IGNORED_ARGUMENTS and value is not None and value is not settings.get(other):
            raise TypeError(f"{op}: unexpected argument `{other}`, got {describe(value)}; leave it out.")
    if not model._core_class.config_type.causal:
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
    batch.padding = _read_padding(op, attention_mask, batch.shape, past)
    if not (
        model._core_class.config_type.causal
        or batch.lengths is None
        or torch.compiler.is_compiling()
        or bool(batch.lengths.all())
    ):
        raise ValueError(f"{op}: `attention_mask` must have a token in every row, got a row without one.")
    indices = dict(position_ids=position_ids, seq_idx=seq_idx)
    batch.cu_seqlens = _read_packing(op, batch.shape, cu_seq_lens_q, batch.padding, **indices)
    if batch.cu_seqlens is not None and batch.returns_cache:
        raise ValueError(
            f"{op}: `cache` and `use_cache` must not be given with packed documents, which end in the call."
        )
    if use_cache is None and batch.cu_seqlens is None and not model.training:
        batch.returns_cache |= config.use_cache
    return batch


_IGNORED_ARGUMENTS = set("tokenizer cache_position cu_seq_lens_k max_length_q max_length_k token_type_ids".split())


def kept_positions(op: str, logits_to_keep: int | Tensor | None, batch: Batch) -> Tensor | None:
    """Return the positions of the wanted logits: (K,), or (B, K) if rows are padded; None: all positions."""
    length, kept = batch.shape[1], None
    if isinstance(logits_to_keep, Tensor):
        kept = torch.arange(length, device=logits_to_keep.device)[logits_to_keep]  # checks bounds, counts from the end
    elif logits_to_keep:
        kept = torch.arange(max(length - logits_to_keep, 0), length, device=batch.inputs.device)
    if batch.padding is None:
        return kept
    positions = batch.padding.positions()
    return positions if kept is None else positions[:, kept]

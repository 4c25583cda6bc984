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
"""The label of a token that is not learned"""


class Padding(NamedTuple):
    """Rows (B, L) with padding on both sides of their tokens; the ops take it on the right only."""

    present: Tensor
    """(B, L) bool, True for columns with a token"""
    first: Tensor
    """(B, 1) column of each row's first token"""
    lengths: Tensor
    """(B,) tokens in each row; 0 if `generate` reads a prompt in pieces and the row begins in a later one"""

    @property
    def last(self) -> Tensor:
        """(B, 1) position of each row's last token."""
        return (self.lengths[:, None] - 1).clamp(min=0)

    def shift(self, rows: Tensor) -> Tensor:
        """Shift rows (B, L) or (B, L, D) to begin at column 0; repeat the last token to the end."""
        columns = torch.arange(rows.shape[1], device=rows.device)
        return select(rows, self.first + columns.minimum(self.last))

    def positions(self) -> Tensor:
        """(B, L) position of each column in its row: the first one before the tokens, the last one after them."""
        columns = torch.arange(self.present.shape[1], device=self.first.device)
        return (columns - self.first).clamp(min=0).minimum(self.last)


def select(rows: Tensor, columns: Tensor) -> Tensor:
    """Return columns (K,), the same in all rows, or (B, K), of rows (B, L) or (B, L, D)."""
    if columns.dim() == 1:
        return rows[:, columns]
    return rows.gather(1, columns if rows.dim() == 2 else columns[..., None].expand(-1, -1, rows.shape[2]))


def _read_padding(op: str, attention_mask: Tensor | None, shape: tuple[int, int], past: int) -> Padding | None:
    """Return the padding in a call's columns, which are the mask's last ones, or None if there is none."""
    if attention_mask is None:
        return None
    batch, length = shape
    if tuple(attention_mask.shape) not in (shape, (batch, past + length)):
        past_too = f" or, with the cache's {past} past columns, ({batch}, {past + length})" if past else ""
        got = tuple(attention_mask.shape)
        raise ValueError(f"{op}: `attention_mask` must be ({batch}, {length}){past_too}, got {got}.")
    mask = attention_mask[:, attention_mask.shape[1] - length :]
    present = mask != 0
    if bool((present != (mask == 1)).any()):
        raise ValueError(f"{op}: `attention_mask` must hold 1 for a token and 0 for padding, got other values.")
    if bool(present.all()):
        return None
    lengths, first = present.sum(1), present.int().argmax(1, keepdim=True)
    columns = torch.arange(length, device=present.device)
    run = (columns >= first) & (columns < first + lengths[:, None])
    if bool((run != present).any()):
        raise ValueError(f"{op}: `attention_mask` must have the tokens of a row together, got padding between tokens.")
    return Padding(present, first, lengths)


def _read_packing(
    op: str, shape: tuple[int, int], offsets: Tensor | None, position_ids: Tensor | None, padding: Padding | None
) -> Tensor | None:
    """Return offsets (S + 1,) of the documents in one row (1, L), or None if each row is one document.

    Given offsets take precedence over `position_ids`; there, a document begins where they do not increase by one.
    """
    if offsets is None:
        if position_ids is None or shape[1] == 1:
            return None
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, shape[0]) or position_ids.shape[1] < shape[1]:
            raise ValueError(f"{op}: `position_ids` must be {shape} as the tokens, got {tuple(position_ids.shape)}.")
        begins = position_ids[:, -shape[1] :].diff() != 1
        if padding is not None:
            begins = begins & padding.present[:, 1:] & padding.present[:, :-1]
        if not bool(begins.any()):
            return None
        offsets = nn.functional.pad(begins[0].nonzero().squeeze(1) + 1, (1, 0))
        offsets = nn.functional.pad(offsets, (0, 1), value=shape[1])
    if shape[0] != 1 or padding is not None:
        raise ValueError(f"{op}: documents must be packed into one row (1, L) without padding, got {shape}.")
    return offsets


def check_labels(op: str, labels: Tensor, batch: Batch) -> None:
    """Raise unless there is an integer label for each token."""
    if labels.shape != batch.shape:
        raise ValueError(f"{op}: `labels` must be {batch.shape} as the tokens, got {tuple(labels.shape)}.")
    if not has_integers(labels):
        raise TypeError(f"{op}: `labels` must be integers, got {labels.dtype}.")


def targets_of(op: str, labels: Tensor, config: MegalodonConfig, batch: Batch) -> Tensor:
    """Return the label after each position (B, L), arbitrary from a padded row's last token on.

    It is IGNORED at the ends of rows and documents, and for tokens that the model reads but never predicts (such as a
    start token without a logit).
    """
    check_labels(op, labels, batch)
    labels = labels if batch.padding is None else batch.padding.shift(labels)
    targets = nn.functional.pad(labels[:, 1:].long(), (0, 1), value=IGNORED)
    if batch.cu_seqlens is not None:
        targets[:, batch.cu_seqlens.long() - 1] = IGNORED  # -1, of an offset of 0, is the row's end
    return targets.masked_fill((targets >= config.num_outputs) & (targets < config.vocab_size), IGNORED)


@dataclass
class Batch:
    """Arguments of one call, for the model's ops."""

    name: str
    """Name of `given` in transformers"""
    given: Tensor
    """Tokens (B, L), numbers (B, L, F) for some encoders, or embeddings (B, L, D)"""
    cache: MegalodonCache | None
    returns_cache: bool
    padding: Padding | None = None
    cu_seqlens: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """B and L."""
        return tuple(self.given.shape[:2])

    @property
    def holds_embeddings(self) -> bool:
        """True if the call is given embeddings."""
        return self.name == "inputs_embeds"

    @property
    def lengths(self) -> Tensor | None:
        """(B,) tokens in each row, or None if none is padded."""
        return None if self.padding is None else self.padding.lengths

    def shifted(self) -> Tensor:
        """Return `given` with each row shifted to column 0."""
        return self.given if self.padding is None else self.padding.shift(self.given)

    @property
    def is_next_token(self) -> bool:
        """True if a decoder can take the call: one token, without gradients, after a past."""
        has_past = self.cache is not None and self.cache.is_initialized
        is_single = not self.holds_embeddings and self.shape[1] == 1 and self.padding is None
        return has_past and is_single and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


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
    **others: Any,
) -> Batch:
    """Check the arguments of a model's call; `inputs` is its argument `main_input_name`."""
    op, config = type(model).__name__, model.config
    name, letters = model.main_input_name, "(B, L)" if model.main_input_name == "input_ids" else "(B, L, F)"
    for other, value in others.items():
        if other not in _READ_BY_OTHER_MODELS and value is not None:
            raise TypeError(f"{op}: unexpected argument `{other}`, got {describe(value)}; leave it out.")
    if not model._is_stateful:
        for other, value in dict(cache=cache, past_key_values=past_key_values, use_cache=use_cache or None).items():
            if value is not None:
                raise ValueError(f"{op}: `{other}` must be None, got {describe(value)}; {NO_STATE}.")
    if (inputs is None) == (inputs_embeds is None):
        raise ValueError(f"{op}: exactly one of `{name}` and `inputs_embeds` must be given.")
    if output_attentions or (output_attentions is None and config.output_attentions):
        raise ValueError(f"{op}: `output_attentions` must be False, as the kernels keep no attention weights.")
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError(f"{op}: `cache` and `past_key_values` are two names of one argument; give one of them.")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, MegalodonCache):
        raise TypeError(f"{op}: `cache` must be a megalodon_ops.hf.MegalodonCache or None, got {describe(cache)}.")
    given = inputs
    if given is None:
        name, given, letters = "inputs_embeds", inputs_embeds, "(B, L, D)"
    check_tensor(op, name, given)
    check_rank(op, name, given, letters, letters.count(",") + 1)
    if cache is not None and (rows := cache.batch_size) not in (-1, len(given)):
        raise ValueError(f"{op}: `cache` must be of {len(given)} rows, those of `{name}`, got one of {rows}.")
    batch = Batch(name, given, cache, cache is not None or bool(use_cache))
    if batch.shape[1] == 0:
        raise ValueError(f"{op}: there must be a token, got {batch.shape}.")
    past = 0 if cache is None else cache.get_seq_length()
    batch.padding = _read_padding(op, attention_mask, batch.shape, past)
    if batch.padding is not None:
        needs_token, rows = (cache.state.norm.count > 0, " that has begun") if past else (not model._is_stateful, "")
        if bool(((batch.padding.lengths == 0) & needs_token).any()):
            raise ValueError(f"{op}: `attention_mask` must leave a token to every row{rows}, got a row without.")
    batch.cu_seqlens = _read_packing(op, batch.shape, cu_seq_lens_q, position_ids, batch.padding)
    if batch.cu_seqlens is not None and batch.returns_cache:
        raise ValueError(f"{op}: packed documents end in the call, so there must be no cache.")
    if use_cache is None and batch.cu_seqlens is None and not model.training:
        batch.returns_cache |= config.use_cache
    return batch


_READ_BY_OTHER_MODELS = ("tokenizer", "cache_position", "cu_seq_lens_k", "max_length_q", "max_length_k")


def kept_positions(op: str, logits_to_keep: int | Tensor | None, batch: Batch) -> Tensor | None:
    """Return the positions of the wanted logits: (K,), or (B, K) if rows are padded; None: all positions."""
    length, kept = batch.shape[1], None
    if isinstance(logits_to_keep, Tensor):
        kept = torch.arange(length, device=logits_to_keep.device)[logits_to_keep]  # checks bounds, counts from the end
    elif logits_to_keep:
        kept = torch.arange(max(length - logits_to_keep, 0), length, device=batch.given.device)
    if batch.padding is None:
        return kept
    positions = batch.padding.positions()
    return positions if kept is None else positions[:, kept]

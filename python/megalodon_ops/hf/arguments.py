"""How transformers says where the sequences of a batch are, and how the model's ops are told: padding, packing, targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.config import MegalodonConfig
from ..model.layers import NO_STATE
from ..ops.linear_cross_entropy.linear_cross_entropy import has_integers
from ..ops.common.checks import check_rank, check_tensor, described
from .cache import MegalodonCache

IGNORED = -100
"""The label of a token that is not learnt"""


class Padding(NamedTuple):
    """Rows (B, L) with padding on either side of their tokens, for ops that take it on the right alone."""

    present: Tensor
    """(B, L): which columns hold a token"""
    first: Tensor
    """(B, 1) the column of each row's first token"""
    lengths: Tensor
    """(B,) tokens in each row; none where `generate` reads a prompt in pieces, and the row begins in a later piece"""

    @property
    def last(self) -> Tensor:
        """(B, 1) the step of each row's last token."""
        return (self.lengths[:, None] - 1).clamp(min=0)

    def shift(self, rows: Tensor) -> Tensor:
        """Rows (B, L) or (B, L, D) moved so that each begins at column 0; its last token fills what is left."""
        columns = torch.arange(rows.shape[1], device=rows.device)
        return select(rows, self.first + columns.minimum(self.last))

    def steps(self) -> Tensor:
        """(B, L): which token of its row each column shows: the first one before it, the last one after it."""
        columns = torch.arange(self.present.shape[1], device=self.first.device)
        return (columns - self.first).clamp(min=0).minimum(self.last)


def select(rows: Tensor, columns: Tensor) -> Tensor:
    """The columns (K,), or of each row its own columns (B, K), of rows (B, L) or (B, L, D)."""
    if columns.dim() == 1:
        return rows[:, columns]
    return rows.gather(1, columns if rows.dim() == 2 else columns[..., None].expand(-1, -1, rows.shape[2]))


def _padding_of(op: str, attention_mask: Tensor | None, shape: tuple[int, int], past: int) -> Padding | None:
    """Where a call's tokens are in its columns, which are the last of the attention mask; None: everywhere."""
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


def _packing_of(
    op: str, shape: tuple[int, int], offsets: Tensor | None, position_ids: Tensor | None, padding: Padding | None
) -> Tensor | None:
    """Offsets (S + 1,) of the documents in one row of shape (1, L), or None if there is one document a row.

    Offsets that are given count before `position_ids`, which do not go up by one where a document begins.
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
    """Raises unless there is a label, an integer, at each token's place."""
    if labels.shape != batch.shape:
        raise ValueError(f"{op}: `labels` must be {batch.shape} as the tokens, got {tuple(labels.shape)}.")
    if not has_integers(labels):
        raise TypeError(f"{op}: `labels` must be integers, got {labels.dtype}.")


def targets_of(op: str, labels: Tensor, config: MegalodonConfig, batch: Batch) -> Tensor:
    """The label after each step (B, L), without meaning from a padded row's last token on.

    IGNORED at the ends of rows and of documents; and so is a token that the model reads but never predicts (the start
    of a document, where it has no logit).
    """
    check_labels(op, labels, batch)
    labels = labels if batch.padding is None else batch.padding.shift(labels)
    targets = nn.functional.pad(labels[:, 1:].long(), (0, 1), value=IGNORED)
    if batch.cu_seqlens is not None:
        targets[:, batch.cu_seqlens.long() - 1] = IGNORED  # -1, of an offset of 0, is the row's end
    return targets.masked_fill((targets >= config.num_outputs) & (targets < config.vocab_size), IGNORED)


@dataclass
class Batch:
    """The arguments of one call, as the model's ops take them."""

    name: str
    """What transformers calls what is given"""
    given: Tensor
    """Tokens (B, L) or, as an encoder may read, numbers (B, L, F); or embeddings (B, L, D) in their place"""
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
        """Whether the call is given embeddings, in the place of what the model embeds."""
        return self.name == "inputs_embeds"

    @property
    def lengths(self) -> Tensor | None:
        """(B,) tokens in each row, or None if none is padded."""
        return None if self.padding is None else self.padding.lengths

    def shifted(self) -> Tensor:
        """What is given, each row from column 0 on."""
        return self.given if self.padding is None else self.padding.shift(self.given)

    @property
    def is_next_token(self) -> bool:
        """Whether a decoder can take the call: one more token, without gradients, of sequences that have begun."""
        begun = self.cache is not None and self.cache.is_initialized
        one = not self.holds_embeddings and self.shape[1] == 1 and self.padding is None
        return begun and one and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


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
    """The arguments of a call of a model, checked; `inputs` are what it calls by its `main_input_name`."""
    op, config = type(model).__name__, model.config
    name, letters = model.main_input_name, "(B, L)" if model.main_input_name == "input_ids" else "(B, L, F)"
    for other, value in others.items():
        if other not in _READ_BY_OTHER_MODELS and value is not None:
            raise TypeError(f"{op}: unexpected argument `{other}`, got {described(value)}; leave it out.")
    if not model._is_stateful:
        for other, value in dict(cache=cache, past_key_values=past_key_values, use_cache=use_cache or None).items():
            if value is not None:
                raise ValueError(f"{op}: `{other}` must be None, got {described(value)}; {NO_STATE}.")
    if (inputs is None) == (inputs_embeds is None):
        raise ValueError(f"{op}: exactly one of `{name}` and `inputs_embeds` must be given.")
    if output_attentions or (output_attentions is None and config.output_attentions):
        raise ValueError(f"{op}: `output_attentions` must be False, as the kernels keep no attention weights.")
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError(f"{op}: `cache` and `past_key_values` are two names of one argument; give one of them.")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, MegalodonCache):
        raise TypeError(f"{op}: `cache` must be a megalodon_ops.hf.MegalodonCache or None, got {described(cache)}.")
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
    batch.padding = _padding_of(op, attention_mask, batch.shape, past)
    if batch.padding is not None:
        begun, which = (cache.state.norm.count > 0, " that has begun") if past else (not model._is_stateful, "")
        if bool(((batch.padding.lengths == 0) & begun).any()):
            raise ValueError(f"{op}: `attention_mask` must leave a token to every row{which}, got a row without.")
    batch.cu_seqlens = _packing_of(op, batch.shape, cu_seq_lens_q, position_ids, batch.padding)
    if batch.cu_seqlens is not None and batch.returns_cache:
        raise ValueError(f"{op}: packed documents end in the call, so there must be no cache.")
    if use_cache is None and batch.cu_seqlens is None and not model.training:
        batch.returns_cache |= config.use_cache
    return batch


_READ_BY_OTHER_MODELS = ("tokenizer", "cache_position", "cu_seq_lens_k", "max_length_q", "max_length_k")


def kept_steps(op: str, logits_to_keep: int | Tensor | None, batch: Batch) -> Tensor | None:
    """The steps whose logits are wanted: (K,) for all rows, (B, K) where rows are padded, None for all steps."""
    length, kept = batch.shape[1], None
    if isinstance(logits_to_keep, Tensor):
        kept = torch.arange(length, device=logits_to_keep.device)[logits_to_keep]  # checks bounds, counts from the end
    elif logits_to_keep:
        kept = torch.arange(max(length - logits_to_keep, 0), length, device=batch.given.device)
    if batch.padding is None:
        return kept
    steps = batch.padding.steps()
    return steps if kept is None else steps[:, kept]

"""How transformers says where the sequences of a batch are, and how the model's ops are told: padding, packing, targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import MegalodonCache
from .configuration import MegalodonHFConfig
from ..ops.values import check_integer, check_tensor, described

IGNORED = -100
"""The label of a token that is not learnt"""


class Padding(NamedTuple):
    """Rows (B, L) with padding on either side of their tokens, for ops that take it on the right alone."""

    first: Tensor
    """(B,) the column of each row's first token"""
    lengths: Tensor
    """(B,) tokens in each row"""

    def shift(self, rows: Tensor) -> Tensor:
        """Rows (B, L) or (B, L, D) moved so that each begins at column 0; its last token fills what is left."""
        columns = torch.arange(rows.shape[1], device=rows.device)
        last = (self.lengths - 1).clamp(min=0)
        return select(rows, self.first[:, None] + columns.minimum(last[:, None]))

    def steps(self, num_columns: int) -> Tensor:
        """(B, L): which token of its row each column shows: the first one before it, the last one after it."""
        columns = torch.arange(num_columns, device=self.first.device)
        return (columns - self.first[:, None]).clamp(min=0).minimum((self.lengths - 1).clamp(min=0)[:, None])


def select(rows: Tensor, columns: Tensor) -> Tensor:
    """The columns (K,), or of each row its own columns (B, K), of rows (B, L) or (B, L, D)."""
    if columns.dim() == 1:
        return rows[:, columns]
    return rows.gather(1, columns if rows.dim() == 2 else columns[..., None].expand(-1, -1, rows.shape[2]))


def _current_mask(op: str, attention_mask: Tensor | None, batch: int, length: int, past: int) -> Tensor | None:
    """The columns (B, L) of an attention mask that this call's tokens have, or None if every column holds a token."""
    if attention_mask is None:
        return None
    check_tensor(op, "attention_mask", attention_mask)
    widths = {length, past + length}
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] not in widths:
        past_too = f" or, with the {past} past columns of the cache, ({batch}, {past + length})" if past else ""
        raise ValueError(
            f"{op}: `attention_mask` must be ({batch}, {length}){past_too}, got {tuple(attention_mask.shape)}; "
            "documents that share a row are told apart by `position_ids` or `cu_seqlens`."
        )
    mask = attention_mask[:, attention_mask.shape[1] - length :]
    present = mask != 0
    if bool((present != (mask == 1)).any()):
        raise ValueError(f"{op}: `attention_mask` must hold 1 for a token and 0 for padding, got other values.")
    return None if bool(present.all()) else present


def _padding_of(op: str, present: Tensor) -> Padding:
    """Where the tokens of each row are; `present` (B, L) must be one run of True in each row."""
    lengths, first = present.sum(1), present.int().argmax(1)
    columns = torch.arange(present.shape[1], device=present.device)
    run = (columns >= first[:, None]) & (columns < (first + lengths)[:, None])
    if bool((run != present).any()):
        raise ValueError(
            f"{op}: `attention_mask` must have a row's padding before or after all its tokens, got padding between "
            "tokens; move the tokens of a row together."
        )
    return Padding(first, lengths)


def _packing_of(
    op: str,
    shape: tuple[int, int],
    cu_seqlens: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    present: Tensor | None,
) -> Tensor | None:
    """Offsets (S + 1,) of the documents in one row of shape (1, L), or None if there is one document a row.

    An explicit `cu_seqlens` counts first, then transformers' `cu_seq_lens_q`, then `position_ids`, which do not go up by
    one where a document begins, then `seq_idx`, which is another number for each document.
    """
    if cu_seq_lens_k is not None and (cu_seq_lens_q is None or not torch.equal(cu_seq_lens_q, cu_seq_lens_k)):
        raise ValueError(f"{op}: `cu_seq_lens_k` must equal `cu_seq_lens_q`, as the model attends within a document.")
    given = cu_seqlens if cu_seqlens is not None else cu_seq_lens_q
    if given is None:
        name, numbers, step = ("position_ids", position_ids, 1) if position_ids is not None else ("seq_idx", seq_idx, 0)
        if numbers is None or shape[1] == 1:
            return None
        check_tensor(op, name, numbers)
        if numbers.dim() != 2 or numbers.shape[0] not in (1, shape[0]) or numbers.shape[1] < shape[1]:
            raise ValueError(f"{op}: `{name}` must be {shape} as the tokens, got {tuple(numbers.shape)}.")
        numbers = numbers[:, numbers.shape[1] - shape[1] :]
        begins = numbers[:, 1:] != numbers[:, :-1] + step
        if present is not None:
            begins = begins & present[:, 1:] & present[:, :-1]
        if not bool(begins.any()):
            return None
        bounds = torch.tensor([0, shape[1]], device=begins.device)
        if shape[0] == 1:
            given = torch.cat([bounds[:1], begins[0].nonzero().squeeze(1) + 1, bounds[1:]])
    if shape[0] != 1 or present is not None:
        raise ValueError(
            f"{op}: documents are packed into one row without padding, (1, L), got {shape}{_padded(present)}."
        )
    return given


def _padded(present: Tensor | None) -> str:
    return "" if present is None else " with an attention mask that has padding"


def targets_of(
    op: str, labels: Tensor, num_outputs: int, vocab_size: int, present: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The label after each token (B, L): IGNORED at padding, at the ends of rows and of documents.

    A token that the model reads but never predicts (the start of a document, where it has no logit) is ignored as well.
    """
    check_tensor(op, "labels", labels)
    targets = torch.full_like(labels, IGNORED, dtype=torch.int64)
    targets[:, :-1] = labels[:, 1:]
    if num_outputs < vocab_size:
        targets = targets.masked_fill((targets >= num_outputs) & (targets < vocab_size), IGNORED)
    if present is not None:
        targets[:, :-1].masked_fill_(~(present[:, :-1] & present[:, 1:]), IGNORED)
    if cu_seqlens is not None:
        targets[:, cu_seqlens.long() - 1] = IGNORED  # -1, of an offset of 0, is the row's end
    return targets


@dataclass
class Batch:
    """The arguments of one call, as the model's ops take them."""

    tokens: Tensor | None
    """(B, L)"""
    embeddings: Tensor | None
    """(B, L, D), in the place of tokens"""
    cache: MegalodonCache | None
    returns_cache: bool
    must_keep_state: bool
    """Whether somebody has asked for a cache; else its state is computed only once it is used"""
    present: Tensor | None
    """(B, L): which columns hold a token; None: all"""
    padding: Padding | None
    cu_seqlens: Tensor | None

    @property
    def given(self) -> Tensor:
        """Tokens or embeddings."""
        return self.tokens if self.embeddings is None else self.embeddings

    @property
    def shape(self) -> tuple[int, int]:
        """B and L."""
        return tuple(self.given.shape[:2])

    def is_next_token(self) -> bool:
        """Whether a decoder can take the call: one more token, without gradients, of sequences that have begun."""
        begun = self.cache is not None and self.cache.is_initialized
        one = self.tokens is not None and self.tokens.shape[1] == 1 and self.padding is None
        return begun and one and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def read_batch(
    op: str,
    config: MegalodonHFConfig,
    training: bool,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: MegalodonCache | None,
    past_key_values: MegalodonCache | None,
    inputs_embeds: Tensor | None,
    use_cache: bool | None,
    output_attentions: bool | None,
    others: dict,
    **packing: Tensor | None,
) -> Batch:
    """The arguments of a call of the model `op`, checked."""
    for name, value in others.items():
        if name not in _READ_BY_OTHER_MODELS and value is not None:
            raise TypeError(f"{op}: unexpected argument `{name}`, got {described(value)}; leave it out.")
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"{op}: exactly one of `input_ids` and `inputs_embeds` must be given.")
    if output_attentions or (output_attentions is None and config.output_attentions):
        raise ValueError(f"{op}: `output_attentions` must be False, as the kernels keep no attention weights.")
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError(f"{op}: `cache` and `past_key_values` are two names of one argument; give one of them.")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, MegalodonCache):
        raise TypeError(
            f"{op}: `cache` must be a megalodon_ops.hf.MegalodonCache or None, got {described(cache)}; a state is no list "
            "of keys and values."
        )
    asked = cache is not None or bool(use_cache)
    batch = Batch(input_ids, inputs_embeds, cache, asked, asked, None, None, None)
    if (dims := batch.given.dim()) != (expected := 2 if inputs_embeds is None else 3):
        name = "`input_ids` must be (B, L)" if inputs_embeds is None else "`inputs_embeds` must be (B, L, D)"
        raise ValueError(f"{op}: {name}, of {expected} dimensions, got {dims}.")
    if batch.shape[1] == 0:
        raise ValueError(
            f"{op}: there must be a token, got {batch.shape}; `generate` with a cache takes all tokens so far, or the new "
            "tokens and an `attention_mask` over the past ones and them."
        )
    past = 0 if cache is None else cache.get_seq_length()
    batch.present = present = _current_mask(op, attention_mask, *batch.shape, past)
    batch.cu_seqlens = _packing_of(op, batch.shape, position_ids=position_ids, present=present, **packing)
    if batch.cu_seqlens is not None and (cache is not None or use_cache):
        raise ValueError(f"{op}: packed documents end in the call, so there must be no cache.")
    batch.returns_cache |= use_cache is None and config.use_cache and not training and batch.cu_seqlens is None
    batch.padding = padding = None if present is None else _padding_of(op, present)
    if padding is not None and past and bool(((padding.lengths == 0) & (cache.state.norm.count > 0)).any()):
        raise ValueError(
            f"{op}: `attention_mask` must leave a token to every row that has begun, got a row without; "
            "cache.batch_select_indices(rows) goes on with some of the rows."
        )
    return batch


_READ_BY_OTHER_MODELS = ("tokenizer", "cache_position", "max_length_q", "max_length_k")


def kept_steps(op: str, logits_to_keep: int | Tensor | None, batch: Batch) -> Tensor | None:
    """The steps whose logits are wanted: (K,) for all rows, (B, K) where rows are padded, None for all steps."""
    length = batch.shape[1]
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1 or logits_to_keep.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{op}: `logits_to_keep` must be an integer or a 1-D tensor of integers, got {logits_to_keep.dtype} "
                f"{tuple(logits_to_keep.shape)}."
            )
        kept = torch.where(logits_to_keep < 0, logits_to_keep + length, logits_to_keep).long()
    elif logits_to_keep:
        most = check_integer(op, "logits_to_keep", logits_to_keep, "an integer of at least 0", 0)
        kept = torch.arange(max(length - most, 0), length, device=batch.given.device)
    else:
        kept = None
    if batch.padding is None:
        return kept
    steps = batch.padding.steps(length)
    return steps if kept is None else steps[:, kept]

"""The Transformer to compare with: transformers' own LlamaForCausalLM, called as `Megalodon` is.

What it sees: a call without a state reads each sequence from its beginning, or from its row's, and a token attends to all
tokens of its sequence in that call. A state is the last `window` tokens of each sequence. A call with a state reads these
tokens again, before its own, so that a token sees at least `window` tokens where there are as many, and at most `window`
tokens and those of its call. That is evaluation by a sliding window, and costs (window + n) / n times as much for calls of
n tokens. Positions count from the first token that a call reads, so they stay within window + n.

Sequences of a packed row become rows of a padded batch, of lengths that differ by a factor of 2 at most, so that SDPA needs
no mask but the causal one, which is its fastest way on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import megalodon_ops as mo

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class WindowState:
    """The last tokens of each sequence."""

    def __init__(self, past: Iterable[Tensor]) -> None:
        self.past = tuple(past)

    @property
    def num_sequences(self) -> int:
        return len(self.past)

    def __getitem__(self, rows: Any) -> WindowState:
        return WindowState(self.past[row] for row in torch.as_tensor(rows).tolist())

    def reset(self, rows: Any) -> WindowState:
        """Without a past in the sequences `rows`: their numbers, or True for each of them."""
        fresh = torch.zeros(len(self.past), dtype=torch.bool)
        fresh[torch.as_tensor(rows)] = True
        return WindowState(past[:0] if new else past for past, new in zip(self.past, fresh.tolist(), strict=True))

    def detach(self) -> WindowState:
        return self


class Llama(nn.Module):
    """A LlamaForCausalLM with the calls of `Megalodon` that training, evaluation and the tasks make."""

    def __init__(self, vocab: int, dim: int, num_layers: int, hidden: int, window: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.window, self.dim = window, dim
        config = LlamaConfig(
            vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=num_layers,
            num_attention_heads=dim // head_dim(dim), max_position_embeddings=1 << 20, tie_word_embeddings=False,
            use_cache=False, attn_implementation="sdpa",
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        self.net = LlamaForCausalLM(config)

    @classmethod
    def sized_like(cls, config: mo.MegalodonConfig, window: int) -> Llama:
        """The rule of equal size: layers and width of the MEGALODON, and hidden units of the feed-forward half until the
        numbers of parameters are equal, to half of what one more hidden unit would add."""
        return cls(config.vocab_size, config.model_dim, config.num_layers, hidden_like(config), window)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def alone(self) -> Llama:
        return self

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        state: WindowState | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """Logits (B, L, vocab), or with targets their loss, as of :class:`megalodon_ops.Megalodon`."""
        own = list(tokens) if cu_seqlens is None else list(tokens[0].split(cu_seqlens.diff().tolist()))
        past = state.past if state is not None else [tokens.new_empty(0)] * len(own)
        whole = [torch.cat(pair) for pair in zip(past, own, strict=True)]
        hidden: list[Any] = [None] * len(own)
        for group in similar([len(ids) for ids in whole]):
            ids = pad_sequence([whole[i] for i in group], batch_first=True)
            found = (
                self.net.model(ids).last_hidden_state
                if ids.numel()
                else self.net.lm_head.weight.new_empty(*ids.shape, self.dim)
            )
            for i, row in zip(group, found, strict=True):
                hidden[i] = row[len(past[i]) : len(whole[i])]
        joined = torch.cat(hidden).view(*tokens.shape, -1)
        result = self.net.lm_head(joined).float()
        if targets is not None:
            result = F.cross_entropy(
                result.flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=ignore_index
            )
            result = result.view(targets.shape) if reduction == "none" else result
        return (result, WindowState(ids[max(0, len(ids) - self.window) :] for ids in whole)) if return_state else result

    def loss(self, tokens: Tensor, targets: Tensor, **options: Any) -> Any:
        return self(tokens, targets, **options)


def head_dim(dim: int) -> int:
    """64 where the width has at least 4 heads of it, 32 below, and 16 in models for tests."""
    return next(size for size in (64, 32, 16) if dim >= 4 * size or size == 16)


def hidden_like(config: mo.MegalodonConfig) -> int:
    vocab, dim, layers = config.vocab_size, config.model_dim, config.num_layers
    others = 2 * vocab * dim + layers * (4 * dim**2 + 2 * dim) + dim  # embedding and output, projections, norms
    return max(1, round((config.num_parameters() - others) / (3 * layers * dim)))


def similar(lengths: list[int]) -> Iterator[list[int]]:
    """Numbers of sequences in groups whose longest is at most twice as long as their shortest; empty ones with any."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        group = [i for i in order if 2 * lengths[i] >= lengths[order[0]]]
        yield group
        order = order[len(group) :]

"""The Transformer for comparison: transformers' LlamaForCausalLM with the calls of `Megalodon`.

- Without a state, a token attends to all earlier tokens of its sequence in the call.
- A state holds the last `window` tokens of each sequence. A call with a state reads them again before its own n tokens: the
  evaluation by a sliding window, which costs (window + n) / n times as much. A token sees these tokens and those of its call.
- Positions count from the first token that a call reads, so they stay below window + n.

Sequences of a packed row become rows of padded batches whose lengths differ by a factor of 2 at most, so SDPA needs only the
causal mask, its fastest path on the CPU.
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
    """Last tokens of each sequence."""

    def __init__(self, past: Iterable[Tensor]) -> None:
        self.past = tuple(past)

    @property
    def num_sequences(self) -> int:
        return len(self.past)

    def __getitem__(self, rows: Any) -> WindowState:
        return WindowState(self.past[row] for row in torch.as_tensor(rows).tolist())

    def reset(self, rows: Any) -> WindowState:
        """Clear the past of sequences `rows`, given as indices or as a boolean mask."""
        fresh = torch.zeros(len(self.past), dtype=torch.bool)
        fresh[torch.as_tensor(rows)] = True
        return WindowState(past[:0] if new else past for past, new in zip(self.past, fresh.tolist(), strict=True))

    def detach(self) -> WindowState:
        return self


class Llama(nn.Module):
    """A LlamaForCausalLM with the methods of `Megalodon` that training, evaluation and the tasks use."""

    def __init__(self, vocab: int, dim: int, num_layers: int, hidden: int, window: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.window, self.dim = window, dim
        sizes = dict(vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=num_layers)
        sizes |= dict(num_attention_heads=dim // head_dim(dim), max_position_embeddings=1 << 20)
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        options = dict(tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa")
        config = LlamaConfig(**sizes, **tokens, **options)
        self.net = LlamaForCausalLM(config)

    @classmethod
    def sized_like(cls, config: mo.MegalodonConfig, window: int) -> Llama:
        """A Llama with the layers, the width and, up to half a hidden unit, the parameter count of a MEGALODON."""
        return cls(config.vocab_size, config.model_dim, config.num_layers, hidden_units(config), window)

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
        """Logits (B, L, vocab), or the loss if there are targets, as in :class:`megalodon_ops.Megalodon`."""
        own = list(tokens) if cu_seqlens is None else list(tokens[0].split(cu_seqlens.diff().tolist()))
        past = state.past if state is not None else [tokens.new_empty(0)] * len(own)
        whole = [torch.cat(pair) for pair in zip(past, own, strict=True)]
        hidden: list[Any] = [None] * len(own)
        for group in group_by_length([len(ids) for ids in whole]):
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
        if not return_state:
            return result
        return result, WindowState(ids[max(0, len(ids) - self.window) :] for ids in whole)

    def loss(self, tokens: Tensor, targets: Tensor, **options: Any) -> Any:
        return self(tokens, targets, **options)


def head_dim(dim: int) -> int:
    """64 if the width has at least 4 such heads, else 32, or 16 in models for tests."""
    return next(size for size in (64, 32, 16) if dim >= 4 * size or size == 16)


def hidden_units(config: mo.MegalodonConfig) -> int:
    """Hidden units of the feed-forward half with which the Llama has as many parameters as a MEGALODON."""
    vocab, dim, layers = config.vocab_size, config.model_dim, config.num_layers
    others = 2 * vocab * dim + layers * (4 * dim**2 + 2 * dim) + dim  # embedding and output, projections, norms
    return max(1, round((config.num_parameters() - others) / (3 * layers * dim)))


def group_by_length(lengths: list[int]) -> Iterator[list[int]]:
    """Yield indices of sequences in groups whose longest is at most twice as long as the shortest; empty ones together."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        group = [i for i in order if 2 * lengths[i] >= lengths[order[0]]]
        yield group
        order = order[len(group) :]

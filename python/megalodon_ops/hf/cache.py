"""Cache of `generate`: a `MegalodonState`, or a decoder that has taken over the state."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..inference.decoder import Decoder
from ..public_models import Megalodon, MegalodonState
from ..inference.quantized_layers import computing_dtype, new_state
from ..ops.common.checks import describe

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in transformers: `cache` from 5.24 on, `past_key_values` before"""


class MegalodonCache(Cache):
    """Past of B sequences, in constant memory, for a model in transformers.

    A model creates the cache, updates it in place and returns it. In `generate`, single tokens go through a
    :class:`megalodon_ops.Decoder`, which the cache creates at the first single token.

    Args:
        state: initial state, from `Megalodon` or another cache; None: new sequences.

    Example:
        >>> import torch, megalodon_ops.hf as hf
        >>> config = hf.MegalodonHFConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> model = hf.MegalodonForCausalLM(config).eval()
        >>> cache = hf.MegalodonCache()
        >>> _ = model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
        >>> cache.get_seq_length(), cache.state.norm.count
        (3, tensor([3]))
    """

    def __init__(self, state: MegalodonState | None = None) -> None:
        if not (state is None or isinstance(state, MegalodonState)):
            raise TypeError(f"MegalodonCache: `state` must be a MegalodonState or None, got {describe(state)}.")
        super().__init__(layers=[])
        self._state = state
        self._decoder: Decoder | None = None
        self.undo = 0
        """Number of tokens that :meth:`crop` can remove"""
        self._columns = 0 if state is None else int(state.norm.count.max())

    @property
    def state(self) -> MegalodonState | None:
        """State after all tokens so far; None before the first."""
        return self._state if self._decoder is None else self._decoder.state

    def advance(self, state: MegalodonState, columns: int) -> None:
        """Set the state after `columns` more columns, padding included."""
        self._state, self._decoder = state, None
        self._columns += columns

    def decode(self, model: Megalodon, tokens: Tensor, columns: int) -> Tensor:
        """Return logits (B, L, num_outputs) after more tokens (B, L) of each sequence, without gradients.

        columns: number of columns after this call, with padding.
        """
        if self.undo and tokens.shape[1] > self.undo + 1:  # num_assistant_tokens has grown
            self.renew(tokens.shape[1] - 1)
        if self._decoder is None:
            state = new_state(model, len(tokens), tokens.device) if self.state is None else self.state
            if state is None:
                new = dict(dtype=computing_dtype(model), device=tokens.device)
                state = MegalodonState.fresh(model.config, len(tokens), **new)
            self._decoder, self._state = Decoder(model, state, undo=self.undo), None
        logits = self._decoder(tokens)
        self._columns = columns
        return logits

    def renew(self, undo: int = 0) -> None:
        """Drop the decoder. The next one reads the model anew, and :meth:`crop` can then remove `undo` tokens."""
        self._state, self._decoder, self.undo = self.state, None, undo

    def reset(self) -> None:
        """Drop the past; the next call begins new sequences, in any number."""
        self._state, self._decoder, self._columns = None, None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row beam_idx[i], for beam search."""
        if self._decoder is not None and len(beam_idx) == self.batch_size:
            self._decoder.reorder(beam_idx)
        else:
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, as neighbours."""
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        self.renew()
        if self._state is not None:
            self._state = self._state[indices]

    def crop(self, tokens: int) -> None:
        """Remove the last -`tokens` tokens. A positive `tokens` (transformers 5.0) is the number of tokens to keep.

        Only the caches of `generate` with an assistant or with prompt lookup can do this.
        """
        count = -tokens if tokens <= 0 else max(self._columns - tokens, 0)
        if count == 0:
            return
        if self._decoder is None or self.undo == 0:
            raise NotImplementedError(
                "MegalodonCache: `crop` must be called in assisted generation, got a cache that cannot remove tokens; "
                "to return to a state, keep a copy.deepcopy of the cache."
            )
        self._decoder.undo(count)
        self._columns -= count

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns so far, padding included."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: the length of the past is unlimited."""
        return -1

    get_max_cache_shape = get_max_length
    max_cache_len = -1  # for peft

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Return length and offset of an attention mask over the past and the next tokens."""
        length = query_length if isinstance(query_length, int) else len(query_length)
        return self._columns + length, 0

    @property
    def batch_size(self) -> int:
        """B, or -1 before the first token."""
        past = self.state if self._decoder is None else self._decoder
        return -1 if past is None else past.num_sequences

    max_batch_size = batch_size

    @property
    def is_initialized(self) -> bool:
        return self._columns > 0

    @property
    def is_croppable(self) -> bool:
        return self.undo > 0

    # `generate` does not compile the forward, and passes new tokens only.
    is_compileable = False
    is_linear = is_sliding = (False,)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the state without the decoder."""
        return {**vars(self), "_state": self.state, "_decoder": None}

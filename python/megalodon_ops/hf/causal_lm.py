"""`MegalodonForCausalLM` and `MegalodonModel`, as the Auto classes make them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..model.blocks import at_least_float32
from ..model.megalodon import Megalodon
from ..model.sequences import Sequences
from .arguments import IGNORED, Batch, kept_steps, read_batch, select, targets_of
from .cache import CACHE, MegalodonCache
from .configuration import MegalodonHFConfig
from .pretrained import MegalodonPreTrainedModel


class MegalodonCausalModel(MegalodonPreTrainedModel):
    """What both causal models share: how the layers run, piece by piece, and what they leave in a cache."""

    config_class = MegalodonHFConfig
    _ours = Megalodon
    _final_norm = "output.final_norm"
    _is_stateful = True

    def _hidden(self, batch: Batch, steps: Tensor | None, whole: bool) -> Tensor:
        """The normalized last layer of `steps` (K,), or of each row's steps (B, K): (B, K, D); None: of all steps.

        Updates the cache, making one if the call returns one. Padded rows are shifted, so that step i is token i of a
        row. Unless the layers need the `whole` batch at once, the tokens are read in pieces of a chunk where there are
        no gradients: memory grows with their number by the result alone.
        """
        model, given, lengths = self.megalodon, batch.shifted(), batch.lengths
        (_, length), state = batch.shape, None if batch.cache is None else batch.cache.state
        if not batch.holds_embeddings:
            if lengths is not None:
                given = given.masked_fill(lengths[:, None] == 0, 0)  # padding may be no token
            model._check(type(self).__name__, "input_ids", given, state, Sequences(batch.cu_seqlens, lengths))
        whole = whole or torch.is_grad_enabled() or batch.cu_seqlens is not None
        size = length if whole else min(model.config.chunk_size, length)
        pieces, kept = [], None
        for begin in range(0, length, size):
            end = min(begin + size, length)
            part, inside = given[:, begin:end], None if lengths is None else (lengths - begin).clamp(0, end - begin)
            piece, state = model._hidden(
                part * model.config.embedding_scale if batch.holds_embeddings else model._embed(part),
                state,
                return_state=batch.returns_cache or end < length,
                inplace_state=begin > 0,  # the first piece's state is the caller's
                sequences=Sequences(batch.cu_seqlens, inside),
            )
            if steps is None:
                pieces.append(piece)
            else:
                piece = select(piece, (steps - begin).clamp(0, end - begin - 1))
                kept = piece if kept is None else torch.where((steps >= begin)[..., None], piece, kept)
        if batch.returns_cache:
            batch.cache = MegalodonCache() if batch.cache is None else batch.cache
            batch.cache.advance(state, length)
        if steps is not None:
            return kept
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


class MegalodonModel(MegalodonCausalModel):
    """A MEGALODON language model without its output matrix: `AutoModel`.

    Example:
        >>> import torch, megalodon_ops.hf as hf
        >>> config = hf.MegalodonHFConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> hf.MegalodonModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    _keys_to_ignore_on_load_unexpected = [r"^output\.output\.weight$"]

    def __init__(self, config: MegalodonHFConfig) -> None:
        super().__init__(config)
        del self.output.output
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **arguments: Any,
    ) -> BaseModelOutputWithPast:
        """The normalized last layer (B, L, D); arguments as in :meth:`MegalodonForCausalLM.forward`."""
        batch = read_batch(self, input_ids, attention_mask, **arguments)
        with self._recording(output_hidden_states, batch) as layers:
            hidden = self._hidden(batch, kept_steps("MegalodonModel", None, batch), whole=layers is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, hidden_states=layers and tuple(layers), **{CACHE: batch.cache}
        )


class MegalodonForCausalLM(MegalodonCausalModel, GenerationMixin):
    """A MEGALODON language model: `AutoModelForCausalLM`.

    Its parameters have the names that :class:`megalodon_ops.Megalodon` gives them, so both read each other's folders;
    `model.megalodon` is a Megalodon with the same modules, and `from_megalodon` makes the model of one.

    Example:
        >>> import torch, megalodon_ops.hf as hf
        >>> config = hf.MegalodonHFConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> model = hf.MegalodonForCausalLM(config).eval()
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> model(tokens, labels=tokens).logits.shape
        torch.Size([1, 3, 9])
        >>> model.generate(tokens, max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    accepts_loss_kwargs = True
    _tied_weights_keys = {"output.output.weight": "embed.weight"}

    def __init__(self, config: MegalodonHFConfig) -> None:
        super().__init__(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.output.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.output.output = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MegalodonCache | None = None,
        past_key_values: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        use_decoder: bool = False,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, K, vocab_size) of the next token after K of the tokens, by default all, and the loss.

        A token that the model reads but never predicts, as where `output_size` is less than `vocab_size`, has the logit
        -inf.

        Args:
            input_ids: (B, L) integers.
            attention_mask: (B, L), or (B, past + L) with a cache: 1 for a token, 0 for padding before or after all tokens
                of a row. Each row is computed as if it were alone. At padding after a row, the logits are those of its
                last token; before a row, they mean nothing.
            position_ids: (B, L); where they do not go up by one, a document begins (B must be 1 then). Their values
                decide nothing else.
            cache, past_key_values: the past, which the call updates in place; two names of one argument.
            inputs_embeds: (B, L, D) instead of `input_ids`, as `get_input_embeddings()` gives them.
            labels: (B, L), the token at each place; the call shifts them. -100, padding, a document's first token and
                tokens without a logit are not learnt.
            use_cache: whether to make a cache where there is none, which takes time and memory for a chunk of keys and
                values, however short the tokens are. None: as the configuration says, but not in training.
            output_hidden_states: also return `hidden_states`, num_layers + 1 tensors (B, L, D): what goes into each layer,
                the embeddings first, and, as the last one, the final norm's output (:meth:`megalodon_ops.Megalodon.features`).
            logits_to_keep: logits of the last n columns, or of the columns in a 1-D tensor; 0 or None: of all. The loss
                needs none: it is computed for a block of tokens at a time.
            cu_seq_lens_q: (S + 1,) offsets of documents packed into one row; it counts before `position_ids`.
            num_items_in_batch: divides the loss in place of the number of labels, as Trainer asks. Without `labels`, for a
                loss that Trainer computes of the logits, tokens that are never predicted have the probability e^-20 together.
            use_decoder: lets a :class:`megalodon_ops.Decoder`, which the cache keeps, take a single token without gradients,
                as `generate` asks. Between two calls that do, weights and modules must stay as they are.
            others: what transformers gives every model: `tokenizer`, `cache_position`, `cu_seq_lens_k`,
                `max_length_q`, `max_length_k`.

        Raises:
            ValueError: padding between the tokens of a row; a mask that is not 2-D; several documents in a row of several;
                attention weights asked for.
            TypeError: the cache is not a MegalodonCache; an unknown argument.
        """
        given = (position_ids, cache, past_key_values, inputs_embeds, use_cache, output_attentions, cu_seq_lens_q)
        batch = read_batch(self, input_ids, attention_mask, *given, **others)
        steps = kept_steps("MegalodonForCausalLM", logits_to_keep, batch)
        loss = logits = None
        with self._recording(output_hidden_states, batch) as layers:
            if use_decoder and batch.is_next_token and labels is None and layers is None:
                logits = batch.cache.decode(self.megalodon, batch.given)
                logits = logits if steps is None else logits[:, steps]
            else:
                hidden = self._hidden(batch, steps if labels is None else None, whole=layers is not None)
        if labels is not None:
            loss = self._loss(hidden, labels, batch, num_items_in_batch)
            hidden = hidden if steps is None else select(hidden, steps)
        if logits is None:
            logits = at_least_float32(self.output.output(hidden))
        if (missing := self.config.vocab_size - logits.shape[-1]) > 0:
            lowest = logits.new_full((1,) * logits.dim(), -math.inf)  # of tokens that are never predicted
            if labels is None and num_items_in_batch is not None:
                lowest = logits.logsumexp(-1, keepdim=True) - 20 - math.log(missing)  # whose logarithms smoothing adds
            logits = torch.cat([logits, lowest.expand(*logits.shape[:-1], missing)], dim=-1)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=layers and tuple(layers), **{CACHE: batch.cache}
        )

    def _loss(self, hidden: Tensor, labels: Tensor, batch: Batch, num_items: int | Tensor | None) -> Tensor:
        targets = targets_of(type(self).__name__, labels, self.megalodon.config, batch)
        loss = self.megalodon._cross_entropy(
            hidden,
            targets.to(hidden.device),
            reduction="mean" if num_items is None else "sum",
            ignore_index=IGNORED,
            # the last token has no target
            sequences=Sequences(batch.cu_seqlens, None if batch.padding is None else batch.padding.lengths - 1),
        )
        return loss if num_items is None else loss / num_items

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs
    ) -> dict[str, Any]:
        """The arguments of the next call of `generate`, during which nobody changes the model."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return {**inputs, "use_decoder": True}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *others, **options) -> None:
        """Refuses a cache of another text; the first call makes one where the caller gives none."""
        mask = model_kwargs.get("attention_mask")  # transformers takes away one without padding, and notes its width
        width = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        for name in ("cache", "past_key_values"):
            if isinstance(given := model_kwargs.get(name), MegalodonCache):
                given.renew()
                if width is not None and width <= given.get_seq_length():
                    raise ValueError(
                        f"{type(self).__name__}: `{name}` has read {given.get_seq_length()} tokens, got {width}; give "
                        "`generate` all tokens so far, or the new ones and an `attention_mask` over the past ones and them."
                    )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *others, **options)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

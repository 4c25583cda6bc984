"""`MegalodonForCausalLM` and `MegalodonModel`, as the Auto classes make them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..model.model import Megalodon, at_least_float32
from ..ops.values import described
from .batches import IGNORED, Batch, kept_steps, read_batch, select, targets_of
from .cache import MegalodonCache
from .configuration import MegalodonHFConfig
from .pretrained import MegalodonPreTrainedModel

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


class MegalodonModel(MegalodonPreTrainedModel):
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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MegalodonCache | None = None,
        past_key_values: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **others,
    ) -> BaseModelOutputWithPast | tuple:
        """The normalized last layer (B, L, D); arguments as in :meth:`MegalodonForCausalLM.forward`."""
        batch = read_batch(
            type(self).__name__, self.config, self.training, input_ids, attention_mask, position_ids, cache, past_key_values,
            inputs_embeds, use_cache, output_attentions, others,
            cu_seqlens=cu_seqlens, cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k, seq_idx=seq_idx,
        )  # fmt: skip
        with self._recording(output_hidden_states, batch) as layers:
            hidden = self._hidden(batch, kept_steps("MegalodonModel", None, batch), whole=layers is not None)
        return self._returned(
            BaseModelOutputWithPast, batch, return_dict, last_hidden_state=hidden, hidden_states=layers
        )


class MegalodonForCausalLM(MegalodonPreTrainedModel, GenerationMixin):
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
    logits_in_training = True
    """False: a call in training with labels leaves the logits out, and so the memory for them; Trainer reads none"""
    _tied_weights_keys = {"output.output.weight": "embed.weight"}

    def __init__(self, config: MegalodonHFConfig) -> None:
        super().__init__(config)
        self.post_init()

    @property
    def megalodon(self) -> Megalodon:
        """This model as a :class:`megalodon_ops.Megalodon` with the same modules, in which a change shows in both."""
        model = Megalodon.__new__(Megalodon)
        nn.Module.__init__(model)
        model.config, model.training = self.config.to_megalodon(), self.training
        model.embed, model.layers, model.output = self.embed, self.layers, self.output
        return model

    @classmethod
    def from_megalodon(cls, model: Megalodon) -> MegalodonForCausalLM:
        """A model of transformers with the modules of `model`, not copies of them."""
        if not isinstance(model, Megalodon):
            raise TypeError(f"{cls.__name__}: `model` must be a Megalodon, got {described(model)}.")
        with torch.device("meta"):
            result = cls(MegalodonHFConfig.from_megalodon(model.config))
        result.embed, result.layers, result.output = model.embed, model.layers, model.output
        result.config.dtype = model.embed.weight.dtype
        result.training = result._megalodon.training = model.training
        return result

    def get_output_embeddings(self) -> nn.Module:
        return self.output.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.output.output = value

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
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        use_decoder: bool = False,
        **others,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, K, vocab_size) of the next token after K of the tokens, by default all, and the loss.

        A token that the model reads but never predicts, as the start of a document is in a model of bytes, has the logit
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
            use_cache: whether to make a cache where there is none. None: as the configuration says, but not in training;
                without gradients, its state is then computed once it is used, by reading the tokens again.
            output_hidden_states: also return the embeddings and what each layer returns.
            logits_to_keep: logits of the last n columns, or of the columns in a 1-D tensor; 0: of all. None: of all, or
                none in training with labels where `model.logits_in_training` is False. The loss needs none: it is
                computed for a block of tokens at a time.
            cu_seqlens: (S + 1,) offsets of documents packed into one row; it counts before `cu_seq_lens_q`, `position_ids`
                and `seq_idx`, in which transformers' collators say the same.
            num_items_in_batch: divides the loss in place of the number of labels, as Trainer asks.
            use_decoder: lets a :class:`megalodon_ops.Decoder`, which the cache keeps, take a single token without gradients,
                as `generate` asks. Between two calls that do, weights and modules must stay as they are.
            others: what transformers gives every model: `tokenizer`, `cache_position`, `max_length_q`, `max_length_k`.

        Raises:
            ValueError: padding between the tokens of a row; a mask that is not 2-D; several documents in a row of several;
                attention weights asked for.
            TypeError: the cache is not a MegalodonCache; an unknown argument.
        """
        batch = read_batch(
            type(self).__name__, self.config, self.training, input_ids, attention_mask, position_ids, cache, past_key_values,
            inputs_embeds, use_cache, output_attentions, others,
            cu_seqlens=cu_seqlens, cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k, seq_idx=seq_idx,
        )  # fmt: skip
        steps = kept_steps("MegalodonForCausalLM", logits_to_keep, batch)
        with self._recording(output_hidden_states, batch) as layers:
            if use_decoder and batch.is_next_token() and labels is None and layers is None:
                logits = self._all_tokens(batch.cache.decode(self, batch.tokens))
                return self._returned(
                    CausalLMOutputWithPast, batch, return_dict, logits=logits if steps is None else logits[:, steps]
                )
            hidden = self._hidden(batch, steps if labels is None else None, whole=layers is not None)
        loss = logits = None
        if labels is not None:
            loss = self._loss(hidden, labels, batch, num_items_in_batch)
            hidden = hidden if steps is None else select(hidden, steps)
        if labels is None or logits_to_keep is not None or self.logits_in_training or not self.training:
            logits = self._all_tokens(at_least_float32(self.output.output(hidden)))
        return self._returned(
            CausalLMOutputWithPast, batch, return_dict, loss=loss, logits=logits, hidden_states=layers
        )

    def _all_tokens(self, logits: Tensor) -> Tensor:
        """Logits (B, K, vocab_size), as transformers expects: -inf for tokens that the model reads but never predicts."""
        missing = self.config.vocab_size - logits.shape[-1]
        return logits if missing <= 0 else nn.functional.pad(logits, (0, missing), value=-math.inf)

    def _loss(self, hidden: Tensor, labels: Tensor, batch: Batch, num_items: int | Tensor | None) -> Tensor:
        op, config = type(self).__name__, self._megalodon.config
        if labels.shape != batch.shape:
            raise ValueError(f"{op}: `labels` must be {batch.shape} as the tokens, got {tuple(labels.shape)}.")
        targets = targets_of(op, labels, config.num_outputs, config.vocab_size, batch.present, batch.cu_seqlens)
        padding = batch.padding
        loss = self._megalodon._cross_entropy(
            hidden,
            (targets if padding is None else padding.shift(targets)).to(hidden.device),
            reduction="mean" if num_items is None else "sum",
            ignore_index=IGNORED,
            cu_seqlens=batch.cu_seqlens,
            lengths=None if padding is None else padding.lengths,
        )
        return loss if num_items is None else loss / num_items

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs
    ) -> dict[str, Any]:
        """The arguments of the next call of `generate`, during which nobody changes the model."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return {**inputs, "use_decoder": True}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *others, **options) -> None:
        """Refuses caches of other models' kinds; the first call makes the cache where the caller gives none."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"{type(self).__name__}: `cache_implementation` must be left out, got "
                f"{generation_config.cache_implementation!r}; a MegalodonCache has a constant size already."
            )
        generation_config.cache_implementation = None
        for name in ("cache", "past_key_values"):
            if isinstance(given := model_kwargs.get(name), MegalodonCache):
                given.renew()
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *others, **options)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _get_deprecated_gen_repo(self, generation_mode: GenerationMode, *others, **options) -> str | None:
        """Refuses what has to take tokens back, or runs code from elsewhere, before transformers asks for that code."""
        if generation_mode not in _MODES:
            raise ValueError(
                f"{type(self).__name__}: generation must be greedy, by sampling or by beams, got "
                f"{generation_mode.value.replace('_', ' ')}; its state cannot take tokens back."
            )
        return super()._get_deprecated_gen_repo(generation_mode, *others, **options)

"""`MegalodonForCausalLM` and `MegalodonModel`, for the Auto classes."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..inference.captured_step import hooked_module
from ..inference.quantized_layers import new_state
from ..model.blocks import at_least_float32
from ..public_models import Megalodon
from ..model.megalodon import Wanted
from ..model.model_state import CallOptions
from ..model.sequences import Sequences
from ..ops.common.definition import is_exporting
from .arguments import IGNORED, Batch, kept_positions, map_columns, read_batch, select, targets_of
from .cache import CACHE, MegalodonCache
from .configuration import MegalodonHFConfig
from .pretrained import CausalCore, MegalodonPreTrainedModel


class MegalodonCausalModel(MegalodonPreTrainedModel):
    """Base of both causal models: runs the layers piece by piece and updates the cache."""

    config_class = MegalodonHFConfig
    _core_class = Megalodon
    _trunk = ("embed", "layers", "output.final_norm")
    _keys_to_ignore_on_load_unexpected = [
        r"^(lm_head|output\.output)\.(weight|scale)$",
        r"^score\.",
    ]  # heads of other classes

    def _hidden(self, batch: Batch, positions: Tensor | None, whole: bool) -> Tensor:
        """Return the final norm's output (B, K, D) at `positions` (K,) or (B, K); None: at all positions.

        If the call returns a cache, update it or create one. Without gradients and hooks, and unless `whole`, the layers
        read one chunk of columns at a time, so that only the result grows with the number of tokens.
        """
        model, inputs = self.megalodon, batch.without_padding()
        length = inputs.shape[1]
        state = None if batch.cache is None else batch.cache.state
        if not batch.holds_embeddings:
            model._check(type(self).__name__, "input_ids", inputs, state, Sequences(batch.spans))
        if state is None and batch.returns_cache:
            state = new_state(model, len(inputs), inputs.device)
        size = model.config.chunk_size
        # An exported program has one piece, as its length may be unknown. A hook would see several pieces.
        whole = whole or torch.is_grad_enabled() or batch.is_packed or is_exporting()
        whole = whole or length <= size or hooked_module(self) is not None
        pieces, selected = [], None
        for begin in (0,) if whole else range(0, length, size):
            end = length if whole else min(begin + size, length)
            part = inputs[:, begin:end]
            piece, state = model._hidden(
                part * model.config.embedding_scale if batch.holds_embeddings else model._embed(part),
                CallOptions(
                    state,
                    return_state=batch.returns_cache or not (whole or end == length),
                    inplace_state=begin > 0,  # the first state is the caller's
                    sequences=Sequences(batch.spans_of(begin, end)),
                ),
            )
            if positions is None:
                pieces.append(piece)
            else:
                piece = select(piece, (positions - begin).clamp(0, end - begin - 1))
                selected = piece if selected is None else torch.where((positions >= begin)[..., None], piece, selected)
        if batch.returns_cache:
            batch.cache = MegalodonCache() if batch.cache is None else batch.cache
            batch.cache.advance(state, batch.shape[1])
        if positions is not None:
            return selected
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


class MegalodonModel(MegalodonCausalModel):
    """A MEGALODON language model without its output matrix: `AutoModel`.

    Example:
        >>> import torch, megalodon_ops.hf as hf
        >>> config = hf.MegalodonHFConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> hf.MegalodonModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    _prefix = ""

    def __init__(self, config: MegalodonHFConfig, core: Megalodon | None = None) -> None:
        super().__init__(config)
        if core is None:
            core = CausalCore(config.to_megalodon())
            del core.output.output
        self.embed, self.layers = core.embed, core.layers
        self.output = nn.ModuleDict({"final_norm": core.output.final_norm})
        self.__dict__["_core"] = core
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        batch: Batch | None = None,
        positions: Tensor | None = None,
        **arguments: Any,
    ) -> BaseModelOutputWithPast:
        """Return the final norm's output (B, L, D), zero at padding.

        Arguments are those of :meth:`MegalodonForCausalLM.forward`.

        A model with a head passes `batch`, the arguments that it has read, and `positions` for :meth:`_hidden`.
        """
        has_head = batch is not None
        if not has_head:
            batch = read_batch(self, input_ids, attention_mask, **arguments)
            positions = kept_positions("MegalodonModel", None, batch)
        with self._record_layers(output_hidden_states, batch) as layers:
            hidden = self._hidden(batch, positions, whole=layers is not None)
        hidden = hidden if has_head else batch.zero_padding(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, hidden_states=layers and tuple(layers), **{CACHE: batch.cache}
        )


class MegalodonForCausalLM(MegalodonCausalModel, GenerationMixin):
    """A MEGALODON language model: `AutoModelForCausalLM`.

    Folders name parameters as those of :class:`megalodon_ops.Megalodon` do, so each class reads the other's folders.
    `model.model` is the :class:`MegalodonModel` without the output matrix, `lm_head`. `model.megalodon` is a Megalodon
    that shares the modules; `from_megalodon` creates a model from a Megalodon.

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
    _head = {"output.output": "lm_head"}
    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}

    def __init__(self, config: MegalodonHFConfig) -> None:
        super().__init__(config)
        core = CausalCore(config.to_megalodon())
        self.model, self.lm_head = MegalodonModel(config, core), core.output.output
        self.post_init()

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
        """Return logits (B, K, vocab_size) of the next token at K positions, by default all, and the loss.

        Tokens that the model reads but never predicts, from `output_size` on, have the logit -inf.

        Args:
            input_ids: (B, L) integers.
            attention_mask: (B, L), or (B, past + L) with a cache: 1 for a token, 0 for padding, in arbitrary columns.
                The result is that of the row without its padding. Padding before and after the tokens stays in place:
                hooks see the call's columns. At padding, the logits are those of the token before it; before a row's
                first token in the call, they are arbitrary.
            position_ids: (B, L); a document begins where they do not increase by one from a column to the next. Their
                values are otherwise ignored.
            cache, past_key_values: two names of one argument, the past, which is updated in place.
            inputs_embeds: (B, L, D), from `get_input_embeddings()`, instead of `input_ids`.
            labels: (B, L), the tokens, which the call shifts. The loss ignores the label -100, padding, a document's
                first token and tokens without a logit.
            use_cache: return a cache even if none is given, at the cost of a chunk of keys and values. None: the
                configuration's `use_cache`, but False in training.
            output_hidden_states: also return `hidden_states`, num_layers + 1 tensors (B, L, D): the input of each layer
                and the final norm's output (:meth:`megalodon_ops.Megalodon.features`).
            logits_to_keep: return logits of the last n columns, or of the columns in a 1-D tensor; 0 or None: of all.
                The loss does not depend on this argument.
            cu_seq_lens_q: (S + 1,) offsets of documents in the flattened rows (B * L), each within one row. Then
                `position_ids` are ignored.
            num_items_in_batch: divides the summed loss, instead of the number of labels; Trainer passes it. If it is
                given without labels, Trainer computes a loss from the logits, so tokens that are never predicted share
                the probability e^-20 instead of 0.
            use_decoder: let the cache's :class:`megalodon_ops.Decoder` read a single token without gradients, for
                `generate`. Weights and modules must not change between such calls.
            others: `shift_labels` (B, L): the target of each token (labels already shifted), which takes
                precedence over `labels`. `seq_idx` (B, L), as `position_ids`: a document begins where it changes.
                Ignored, since no result depends on them: `token_type_ids`, `cache_position`, `cu_seq_lens_k`,
                `max_length_q`, `max_length_k`, `tokenizer`.

        Raises:
            ValueError: a mask that is not 2-D or not of 0 and 1; a document in two rows; `output_attentions`.
            TypeError: the cache is not a MegalodonCache; an unknown argument.
        """
        # Not a named parameter: Trainer expects each parameter with "label" in its name in every batch.
        shift_labels = others.pop("shift_labels", None)
        are_shifted = shift_labels is not None
        labels = shift_labels if are_shifted else labels
        arguments = (position_ids, cache, past_key_values, inputs_embeds, use_cache, output_attentions, cu_seq_lens_q)
        batch = read_batch(self, input_ids, attention_mask, *arguments, **others)
        positions = kept_positions("MegalodonForCausalLM", logits_to_keep, batch)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        loss = layers = None
        decodes = use_decoder and labels is None and batch.is_for_decoder
        if decodes and (batch.cache.undo or not output_hidden_states):  # `crop` needs a decoder
            if output_hidden_states:  # which the layers compute from a copy of the past
                past = dataclasses.replace(batch, cache=MegalodonCache(batch.cache.state), returns_cache=False)
                layers = self.model(output_hidden_states=True, batch=past, return_dict=True).hidden_states
            logits = self._decode(batch, positions)
        else:
            selects = labels is None and positions is not None and positions.shape[-1] < batch.width
            read = dict(batch=batch, positions=positions if selects else None, return_dict=True)
            output = self.model(output_hidden_states=output_hidden_states, **read)
            hidden, layers = output.last_hidden_state, output.hidden_states
            logits = map_columns(self.lm_head, hidden, None if selects else positions)
        if labels is not None:
            loss = self._loss(hidden, labels, are_shifted, batch, num_items_in_batch)
        logits = at_least_float32(logits)
        if (missing := self.config.vocab_size - logits.shape[-1]) > 0:
            lowest = logits.new_full((1,) * logits.dim(), -math.inf)  # for tokens that are never predicted
            if labels is None and num_items_in_batch is not None:
                lowest = logits.logsumexp(-1, keepdim=True) - 20 - math.log(missing)  # label smoothing sums logarithms
            logits = torch.cat([logits, lowest.expand(*logits.shape[:-1], missing)], dim=-1)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=layers, **{CACHE: batch.cache})

    def _decode(self, batch: Batch, positions: Tensor | None) -> Tensor:
        """Return logits (B, K, num_outputs) at `positions`, or at all of them, from the cache's decoder.

        The decoder reads tokens that may be removed or whose logits are wanted. The layers read those before them.
        """
        tokens, columns = batch.without_padding(), batch.cache.get_seq_length() + batch.shape[1]
        first, end = batch.token_columns
        begin = first
        if batch.cache.undo and positions is not None:
            begin = max(min(end - batch.cache.undo - 1, int(positions.min())), first)
        if begin > first:
            before = dict(inputs=tokens[:, :begin], spans=batch.spans_of(0, begin), present=None, columns=None)
            last = torch.tensor([begin - 1], device=tokens.device)
            self._hidden(dataclasses.replace(batch, **before, positions=None), last, whole=False)
        logits = batch.cache.decode(self.megalodon, tokens[:, begin:end], columns)
        if positions is None and logits.shape[1] < batch.width:
            positions = torch.arange(batch.width, device=tokens.device)
        return logits if positions is None else select(logits, (positions - begin).clamp(0, end - begin - 1))

    def _loss(
        self, hidden: Tensor, labels: Tensor, are_shifted: bool, batch: Batch, num_items: int | Tensor | None
    ) -> Tensor:
        targets = targets_of(type(self).__name__, labels, are_shifted, self.megalodon.config, batch)
        reduction = "mean" if num_items is None else "sum"
        wanted = Wanted(targets=targets.to(hidden.device), reduction=reduction, ignore_index=IGNORED)
        loss = self.megalodon._cross_entropy(hidden, wanted, Sequences(batch.spans))
        return loss if num_items is None else loss / num_items

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs
    ) -> dict[str, Any]:
        """Add `use_decoder` to the arguments of the next call, as the model does not change during `generate`."""
        cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
        if kwargs.get("next_sequence_length", 0) is None and cache is not None and mask is not None:
            # assisted generation would read the past of a given cache again
            kwargs["next_sequence_length"] = min(mask.shape[1] - cache.get_seq_length(), input_ids.shape[1])
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        # peft reads the cache by its old name; without it, peft would insert its virtual tokens again
        return {**inputs, "past_key_values": inputs.get(CACHE), "use_decoder": True}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *others, **options) -> None:
        """Create or check the cache. Raise if it has read the whole prompt, or if a row's last piece has no token."""
        mask = model_kwargs.get("attention_mask")  # transformers drops a mask without padding, and keeps its width
        width = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        past = undo = 0
        if others[:1] == (GenerationMode.ASSISTED_GENERATION,):
            undo = 1
        elif generation_config.is_assistant:
            # An assistant keeps its decoder in all rounds. In a round, it reads one or two and drafts max_new_tokens.
            undo = 2 * (generation_config.max_new_tokens + 1)
        names = ("cache", "past_key_values")
        for name in names:
            if isinstance(cache := model_kwargs.get(name), MegalodonCache):
                if not (generation_config.is_assistant and cache.undo > generation_config.max_new_tokens):
                    cache.renew(undo)
                past = cache.get_seq_length()
                if width is not None and width <= past:
                    raise ValueError(
                        f"{type(self).__name__}: `{name}` has read {past} tokens, got {width}; give "
                        "`generate` all tokens so far, or the new ones and an `attention_mask` over past and new ones."
                    )
        if mask is not None:
            piece = generation_config.prefill_chunk_size or width
            last = mask[:, past + (width - past - 1) // piece * piece :]
            if not bool(last.any(1).all()):
                raise ValueError(
                    f"{type(self).__name__}: `attention_mask` must have a token in every row of the last {last.shape[1]} "
                    "columns, which are read before the first new token, got a row without one; pad on the left."
                )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *others, **options)
        if generation_config.use_cache and all(model_kwargs.get(name) is None for name in names):
            model_kwargs[CACHE] = MegalodonCache()
            model_kwargs[CACHE].renew(undo)

    def init_continuous_batching(self, *arguments: Any, **options: Any) -> None:
        """Refuse `generate_batch`, which needs a paged cache of keys and values."""
        raise NotImplementedError(
            f"{type(self).__name__}: `generate_batch` must have a paged cache of keys and values, which a recurrent "
            "state is not; use `generate` with a batch of prompts."
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

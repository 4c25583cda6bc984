"""`MegalodonForCausalLM` and `MegalodonModel`: the modules of a `Megalodon` behind transformers' interface."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..model.blocks import NormalizedAttention
from ..model.layers import Embedding, Linear
from ..model.model import Megalodon, at_least_float32
from ..model.states import MegalodonState
from ..ops.values import check_integer, described
from .batches import IGNORED, Padding, current_mask, packing_of, padding_of, select, targets_of
from .cache import MegalodonCache
from .configuration import MegalodonHFConfig

_CACHE = next(
    field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values")
)
"""What transformers calls the cache: `cache` from 5.24 on, `past_key_values` before"""


@dataclasses.dataclass
class _Batch:
    """The arguments of one call, as the model's ops take them."""

    tokens: Tensor | None
    embeddings: Tensor | None
    cache: MegalodonCache | None
    returns_cache: bool
    present: Tensor | None
    """(B, L), or None without padding"""
    padding: Padding | None
    cu_seqlens: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple((self.tokens if self.embeddings is None else self.embeddings).shape[:2])

    def is_next_token(self) -> bool:
        """Whether this is a step of a generation, which a decoder can take."""
        begun = self.cache is not None and self.cache.is_initialized
        one = self.tokens is not None and self.tokens.shape[1] == 1 and self.padding is None
        return begun and one and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class MegalodonPreTrainedModel(PreTrainedModel):
    """What both models share: modules, weights, and how a call reads its tokens."""

    config_class = MegalodonHFConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _is_stateful = True
    _no_split_modules = ["MegalodonBlock"]
    _keep_in_fp32_modules_strict = ["timenorm", "cema", "rmsnorm", "norm", "final_norm", "gamma", "beta", "alpha"]

    def __init__(self, config: MegalodonHFConfig) -> None:
        super().__init__(config)
        if torch.get_default_dtype() not in (torch.bfloat16, torch.float16):
            self.dtype_plan = {}  # transformers 5.0 would load these parameters as float32 for a float64 model, too
        made = Megalodon(config.to_megalodon())
        self.embed, self.layers, self.output = made.embed, made.layers, made.output
        # The Megalodon that computes is no module of this one, but has its modules, whatever they become.
        made._modules = self._modules
        self.__dict__["_megalodon"] = made
        self.gradient_checkpointing = False
        if not self.embed.weight.is_meta:
            for module in self.modules():
                module._is_hf_initialized = True  # by its constructor

    @property
    def megalodon(self) -> Megalodon:
        """This model as a :class:`megalodon_ops.Megalodon` with the same modules, in which a change shows in both."""
        model = Megalodon.__new__(Megalodon)
        nn.Module.__init__(model)
        model.config, model.training = self.config.to_megalodon(), self.training
        model.embed, model.layers, model.output = self.embed, self.layers, self.output
        return model

    def train(self, mode: bool = True) -> MegalodonPreTrainedModel:
        super().train(mode)
        self._megalodon.training = mode
        return self

    @classmethod
    def from_megalodon(cls, model: Megalodon) -> MegalodonPreTrainedModel:
        """A model of transformers with the modules of `model`, not copies of them."""
        if not isinstance(model, Megalodon):
            raise TypeError(f"{cls.__name__}: `model` must be a Megalodon, got {described(model)}.")
        with torch.device("meta"):
            result = cls(MegalodonHFConfig.from_megalodon(model.config))
        result.config.dtype = model.embed.weight.dtype
        result._take(model)
        result.training = result._megalodon.training = model.training
        return result

    def _take(self, model: Megalodon) -> None:
        self.embed, self.layers, self.output = model.embed, model.layers, model.output

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises the parameters that a checkpoint lacks, and makes again what no checkpoint holds."""
        if type(module) is nn.Embedding:  # resize_token_embeddings has made it, and the output matrix below
            module.__class__ = Embedding
        elif type(module) is nn.Linear:
            module.__class__, module.of_tokens = Linear, True
        own = dict(module.named_parameters(recurse=False))
        loaded = {name: weight for name, weight in own.items() if getattr(weight, "_is_hf_initialized", False)}
        if len(loaded) < len(own):
            kept = {name: weight.clone() for name, weight in loaded.items()}
            module.reset_parameters()
            for name, weight in kept.items():
                own[name].copy_(weight)
        if isinstance(module, NormalizedAttention):
            module._keep_rotary()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        func = gradient_checkpointing_func
        options = func.keywords if isinstance(func, functools.partial) else {}
        plain = getattr(func, "func", func) is checkpoint and options in ({}, {"use_reentrant": False})
        if enable and not (plain and every_n_layers == 1):
            raise ValueError(
                f"{type(self).__name__}: gradient checkpointing recomputes every layer with use_reentrant=False; "
                "leave out other options."
            )
        self.gradient_checkpointing = enable
        self._configure()

    def _configure(self) -> None:
        """Gives the Megalodon that computes what the configuration and gradient checkpointing say now."""
        config = self.config.to_megalodon()
        self._megalodon.config = (
            dataclasses.replace(config, layerwise_ckpt=True) if self.gradient_checkpointing else config
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value

    def resize_token_embeddings(self, *args, **options) -> nn.Embedding:
        """As in transformers; the model then has as many logits as tokens."""
        embeddings = super().resize_token_embeddings(*args, **options)
        self.config.output_size = -1
        config = self.config.to_megalodon()
        for module in self.layers.modules():
            if hasattr(module, "config"):
                module.config = config
        self._configure()
        return embeddings

    def _read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: MegalodonCache | None,
        past_key_values: MegalodonCache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        **packing: Tensor | None,
    ) -> _Batch:
        op = type(self).__name__
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{op}: exactly one of `input_ids` and `inputs_embeds` must be given.")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(f"{op}: `output_attentions` must be False, as the kernels keep no attention weights.")
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            raise ValueError(f"{op}: `cache` and `past_key_values` are two names of one argument; give one of them.")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, MegalodonCache):
            raise TypeError(
                f"{op}: `{_CACHE}` must be a megalodon_ops.hf.MegalodonCache or None, got {described(cache)}; "
                "a state is no list of keys and values."
            )
        shape = tuple((input_ids if inputs_embeds is None else inputs_embeds).shape[:2])
        past = 0 if cache is None else cache.get_seq_length()
        if len(shape) == 2 and shape[1] == 0:
            raise ValueError(
                f"{op}: there must be a token, got {shape}; `generate` with a cache takes all tokens so far, or the new "
                "tokens and an `attention_mask` over the past ones and them."
            )
        present = current_mask(op, attention_mask, *shape, past)
        cu_seqlens = packing_of(op, shape, position_ids=position_ids, present=present, **packing)
        if cu_seqlens is not None and (cache is not None or use_cache):
            raise ValueError(f"{op}: packed documents end in the call, so there must be no cache.")
        padding = None if present is None else padding_of(op, present)
        if padding is not None and past and bool(((padding.lengths == 0) & (cache.state.norm.count > 0)).any()):
            raise ValueError(
                f"{op}: `attention_mask` must leave a token to every row that has begun, got a row without; "
                "cache.batch_select_indices(rows) goes on with some of the rows."
            )
        wanted = use_cache if use_cache is not None else self.config.use_cache and not self.training
        return _Batch(
            tokens=input_ids,
            embeddings=inputs_embeds,
            cache=cache,
            returns_cache=cache is not None or (wanted and cu_seqlens is None),
            present=present,
            padding=padding,
            cu_seqlens=cu_seqlens,
        )

    def _hidden(self, batch: _Batch, columns: Tensor | None) -> Tensor:
        """The normalized last layer of `columns` (K,), or of each row's columns (B, K): (B, K, D); None: of all steps.

        Updates the cache, making one if the call returns one. Padded rows are shifted, so that step i is token i of a
        row. Without gradients, the tokens are read in pieces of a chunk: memory does not grow with their number but for
        the result.
        """
        model, padding = self._megalodon, batch.padding
        tokens, embeddings = batch.tokens, batch.embeddings
        if padding is not None and embeddings is None:
            tokens = padding.shift(tokens)
        elif padding is not None:
            embeddings = padding.shift(embeddings)
        lengths = None if padding is None else padding.lengths
        cache = batch.cache
        state = None if cache is None else cache.state
        if tokens is not None:
            model._check(tokens, state, True, batch.cu_seqlens, lengths)

        def embed(begin: int, end: int) -> Tensor:
            if embeddings is None:
                return model._embed(tokens[:, begin:end])
            return embeddings[:, begin:end] * model.config.embedding_scale

        (_, length), chunk = batch.shape, model.config.chunk_size
        whole = torch.is_grad_enabled() or batch.cu_seqlens is not None or length <= chunk or self._records
        pieces, result = [], None
        for begin in range(0, length, length if whole else chunk):
            end = length if whole else min(begin + chunk, length)
            left = None if lengths is None else (lengths - begin).clamp(0, end - begin)
            is_own = begin > 0  # the first piece's state is the caller's
            piece, state = model._hidden(
                embed(begin, end),
                state,
                batch.returns_cache or not whole,
                is_own,
                cu_seqlens=batch.cu_seqlens,
                lengths=left,
            )
            if columns is None:
                pieces.append(piece)
                continue
            part = select(piece, (columns - begin).clamp(0, end - begin - 1))
            inside = ((columns >= begin) & (columns < end))[..., None]
            result = part if result is None else torch.where(inside, part, result)
        if batch.returns_cache:
            batch.cache = cache = MegalodonCache() if cache is None else cache
            cache.advance(state, length)
        return result if columns is not None else pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    _records = False

    @contextmanager
    def _recording(self, wanted: bool | None, batch: _Batch) -> Iterator[list[Tensor] | None]:
        """Collects what goes into the first layer and what each layer returns, in the columns of the call."""
        if not (self.config.output_hidden_states if wanted is None else wanted):
            yield None
            return
        found: list[Tensor] = []
        steps = None if batch.padding is None else batch.padding.steps(batch.shape[1])

        def keep(x: Tensor | tuple[Tensor, MegalodonState]) -> None:
            x = x[0] if isinstance(x, tuple) else x
            found.append(x if steps is None else select(x, steps))

        hooks = [self.layers[0].register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))]
        hooks += [layer.register_forward_hook(lambda *call: keep(call[-1])) for layer in self.layers]
        self._records = True
        try:
            yield found
        finally:
            self._records = False
            for hook in hooks:
                hook.remove()

    def _returned(self, kind: type, batch: _Batch, return_dict: bool | None, *, hidden_states=None, **fields):
        layers = None if hidden_states is None else tuple(hidden_states)
        output = kind(**fields, hidden_states=layers, **{_CACHE: batch.cache if batch.returns_cache else None})
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


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

    def _take(self, model: Megalodon) -> None:
        self.embed, self.layers = model.embed, model.layers
        self.output.final_norm = model.output.final_norm

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
        _check_others("MegalodonModel", others)
        batch = self._read(
            input_ids, attention_mask, position_ids, cache, past_key_values, inputs_embeds, use_cache, output_attentions,
            cu_seqlens=cu_seqlens, cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k, seq_idx=seq_idx,
        )  # fmt: skip
        with self._recording(output_hidden_states, batch) as layers:
            hidden = self._hidden(batch, None if batch.padding is None else batch.padding.steps(batch.shape[1]))
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
    _tied_weights_keys = {"output.output.weight": "embed.weight"}

    def __init__(self, config: MegalodonHFConfig) -> None:
        super().__init__(config)
        self.post_init()

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
            use_cache: whether to make a cache where there is none; None: as the configuration says, but not in training.
            output_hidden_states: also return the embeddings and what each layer returns.
            logits_to_keep: logits of the last n columns, or of the columns in a 1-D tensor; 0: of all. None: of all, but
                none in training with labels, where the loss is computed for a block of tokens at a time.
            cu_seqlens: (S + 1,) offsets of documents packed into one row; it counts before `cu_seq_lens_q`, `position_ids`
                and `seq_idx`, in which transformers' collators say the same.
            num_items_in_batch: divides the loss in place of the number of labels, as Trainer asks.
            others: what transformers gives every model: `tokenizer`, `cache_position`, `max_length_q`, `max_length_k`.

        Raises:
            ValueError: padding between the tokens of a row; a mask that is not 2-D; several documents in a row of several;
            attention weights asked for. TypeError: the cache is not a MegalodonCache; an unknown argument.
        """
        _check_others("MegalodonForCausalLM", others)
        batch = self._read(
            input_ids, attention_mask, position_ids, cache, past_key_values, inputs_embeds, use_cache, output_attentions,
            cu_seqlens=cu_seqlens, cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k, seq_idx=seq_idx,
        )  # fmt: skip
        columns = _columns(logits_to_keep, batch)
        with self._recording(output_hidden_states, batch) as layers:
            if batch.is_next_token() and labels is None and layers is None:
                logits = self._all_tokens(batch.cache.decode(self, batch.tokens))
                return self._returned(
                    CausalLMOutputWithPast, batch, return_dict, logits=logits if columns is None else logits[:, columns]
                )
            hidden = self._hidden(batch, columns if labels is None else None)
        loss = logits = None
        if labels is not None:
            loss = self._loss(hidden, labels, batch, num_items_in_batch)
            hidden = hidden if columns is None else select(hidden, columns)
        if labels is None or logits_to_keep is not None or not self.training:
            logits = self._all_tokens(at_least_float32(self.output.output(hidden)))
        return self._returned(
            CausalLMOutputWithPast, batch, return_dict, loss=loss, logits=logits, hidden_states=layers
        )

    def _all_tokens(self, logits: Tensor) -> Tensor:
        """Logits (B, K, vocab_size), as transformers expects: -inf for tokens that the model reads but never predicts."""
        missing = self.config.vocab_size - logits.shape[-1]
        return logits if missing <= 0 else nn.functional.pad(logits, (0, missing), value=-math.inf)

    def _loss(self, hidden: Tensor, labels: Tensor, batch: _Batch, num_items: int | Tensor | None) -> Tensor:
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


_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


_READ_BY_OTHERS = ("tokenizer", "cache_position", "max_length_q", "max_length_k")


def _check_others(op: str, others: dict) -> None:
    """Raises for an argument that other models read and that would change what this one computes, or that none reads."""
    for name, value in others.items():
        if name not in _READ_BY_OTHERS and value is not None:
            raise TypeError(f"{op}: unexpected argument `{name}`, got {described(value)}; leave it out.")


def _columns(logits_to_keep: int | Tensor | None, batch: _Batch) -> Tensor | None:
    """The steps whose logits are wanted: (K,) for all rows, (B, K) where rows are padded, None for all steps."""
    length = batch.shape[1]
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1 or logits_to_keep.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "MegalodonForCausalLM: `logits_to_keep` must be an integer or a 1-D tensor of integers, got "
                f"{logits_to_keep.dtype} {tuple(logits_to_keep.shape)}."
            )
        kept = torch.where(logits_to_keep < 0, logits_to_keep + length, logits_to_keep).long()
    elif logits_to_keep:
        most = check_integer("MegalodonForCausalLM", "logits_to_keep", logits_to_keep, "an integer of at least 0", 0)
        device = (batch.tokens if batch.embeddings is None else batch.embeddings).device
        kept = torch.arange(max(length - most, 0), length, device=device)
    else:
        kept = None
    if batch.padding is None:
        return kept
    steps = batch.padding.steps(length)
    return steps if kept is None else steps[:, kept]

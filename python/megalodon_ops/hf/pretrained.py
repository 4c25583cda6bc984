"""What `MegalodonForCausalLM` and `MegalodonModel` share: the modules of a `Megalodon` behind transformers' interface."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..model.blocks import NormalizedAttention
from ..model.layers import Embedding, Linear
from ..model.model import Megalodon
from ..model.states import MegalodonState
from ..ops.library import is_autocast_enabled
from .batches import Batch, select
from .cache import MegalodonCache
from .configuration import MegalodonHFConfig

CACHE = next(
    field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values")
)
"""What transformers calls the cache: `cache` from 5.24 on, `past_key_values` before"""


class MegalodonPreTrainedModel(PreTrainedModel):
    """What both models share: modules, weights, and how the layers run."""

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

    def train(self, mode: bool = True) -> MegalodonPreTrainedModel:
        super().train(mode)
        self._megalodon.training = mode
        return self

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

    def _hidden(self, batch: Batch, steps: Tensor | None, whole: bool) -> Tensor:
        """The normalized last layer of `steps` (K,), or of each row's steps (B, K): (B, K, D); None: of all steps.

        Updates the cache, making one if the call returns one. Padded rows are shifted, so that step i is token i of a
        row. Unless the layers need the `whole` batch at once, the tokens are read in pieces of a chunk where there are
        no gradients: memory grows with their number by the result alone.
        """
        model, padding = self._megalodon, batch.padding
        tokens, embeddings = batch.tokens, batch.embeddings
        if padding is not None and embeddings is None:
            tokens = padding.shift(tokens).masked_fill(padding.lengths[:, None] == 0, 0)  # padding may be no token
        elif padding is not None:
            embeddings = padding.shift(embeddings)
        lengths = None if padding is None else padding.lengths
        state = None if batch.cache is None else batch.cache.state
        if tokens is not None:
            model._check(tokens, state, True, batch.cu_seqlens, lengths)

        def embed(begin: int, end: int) -> Tensor:
            if embeddings is None:
                return model._embed(tokens[:, begin:end])
            return embeddings[:, begin:end] * model.config.embedding_scale

        (_, length), chunk = batch.shape, model.config.chunk_size
        whole = whole or torch.is_grad_enabled() or batch.cu_seqlens is not None or length <= chunk
        eager = torch.is_grad_enabled() or torch.compiler.is_compiling() or tokens is None or not whole
        keeps = batch.returns_cache and (batch.must_keep_state or eager)
        pieces, result = [], None
        for begin in range(0, length, length if whole else chunk):
            end = length if whole else min(begin + chunk, length)
            left = None if lengths is None else (lengths - begin).clamp(0, end - begin)
            piece, state = model._hidden(
                embed(begin, end),
                state,
                return_state=keeps or not whole,
                inplace_state=begin > 0,  # the first piece's state is the caller's
                cu_seqlens=batch.cu_seqlens,
                lengths=left,
            )
            if steps is None:
                pieces.append(piece)
            else:
                part = select(piece, (steps - begin).clamp(0, end - begin - 1))
                is_inside = ((steps >= begin) & (steps < end))[..., None]
                result = part if result is None else torch.where(is_inside, part, result)
        if batch.returns_cache:
            batch.cache = MegalodonCache() if batch.cache is None else batch.cache
            batch.cache.advance(state, length) if keeps else batch.cache.postpone(self._later(batch), length)
        if steps is not None:
            return result
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _later(self, batch: Batch) -> Callable[[], MegalodonState]:
        """What reads a batch again for its state, which takes memory for a whole chunk of each sequence."""
        again = dataclasses.replace(batch, tokens=batch.tokens.clone(), cache=None, must_keep_state=True)
        before = self._what_decides(batch.tokens.device.type)

        @torch.no_grad()
        def state() -> MegalodonState:
            if self._what_decides(batch.tokens.device.type) != before:
                raise RuntimeError(
                    f"{type(self).__name__}: the weights, the mode of training or autocast have changed since the call that "
                    "returned this cache; ask for the cache in that call, by use_cache=True."
                )
            self._hidden(again, torch.arange(0, device=again.tokens.device), whole=False)
            return again.cache.state

        return state

    def _what_decides(self, device: str) -> tuple:
        """What a state depends on besides the tokens, to be compared."""
        weights = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in self.parameters()]
        adapters = [  # PEFT's
            (
                layer.disable_adapters,
                tuple(layer.active_adapters),
                tuple(layer.merged_adapters),
                tuple(layer.scaling.items()),
            )
            for layer in self.modules()
            if hasattr(layer, "merged_adapters")
        ]
        autocast = is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return self.training, autocast, weights, adapters

    @contextmanager
    def _recording(self, wanted: bool | None, batch: Batch) -> Iterator[list[Tensor] | None]:
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
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def _returned(self, kind: type, batch: Batch, return_dict: bool | None, *, hidden_states=None, **fields):
        layers = None if hidden_states is None else tuple(hidden_states)
        output = kind(**fields, hidden_states=layers, **{CACHE: batch.cache if batch.returns_cache else None})
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

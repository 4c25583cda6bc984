"""What `MegalodonForCausalLM` and `MegalodonModel` share: the modules of a `Megalodon` behind transformers' interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..model.blocks import NormalizedAttention
from ..model.layers import Embedding, Linear
from ..model.model import Megalodon
from ..model.states import MegalodonState
from .batches import Batch, select
from .cache import MegalodonCache
from .configuration import MegalodonHFConfig

CACHE = next(
    field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values")
)
"""What transformers calls the cache: `cache` from 5.24 on, `past_key_values` before"""


class MegalodonPreTrainedModel(PreTrainedModel):
    """What both models share: modules, weights, and how the layers run.

    Attributes:
        megalodon: a :class:`megalodon_ops.Megalodon` with the same modules, in which a change shows in both.
    """

    config_class = MegalodonHFConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _input_embed_layer = "embed"
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
        self.__dict__["megalodon"] = made
        self.gradient_checkpointing = False
        if not self.embed.weight.is_meta:
            for module in self.modules():
                module._is_hf_initialized = True  # by its constructor

    def train(self, mode: bool = True) -> MegalodonPreTrainedModel:
        super().train(mode)
        self.megalodon.training = mode
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
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **_: Any
    ) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(f"{type(self).__name__}: gradient checkpointing must have use_reentrant=False, got True.")
        self.gradient_checkpointing = enable
        self._configure()

    def _configure(self) -> None:
        """Gives the Megalodon that computes what the configuration and gradient checkpointing say now."""
        config = self.config.to_megalodon()
        recomputes = config.layerwise_ckpt or self.gradient_checkpointing
        self.megalodon.config = dataclasses.replace(config, layerwise_ckpt=recomputes)

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
        model, given, lengths = self.megalodon, batch.given, None
        (_, length), state = batch.shape, None if batch.cache is None else batch.cache.state
        if batch.padding is not None:
            given, lengths = batch.padding.shift(given), batch.padding.lengths
        if batch.holds_tokens:
            if lengths is not None:
                given = given.masked_fill(lengths[:, None] == 0, 0)  # padding may be no token
            model._check(type(self).__name__, "input_ids", given, state, True, batch.cu_seqlens, lengths)
        whole = whole or torch.is_grad_enabled() or batch.cu_seqlens is not None
        size = length if whole else min(model.config.chunk_size, length)
        pieces, kept = [], None
        for begin in range(0, length, size):
            end = min(begin + size, length)
            part = given[:, begin:end]
            piece, state = model._hidden(
                model._embed(part) if batch.holds_tokens else part * model.config.embedding_scale,
                state,
                return_state=batch.returns_cache or end < length,
                inplace_state=begin > 0,  # the first piece's state is the caller's
                cu_seqlens=batch.cu_seqlens,
                lengths=None if lengths is None else (lengths - begin).clamp(0, end - begin),
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

    @contextmanager
    def _recording(self, wanted: bool | None, batch: Batch) -> Iterator[list[Tensor] | None]:
        """Collects what goes into each layer and the final norm's output, in the columns of the call, as other models do."""
        if not (self.config.output_hidden_states if wanted is None else wanted):
            yield None
            return
        found: list[Tensor] = []
        steps = None if batch.padding is None else batch.padding.steps()

        def keep(x: Tensor | tuple[Tensor, MegalodonState]) -> None:
            x = x[0] if isinstance(x, tuple) else x
            found.append(x if steps is None else select(x, steps))

        with ExitStack() as hooks:
            hooks.enter_context(self.layers[0].register_forward_pre_hook(lambda _, inputs: keep(inputs[0])))
            for module in (*self.layers[:-1], self.output.final_norm):
                hooks.enter_context(module.register_forward_hook(lambda *call: keep(call[-1])))
            yield found

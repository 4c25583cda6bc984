"""Base of all models: the modules of a `Megalodon` or `MegalodonEncoder` behind transformers' interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..model.blocks import MegalodonBlock, NormalizedAttention
from ..model.layers import Embedding, Linear
from ..model.encoder import MegalodonEncoder
from ..model.megalodon import Megalodon
from ..model.model_state import MegalodonState
from ..model.quantized_layers import computing_dtype
from ..ops.common.checks import describe
from .arguments import Batch, select
from .configuration import MegalodonHFConfig
from .quantizer import MegalodonQuantizationConfig, MegalodonQuantizer

# Programs find layers that a backward recomputes by their class (peft does for aLoRA). A block recomputes itself, so it
# inherits no method.
MegalodonBlock.__bases__ = (GradientCheckpointingLayer,)
MegalodonBlock.__call__, MegalodonBlock.__init_subclass__ = nn.Module.__call__, nn.Module.__init_subclass__


class MegalodonPreTrainedModel(PreTrainedModel):
    """Base of all models: modules and weights.

    Attributes:
        megalodon: a :class:`megalodon_ops.Megalodon` or MegalodonEncoder that shares this model's modules.
    """

    _ours: type[Megalodon] | type[MegalodonEncoder]
    _final_norm: str
    """Name of the module"""
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _input_embed_layer = "embed"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["MegalodonBlock"]
    _keep_in_fp32_modules_strict = ["timenorm", "cema", "rmsnorm", "norm", "final_norm", "gamma", "beta", "alpha"]

    def __init__(self, config: MegalodonHFConfig) -> None:
        super().__init__(config)
        if torch.get_default_dtype() not in (torch.bfloat16, torch.float16):
            self.dtype_plan = {}  # transformers 5.0 would load them as float32 even into a float64 model
        core = self._ours(config.to_megalodon())
        for name, module in core.named_children():
            self.add_module(name, module)
        # The core is no submodule, but shares the dictionary of modules, so replaced modules show in both.
        core._modules = self._modules
        self.__dict__["megalodon"] = core
        self.gradient_checkpointing = False
        if not self.embed.weight.is_meta:
            for module in self.modules():
                module._is_hf_initialized = True  # by the constructor

    @classmethod
    def from_megalodon(cls, model: Megalodon | MegalodonEncoder) -> MegalodonPreTrainedModel:
        """Create a model for transformers that shares the modules of `model`."""
        if not isinstance(model, cls._ours):
            raise TypeError(f"{cls.__name__}: `model` must be a {cls._ours.__name__}, got {describe(model)}.")
        quantization = getattr(model, "quantization", None)
        with torch.device("meta"):
            result = cls(cls.config_class.from_megalodon(model.config))
            if quantization:
                quantizer = MegalodonQuantizer(MegalodonQuantizationConfig(quantization), pre_quantized=True)
                quantizer.preprocess_model(result)
                quantizer.postprocess_model(result)
                result.hf_quantizer = quantizer
        for name in result._modules.keys() & model._modules.keys():
            setattr(result, name, model._modules[name])
        result.tie_weights()
        result.config.dtype = computing_dtype(model)
        result.training = result.megalodon.training = model.training
        return result

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations: a quantised model's first parameter, of which transformers asks, is a scale."""
        return computing_dtype(self) if getattr(self.megalodon, "quantization", None) else super().dtype

    def train(self, mode: bool = True) -> MegalodonPreTrainedModel:
        super().train(mode)
        self.megalodon.training = mode
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize parameters that a checkpoint lacks, and recompute the rotary angles, which none holds."""
        if type(module) is nn.Embedding:  # created by resize_token_embeddings, as is the output matrix below
            module.__class__ = Embedding
        elif type(module) is nn.Linear:
            Linear.give_methods(module, token_rows=True)
        own = dict(module.named_parameters(recurse=False))
        loaded = {name: weight for name, weight in own.items() if getattr(weight, "_is_hf_initialized", False)}
        if len(loaded) < len(own):
            saved = {name: weight.clone() for name, weight in loaded.items()}
            module.reset_parameters()
            for name, weight in saved.items():
                own[name].copy_(weight)
        if isinstance(module, NormalizedAttention):
            module._keep_rotary()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)
        for i, layer in enumerate(self.megalodon.layers):
            layer.gradient_checkpointing = enable and i % every_n_layers == 0
        self._configure()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *_: Any, **options: Any) -> str:
        """Accept transformers' usual choices, whose results are those of the package's kernels."""
        if attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                f'{type(self).__name__}: `attn_implementation` must be "eager" or "sdpa", got "{attn_implementation}"; leave '
                "it out, as attention is computed by the kernels of megalodon_ops."
            )
        return "eager"

    def _configure(self) -> None:
        """Update the core's configuration; gradient checkpointing, if enabled, replaces `layerwise_ckpt`."""
        config = self.config.to_megalodon()
        recomputes = config.layerwise_ckpt and not self.gradient_checkpointing
        self.megalodon.config = dataclasses.replace(config, layerwise_ckpt=recomputes)

    def resize_token_embeddings(self, *args, **options) -> nn.Embedding:
        """Resize as transformers does; the model then has as many logits as tokens."""
        embeddings = super().resize_token_embeddings(*args, **options)
        self.config.output_size = -1
        config = self.config.to_megalodon()
        for module in self.layers.modules():
            if hasattr(module, "config"):
                module.config = config
        self._configure()
        return embeddings

    @contextmanager
    def _record_layers(self, wanted: bool | None, batch: Batch) -> Iterator[list[Tensor] | None]:
        """Collect the inputs of the layers and the final norm's output, in the columns of the call."""
        if not (self.config.output_hidden_states if wanted is None else wanted):
            yield None
            return
        found: list[Tensor] = []
        positions = None if batch.padding is None else batch.padding.positions()

        def keep(x: Tensor | tuple[Tensor, MegalodonState]) -> None:
            x = x[0] if isinstance(x, tuple) else x
            found.append(x if positions is None else select(x, positions))

        with ExitStack() as hooks:
            hooks.enter_context(self.layers[0].register_forward_pre_hook(lambda _, inputs: keep(inputs[0])))
            for module in (*self.layers[:-1], self.get_submodule(self._final_norm)):
                hooks.enter_context(module.register_forward_hook(lambda *call: keep(call[-1])))
            yield found

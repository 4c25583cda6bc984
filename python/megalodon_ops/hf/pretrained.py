"""Base of all models: the modules of a `Megalodon` or `MegalodonEncoder` behind transformers' interface."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer

from ..model.blocks import MegalodonBlock, NormalizedAttention
from ..model.layers import Embedding, Linear
from ..public_models import Megalodon, MegalodonEncoder, shared_empty_model
from ..inference.quantized_layers import computing_dtype
from ..ops.common.checks import check_tensor, describe
from .arguments import Batch, select
from .configuration import MegalodonHFConfig
from .quantizer import MegalodonQuantizationConfig, MegalodonQuantizer


class _RecomputesItself:
    """Base that hides the methods by which transformers' layers, of different versions, recompute themselves."""

    __call__ = nn.Module.__call__

    def __init_subclass__(cls, **options: Any) -> None:
        pass


class MegalodonHFBlock(MegalodonBlock, _RecomputesItself, GradientCheckpointingLayer):
    """A block of the models in transformers; peft (for aLoRA) finds recomputed layers by their base class."""

    def checkpoint(self, function: Callable, x: Tensor) -> Tensor:
        """Recompute by the function that transformers, or a client after it, has set."""
        return self._gradient_checkpointing_func(function, x)


class CausalCore(Megalodon):
    """The :class:`Megalodon` of a model in transformers."""

    block_type = MegalodonHFBlock

    def _reference(self) -> Megalodon:
        return shared_empty_model(CausalCore, self.config, torch.float32, self.quantization, self.activations)


class EncoderCore(MegalodonEncoder):
    """The :class:`MegalodonEncoder` of a model in transformers."""

    block_type = MegalodonHFBlock


def _module_at(root: nn.Module, path: str) -> nn.Module:
    """Return a submodule; `get_submodule` takes ten times as long, too long for each decoded token."""
    for name in path.split("."):
        root = root._modules[name]
    return root


class MegalodonPreTrainedModel(PreTrainedModel):
    """Base of all models: modules and weights. A model with a head has the model without it as its module `model`."""

    _core_class: type[Megalodon] | type[MegalodonEncoder]
    """Class of the core, whose modules this model has; files name parameters as the core does"""
    _trunk: tuple[str, ...]
    """Names of the core's modules, without those of a head; the last one is the final norm"""
    _head: dict[str, str] = {}
    """Names of the head's modules: {name in the core: name in this model}"""
    _prefix = "model."
    """Prefix of the trunk's names in this model"""
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _input_embed_layer = "embed"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["MegalodonBlock", "MegalodonHFBlock"]
    _keep_in_fp32_modules_strict = ["timenorm", "cema", "rmsnorm", "norm", "final_norm", "gamma", "beta", "alpha"]

    def __init__(self, config: MegalodonHFConfig) -> None:
        super().__init__(config)
        if torch.get_default_dtype() not in (torch.bfloat16, torch.float16):
            self.dtype_plan = {}  # transformers 5.0 would load these modules as float32 even into a float64 model
        self.gradient_checkpointing = False

    def post_init(self) -> None:
        if not self.get_input_embeddings().weight.is_meta:
            for module in self.modules():
                module._is_hf_initialized = True  # by the constructor
        super().post_init()
        # from_pretrained sets this attribute, too; save_pretrained reverts the renamings
        self._weight_conversions = [WeightRenaming(file, own_name) for file, own_name in self._key_mapping().items()]

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **options: Any) -> Any:
        """Load a folder as transformers does, with parameters named as in the core."""
        return super().from_pretrained(*args, key_mapping={**cls._key_mapping(), **(key_mapping or {})}, **options)

    @classmethod
    def _key_mapping(cls) -> dict[str, str]:
        """Return beginnings of names that differ: {in files, as a regular expression: in this model}."""
        return {f"^{name}.": f"{own_name}." for name, own_name in cls._names().items() if name != own_name}

    @classmethod
    def _names(cls) -> dict[str, str]:
        """Return the modules' names: {in the core and in files: in this model}."""
        return {**{name: cls._prefix + name for name in cls._trunk}, **cls._head}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing, as :meth:`MegalodonHFConfig.register_for_auto_class`."""

    @property
    def megalodon(self) -> Megalodon | MegalodonEncoder:
        """A :class:`megalodon_ops.Megalodon` or MegalodonEncoder that shares this model's modules."""
        core = self.base_model._core  # no submodule: it would double the parameters
        for name, own_name in self._names().items():
            if _module_at(core, name) is not (module := _module_at(self, own_name)):  # replaced since the last call
                core.set_submodule(name, module)
        if core.config.num_layers != len(core.layers):  # layers were cut or stacked
            core.config = dataclasses.replace(core.config, num_layers=len(core.layers))
        return core

    @classmethod
    def from_megalodon(cls, model: Megalodon | MegalodonEncoder) -> MegalodonPreTrainedModel:
        """Create a model for transformers that shares the modules of `model`: those inside of its blocks, and others."""
        if not isinstance(model, cls._core_class):
            raise TypeError(f"{cls.__name__}: `model` must be a {cls._core_class.__name__}, got {describe(model)}.")
        quantization = getattr(model, "quantization", None)
        with torch.device("meta"):
            result = cls(cls.config_class.from_megalodon(model.config))
            if quantization:
                settings = MegalodonQuantizationConfig(quantization, model.activations)
                quantizer = MegalodonQuantizer(settings, pre_quantized=True)
                quantizer.preprocess_model(result)
                quantizer.postprocess_model(result)
                result.hf_quantizer = quantizer
        for name, own_name in cls._names().items():
            if name != "layers":
                result.set_submodule(own_name, model.get_submodule(name))
        for i, (block, own) in enumerate(zip(model.layers, layers := result.base_model.layers, strict=True)):
            if type(block) is MegalodonBlock and not (block._forward_hooks or block._forward_pre_hooks):
                for name in ("mega", "nffn", "training", "recompute"):
                    setattr(own, name, getattr(block, name))
            else:  # a block with hooks or of another class stays itself
                layers[i] = block
        result.tie_weights()
        result.config.dtype = computing_dtype(model)
        for module in (result, result.base_model, result.megalodon):
            module.training = model.training
        return result

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations; in a quantised model, transformers would return the dtype of a scale."""
        return computing_dtype(self.megalodon) if getattr(self.megalodon, "quantization", None) else super().dtype

    def train(self, mode: bool = True) -> MegalodonPreTrainedModel:
        super().train(mode)
        self.megalodon.training = mode
        return self

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **options: Any) -> Any:
        """Load tensors by their names in this model or, as Trainer does to resume, by their names in files."""
        for file, own_name in self._key_mapping().items():
            state_dict = {re.sub(file, own_name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **options)

    def mark_tied_weights_as_initialized(self, *loading_info: Any) -> None:
        """Keep tied weights that the file lacks among the missing keys: the constructor tied them, so both are marked."""
        tied = [set(pair) for pair in self.all_tied_weights_keys.items()]
        absent = [pair for info in loading_info for pair in tied if pair <= info.missing_keys]
        super().mark_tied_weights_as_initialized(*loading_info)
        for info in loading_info:  # transformers 5.0 passes none, and keeps them itself
            info.missing_keys.update(*absent)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize parameters that a checkpoint lacks, and recompute the rotary angles, which no checkpoint holds."""
        if type(module) is nn.Linear:  # created by resize_token_embeddings, as is the nn.Embedding below
            Linear.give_methods(module, token_rows=True)
        parameters = dict(module.named_parameters(recurse=False))
        loaded = {name: weight for name, weight in parameters.items() if getattr(weight, "_is_hf_initialized", False)}
        if len(loaded) < len(parameters):
            saved = {name: weight.clone() for name, weight in loaded.items()}
            if type(module) is nn.Embedding:
                Embedding.reset_parameters(module)
            else:
                module.reset_parameters()
            for name, weight in saved.items():
                parameters[name].copy_(weight)
        if isinstance(module, NormalizedAttention):
            module._update_rotary()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)
        for i, layer in enumerate(self.megalodon.layers):
            layer.gradient_checkpointing = enable and i % every_n_layers == 0
            own = getattr(layer, "checkpoint", gradient_checkpointing_func)
            replaced = own if layer.gradient_checkpointing else False
            layer.recompute = replaced if enable else self.config.layerwise_ckpt

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *_: Any, **options: Any) -> str:
        """Accept "eager" and "sdpa"; with both, the package's kernels compute attention."""
        if attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                f'{type(self).__name__}: `attn_implementation` must be "eager" or "sdpa", got "{attn_implementation}"; leave '
                "it out, as attention is computed by the kernels of megalodon_ops."
            )
        return "eager"

    def resize_token_embeddings(self, *args, **options) -> nn.Embedding:
        """Resize as transformers does; the model then has as many logits as tokens."""
        embeddings = super().resize_token_embeddings(*args, **options)
        self.config.output_size = -1
        config = self.config.to_megalodon()
        for module in self.megalodon.layers.modules():
            if hasattr(module, "config"):
                module.config = config
        self.megalodon.config = config
        return embeddings

    def _class_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of class logits (B, num_labels), as transformers chooses it."""
        op = type(self).__name__
        check_tensor(op, "labels", labels)
        if labels.shape[:1] != logits.shape[:1]:
            raise ValueError(f"{op}: `labels` must have {len(logits)} rows, got {tuple(labels.shape)}.")
        return self.loss_function(labels=labels, pooled_logits=logits, config=self.config)

    @contextmanager
    def _record_layers(self, wanted: bool | None, batch: Batch) -> Iterator[list[Tensor] | None]:
        """Collect the inputs of the layers and the final norm's output, each (B, L, D); the latter is zero at padding."""
        if not (self.config.output_hidden_states if wanted is None else wanted):
            yield None
            return
        recorded: list[Tensor] = []
        positions = batch.positions

        def keep(x: Tensor) -> None:
            recorded.append(x if positions is None else select(x, positions))

        with ExitStack() as hooks:
            hooks.enter_context(self.layers[0].register_forward_pre_hook(lambda _, inputs: keep(inputs[0])))
            for module in (*self.layers[:-1], self.get_submodule(self._trunk[-1])):
                hooks.enter_context(module.register_forward_hook(lambda *call: keep(call[-1])))
            yield recorded
        recorded[-1] = batch.zero_padding(recorded[-1])

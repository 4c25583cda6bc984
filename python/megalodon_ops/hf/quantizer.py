"""Folders with weights of 8 or 4 bits, as `from_pretrained` loads them."""

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..inference.quantized_layers import METHOD, replace_layers
from ..ops.quantized_linear.quantized_linear import check_activations, check_kind


@register_quantization_config(METHOD)
class MegalodonQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a folder; kind: "int8" or "int4"; activations: None or "int8"."""

    def __init__(self, kind: str, activations: str | None = None, **_: Any) -> None:
        check_kind("quantization_config", kind)
        check_activations("quantization_config", activations)
        self.quant_method, self.kind, self.activations = METHOD, kind, activations


@register_quantizer(METHOD)
class MegalodonQuantizer(HfQuantizer):
    """Puts quantised layers into a model before its weights are loaded."""

    requires_calibration = True  # `megalodon_ops.quantize` has quantised the weights; this class only loads them
    is_trainable = False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        core = model.megalodon
        replace_layers(core, self.quantization_config.kind, self.quantization_config.activations)
        for name, own_name in model._names().items():
            model.set_submodule(own_name, core.get_submodule(name))
        if model._tied_weights_keys and model.config.tie_word_embeddings:
            tied = model._tied_weights_keys.items()
            model._tied_weights_keys = {
                key.replace("weight", name): source.replace("weight", name)
                for key, source in tied
                for name in ("weight", "scale")
            }
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
        return model

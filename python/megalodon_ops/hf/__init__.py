"""Models for transformers; importing this module registers them with the Auto classes.

    import megalodon_ops.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)    # a folder of `Megalodon.save` or of `save_pretrained`

B batch, L length, D model dim.
"""

from .. import extras

_transformers = extras.load("transformers", "hf")

if int(_transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"needs transformers 5.0 or newer, got {_transformers.__version__}")

from transformers import AutoConfig, AutoModelForMultimodalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from ..storage.folder import AUTO_CLASSES
from .cache import MegalodonCache
from .causal_lm import MegalodonForCausalLM, MegalodonModel
from .classification import MegalodonEncoderForTokenClassification, MegalodonForSequenceClassification
from .classification import MegalodonForTokenClassification
from .configuration import MegalodonEncoderHFConfig, MegalodonHFConfig
from .encoder_models import MegalodonEncoderForMaskedLM, MegalodonEncoderForSequenceClassification
from .encoder_models import MegalodonEncoderModel

for _config in (MegalodonHFConfig, MegalodonEncoderHFConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoTokenizer.register(_config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
    for _auto, _name in AUTO_CLASSES[_config.model_type].items():
        if (_model := globals()[_name]) is not _config:
            getattr(_transformers, _auto).register(_config, _model, exist_ok=True)
# Trainer's label smoothing shifts labels only for models in the first table; `transformers serve` finds classes from
# outside of transformers only in the second.
for _names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    _names[MegalodonHFConfig.model_type] = MegalodonForCausalLM.__name__
AutoModelForMultimodalLM.register(MegalodonHFConfig, MegalodonForCausalLM, exist_ok=True)

__all__ = [
    "MegalodonCache",
    "MegalodonEncoderForMaskedLM",
    "MegalodonEncoderForSequenceClassification",
    "MegalodonEncoderForTokenClassification",
    "MegalodonEncoderHFConfig",
    "MegalodonEncoderModel",
    "MegalodonForCausalLM",
    "MegalodonForSequenceClassification",
    "MegalodonForTokenClassification",
    "MegalodonHFConfig",
    "MegalodonModel",
]

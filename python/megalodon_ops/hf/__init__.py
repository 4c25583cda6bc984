"""Models for transformers; importing this module registers them with the Auto classes.

    import megalodon_ops.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)    # a folder of `Megalodon.save` or of `save_pretrained`

B batch, L length, D model dim, as in the rest of the package.
"""

from .. import extras

_transformers = extras.load("transformers", "hf")

if int(_transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"needs transformers 5.0 or newer, got {_transformers.__version__}")

from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cache import MegalodonCache
from .configuration import MegalodonEncoderHFConfig, MegalodonHFConfig
from .encoder_models import MegalodonEncoderForMaskedLM, MegalodonEncoderForSequenceClassification
from .encoder_models import MegalodonEncoderModel
from .causal_lm import MegalodonForCausalLM, MegalodonModel

for _auto, _model in (
    (AutoModel, MegalodonModel),
    (AutoModelForCausalLM, MegalodonForCausalLM),
    (AutoModel, MegalodonEncoderModel),
    (AutoModelForSequenceClassification, MegalodonEncoderForSequenceClassification),
    (AutoModelForMaskedLM, MegalodonEncoderForMaskedLM),
):
    _auto.register(_model.config_class, _model, exist_ok=True)
# Trainer's label smoothing shifts labels only for models with these names.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MegalodonHFConfig.model_type] = MegalodonForCausalLM.__name__
for _config in (MegalodonHFConfig, MegalodonEncoderHFConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoTokenizer.register(_config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)

__all__ = [
    "MegalodonCache",
    "MegalodonEncoderForMaskedLM",
    "MegalodonEncoderForSequenceClassification",
    "MegalodonEncoderHFConfig",
    "MegalodonEncoderModel",
    "MegalodonForCausalLM",
    "MegalodonHFConfig",
    "MegalodonModel",
]

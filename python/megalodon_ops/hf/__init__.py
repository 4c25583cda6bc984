"""The model in transformers: importing this module registers it with the Auto classes.

    import megalodon_ops.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)    # a folder of `Megalodon.save` or of `save_pretrained`

B batch, L length, D model dim, as in the rest of the package.
"""

from .. import extras

_transformers = extras.load("transformers", "hf")

if int(_transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"needs transformers 5.0 or newer, got {_transformers.__version__}")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from .cache import MegalodonCache
from .configuration import MegalodonHFConfig
from .model import MegalodonForCausalLM, MegalodonModel

AutoConfig.register(MegalodonHFConfig.model_type, MegalodonHFConfig, exist_ok=True)
AutoModel.register(MegalodonHFConfig, MegalodonModel, exist_ok=True)
AutoModelForCausalLM.register(MegalodonHFConfig, MegalodonForCausalLM, exist_ok=True)
AutoTokenizer.register(MegalodonHFConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)

__all__ = ["MegalodonCache", "MegalodonForCausalLM", "MegalodonHFConfig", "MegalodonModel"]

"""Small random models of every class for transformers, each in a folder of the class's name with a tokenizer."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import megalodon_ops.hf as hf

SIZES = dict(num_layers=2, model_dim=32, z_dim=32, value_dim=32, num_heads=2, ffn_hidden_dim=64, cema_ndim=4)
SIZES |= dict(chunk_size=16, norm_num_groups=4, vocab_size=1024, pad_token_id=0)
CLASSES = [
    value for value in map(vars(hf).get, hf.__all__) if isinstance(value, type) and issubclass(value, PreTrainedModel)
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, after three special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}assistant: "
    return fast


def main() -> None:
    torch.manual_seed(0)
    for model_class in CLASSES:
        model = model_class(model_class.config_class(**SIZES, bos_token_id=1, eos_token_id=2))
        model.save_pretrained(model_class.__name__)
        tokenizer().save_pretrained(model_class.__name__)
    quotes = Path("ybelkada/english_quotes_copy")  # a data set of PEFT's tests
    quotes.mkdir(parents=True)
    rows = [json.dumps({"quote": "The quick brown fox jumps over the lazy dog. " * n}) for n in (1, 3, 2, 4) * 5]
    (quotes / "quotes.jsonl").write_text("\n".join(rows))


if __name__ == "__main__":
    main()

"""Folders with weights of 8 and 4 bits in transformers: loaded, generated from and saved as `Megalodon` does."""

import pytest
import torch

pytest.importorskip("transformers")
from hf_models import SIZES, VARIANTS, hf, transformers

import megalodon_ops as mo
from megalodon_ops.hf.cache import CACHE


def assert_greedy(model: mo.Megalodon, prompt: torch.Tensor, found: torch.Tensor, *, exact: bool) -> None:
    """Assert that 4 generated tokens are the model's greedy choice: their logits are the largest, up to bfloat16's rounding.

    If `exact`, `model.generate` gives the same tokens. In bfloat16 it may not, as it rounds in another order.
    """
    assert found.shape == (len(prompt), prompt.shape[1] + 4) and torch.equal(found[:, : prompt.shape[1]], prompt)
    logits = model(found[:, :-1])[:, prompt.shape[1] - 1 :]
    chosen = logits.gather(-1, found[:, prompt.shape[1] :, None])[..., 0]
    if exact:
        assert torch.equal(found, model.generate(prompt, max_new_tokens=4, temperature=0))
    assert (logits.amax(-1) - chosen).max() <= 2 * torch.finfo(torch.bfloat16).eps * logits.abs().max()


@pytest.mark.parametrize("kind, activations", [("int8", "int8"), ("int4", None)])
@pytest.mark.parametrize("variant", ["plain", "released"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loads_generates_and_saves(kind, activations, variant, dtype, tmp_path):
    config = mo.MegalodonConfig(**SIZES, **VARIANTS[variant])
    small = mo.quantize(mo.Megalodon(config).to(dtype), kind, activations)
    tokens = torch.randint(50, (6, 12))
    mask = torch.ones_like(tokens)
    logits = small(tokens)
    small.save(tmp_path / "ours")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded.dtype == loaded.config.dtype == dtype and loaded.megalodon.quantization == kind
    shared = hf.MegalodonForCausalLM.from_megalodon(small)
    for name, model in {"loaded": loaded, "shared": shared}.items():
        assert torch.equal(model(tokens).logits, logits)
        found = model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False)
        assert_greedy(small, tokens, found, exact=dtype == torch.float32)
        assert model(tokens, use_cache=True)[CACHE].state.cache_dtype == torch.int8
        model.save_pretrained(tmp_path / name)
        again = mo.Megalodon.load(tmp_path / name)
        assert torch.equal(again(tokens), logits) and again.quantization == kind and again.activations == activations
        assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits, logits)
    features = transformers.AutoModel.from_pretrained(tmp_path / "ours")(tokens).last_hidden_state
    assert torch.equal(features, small.features(tokens))


def test_generates_with_keys_and_values_of_8_bits():
    model = mo.Megalodon(mo.MegalodonConfig(**SIZES)).eval()
    fresh = mo.MegalodonState.fresh(model.config, 2, cache_dtype=torch.int8)
    tokens = torch.randint(50, (2, 12))
    options = dict(max_new_tokens=6, do_sample=False, **{CACHE: hf.MegalodonCache(fresh)})
    found = hf.MegalodonForCausalLM.from_megalodon(model).generate(tokens, **options)
    cache = options[CACHE]
    expected, state = model.generate(tokens, max_new_tokens=6, temperature=0, state=fresh, return_state=True)
    assert torch.equal(found, expected) and cache.state.cache_dtype == torch.int8
    for layer, own in zip(state.layers, cache.state.layers, strict=True):
        assert torch.equal(layer.attention.position, own.attention.position)


def test_weights_are_not_rounded_while_they_are_loaded(tmp_path):
    mo.Megalodon(mo.MegalodonConfig(**SIZES)).save(tmp_path)
    from megalodon_ops.hf.quantizer import MegalodonQuantizationConfig

    with pytest.raises(ValueError, match="megalodon_ops does require the model to be pre-quantized"):
        kind = MegalodonQuantizationConfig("int8")
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=kind)


def test_trainer_refuses(tmp_path):
    pytest.importorskip("accelerate")
    model = hf.MegalodonForCausalLM.from_megalodon(mo.quantize(mo.Megalodon(mo.MegalodonConfig(**SIZES)), "int8"))
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path), report_to=[]))

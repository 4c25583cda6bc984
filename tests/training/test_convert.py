"""`load_any`: load a model from a folder of any format, and save it in another."""

import pytest
import torch
from models import tiny_model, tokens_of

import megalodon_ops as mo
from megalodon_ops.tokenizers import ByteTokenizer, load_tokenizer
from megalodon_ops.training.run_checkpoint import load_any, save_checkpoint


def equal_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def model():
    return tiny_model(torch.float32, num_heads=4).eval()


@pytest.fixture(scope="module")
def sources(model, tmp_path_factory):
    """The model in a folder of each format."""
    root = tmp_path_factory.mktemp("sources")
    model.save(root / "own", tokenizer=ByteTokenizer())
    mo.save_official(model, root / "official", tokenizer=ByteTokenizer())
    save_checkpoint(root / "run", 3, model, tokenizer=ByteTokenizer())
    (root / "step").symlink_to(next((root / "run" / "checkpoints").iterdir()))
    return root


@pytest.mark.parametrize("source", ["own", "official", "run", "step"])
def test_load_any_and_save(sources, source, model, tmp_path):
    loaded, tokenizer, record = load_any(sources / source)
    assert equal_weights(loaded, model) and not loaded.training and tokenizer.vocab_size == 257
    assert (record and record["step"]) == (3 if source in ("run", "step") else None)
    assert load_any(sources / source, dtype=torch.bfloat16)[0].embed.weight.dtype == torch.bfloat16
    loaded.save(tmp_path / "own", tokenizer=tokenizer)
    mo.save_official(loaded, tmp_path / "official", tokenizer=tokenizer)
    for read, folder in ((mo.Megalodon.load, tmp_path / "own"), (mo.load_official, tmp_path / "official")):
        again = read(folder)
        assert equal_weights(again, model) and torch.equal(again(tokens_of(1, 9)), model(tokens_of(1, 9)))
        assert load_tokenizer(folder).vocab_size == 257

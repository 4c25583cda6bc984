"""`train --init-from`: a new run that starts from a model's weights, and flags that contradict the model."""

import pytest
import torch
from command_line import TINY, assert_refused, error_of, evaluated_bits, output, refusals, rows
from models import TINY as TINY_SIZES

import megalodon_ops as mo
from megalodon_ops.cli import main
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer
from megalodon_ops.training import load_checkpoint

pytestmark = pytest.mark.usefixtures("quick")

COMMAND = "train --init-from {source} --data {text} --out {out} --batch 3 --length 24 --steps 2"


def init(source, data, out, *flags):
    return main([*(word.format(source=source, text=data, out=out) for word in COMMAND.split()), *map(str, flags)])


def first_weights(run):
    """The weights before the first step."""
    return dict(mo.Megalodon.load(run / "checkpoints/step-00000000").named_parameters())


def test_a_run_starts_from_the_weights_with_other_data_optimizer_and_rate(finished, tmp_path):
    (tmp_path / "other.txt").write_text("to be or not to be, that is the question. " * 50)
    flags = ("--optimizer", "muon", "--lr", 0.002, "--dropout", 0.1, "--layerwise-ckpt")
    assert init(finished, tmp_path / "other.txt", tmp_path / "run", *flags, "--checkpoint-every", 2) == 0
    wanted, found = load_checkpoint(finished), load_checkpoint(tmp_path / "run")
    model = mo.Megalodon(wanted.config)
    wanted.load_weights(model)
    torch.testing.assert_close(first_weights(tmp_path / "run"), dict(model.named_parameters()), rtol=0, atol=0)
    assert found.record["optimizer"] == "Muon" and found.config.dropout == 0.1 and found.config.layerwise_ckpt
    assert found.config.model_dim == wanted.config.model_dim == 32

    # The run needs its source no more, and its options file repeats it.
    options = ["--config", str(tmp_path / "run" / "options.json")]
    assert main(["train", *options, "--out", str(tmp_path / "again")]) == 0
    assert rows(tmp_path / "again") == rows(tmp_path / "run")
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--steps", "3"]) == 0


@pytest.mark.parametrize("kind", ["own", "bfloat16", "released", "best"])
def test_every_kind_of_folder(finished, text, tmp_path, kind):
    source = tmp_path / kind
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = mo.Megalodon(mo.MegalodonConfig(**TINY_SIZES | {"vocab_size": 257})).to(dtype)
    if kind == "released":
        mo.save_official(model, source, tokenizer=ByteTokenizer())
    elif kind == "best":
        source = finished / "best"
        model = mo.Megalodon.load(source)
    else:
        model.save(source)  # without a tokenizer: bytes
    assert init(source, text, tmp_path / "run") == 0
    wanted = {name: parameter.float() for name, parameter in model.named_parameters()}
    torch.testing.assert_close(first_weights(tmp_path / "run"), wanted, rtol=0, atol=0)


WRONG = """
    --dim 64 => --dim: the model in {source} has 32, got 64; leave the flag out
    --preset small => --preset: the model in {source} has a configuration of its own, got small; leave
    --no-end-token => --end-token: the model in {source} has True, got False; leave the flag out
    --share-emb => --share-emb: the model in {source} has False, got True; leave the flag out
    --tokenizer {bpe} => --tokenizer: has another tokenizer than the model in {source}
    --init-from {bpe} => --init-from {bpe}:
    --resume --out {source} => --init-from: the run in {source} has None, got {source}; leave
"""


@refusals(WRONG)
def test_contradictions_are_refused_by_name(finished, text, tmp_path, command, words, capsys):
    pytest.importorskip("tokenizers")
    bpe = tmp_path / "bpe.json"
    bpe.write_bytes(Tokenizer.train([b"to be or not to be, that is the question. " * 20], vocab_size=300).content)
    paths = dict(source=finished, text=text, out=tmp_path / "run", bpe=bpe)
    assert_refused(capsys, f"{COMMAND} {command}", words, **paths)
    assert not (tmp_path / "run").exists()


def test_models_that_no_text_trains_are_refused(finished, text, tmp_path, capsys):
    sizes = dict(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32)
    models = {
        "has int8 weights": mo.quantize(mo.Megalodon(mo.MegalodonConfig(**sizes, vocab_size=257)), "int8"),
        "reads numbers, not text": mo.Megalodon(mo.MegalodonConfig(**sizes, num_features=1)),
    }
    for message, model in models.items():
        model.save(tmp_path / message)
        assert init(tmp_path / message, text, tmp_path / "run") == 2
        assert f"the model {message}; name one" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_flags_that_agree_are_taken(finished, text, tmp_path):
    assert init(finished, text, tmp_path / "run", "--dim", 32, "--layers", 2, "--end-token") == 0


def test_validation_is_evaluated_and_not_trained_on(text, tmp_path, capsys):
    held_out = text / "3.py"
    flags = ["--data", str(text), "--validation", str(held_out), "--out", str(tmp_path / "run"), *TINY, "--steps", "2"]
    out = output(capsys, "train", *flags)
    assert " in 39 documents to learn from" in out and f", {held_out.stat().st_size:,} in 1 held out" in out
    last = rows(tmp_path / "run")[-1]["held_out_bits_per_byte"]
    assert evaluated_bits(capsys, "--checkpoint", tmp_path / "run") == pytest.approx(last, abs=2e-4)
    resume = ["train", "--out", tmp_path / "run", "--resume", "--validation", text / "4.py"]
    assert "the text is not the one" in error_of(capsys, *resume)
    wrong = error_of(capsys, "train", "--data", held_out, "--validation", held_out, "--out", tmp_path / "no")
    assert f"{held_out}: must have a document that is not in --validation" in wrong

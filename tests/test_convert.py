"""`convert`: checkpoints of one format in another."""

import pytest
import torch
from models import tiny_model, tokens_of

import megalodon_ops as mo
from megalodon_ops.cli import main
from megalodon_ops.tokenizers import ByteTokenizer, load_tokenizer
from megalodon_ops.training.checkpoint import load_any, save_checkpoint


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def model():
    return tiny_model(torch.float32, num_heads=4).eval()


@pytest.fixture(scope="module")
def sources(model, tmp_path_factory):
    """Every kind of folder that is read, with the model in it."""
    root = tmp_path_factory.mktemp("sources")
    model.save(root / "own", tokenizer=ByteTokenizer())
    mo.save_official(model, root / "official", shards=2, tokenizer=ByteTokenizer())
    save_checkpoint(root / "run", 3, model, tokenizer=ByteTokenizer())
    (root / "step").symlink_to(next((root / "run" / "checkpoints").iterdir()))
    return root


@pytest.mark.parametrize("source", ["own", "official", "run", "step"])
def test_load_any(sources, source, model):
    loaded, tokenizer, record = load_any(sources / source)
    assert same(loaded, model) and not loaded.training and tokenizer.vocab_size == 257
    assert (record and record["step"]) == (3 if source in ("run", "step") else None)
    assert load_any(sources / source, dtype=torch.bfloat16)[0].embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("source", ["own", "official", "run"])
@pytest.mark.parametrize("to", ["own", "hf", "official"])
def test_weights_and_tokenizer_go_along(sources, source, to, model, tmp_path, capsys):
    flags = ["--from", "official" if source == "official" else "own", "--to", to]
    assert main(["convert", *flags, str(sources / source), str(tmp_path / "m")]) == 0
    load = mo.load_official if to == "official" else mo.Megalodon.load
    assert same(load(tmp_path / "m"), model)
    assert torch.equal(load(tmp_path / "m")(tokens_of(1, 9)), model(tokens_of(1, 9)))
    assert load_tokenizer(tmp_path / "m").vocab_size == 257
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}/m: {model.num_parameters():,} parameters, float32, read by ")


def test_dtype_and_shards(sources, model, tmp_path):
    flags = ["--from", "own", "--to", "official", "--shards", "4", "--dtype", "bfloat16"]
    assert main(["convert", *flags, str(sources / "own"), str(tmp_path / "m")]) == 0
    assert len(list((tmp_path / "m").glob("consolidated.0*.pth"))) == 4
    assert same(
        mo.load_official(tmp_path / "m", dtype=torch.bfloat16), tiny_model(torch.float32, num_heads=4).bfloat16()
    )


ERRORS = {
    "no folder": (["--from", "own", "--to", "own", "{tmp}/none", "{tmp}/m"], "{tmp}/none: no such folder"),
    "no official": (["--from", "official", "--to", "own", "{own}", "{tmp}/m"], "holds no consolidated.pth, so the released code did not write it; try --from own"),
    "official as own": (["--from", "own", "--to", "own", "{official}", "{tmp}/m"], "--from official reads it"),
    "exists": (["--from", "own", "--to", "official", "{own}", "{own}"], "{own}: exists; name a new folder"),
    "shards of own": (["--from", "own", "--to", "own", "--shards", "2", "{own}", "{tmp}/m"], "--shards: only the released format"),
    "too many shards": (["--from", "own", "--to", "official", "--shards", "3", "{own}", "{tmp}/m"], "`shards` must divide num_heads = 4, got 3"),
    "float64": (["--from", "own", "--to", "official", "--dtype", "float64", "{own}", "{tmp}/m"], "got torch.float64"),
    "no format": (["--from", "gguf", "--to", "own", "{own}", "{tmp}/m"], "argument --from: invalid choice"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_faults_are_one_line_and_write_nothing(name, sources, tmp_path, capsys):
    arguments, message = ERRORS[name]

    def fill(word):
        return word.format(tmp=tmp_path, own=sources / "own", official=sources / "official")

    try:
        code = main(["convert", *map(fill, arguments)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and fill(message) in err
    assert not list(tmp_path.iterdir())

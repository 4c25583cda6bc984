"""`eval --checkpoint` with model folders of every format, on bytes and on tokens."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from command_line import error_of, output
from models import tiny_model
from released import save_released

from megalodon_ops import Megalodon
from megalodon_ops.cli import main
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def book(text, tmp_path_factory):
    """One document of 2,000 bytes with a multi-byte letter, and no newline at its end."""
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_bytes("é".encode() + (text / "4.py").read_bytes() * 3 + b" end")
    return path


@pytest.fixture(scope="module")
def bpe(text, tmp_path_factory):
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bpe")
    Tokenizer.train((path.read_bytes() for path in sorted(text.glob("1*.py"))), vocab_size=300).save(folder)
    return folder


def model_of(tokenizer: Tokenizer, **overrides) -> Megalodon:
    return tiny_model(torch.float32, **{"vocab_size": tokenizer.vocab_size, **overrides}).eval()


def naive_nats(model: Megalodon, tokenizer: Tokenizer, text: bytes, context: int) -> float:
    ids = torch.tensor([tokenizer.start, *tokenizer.encode(text).tolist()])
    nats = 0.0
    with torch.no_grad():
        for inputs, targets in zip(ids[:-1].split(context), ids[1:].split(context), strict=True):
            nats += F.cross_entropy(model(inputs[None])[0].double(), targets, reduction="sum").item()
    return nats


def figures(capsys, tmp_path, *flags) -> dict:
    file = tmp_path / "figures.json"
    assert main(["eval", "--context", "50", "all", "--json", str(file), *map(str, flags)]) == 0
    assert "step" not in capsys.readouterr().out
    fifty, whole = json.loads(file.read_text())["contexts"]
    return {"50": fifty, "all": whole}


def assert_figures(found: dict, model: Megalodon, tokenizer: Tokenizer, text: bytes, rel: float = 1e-5) -> None:
    for name, context in (("50", 50), ("all", len(text) + 1)):
        nats = naive_nats(model, tokenizer, text, context)
        assert found[name]["nats"] == pytest.approx(nats, rel=rel)
        assert found[name]["num_bytes"] == len(text) and found[name]["tokens"] == len(tokenizer.encode(text))
        assert found[name]["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=rel)
        assert found[name]["perplexity"] == pytest.approx(math.exp(nats / found[name]["tokens"]), rel=rel)


def test_our_folder(book, tmp_path, capsys):
    model = model_of(ByteTokenizer())
    model.save(tmp_path / "own", tokenizer=ByteTokenizer())
    found = figures(capsys, tmp_path, "--checkpoint", tmp_path / "own", "--data", book)
    assert_figures(found, model, ByteTokenizer(), book.read_bytes())
    ended = figures(capsys, tmp_path, "--checkpoint", tmp_path / "own", "--data", book, "--end-token")["all"]
    with torch.no_grad():
        last = model(torch.tensor([[256, *book.read_bytes()]]))[0, -1].log_softmax(-1)[256].item()
    assert ended["nats"] == pytest.approx(found["all"]["nats"] - last, rel=1e-5)
    assert (ended["tokens"], ended["num_bytes"]) == (found["all"]["tokens"] + 1, found["all"]["num_bytes"])


def test_our_folder_on_tokens(book, bpe, tmp_path, capsys):
    """Bits per byte are over the bytes of the text, not over the tokens."""
    tokenizer = Tokenizer.from_file(bpe / "tokenizer.json")
    model = model_of(tokenizer)
    model.save(tmp_path / "own", tokenizer=tokenizer)
    found = figures(capsys, tmp_path, "--checkpoint", tmp_path / "own", "--data", book)
    assert found["all"]["tokens"] < 0.9 * found["all"]["num_bytes"]
    assert_figures(found, model, tokenizer, book.read_bytes())
    line = output(capsys, "eval", "--checkpoint", tmp_path / "own", "--data", book).splitlines()[-1]
    whole = found["all"]
    assert line == (
        f"{whole['bits_per_byte']:.4f} bits per byte, perplexity {whole['perplexity_per_byte']:.4f} per byte, "
        f"{whole['perplexity']:.4f} per token"
    )


def test_a_released_folder(book, bpe, tmp_path, capsys):
    tokenizer = Tokenizer.from_file(bpe / "tokenizer.json")
    model, folder = model_of(tokenizer), tmp_path / "released"
    folder.mkdir()
    save_released(model, folder, 2)
    found = figures(capsys, tmp_path, "--checkpoint", folder, "--data", book, "--tokenizer", bpe)
    assert_figures(found, model, tokenizer, book.read_bytes())
    assert "--tokenizer" in error_of(capsys, "eval", "--checkpoint", folder, "--data", book)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers, depending on the version
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_folder_of_transformers(book, tmp_path, capsys):
    hf = pytest.importorskip("megalodon_ops.hf", exc_type=ImportError)
    model, folder = model_of(ByteTokenizer()), tmp_path / "transformers"
    model.save(tmp_path / "own")
    hf.MegalodonForCausalLM.from_pretrained(tmp_path / "own").save_pretrained(folder)
    ByteTokenizer().save(folder)
    found = figures(capsys, tmp_path, "--checkpoint", folder, "--data", book)
    assert_figures(found, model, ByteTokenizer(), book.read_bytes())


def test_the_precision_is_the_folders_or_the_flags(book, tmp_path, capsys):
    model = model_of(ByteTokenizer()).to(torch.bfloat16)
    model.save(tmp_path / "own", tokenizer=ByteTokenizer())
    options = ["--checkpoint", tmp_path / "own", "--data", book]
    short = figures(capsys, tmp_path, *options)
    wide = figures(capsys, tmp_path, *options, "--dtype", "float32")
    assert_figures(wide, model.float(), ByteTokenizer(), book.read_bytes())
    assert_figures(short, model, ByteTokenizer(), book.read_bytes(), rel=0.02)
    assert short["all"]["nats"] != wide["all"]["nats"]


@pytest.mark.parametrize(
    ("overrides", "flags", "message"),
    [
        ({}, [], "give --data"),
        ({"vocab_size": 256, "output_size": 256}, ["--data", "{book}"], "257 ids, and the model knows 256"),
        ({"output_size": 90}, ["--data", "{book}"], "`targets` must be in [0, 90)"),
    ],
)
def test_models_that_cannot_be_evaluated_are_reported_in_one_line(book, tmp_path, capsys, overrides, flags, message):
    model_of(ByteTokenizer(), **overrides).save(tmp_path / "own", tokenizer=ByteTokenizer())
    flags = (flag.format(book=book) for flag in flags)
    line = error_of(capsys, "eval", "--checkpoint", tmp_path / "own", *flags, has_bar=True, prints=True)
    assert line.startswith("megalodon_ops eval: error: ") and message in line

"""`tokenizer`, and `train`, `eval` and `generate` on tokens."""

import dataclasses
import json
import math
import re
import shutil
import sys

import pytest
import torch
from command_line import assert_refused, error_of, evaluated_bits, output, quick_commands, refusals, rows, train
from released import save_released

import megalodon_ops as mo
from megalodon_ops.cli import main
from megalodon_ops.cli.data import load_corpus
from megalodon_ops.cli.models import trained_model
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from megalodon_ops.training import Batches, load_checkpoint, save_checkpoint

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("quick")
SIZE = 400


@pytest.fixture(scope="module")
def bpe(text, tmp_path_factory):
    """The file of a BPE of 400 ids."""
    path = tmp_path_factory.mktemp("bpe") / "new" / "bpe.json"
    assert main(["tokenizer", "--train", "--vocab-size", str(SIZE), "--out", str(path), str(text)]) == 0
    return path


@pytest.fixture(scope="module")
def run(text, bpe, tmp_path_factory):
    """A run of 40 steps on its tokens."""
    out = tmp_path_factory.mktemp("tokens") / "run"
    with quick_commands():
        assert train(text, out, "--steps", 40, "--eval-every", 20, "--tokenizer", bpe) == 0
    return out


def test_a_trained_tokenizer(text, bpe, tmp_path, capsys):
    out = output(capsys, "tokenizer", "--train", "--vocab-size", 300, "--out", tmp_path / "bpe.json", text)
    assert re.search(r"bpe.json: 300 ids, from 19,\d{3} bytes of text in [\d.]+ s\n", out)
    assert re.search(r"held-out text: \d+ documents, [\d,]+ bytes, [\d,]+ tokens: 1\.\d{3} bytes a token\n", out)
    tokenizer = Tokenizer.from_file(bpe)
    assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (SIZE, SIZE - 1, SIZE - 1)
    learned = Tokenizer.train(load_corpus([text]).train, vocab_size=SIZE)
    assert learned.fingerprint == tokenizer.fingerprint, "it learns from the same text as `train`"


def test_a_tokenizer_is_measured_on_text(text, bpe, tmp_path, capsys):
    out = output(capsys, "tokenizer", "--tokenizer", bpe, text / "0.py", text / "1.py")
    assert out.startswith(f"{bpe}: 400 ids; 399, <|startoftext|>, opens a document, and ends it\n")
    assert re.search(r"the text: 2 documents, 1,000 bytes, \d+ tokens: [12]\.\d{3} bytes a token\n$", out)
    ByteTokenizer().save(tmp_path)
    out = output(capsys, "tokenizer", "--tokenizer", tmp_path, text / "0.py", text / "1.py")
    assert "1,000 tokens: 1.000 bytes a token" in out


def test_a_run_over_tokens_reports_bits_per_byte(run, bpe, text):
    curve = [row for row in rows(run) if "loss" in row]
    corpus = load_corpus([text])
    tokenizer = load_tokenizer(bpe)
    per_token = sum(map(len, corpus.train)) / sum(len(ids) + 1 for ids in tokenizer.encode_batch(corpus.train))
    assert per_token > 1.3
    for row in curve:
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2) / per_token)
    assert sum(row["bits_per_byte"] for row in curve[-5:]) / 5 < curve[0]["bits_per_byte"] - 0.5
    steps, batch, length = 40, 3, 24  # as `run` and command_line.TINY say
    assert (curve[-1]["step"], curve[-1]["tokens"]) == (steps, steps * batch * length)
    held_out = [row["held_out_bits_per_byte"] for row in rows(run) if "held_out_bits_per_byte" in row]
    assert 1 < held_out[-1] < held_out[0] < 8
    folder = load_checkpoint(run).folder
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint, "the checkpoint holds the tokenizer"
    assert (folder / "tokenizer.json").read_bytes() == bpe.read_bytes()


def test_arguments_of_batches(text, bpe, tmp_path, monkeypatch):
    given = {}

    def batches(documents, *shape, **options):
        given.update(options, documents=documents)
        return Batches(documents, *shape, **options)

    monkeypatch.setattr("megalodon_ops.cli.train.Batches", batches)
    assert train(text, tmp_path / "run", "--steps", 1, "--tokenizer", bpe) == 0
    tokenizer, corpus = load_tokenizer(bpe), load_corpus([text])
    assert (given["start"], given["context_length"], given["seed"]) == (tokenizer.start, 192, 0)
    assert [tokenizer.decode(ids) for ids in given["documents"]] == corpus.train and given["end"] == tokenizer.end
    assert train(text, tmp_path / "bytes", "--steps", 1) == 0
    assert (given["start"], given["end"], given["documents"]) == (256, 256, corpus.train)


def test_a_run_without_end_tokens_resumes_without(text, tmp_path, monkeypatch):
    ends = []

    def batches(*arguments, end, **options):
        ends.append(end)
        return Batches(*arguments, end=end, **options)

    monkeypatch.setattr("megalodon_ops.cli.train.Batches", batches)
    assert train(text, tmp_path, "--steps", 1, "--no-end-token") == 0
    assert main(["train", "--out", str(tmp_path), "--resume", "--steps", "2"]) == 0
    assert ends == [None, None] and load_checkpoint(tmp_path).config.eos_token_id is None


def test_eval_repeats_the_end_of_training(run, text, capsys):
    last = rows(run)[-1]["held_out_bits_per_byte"]
    assert evaluated_bits(capsys, "--checkpoint", run, "--batch", 2) == pytest.approx(last, abs=2e-4)
    out = output(capsys, "eval", "--checkpoint", run, "--data", text / "0.py", "--context", 8, "all")
    assert "1 documents, 500 bytes" in out and len(out.splitlines()) == 4


def test_generate_writes_whole_letters(run, capsys):
    def generate(*flags):
        return output(capsys, "generate", "--checkpoint", run, "--prompt", "caf\u00e9 ", *flags)

    text = generate("--tokens", 60)
    assert text.startswith("caf\u00e9 ") and len(text) >= len("caf\u00e9 ") + 60
    assert generate("--tokens", 60) == text and generate("--tokens", 60, "--seed", 1) != text
    few = generate("--tokens", 7, "--temperature", 0)
    tokenizer = load_tokenizer(load_checkpoint(run).folder)
    model = trained_model(run, torch.device("cpu")).model
    ids = torch.tensor([[tokenizer.start, *tokenizer.encode("caf\u00e9 ")]])
    expected = model.generate(ids, max_new_tokens=7, temperature=0.0)[0].tolist()
    assert few == tokenizer.decode(expected).decode(errors="replace") + "\n"


def test_generate_stops_before_a_string(run, capsys):
    command = ["generate", "--checkpoint", run, "--prompt", "def ", "--tokens", 100]

    def continuation(*flags):
        return output(capsys, *command, *flags).removeprefix("def ").removesuffix("\n")

    whole = continuation()
    stop = whole[20:23]  # three letters of what is generated
    assert continuation("--stop", "no such text", "--stop", stop) == whole[: whole.index(stop)]
    assert output(capsys, *command, "--min-p", "1.0", "--top-k", "9") == output(capsys, *command, "--temperature", "0")
    assert output(capsys, *command, "--repetition-penalty", "5") != output(capsys, *command)


def test_a_text_that_ends_with_part_of_a_stop_is_written_whole(run, capsys):
    command = ["generate", "--checkpoint", run, "--prompt", "def ", "--tokens", 9, "--temperature", 0]
    whole = output(capsys, *command)
    stop = whole[-4:-1] + "\x00 and more"  # begins with the last letters before the newline
    assert output(capsys, *command, "--stop", stop) == whole


def test_samples_of_a_prompt(run, capsys):
    out = output(capsys, "generate", "--checkpoint", run, "--prompt", "def ", "--tokens", 15, "--samples", 3)
    samples = re.split(r"^--- sample \d\n", out, flags=re.M)[1:]
    assert len(set(samples)) == 3 and all(sample.startswith("def ") for sample in samples)
    single = output(capsys, "generate", "--checkpoint", run, "--prompt", "def ", "--tokens", 15)
    assert samples[0] == single, "the first sample is that of a single draw"


def test_interrupted_and_resumed(text, bpe, tmp_path, capsys):
    """The tokenizer comes from the checkpoint, so its file may be gone. Another tokenizer is refused."""
    flags = ["--tokenizer", tmp_path / "bpe.json", "--dropout", 0.1]
    shutil.copy(bpe, tmp_path / "bpe.json")
    out = tmp_path / "run"
    assert train(text, out, *flags, "--steps", 12, "--checkpoint-every", 6) == 0
    whole = rows(out)
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    (tmp_path / "bpe.json").unlink()
    resume = ["train", "--resume", "--out", str(out)]
    assert main(resume) == 0
    assert rows(out) == whole
    assert main([*resume, "--tokenizer", str(bpe)]) == 0
    Tokenizer.train([b"other text " * 9], vocab_size=SIZE).save(tmp_path)
    assert "has another one; leave the flag out" in error_of(capsys, *resume, "--tokenizer", tmp_path)


@pytest.mark.parametrize("keeps", [True, False])
def test_sentencepiece(text, tmp_path, capsys, keeps):
    """A SentencePiece model drops line ends and spaces by default, and `tokenizer` reports it; others keep them."""
    sentencepiece = pytest.importorskip("sentencepiece")
    source = tmp_path / "all.txt"
    source.write_bytes(b"".join(path.read_bytes() for path in sorted(text.glob("*.py"))))
    files = dict(input=str(source), model_prefix=str(tmp_path / "sp"))
    options = dict(vocab_size=400, byte_fallback=True, model_type="bpe", bos_id=-1, hard_vocab_limit=False)
    if keeps:
        options |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    sentencepiece.SentencePieceTrainer.train(**files, **options, minloglevel=2)
    assert train(text, tmp_path / "run", "--steps", 3, "--tokenizer", tmp_path / "sp.model") == 0
    shown = output(capsys, "tokenizer", "--tokenizer", tmp_path / "sp.model", source)
    assert ("1 are not decoded exactly" in shown) == (not keeps)
    found = load_checkpoint(tmp_path / "run")
    assert (found.folder / "tokenizer.model").exists() and found.config.vocab_size == found.tokenizer().vocab_size
    assert "def" in output(capsys, "generate", "--checkpoint", tmp_path / "run", "--prompt", "def", "--tokens", 3)


def test_a_folder_without_a_tokenizer(run, bpe, tmp_path, capsys):
    trained = trained_model(run, torch.device("cpu"))
    trained.model.save(tmp_path / "bare")
    bare = ["--checkpoint", tmp_path / "bare"]
    words = "not a run of `train` with held-out text; give --data"
    assert "has no tokenizer.json or tokenizer.model" in error_of(capsys, "generate", *bare, "--tokens", 5)
    output(capsys, "generate", *bare, "--tokens", 5, "--tokenizer", bpe)
    assert words in error_of(capsys, "eval", *bare, "--tokenizer", bpe)
    output(capsys, "eval", *bare, "--tokenizer", bpe, "--data", __file__)
    trained.model.save(tmp_path / "whole", tokenizer=trained.tokenizer)
    assert main(["generate", "--checkpoint", str(tmp_path / "whole"), "--tokens", "5"]) == 0


def test_a_released_folder_with_a_tokenizer(run, bpe, tmp_path, capsys):
    trained = trained_model(run, torch.device("cpu"))
    (tmp_path / "released").mkdir()
    save_released(trained.model, tmp_path / "released", 2)
    flags = ["--prompt", "def ", "--tokens", 9]
    expected = output(capsys, "generate", "--checkpoint", run, *flags)
    assert output(capsys, "generate", "--checkpoint", tmp_path / "released", "--tokenizer", bpe, *flags) == expected
    trained.tokenizer.save(tmp_path / "released")
    assert output(capsys, "generate", "--checkpoint", tmp_path / "released", *flags) == expected


def test_a_checkpoint_of_another_training_program(run, bpe, tmp_path, capsys):
    """Its options are not read as those of `train`; a model may have more ids than the tokenizer."""
    tokenizer = load_tokenizer(bpe)
    config = trained_model(run, torch.device("cpu")).model.config
    model = mo.Megalodon(dataclasses.replace(config, vocab_size=512, output_size=-1))
    save_checkpoint(tmp_path / "own", 3, model, tokenizer=tokenizer, record={"options": {"dtype": 5}})
    flags = ["--checkpoint", tmp_path / "own"]
    assert output(capsys, "generate", *flags, "--tokens", 99).count("\ufffd") > 9
    assert " bits per byte" in output(capsys, "eval", *flags, "--data", __file__)
    assert "not a run of `train` with held-out text; give --data" in error_of(capsys, "eval", *flags)


def test_without_the_package(run, bpe, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for command in (
        ["train", "--data", text, "--out", tmp_path / "run", "--tokenizer", bpe],
        ["generate", "--checkpoint", run],
        ["tokenizer", "--train", "--vocab-size", "300", "--out", tmp_path / "x"],
    ):
        line = error_of(capsys, *command)
        assert line.endswith('[train]"') and "needs tokenizers, which is not installed: pip install" in line
    assert train(text, tmp_path / "bytes", "--steps", 1) == 0, "bytes need no package"


def test_bytes_have_a_tokenizer_file(finished):
    folder = load_checkpoint(finished).folder
    assert isinstance(load_tokenizer(folder), ByteTokenizer)
    assert json.loads((folder / "tokenizer_config.json").read_text())["bos_token"] == "<|startoftext|>"


ERRORS = """
    train --tokenizer {tmp}/none => --tokenizer {tmp}/none: no such file
    train --tokenizer {tmp}/noise => --tokenizer {tmp}/noise: neither a JSON file of the
    train --tokenizer {run} => no tokenizer.model in this folder; a run's tokenizer is in each of its ch
    tokenizer --train --vocab-size 300 --out /proc/none/x {here} => --out /proc/none/x: could not be
    train --tokenizer {tmp} => --tokenizer {tmp}: no tokenizer.json and no tokenizer.model
    train --tokenizer {tmp}/half.json => --tokenizer {tmp}/half.json: EOF while parsing
    generate --checkpoint {run} --tokenizer {bytes} => {run} holds another tokenizer
    generate --checkpoint {small} --tokenizer {bpe} => its tokenizer has 400 ids, and the model knows 257
    generate --checkpoint {run} --samples 2 --temperature 0 => --samples: must be 1
    generate --checkpoint {run} --prompt a --prompt-file - => --prompt-file: cannot be combined with --prompt
    generate --checkpoint {run} --stop '' => --stop: must be text, got ''
    tokenizer => give --train to train a tokenizer, or --tokenizer FILE to measure one
    tokenizer --train --vocab-size 300 => --train: needs --vocab-size N, the maximum number of ids, and --out
    tokenizer --train --out {tmp}/x => --train: needs --vocab-size N, the maximum number of ids, and --out
    tokenizer --train --out x --vocab-size 257 => --vocab-size: must be a whole number >= 258, got '257'
    tokenizer --train --vocab-size 300 --out {tmp} => --out {tmp}: a folder, name a file
    tokenizer --tokenizer {bpe} --out x => --out: needs --train
    tokenizer --tokenizer {bpe} --glob * => --glob: chooses among the files of folders, and
    tokenizer --tokenizer {bpe} {tmp}/none => error: {tmp}/none: no such file or folder
"""


@refusals(ERRORS)
def test_one_line_and_exit_code_2(command, words, run, bpe, finished, tmp_path, capsys):
    (tmp_path / "noise").write_bytes(b"\x00\x01noise")
    (tmp_path / "half.json").write_bytes(b'{"model": {')
    ByteTokenizer().save(tmp_path / "bytes")
    if "{small}" in command:
        trained_model(finished, torch.device("cpu")).model.save(tmp_path / "small")
    paths = dict(tmp=tmp_path, run=run, bpe=bpe, bytes=tmp_path / "bytes", small=tmp_path / "small", here=__file__)
    assert_refused(capsys, command, words, **paths)

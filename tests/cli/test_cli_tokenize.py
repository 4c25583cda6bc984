"""`tokenize`: folders of text and JSON lines, kills and repeats, and training on the tokens."""

import gzip
import json
import os
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from command_line import TINY, error_of, evaluated_bits, rows, train
from killed import killed_at
from programs import run_python

from megalodon_ops.cli import documents as reading
from megalodon_ops.cli import main
from megalodon_ops.cli.data import load_corpus
from megalodon_ops.tokenizers import Tokenizer
from megalodon_ops.training import Shards, load_checkpoint
from megalodon_ops.training.shards import Index, shard_paths

pytestmark = pytest.mark.usefixtures("quick")

IS_TOKENS = "is a folder of tokens, which `train --data` reads; name text"


def tokenize(out, *arguments):
    return main(["tokenize", *map(str, arguments), "--out", str(out)])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def bpe(text, tmp_path_factory):
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bpe")
    Tokenizer.train(load_corpus([text]).train, vocab_size=400).save(folder)
    return folder / "tokenizer.json"


def write_mixed(folder, scale=1):
    """Write text, a file of JSON lines, and one that ends with blank lines: `scale` times 200 KB in all."""
    folder.mkdir()
    lines = [json.dumps({"text": f"line {i} " * (i % 50 + 1)}) for i in range(750 * scale)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text("to be or not to be, that is the question\n" * 560 * scale)
    (folder / "c.ndjson").write_text('{"text": "one"}\r\n\n{"text": "two", "id": 2}\n\n')
    return folder


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """Files that are divided as if 16 times as large: with --shard-size 1 into four shards."""
    monkeypatch.setattr(
        "megalodon_ops.cli.tokenize.split_files", lambda files, size: reading.split_files(files, size >> 4)
    )
    return write_mixed(tmp_path / "mixed")


@pytest.fixture
def large(tmp_path):
    """Files of as many shards, and a document that takes some time."""
    folder = write_mixed(tmp_path / "large", 16)
    (folder / "d.txt").write_bytes((folder / "b.txt").read_bytes() * 10)
    return folder


def test_files_and_output(mixed, bpe, tmp_path, monkeypatch, capsys):
    (mixed / "d.jsonl").write_text('{"text": ""}\n[]\n{"body": "x"}\n')
    split = mock.Mock(side_effect=lambda files, size: reading.split_files(files, size >> 4))
    monkeypatch.setattr("megalodon_ops.cli.tokenize.split_files", split)
    assert tokenize(tmp_path / "tokens", mixed, "--tokenizer", bpe, "--shard-size", 1) == 0
    out, err = capsys.readouterr()
    shards = Shards(tmp_path / "tokens")
    assert (shards.num_documents, shards.num_shards) == (753, 4)
    assert [call.args[1] for call in split.call_args_list] == [1 << 20], "--shard-size is in MiB"
    assert out.splitlines() == [
        f"{tmp_path}/tokens: 753 documents, {shards.num_bytes:,} bytes, {shards.num_tokens:,} tokens in 4 shards: "
        f"{shards.num_bytes / shards.num_tokens:.3f} bytes a token",
        "skipped: empty documents (1), lines without a text 'text' (2)",
        f"train with it: megalodon-ops train --data {tmp_path}/tokens",
    ]
    assert "tokenizing" in err
    tokenizer = shards.tokenizer
    for number in (0, 1, 50, 749):
        assert tokenizer.decode(shards.document(number).tolist()) == f"line {number} ".encode() * (number % 50 + 1)
    assert tokenizer.decode(shards.document(750).tolist()) == (mixed / "b.txt").read_bytes()
    assert [tokenizer.decode(shards.document(n).tolist()) for n in (751, 752)] == [b"one", b"two"]
    assert [path.name for path in tmp_path.glob("tokens/.*")] == [".lock"]


@pytest.mark.parametrize(("call", "counts"), [("rename", range(0, 15, 2)), ("fsync", range(0, 30, 9))])
def test_a_repeat_after_a_kill_gives_the_same_files(mixed, tmp_path, monkeypatch, call, counts, capsys):
    """Whenever the command is killed, a repeat completes the same files and keeps the shards in the index."""
    wanted = tmp_path / "whole"
    assert tokenize(wanted, mixed, "--shard-size", 1) == 0
    assert len(list(wanted.glob("shard-*.tokens.npy"))) == 4
    for count in counts:
        out = tmp_path / f"{call}-{count}"
        with killed_at(monkeypatch, call, count):
            tokenize(out, mixed, "--shard-size", 1)
        listed = Index.read(out).shards if (out / "dataset.json").exists() else []
        paths = [path for number, shard in enumerate(listed) if shard for path in shard_paths(out, number)]
        inodes = {path: path.stat().st_ino for path in paths}
        assert tokenize(out, mixed, "--shard-size", 1) == 0
        assert all(path.stat().st_ino == inode for path, inode in inodes.items())
        assert contents(out) == contents(wanted)
        shutil.rmtree(out)
    assert capsys.readouterr().err.count("error") == 0


def test_a_repeat_after_the_end_writes_nothing(mixed, tmp_path, capsys):
    out = tmp_path / "tokens"
    assert tokenize(out, mixed) == 0
    printed = capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert tokenize(out, mixed) == 0
    assert capsys.readouterr().out == printed and {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


MEMORY = """
import sys, threading, time
from pathlib import Path
from megalodon_ops.cli import main
from megalodon_ops.training import Batches, Shards

def anonymous():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(fields["RssAnon"].split()[0]) / 1024

def measured(folder):
    assert main(["tokenize", folder + "/text", "--out", folder + "/tokens", "--shard-size", "1"]) == 0
    corpus = Shards(folder + "/tokens").hold_out()
    for batch in Batches(corpus.train, 8, 2048, seed=None):
        pass

peak, stop = 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.002)

measured(sys.argv[1] + "/first")
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
measured(sys.argv[1] + "/second")
stop = True
watcher.join()
print(peak - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    """Ten times more text takes hardly more memory, without mapped files: a long text, JSON lines, a Parquet row group."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    line = json.dumps({"text": "to be or not to be, that is the question: whether tis nobler " * 30}) + "\n"
    size = 300
    growth = {}
    for times in (1, 10):
        folder = tmp_path / str(times)
        for name, copies in (("first", size), ("second", size * times)):
            (folder / name / "text").mkdir(parents=True)
            lines = "".join(line.replace("question", f"question {i}") for i in range(copies))
            (folder / name / "text" / "lines.jsonl").write_text(lines)
            (folder / name / "text" / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
            texts = [json.loads(line)["text"] for line in lines.splitlines()]
            table = pyarrow.table({"text": texts})
            pyarrow.parquet.write_table(table, folder / name / "text" / "rows.parquet", use_dictionary=False)
            (folder / name / "text" / "whole.txt").write_text(line * 10 * copies)
        ran = run_python(MEMORY, folder, OMP_NUM_THREADS="1")
        assert ran.returncode == 0, ran.stderr[-2000:]
        growth[times] = float(ran.stdout.splitlines()[-1])
        shutil.rmtree(folder)
    more = 9 * size * 13 * len(line) / 2**20  # each file of lines has `size` of them, the long text ten times as many
    assert growth[10] - growth[1] < more / 4, (growth, more)
    print(f"{more:.0f} MiB more text, {growth[10] - growth[1]:.1f} MiB more memory")


def test_one_line_and_exit_code_2(mixed, bpe, tmp_path, capsys):
    error = partial(error_of, capsys, "tokenize", has_bar=True)
    out, none = tmp_path / "tokens", tmp_path / "none"
    assert "the following arguments are required: --out" in error(mixed)
    assert f"error: {none}: no such file or folder" in error(none, "--out", out)
    assert "--tokenizer" in error(mixed, "--tokenizer", none, "--out", out)
    assert "--field: must be text, got ''" in error(mixed, "--field", "", "--out", out)
    assert "--shard-size: must be a whole number >= 1, got '0'" in error(mixed, "--shard-size", "0", "--out", out)
    words = "no document in these files: lines without a text 'body' (2)"
    assert words in error(mixed / "c.ndjson", "--field", "body", "--out", out)
    assert not out.exists()
    out.mkdir()
    (out / ".user_file").write_text("a user's")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    assert "no document in these files: they are blank" in error(tmp_path / "blank.jsonl", "--out", out)
    assert contents(out) == {Path(".user_file"): b"a user's", Path(".lock"): b""}, "a user's files stay"
    assert f"--out {mixed}: holds other files, such as a.jsonl; name another folder" in error(mixed, "--out", mixed)
    assert tokenize(out, mixed / "c.ndjson") == 0
    words = f"--out {out}: was begun with other files, flags or another tokenizer, or a file was changed since"
    assert words in error(mixed, "--out", out)
    assert f"error: {out}: {IS_TOKENS}" in error(out, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change", ["--shard-size", "--field", "--tokenizer", "another time", "another file"])
def test_an_unfinished_folder_continues_only_with_the_same_input(mixed, bpe, tmp_path, monkeypatch, capsys, change):
    out = tmp_path / "tokens"
    with killed_at(monkeypatch, "rename", 4):
        tokenize(out, mixed, "--shard-size", 1)
    flags = {"--shard-size": ["--shard-size", 2], "--field": ["--field", "body"], "--tokenizer": ["--tokenizer", bpe]}
    if change == "another time":
        os.utime(mixed / "a.jsonl", (0, 0))
    elif change == "another file":
        (mixed / "e.txt").write_text("more")
    capsys.readouterr()
    assert tokenize(out, mixed, "--shard-size", 1, *flags.get(change, [])) == 2
    assert "was begun with other files, flags or another tokenizer, or a file was changed" in capsys.readouterr().err
    assert train(out, tmp_path / "run", "--steps", 1) == 2
    assert f"{out}: is incomplete; run the command `tokenize` again to continue it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.jsonl", "b.txt"])
def test_a_file_that_changes_while_it_is_read(mixed, tmp_path, monkeypatch, capsys, name):
    def truncate(files, size):
        units = reading.split_files(files, size)
        os.truncate(mixed / name, 1000)
        return units

    monkeypatch.setattr("megalodon_ops.cli.tokenize.split_files", truncate)
    assert tokenize(tmp_path / "tokens", mixed) == 2
    assert "a file was changed while it was read; remove the folder" in capsys.readouterr().err


def test_a_full_disk(mixed, tmp_path, capfd, file_size_limit):
    for limit, name in ((3000, "tokenizer.json"), (100_000, "shard-000000.tokens.npy")):
        with file_size_limit(limit):
            assert tokenize(tmp_path / "tokens", mixed) == 2
        assert f"error: {tmp_path}/tokens/{name}: could not be written: File too large" in capfd.readouterr().err
        assert not list(tmp_path.glob("tokens/.*draft*"))
    assert tokenize(tmp_path / "tokens", mixed) == 0


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_training_on_tokens_equals_training_on_text(text, bpe, tmp_path, kind, capsys):
    """Losses and held-out figures are the same. The tokenizer comes with the tokens."""
    flags = [] if kind == "bytes" else ["--tokenizer", bpe]
    assert tokenize(tmp_path / "tokens", text, *flags) == 0
    assert train(text, tmp_path / "from-text", "--steps", 8, "--eval-every", 4, *flags) == 0
    assert train(tmp_path / "tokens", tmp_path / "whole", "--steps", 8, "--eval-every", 4) == 0
    assert rows(tmp_path / "whole") == rows(tmp_path / "from-text")
    assert capsys.readouterr().out.count("bytes in 38 documents to learn from") == 2
    found = load_checkpoint(tmp_path / "whole")
    assert found.tokenizer().fingerprint == Shards(tmp_path / "tokens").tokenizer.fingerprint
    assert found.record["data"]["fingerprint"] == Shards(tmp_path / "tokens").hold_out().fingerprint
    last = rows(tmp_path / "whole")[-1]["held_out_bits_per_byte"]
    assert evaluated_bits(capsys, "--checkpoint", tmp_path / "whole") == pytest.approx(last, abs=2e-4)


def test_a_run_on_tokens_resumes_to_equal_losses(text, bpe, tmp_path):
    assert tokenize(tmp_path / "tokens", text, "--tokenizer", bpe) == 0
    flags = ["--steps", 8, "--eval-every", 4, "--checkpoint-every", 3]
    assert train(tmp_path / "tokens", tmp_path / "run", *flags) == 0
    whole = rows(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert rows(tmp_path / "run") == whole


def test_a_run_on_tokens_encodes_nothing(text, bpe, tmp_path, monkeypatch):
    assert tokenize(tmp_path / "tokens", text, "--tokenizer", bpe) == 0

    def refuse(*arguments):
        raise AssertionError("encoded")

    monkeypatch.setattr("megalodon_ops.cli.train.work_bar", refuse)
    monkeypatch.setattr("megalodon_ops.tokenizers.Tokenizer.encode_batch", refuse)

    def interrupt(progress, row):
        raise KeyboardInterrupt

    monkeypatch.setattr("megalodon_ops.cli.train.Progress.show", interrupt)
    assert train(tmp_path / "tokens", tmp_path / "run", "--steps", 2) == 130


def test_wrong_data_for_training(text, bpe, tmp_path, capsys):
    tokens = tmp_path / "tokens"
    assert tokenize(tokens, text) == 0
    error = partial(error_of, capsys)
    new = ["--out", tmp_path / "run", *TINY]
    words = f"--tokenizer {bpe}: {tokens} has another tokenizer; leave the flag out"
    assert words in error("train", "--data", tokens, "--tokenizer", bpe, *new)
    assert f"--data {tokens}: holds tokens, so it must be named alone" in error("train", "--data", tokens, text, *new)
    assert "--glob: chooses among files of text" in error("train", "--data", tokens, "--glob", "*", *new)
    assert not (tmp_path / "run").exists()
    new_tokenizer = ["tokenizer", "--train", "--vocab-size", 300, "--out", tmp_path / "x"]
    assert f"{tokens}: {IS_TOKENS}" in error(*new_tokenizer, tokens)
    assert train(tokens, tmp_path / "run", "--steps", 1) == 0
    assert f"error: {tokens}: {IS_TOKENS}" in error("eval", "--checkpoint", tmp_path / "run", "--data", tokens)
    assert tokenize(tmp_path / "others", text / "0.py", text / "1.py") == 0
    resume = ["train", "--resume", "--out", tmp_path / "run", "--steps", 2, "--data"]
    assert "--resume: the text is not the one this run was started with" in error(*resume, tmp_path / "others")
    shutil.move(tokens, tmp_path / "moved")
    assert main([*map(str, resume), str(tmp_path / "moved")]) == 0
    (tmp_path / "moved" / "shard-000000.tokens.npy").write_bytes(b"")
    assert "shard-000000.tokens.npy: " in error(*resume, tmp_path / "moved", "--steps", 3)

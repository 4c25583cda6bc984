"""`tokenize`: what it makes of text and of lines of JSON, killed and done again, by any number of processes; training from it."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import TINY, rows, shell, train
from killed import killed_at
from programs import run_python

from megalodon_ops.cli import documents as reading
from megalodon_ops.cli import main
from megalodon_ops.cli.data import load_corpus
from megalodon_ops.tokenizers import Tokenizer
from megalodon_ops.training import Shards, load_checkpoint

pytestmark = pytest.mark.usefixtures("quick")


def tokenize(out, *arguments):
    """In this process, unless it is told to use others, which take seconds to start."""
    return main(["tokenize", "--workers", "1", *map(str, arguments), "--out", str(out)])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def bpe(text, tmp_path_factory):
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bpe")
    Tokenizer.train(load_corpus([text]).train, vocab_size=400).save(folder)
    return folder / "tokenizer.json"


@pytest.fixture
def mixed(tmp_path):
    """Text, a file of lines, and one with a blank end, of 3.5 MB in all."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    lines = [json.dumps({"text": f"line {i} " * (i % 50 + 1)}) for i in range(12_000)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text("to be or not to be, that is the question\n" * 9000)
    (folder / "c.ndjson").write_text('{"text": "one"}\r\n\n{"text": "two", "id": 2}\n\n')
    return folder


def test_what_it_makes_and_says(mixed, bpe, tmp_path, capsys):
    (mixed / "d.jsonl").write_text('{"text": ""}\n[]\n{"body": "x"}\n')
    assert tokenize(tmp_path / "tokens", mixed, "--tokenizer", bpe, "--shard-size", 1) == 0
    out, err = capsys.readouterr()
    shards = Shards(tmp_path / "tokens")
    assert (shards.num_documents, shards.num_shards) == (12003, 4)
    assert out.splitlines() == [
        f"{tmp_path}/tokens: 12,003 documents, {shards.num_bytes:,} bytes, {shards.num_tokens:,} tokens in 4 shards: "
        f"{shards.num_bytes / shards.num_tokens:.3f} bytes a token",
        "skipped: empty documents (1), lines without a JSON object (1), lines without a text 'text' (1)",
        f"train with it: python -m megalodon_ops train --data {tmp_path}/tokens",
    ]
    assert "tokenizing" in err
    tokenizer = shards.tokenizer
    for number in (0, 1, 50, 11_999):
        assert tokenizer.decode(shards.document(number).tolist()) == f"line {number} ".encode() * (number % 50 + 1)
    assert tokenizer.decode(shards.document(12_000).tolist()) == (mixed / "b.txt").read_bytes()
    assert [tokenizer.decode(shards.document(n).tolist()) for n in (12_001, 12_002)] == [b"one", b"two"]
    assert tokenize(tmp_path / "tokens", "--check") == 0
    assert "as it was written; 12,003 documents" in capsys.readouterr().out
    assert not list(tmp_path.glob("tokens/.*")) and not (tmp_path / "tokens" / "lock").exists()


@pytest.mark.parametrize(
    ("call", "counts"),
    [
        ("rename", range(0, 6, 2)), ("replace", range(3)), ("fsync", range(0, 40, 9)),
        pytest.param("rename", range(6), marks=pytest.mark.slow), pytest.param("fsync", range(40), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_killed_at_any_moment_and_done_again(mixed, tmp_path, monkeypatch, call, counts, capsys):
    """After a kill at a rename or a flush, the same command gives the same files; what was whole is not made again."""
    wanted = tmp_path / "whole"
    assert tokenize(wanted, mixed, "--shard-size", 1) == 0
    assert len(list(wanted.glob("shard-*"))) == 4
    for count in counts:
        out = tmp_path / f"{call}-{count}"
        with killed_at(monkeypatch, call, count):
            tokenize(out, mixed, "--shard-size", 1)
        if (out / "tokenize.json").exists() or not any(out.glob("*")):
            made = {path: path.stat().st_ino for path in out.glob("shard-*/shard.json")}
            assert tokenize(out, mixed, "--shard-size", 1) == 0
            assert all(path.stat().st_ino == node for path, node in made.items())
        assert contents(out) == contents(wanted)
        shutil.rmtree(out)
    assert capsys.readouterr().err.count("error") == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_processes_change_nothing(mixed, bpe, tmp_path, kind):
    flags = ["--shard-size", 1, *(["--tokenizer", bpe] if kind == "bpe" else [])]
    assert tokenize(tmp_path / "one", mixed, "--workers", 1, *flags) == 0
    assert tokenize(tmp_path / "three", mixed, "--workers", 3, *flags) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def children_of(process):
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_with_its_processes(mixed, bpe, tmp_path, number, capsys):
    """Once the first process is gone, the others end; another run goes on with the shards that were whole."""
    (mixed / "d.txt").write_bytes((mixed / "b.txt").read_bytes() * 30)  # takes its process a while
    flags = ["--shard-size", 1, "--tokenizer", bpe]
    process = subprocess.Popen(
        shell("tokenize", mixed, "--out", tmp_path / "parts", "--workers", 2, *flags),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not list((tmp_path / "parts").glob("shard-*")):
        time.sleep(0.01)
    processes = children_of(process.pid)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number) and "Traceback" not in said
    end = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in processes):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert tokenize(tmp_path / "parts", mixed, *flags, "--workers", 1) == 0
    assert tokenize(tmp_path / "whole", mixed, *flags, "--workers", 1) == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_command_in_one_line(mixed, bpe, tmp_path):
    (mixed / "d.txt").write_bytes((mixed / "b.txt").read_bytes() * 30)
    process = subprocess.Popen(
        shell("tokenize", mixed, "--out", tmp_path / "parts", "--workers", 2, "--shard-size", 1, "--tokenizer", bpe),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not list((tmp_path / "parts").glob("shard-*")):
        time.sleep(0.01)
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children_of(process.pid)}
    os.kill(next(child for child, command in commands.items() if b"spawn_main" in command), signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "Traceback" not in said
    assert "error: a process was killed, maybe for its memory; the same command with fewer --workers goes on" in said


MEMORY = """
import sys, threading, time
from pathlib import Path
from megalodon_ops.cli import main
from megalodon_ops.training import Batches, Shards

def anonymous():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(fields["RssAnon"].split()[0]) / 1024

def measured(folder):
    assert main(["tokenize", folder + "/text", "--out", folder + "/tokens", "--workers", "1", "--shard-size", "4", *sys.argv[2:]]) == 0
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
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_memory_does_not_grow_with_the_text(bpe, tmp_path, kind):
    """Ten times more text, in a long file and in lines, is encoded and read in hardly more memory: files that are mapped count not."""
    line = json.dumps({"text": "to be or not to be, that is the question: whether tis nobler " * 30}) + "\n"
    size = 600 if kind == "bytes" else 200
    grown = {}
    for times in (1, 10):
        folder = tmp_path / str(times)
        for name, copies in (("first", size), ("second", size * times)):
            (folder / name / "text").mkdir(parents=True)
            numbers = (line.replace("question", f"question {i}") for i in range(copies))
            (folder / name / "text" / "lines.jsonl").write_text("".join(numbers))
            (folder / name / "text" / "whole.txt").write_text(line * 10 * copies)
        flags = [] if kind == "bytes" else ["--tokenizer", str(bpe)]
        program = f"import sys; sys.argv = ['x', {str(folder)!r}, *{flags!r}]\n" + MEMORY
        ran = run_python(program, OMP_NUM_THREADS="1")
        assert ran.returncode == 0, ran.stderr[-2000:]
        grown[times] = float(ran.stdout.splitlines()[-1])
        shutil.rmtree(folder)
    more = 9 * size * 11 * len(line) / 2**20
    assert grown[10] - grown[1] < more / 4, (grown, more)
    print(f"{more:.0f} MiB more text, {grown[10] - grown[1]:.1f} MiB more memory")


# Errors


def test_one_line_and_exit_code_2(mixed, bpe, tmp_path, capsys):
    def said(*arguments):
        try:
            code = main(["tokenize", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.strip() and "tokenizing" not in line]
        assert code == 2 and len(lines) == 1 and out == "", lines
        return lines[0]

    out = tmp_path / "tokens"
    assert "the following arguments are required: --out" in said(mixed)
    assert "error: " + str(tmp_path / "none") + ": no such file or folder" in said(tmp_path / "none", "--out", out)
    assert "--tokenizer" in said(mixed, "--tokenizer", tmp_path / "none", "--out", out)
    assert "argument --field: must be text, got none" in said(mixed, "--field", "", "--out", out)
    assert "whole number of MiB above 0" in said(mixed, "--shard-size", "0", "--out", out)
    assert "no document in these files; skipped: lines without a text 'body' (2)" in said(
        mixed / "c.ndjson", "--field", "body", "--out", out
    )
    assert not out.exists()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    assert "no document in these files; they are blank" in said(tmp_path / "blank.jsonl", "--out", out)
    assert f"--out {mixed}: holds other files, such as a.jsonl; name another folder" in said(mixed, "--out", mixed)
    assert "--check: reads the folder --out alone" in said(mixed, "--check", "--out", out)
    assert "dataset.json: no such file" in said("--check", "--out", out)
    assert tokenize(out, mixed / "c.ndjson") == 0
    capsys.readouterr()
    assert f"--out {out}: holds tokens already; name another folder" in said(mixed, "--out", out)
    assert f"error: {out}: is a folder of tokens, which `train --data` reads; name text" in said(
        out, "--out", tmp_path / "x"
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mixed: ["--shard-size", "2"], "was begun with another --shard-size; give what it was begun with"),
        (lambda mixed: ["--field", "body"], "was begun with another --field"),
        (lambda mixed: os.utime(mixed / "a.jsonl", (0, 0)), "was begun of other files, or some were changed since"),
        (lambda mixed: (mixed / "e.txt").write_text("more"), "was begun of other files, or some were changed since"),
    ],
)
def test_an_unfinished_folder_goes_on_with_what_it_was_begun_with(
    mixed, tmp_path, monkeypatch, capsys, change, message
):
    out = tmp_path / "tokens"
    with killed_at(monkeypatch, "rename", 1):
        tokenize(out, mixed, "--shard-size", 1)
    flags = change(mixed)
    capsys.readouterr()
    assert tokenize(out, mixed, "--shard-size", 1, *(flags if isinstance(flags, list) else [])) == 2
    assert message in capsys.readouterr().err
    assert train(out, tmp_path / "run", "--steps", 1) == 2
    assert f"--data {out}: is not finished; run the command `tokenize` again, which goes on" in capsys.readouterr().err


def test_a_file_that_changes_while_it_is_read(mixed, tmp_path, monkeypatch, capsys):
    for name in ("a.jsonl", "b.txt"):
        real = reading.divided

        def cut(files, size, name=name, real=real):
            units = real(files, size)
            os.truncate(mixed / name, 1000)
            return units

        monkeypatch.setattr("megalodon_ops.cli.tokenize.divided", cut)
        assert tokenize(tmp_path / "tokens", mixed) == 2
        assert f"{mixed}/{name}: the file became shorter while it was read" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "tokens")
        monkeypatch.undo()


def test_a_draft_that_a_killed_process_left_is_in_nobodys_way(mixed, tmp_path):
    out = tmp_path / "tokens"
    (out / ".shard-000000.draft-12345678").mkdir(parents=True)
    (out / ".shard-000000.draft-12345678" / "tokens.npy").write_bytes(b"half")
    for name in (".tokenize.json.draft", ".dataset.json.draft"):
        (out / name).write_text('{"half')
    assert tokenize(out, mixed) == 0
    assert not list(out.glob(".*"))


def test_a_full_disk(mixed, tmp_path, capfd, file_size_limit):
    with file_size_limit(100_000):
        assert tokenize(tmp_path / "tokens", mixed) == 2
    assert "could not be written" in capfd.readouterr().err
    assert tokenize(tmp_path / "tokens", mixed) == 0


# Training


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_training_from_tokens_is_training_from_text(text, bpe, tmp_path, kind, capsys):
    """Document by document, loss by loss, held-out figures and all; interrupted, too. The tokenizer comes with the tokens."""
    flags = [] if kind == "bytes" else ["--tokenizer", bpe]
    assert tokenize(tmp_path / "tokens", text, *flags) == 0
    assert train(text, tmp_path / "of-text", "--steps", 8, "--eval-every", 4, *flags) == 0
    before = capsys.readouterr().out
    assert train(tmp_path / "tokens", tmp_path / "whole", "--steps", 8, "--eval-every", 4) == 0
    after = capsys.readouterr().out
    assert rows(tmp_path / "whole") == rows(tmp_path / "of-text")
    learned = "bytes in 38 documents to learn from"
    assert learned in before and learned in after
    assert train(tmp_path / "tokens", tmp_path / "parts", "--steps", 8, "--eval-every", 4, "--checkpoint-every", 3) == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000008")
    assert main(["train", "--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    found = load_checkpoint(tmp_path / "parts")
    assert found.tokenizer().fingerprint == Shards(tmp_path / "tokens").tokenizer.fingerprint
    assert found.record["data"]["fingerprint"] == Shards(tmp_path / "tokens").fingerprint
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(tmp_path / "parts")]) == 0
    bits = float(capsys.readouterr().out.splitlines()[-1].split()[0])
    assert bits == pytest.approx(rows(tmp_path / "whole")[-1]["held_out_bits_per_byte"], abs=2e-4)


def test_a_start_encodes_nothing(text, bpe, tmp_path, monkeypatch):
    assert tokenize(tmp_path / "tokens", text, "--tokenizer", bpe) == 0

    def refuse(*arguments):
        raise AssertionError("encoded")

    monkeypatch.setattr("megalodon_ops.cli.train.tqdm", refuse)
    monkeypatch.setattr("megalodon_ops.cli.train.dropped", lambda *held_out: "")
    monkeypatch.setattr("megalodon_ops.cli.train.Trainer._look", lambda trainer: 1.0)
    monkeypatch.setattr("megalodon_ops.cli.train.Trainer._finish", lambda trainer: None)
    monkeypatch.setattr("megalodon_ops.tokenizers.base.Tokenizer.encode_batch", refuse)
    assert train(tmp_path / "tokens", tmp_path / "run", "--steps", 2) == 0


def test_wrong_data_for_training(text, bpe, tmp_path, capsys):
    tokens = tmp_path / "tokens"
    assert tokenize(tokens, text) == 0

    def said(*arguments):
        capsys.readouterr()
        assert main([*map(str, arguments)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    new = ["--out", tmp_path / "run", *TINY]
    assert f"--tokenizer {bpe}: the tokens in {tokens} are another's; leave the flag out" in said(
        "train", "--data", tokens, "--tokenizer", bpe, *new
    )
    assert f"--data {tokens}: holds tokens, so it must be named alone" in said("train", "--data", tokens, text, *new)
    assert "--glob: chooses among files of text" in said("train", "--data", tokens, "--glob", "*", *new)
    assert not (tmp_path / "run").exists()
    assert f"{tokens}: is a folder of tokens, which `train --data` reads; name text" in said(
        "tokenizer", "--train", "--vocab-size", 300, "--out", tmp_path / "x", tokens
    )
    assert train(tokens, tmp_path / "run", "--steps", 1) == 0
    assert f"--data {tokens}: is a folder of tokens, which `train --data` reads; name text" in said(
        "eval", "--checkpoint", tmp_path / "run", "--data", tokens
    )
    assert tokenize(tmp_path / "others", text / "0.py", text / "1.py") == 0
    resume = ["train", "--resume", "--out", tmp_path / "run", "--steps", 2, "--data"]
    assert "--resume: the text is not the one this run was started with" in said(*resume, tmp_path / "others")
    shutil.move(tokens, tmp_path / "moved")
    assert main([*map(str, resume), str(tmp_path / "moved")]) == 0
    (tmp_path / "moved" / "shard-000000" / "tokens.npy").write_bytes(b"")
    assert "shard-000000/tokens.npy: has 0 bytes instead of" in said(*resume, tmp_path / "moved", "--steps", 3)

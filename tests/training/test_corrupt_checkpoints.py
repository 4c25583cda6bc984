"""Mutated checkpoints of every format, and states, are refused in one line or load as valid."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from command_line import quick_commands
from models import tiny_model, tokens_of
from mutations import mutate
from released import save_released

import megalodon_ops as mo
from megalodon_ops.cli import main
from megalodon_ops.files import FileError
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer
from megalodon_ops.training import run_checkpoint as checkpoint

SEED = 20260
TINY = "--dim 16 --layers 1 --chunk 4 --batch 2 --length 8 --norm-groups 4 --warmup 2 --steps 3 --checkpoint-every 1".split()


def mutation_counts(few, many):
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def alarm(*_):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    text = out / "text"
    text.write_bytes(b"to be or not to be, that is the question. " * 30)
    with quick_commands():
        assert main(["train", "--data", str(text), "--out", str(out / "r"), *TINY]) == 0
        yield out / "r", text


@mutation_counts(20, 500)
def test_a_mutated_checkpoint_of_a_run_is_refused_in_one_line_or_runs(run, tmp_path, capsys, count):
    """A file is refused whichever byte has changed; only the record's layout may change."""
    out, text = run
    base = sorted((out / "checkpoints").iterdir())[-1]
    model, _, record = checkpoint.load_any(base)
    want, wanted = model.state_dict(), json.dumps(record, sort_keys=True)
    rng = random.Random(SEED)
    bad, refused = [], 0
    for i in range(count):
        r = tmp_path / "r"
        shutil.rmtree(r, ignore_errors=True)
        folder = r / "checkpoints" / base.name
        shutil.copytree(base, folder)
        mutation = mutate(rng.choice(sorted(folder.iterdir())), rng)
        command = [
            ["eval", "--checkpoint", str(folder), "--data", str(text)],
            ["generate", "--checkpoint", str(r), "--tokens", "3"],
            ["train", "--resume", "--out", str(r), "--steps", "4"],
        ][i % 3]
        capsys.readouterr()
        try:
            with time_limit(30):
                try:
                    model, _, record = checkpoint.load_any(folder)
                    weights = model.state_dict()
                except (FileError, FileNotFoundError):
                    weights = None
                    refused += 1
                capsys.readouterr()
                code = main(command)
                err = capsys.readouterr().err
        except BaseException as error:
            bad.append((mutation, command[0], repr(error)[:300]))
            continue
        if weights is not None and any(not torch.equal(weights[name], want[name]) for name in want):
            bad.append((mutation, "other weights"))
        if weights is not None and record is not None and json.dumps(record, sort_keys=True) != wanted:
            bad.append((mutation, "another record"))
        if code not in (0, 2) or (code == 2 and (err.count("\n") != 1 or not err.startswith("megalodon_ops"))):
            bad.append((mutation, code, err[:300]))
        is_checkpoint = (folder / "training.json").exists()  # without it, the folder is a plain model, for `eval`
        if weights is None and code == 0 and (command[0] == "train" or is_checkpoint):
            bad.append((mutation, "refused by load, accepted by", command[0]))
    assert not bad, bad[:12]
    assert refused > count / 2


def fault_of(error: Exception, beginning: str) -> str | None:
    """Return None for a file's error that is one line and begins so, else its text."""
    is_plain = isinstance(error, (FileError, FileNotFoundError)) and str(error).isprintable()
    return None if is_plain and str(error).startswith(beginning) else repr(error)[:300]


@mutation_counts(30, 800)
def test_a_mutated_folder_of_our_format_is_refused_in_one_line_or_computes(tmp_path, count):
    """Changed weights may load if they are finite; all else must be unchanged or refused."""
    text = b"to be or not to be, that is the question " * 9
    for name, dtype, shard, tokenizer in (
        ("one", torch.float32, 1 << 30, ByteTokenizer()),
        ("shards", torch.bfloat16, 20_000, Tokenizer.train([text], vocab_size=270)),
    ):
        model = tiny_model(torch.float32, share_emb=name == "one").to(dtype)
        model.save(tmp_path / name, max_shard_bytes=shard, tokenizer=tokenizer)
    rng = random.Random(SEED + 3)
    bad, refused = [], 0
    for i in range(count):
        name = ("one", "shards")[i % 2]
        folder = tmp_path / "d"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / name, folder)
        mutation = mutate(rng.choice(sorted(folder.iterdir())), rng)
        try:
            with time_limit(30):
                model, tokenizer, _ = checkpoint.load_any(folder)
                if tokenizer is not None:
                    tokenizer.decode(tokenizer.encode(text[:50]))
                if all(torch.equal(p, p) for p in model.parameters()) and model.config.vocab_size == 31:
                    model(tokens_of(1, 5))
                else:
                    bad.append((mutation, "not finite, or another vocabulary"))
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            if fault := fault_of(error, str(folder)):
                bad.append((mutation, fault))
        except BaseException as error:
            bad.append((mutation, repr(error)[:300]))
    assert not bad, bad[:12]
    assert refused > count / 3


@mutation_counts(15, 200)
def test_a_mutated_folder_of_the_released_format_is_refused_or_gives_its_weights(tmp_path, count):
    model = tiny_model(torch.float32)
    want = model.state_dict()
    rng = random.Random(SEED + 2)
    bad = []
    for shards in (1, 2):
        base = tmp_path / f"b{shards}"
        base.mkdir()
        save_released(model, base, shards)
        for _ in range(count):
            folder = tmp_path / "d"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(base, folder)
            mutation = mutate(rng.choice(sorted(folder.iterdir())), rng)
            try:
                with time_limit(30):
                    got = mo.load_official(folder).state_dict()
                if any(not torch.equal(got[name], want[name]) for name in want):
                    bad.append((mutation, "other weights"))
            except (ValueError, FileNotFoundError) as error:
                if fault := fault_of(error, "load_official: "):
                    bad.append((mutation, fault))
            except BaseException as error:
                bad.append((mutation, repr(error)[:300]))
    assert not bad, bad[:12]


@mutation_counts(20, 300)
def test_a_mutated_state_is_refused_or_valid(tmp_path, count):
    model = tiny_model(torch.float32)
    _, state = model(tokens_of(2, 5), return_state=True)
    state.save(tmp_path / "state.safetensors", model.config)
    rng = random.Random(SEED + 4)
    bad = []
    for _ in range(count):
        folder = tmp_path / "d"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "state.safetensors"
        shutil.copy(tmp_path / path.name, path)
        mutation = mutate(path, rng)
        try:
            with time_limit(30):
                found = mo.MegalodonState.load(path, model.config)
                model(tokens_of(2, 3), state=found)
        except (ValueError, FileNotFoundError) as error:
            if not (str(error).isprintable() and str(path) in str(error)):
                bad.append((mutation, repr(error)[:300]))
        except BaseException as error:
            bad.append((mutation, repr(error)[:300]))
    assert not bad, bad[:12]

"""Mutated checkpoints of every format, and states, are refused in one line or load as valid."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from command_line import quick_commands
from models import tiny_model, tokens_of
from mutations import mutants
from released import save_released

import megalodon_ops as mo
from megalodon_ops.cli import main
from megalodon_ops.storage.files import FileError
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


def attempt(call: Callable[[], Any], beginning: str) -> tuple[Any, str | None]:
    """A call's result (None: it raised an error), and its fault, or None.

    The only error that is no fault is one line about a file, with this beginning.
    """
    try:
        with time_limit(30):
            return call(), None
    except (ValueError, FileNotFoundError) as error:
        is_plain = isinstance(error, (FileError, FileNotFoundError)) and str(error).isprintable()
        return None, None if is_plain and str(error).startswith(beginning) else repr(error)[:300]
    except BaseException as error:
        return None, repr(error)[:300]


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
    wanted_weights = model.state_dict()
    wanted_record = json.dumps(record, sort_keys=True)
    bad = []
    refused = 0
    for i, (folder, mutation) in enumerate(mutants(base, tmp_path, count, SEED)):
        command = [
            ["eval", "--checkpoint", str(folder), "--data", str(text)],
            ["generate", "--checkpoint", str(folder.parents[1]), "--tokens", "3"],
            ["train", "--resume", "--out", str(folder.parents[1]), "--steps", "4"],
        ][i % 3]
        loaded, fault = attempt(lambda folder=folder: checkpoint.load_any(folder), "")
        refused += loaded is None
        if loaded is not None:
            weights, found = loaded[0].state_dict(), loaded[2]
            if any(not torch.equal(weights[name], wanted) for name, wanted in wanted_weights.items()):
                fault = "other weights"
            if found is not None and json.dumps(found, sort_keys=True) != wanted_record:
                fault = "another record"
        capsys.readouterr()
        code, crash = attempt(lambda command=command: main(command), "")
        err = capsys.readouterr().err
        if code not in (0, 2) or (code == 2 and (err.count("\n") != 1 or not err.startswith("megalodon_ops"))):
            fault = (code, crash, err[:300])
        is_checkpoint = (folder / "training.json").exists()  # without it, the folder is a plain model, for `eval`
        if loaded is None and code == 0 and (command[0] == "train" or is_checkpoint):
            fault = "refused by load, accepted by the command"
        if fault is not None:
            bad.append((mutation, command[0], fault))
    assert not bad, bad[:12]
    assert refused > count / 2


@mutation_counts(15, 400)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_mutated_folder_of_our_format_is_refused_in_one_line_or_computes(tmp_path, count, sharded):
    """Changed weights may load if they are finite; all else must be unchanged or refused."""
    text = b"to be or not to be, that is the question " * 9
    tokenizer = Tokenizer.train([text], vocab_size=270) if sharded else ByteTokenizer()
    model = tiny_model(torch.float32, share_emb=not sharded).to(torch.bfloat16 if sharded else torch.float32)
    model.save(tmp_path / "m", max_shard_bytes=20_000 if sharded else 1 << 30, tokenizer=tokenizer)

    def load_and_compute(folder):
        model, tokenizer, _ = checkpoint.load_any(folder)
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode(text[:50]))
        is_nan = any(parameter.isnan().any() for parameter in model.parameters())
        assert not is_nan and model.config.vocab_size == 31
        return model(tokens_of(1, 5))

    refused, bad = 0, []
    for folder, mutation in mutants(tmp_path / "m", tmp_path, count, SEED + 3):
        logits, fault = attempt(lambda folder=folder: load_and_compute(folder), str(folder))
        refused += logits is None
        if fault:
            bad.append((mutation, fault))
    assert not bad, bad[:12]
    assert refused > count / 3


@mutation_counts(15, 200)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_mutated_folder_of_the_released_format_is_refused_or_gives_its_weights(tmp_path, count, shards):
    model, base = tiny_model(torch.float32), tmp_path / "m"
    base.mkdir()
    save_released(model, base, shards)
    for folder, mutation in mutants(base, tmp_path, count, SEED + 2):
        loaded, fault = attempt(lambda folder=folder: mo.load_official(folder), "load_official: ")
        assert fault is None, (mutation, fault)
        if loaded is not None:
            weights = loaded.state_dict()
            assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items()), mutation


@mutation_counts(20, 300)
def test_a_mutated_state_is_refused_or_valid(tmp_path, count):
    model = tiny_model(torch.float32)
    (tmp_path / "m").mkdir()
    model(tokens_of(2, 5), return_state=True)[1].save(tmp_path / "m" / "state.safetensors", model.config)
    for folder, mutation in mutants(tmp_path / "m", tmp_path, count, SEED + 4):
        path = folder / "state.safetensors"
        state, fault = attempt(lambda path=path: mo.MegalodonState.load(path, model.config), str(path))
        assert fault is None, (mutation, fault)
        if state is not None:
            model(tokens_of(2, 3), state=state)

"""Several processes save one path at once: none fails, and the path holds the whole result of one of them."""

import errno
import fcntl
import itertools
import multiprocessing
import os
import shutil
import threading
import time

import pytest
import torch
from models import SMALLEST
from torch import nn

import megalodon_ops as mo
from megalodon_ops.storage import files
from megalodon_ops.storage import folder as checkpoint
from megalodon_ops.storage import weights
from megalodon_ops.tokenizers import Tokenizer, load_tokenizer
from megalodon_ops.training import run_checkpoint as runs
from megalodon_ops.training import load_checkpoint, save_checkpoint

CONFIG = mo.MegalodonConfig(**SMALLEST)


def model_of(value, config=CONFIG):
    model = mo.Megalodon(config)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def value_of(model):
    """Return the one value of all weights."""
    (value,) = torch.cat([weight.flatten() for weight in model.state_dict().values()]).unique().tolist()
    return value


def save_state(path, value):
    _, state = model_of(0.5)(torch.ones(value, 1, dtype=torch.int64), return_state=True)
    state.detach().save(path, CONFIG)


def save_tokenizer(path, value):
    """Save a tokenizer whose second file names another start token for each value."""
    content = Tokenizer.train([b"to be or not to be %d " % value * 20], vocab_size=260 + value).content
    path.with_name(f"{value}.json").write_bytes(content)
    Tokenizer.from_file(path.with_name(f"{value}.json"), start="abcdefgh"[value]).save(path)
    path.with_name(f"{value}.json").unlink()


def tokenizer_value(path):
    tokenizer = load_tokenizer(path)
    value = tokenizer.vocab_size - 260
    assert tokenizer.start_token == "abcdefgh"[value]
    return value


def checkpoint_value(path):
    found, model = load_checkpoint(path), model_of(0)
    found.load_weights(model)
    assert found.record["value"] == value_of(model)
    return value_of(model)


# What is saved: how, as one of several values, and how the value is read.
KINDS = {
    "model": (lambda path, value: model_of(value).save(path), lambda path: value_of(mo.Megalodon.load(path))),
    "released": (lambda path, i: mo.save_official(model_of(i), path), lambda path: value_of(mo.load_official(path))),
    "checkpoint": (lambda path, i: save_checkpoint(path, 7, model_of(i), record={"value": i}), checkpoint_value),
    "state": (save_state, lambda path: mo.MegalodonState.load(path, CONFIG).num_sequences),
    "tokenizer": (save_tokenizer, tokenizer_value),
}


def drafts(folder):
    return [*folder.rglob(".*")]


def _save_at_once(save, paths, value, ready, messages):
    for path in paths:
        ready.wait(60)
        try:
            save(path, value)
        except BaseException as error:
            messages.put(f"{path.name}: {error}")
    messages.put(None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("exchange", [True, False])
def test_processes_that_save_one_path(tmp_path, monkeypatch, kind, processes, exchange):
    """Every second path exists before."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    save, read_value = KINDS[kind]
    paths = [tmp_path / f"{i}" / "it" for i in range(20)]
    for i, path in enumerate(paths):
        path.parent.mkdir()
        if i % 2:
            save(path, 5)
    context = multiprocessing.get_context("fork")
    ready, messages = context.Barrier(processes), context.Queue()
    values = range(1, processes + 1)
    workers = [context.Process(target=_save_at_once, args=(save, paths, value, ready, messages)) for value in values]
    for process in workers:
        process.start()
    errors = []
    while errors.count(None) < processes:
        errors.append(messages.get(timeout=60))
    for process in workers:
        process.join(60)
    assert not any(errors)
    assert {read_value(path) for path in paths} <= {*values}
    assert not drafts(tmp_path)


def interrupt(monkeypatch, module, name, interruption, call=0):
    """Make call number `call` of a function call `interruption` first."""
    real = getattr(module, name)
    calls = itertools.count()

    def interrupted(*arguments, **options):
        if next(calls) == call:
            interruption()
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, interrupted)


@pytest.mark.parametrize("kind", ["model", "released", "checkpoint", "state"])
def test_another_save_while_one_writes(tmp_path, monkeypatch, kind):
    """The second save leaves the first one's draft, which then replaces its result."""
    save, read_value = KINDS[kind]
    for before in (False, True):
        path = tmp_path / str(before)
        if before:
            save(path, 1)
        interrupt(monkeypatch, files, "flush", lambda path=path: save(path, 2))
        save(path, 3)
        assert read_value(path) == 3
        monkeypatch.undo()
    assert not drafts(tmp_path)


def disable_locks(monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_folders_that_cannot_be_exchanged_nor_locked(tmp_path, monkeypatch):
    """Another process takes the name while it is free."""
    disable_locks(monkeypatch)
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    model_of(1).save(tmp_path / "it")
    interrupt(monkeypatch, os, "rename", lambda: model_of(2).save(tmp_path / "it"), call=1)
    model_of(3).save(tmp_path / "it")
    assert value_of(mo.Megalodon.load(tmp_path / "it")) == 3
    assert not drafts(tmp_path)


def test_the_old_folder_comes_back_if_the_new_one_cannot_be_renamed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    model_of(1).save(tmp_path / "it")
    rename = os.rename

    def rename_on_full_disk(source, target):
        if source.name == "new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_on_full_disk)
    with pytest.raises(OSError, match="it: could not be written: No space left"):
        model_of(2).save(tmp_path / "it")
    assert value_of(mo.Megalodon.load(tmp_path / "it")) == 1
    assert not drafts(tmp_path)


def test_two_processes_remove_one_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, model_of(step))
    interrupt(monkeypatch, runs, "drafting", lambda: shutil.rmtree(tmp_path / "checkpoints" / "step-00000001"))
    save_checkpoint(tmp_path, 3, model_of(3))
    assert [path.name for path in runs.checkpoints_of(tmp_path)] == ["step-00000002", "step-00000003"]


def test_a_model_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """All of its shards are those of one model."""
    model_of(1).save(tmp_path / "it", max_shard_bytes=100)
    interrupt(monkeypatch, weights, "load_file", lambda: model_of(2).save(tmp_path / "it", max_shard_bytes=100), call=3)
    assert value_of(mo.Megalodon.load(tmp_path / "it")) == 2


def test_without_locks_files_are_written_and_no_draft_is_removed(tmp_path, monkeypatch):
    disable_locks(monkeypatch)
    interrupt(monkeypatch, files, "flush", lambda: files.write_whole(tmp_path / "it", b"2"))
    files.write_whole(tmp_path / "it", b"3")
    assert (tmp_path / "it").read_bytes() == b"3"
    assert not drafts(tmp_path)


def test_a_lock_that_its_last_holder_removes_is_recreated(tmp_path, monkeypatch):
    lock = tmp_path / ".it.draft-turn.lock"
    interrupt(monkeypatch, fcntl, "flock", lock.unlink)
    with files.drafting(tmp_path / "it", "turn"):
        assert lock.exists()


def saving_thread(monkeypatch, save, *arguments):
    """Return a thread that saves, and a function that starts it and returns once it has saved or waits for a lock."""
    thread = threading.Thread(target=save, args=arguments)
    is_waiting = threading.Event()
    flock = fcntl.flock

    def flock_with_event(file, operation):
        try:
            flock(file, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            is_waiting.set()
            flock(file, operation)

    def start():
        thread.start()
        while thread.is_alive() and not is_waiting.is_set():
            time.sleep(0.001)

    monkeypatch.setattr(fcntl, "flock", flock_with_event)
    return thread, start


def test_a_tokenizer_has_both_files_of_one_process(tmp_path, monkeypatch):
    """While one process writes them, another one waits."""
    other, start = saving_thread(monkeypatch, save_tokenizer, tmp_path / "it", 2)
    interrupt(monkeypatch, files, "flush", start, call=1)
    save_tokenizer(tmp_path / "it", 3)
    other.join()
    assert tokenizer_value(tmp_path / "it") == 2


def test_another_process_creates_the_folder_while_save_checks_it(tmp_path, monkeypatch):
    """It is not taken for a folder that holds other files."""
    other, start = saving_thread(monkeypatch, model_of(1).save, tmp_path / "it")
    interrupt(monkeypatch, checkpoint, "kept_files", start)
    model_of(2).save(tmp_path / "it")
    other.join()
    assert value_of(mo.Megalodon.load(tmp_path / "it")) in (1, 2)

"""A model's folder is whole, even if the disk is full or the process that writes it is killed."""

import itertools
import multiprocessing
import os
import signal
import time

import pytest
import torch
from killed import COUNTS, killed_at
from models import TINY, tiny_model

import megalodon_ops as mo
from megalodon_ops.storage import files


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, file_size_limit):
    model = tiny_model(torch.float32)
    model.save(tmp_path / "m")
    before = {path: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    other = tiny_model(torch.float32, model_dim=64)
    for limit in (10, 10_000):
        with file_size_limit(limit), pytest.raises(OSError, match=f"^{tmp_path}/m: could not be written: .*large"):
            other.save(tmp_path / "m")
        assert {path: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["m"]


def _save_repeatedly(folder):
    model = mo.Megalodon(mo.MegalodonConfig(**TINY))
    for number in itertools.count():
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, number)
        model.save(folder)


@pytest.mark.slow
def test_killed_at_any_time_the_folder_is_the_old_or_the_new(tmp_path):
    """A process that saves repeatedly is killed 12 times; the folder is always whole."""
    folder = tmp_path / "m"
    model = mo.Megalodon(mo.MegalodonConfig(**TINY))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0)
    model.save(folder)
    for i in range(12):
        process = multiprocessing.get_context("fork").Process(target=_save_repeatedly, args=(folder,))
        process.start()
        time.sleep(0.1 + 0.0237 * i)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        weights = mo.Megalodon.load(folder).state_dict()
        assert len(torch.cat([weight.flatten() for weight in weights.values()]).unique()) == 1
    model.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("call", ["rename", "fsync"])
@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_each_call(tmp_path, monkeypatch, counts, call, exchange):
    """The folder is the old or the new one; between the two renames without an exchange, the old one is in a draft."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    old, new = tiny_model(torch.float32), tiny_model(torch.float32, swiglu=True)
    for count in counts:
        parent = tmp_path / str(count)
        parent.mkdir()
        old.save(parent / "m")
        with killed_at(monkeypatch, call, count):
            new.save(parent / "m")
        if (parent / "m").exists():
            is_killed = not (exchange and call == "rename")  # an exchange makes no rename
            allowed = [old.config, new.config] if is_killed else [new.config]
            assert mo.Megalodon.load(parent / "m").config in allowed, count
        else:
            assert not exchange
            (moved,) = parent.glob(".m.draft-*/old-*")
            assert mo.Megalodon.load(moved).config == old.config, count
        new.save(parent / "m")
        assert mo.Megalodon.load(parent / "m").config == new.config, count
        assert [path.name for path in parent.iterdir()] == ["m"], count

"""Checkpoints: complete or not there, whatever happens while they are written."""

import json
import os

import pytest
import torch
from torch import nn

from megalodon_ops import Megalodon, MegalodonConfig
from megalodon_ops.cli import checkpoint
from megalodon_ops.cli.errors import CommandError


CONFIG = MegalodonConfig(
    num_layers=1, model_dim=4, z_dim=2, value_dim=2, ffn_hidden_dim=2, cema_ndim=1, chunk_size=2, norm_num_groups=1,
    vocab_size=9,
)  # fmt: skip


def record(step):
    options = {
        "data": None, "steps": 9, "minutes": None, "preset": "small", "context": "packed", "batch": 1, "length": 3,
        "lr": 0.01, "warmup": 1, "weight_decay": 0.1, "clip": 1.0, "seed": 0, "device": "cpu", "dtype": "float32",
        "eval_every": 1, "checkpoint_every": 1,
    }  # fmt: skip
    position = {"taken": step, "readers": [[-1, 0]]}
    return {
        "megalodon_ops": "1", "torch": "2", "threads": 1, "options": options, "config": CONFIG.to_dict(),
        "data": {"fingerprint": "0" * 64, "position": position}, "seconds": float(step),
        "schedule": {"steps": 9, "budget": None, "anchor": [0, 0.0], "end": 9},
    }  # fmt: skip


def save(run, step, value=None, **options):
    model, optimizer = Megalodon(CONFIG), {}
    for name, parameter in model.named_parameters():
        nn.init.constant_(parameter, step if value is None else value)
        for what, shape in {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}.items():
            optimizer[f"{name}/{what}"] = torch.zeros(shape)
    parts = {
        "model": checkpoint.model_tensors(model), "optimizer": optimizer if step else {}, "state": {},
        "random": {"cpu": torch.get_rng_state()},
    }  # fmt: skip
    content = record(step)
    return checkpoint.save(run, step, {**content, "options": {**content["options"], **options}}, parts)


def newest(run):
    return checkpoint.load(run, "--resume")


def test_round_trip(tmp_path):
    folder = save(tmp_path, 12)
    for path in (tmp_path, folder):
        found = newest(path)
        assert found.folder == folder
        assert found.record["step"] == found.record["data"]["position"]["taken"] == 12
        assert found.parts["state"] == {}
        assert torch.equal(found.parts["model"]["embed.weight"], torch.full((9, 4), 12.0))
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_the_newest_is_read_and_old_ones_go(tmp_path):
    for step in (8, 9, 10, 100):
        save(tmp_path, step)
    assert newest(tmp_path).record["step"] == 100
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000100"]


def test_the_same_step_again_replaces(tmp_path):
    save(tmp_path, 5, value=1)
    save(tmp_path, 5, value=2)
    assert newest(tmp_path).parts["model"]["embed.weight"][0, 0] == 2


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_killed_while_writing(tmp_path, monkeypatch, call, count):
    """At any flush or rename of the writer the checkpoint before is still read, and the next writing succeeds."""
    save(tmp_path, 1)
    save(tmp_path, 2)

    class Killed(BaseException):
        pass

    real, calls = getattr(os, call), 0

    def die_at(*arguments):
        nonlocal calls
        calls += 1
        if calls > count:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, die_at)
        try:
            save(tmp_path, 3)
        except Killed:
            pass
    assert newest(tmp_path).record["step"] in (2, 3)
    save(tmp_path, 4)
    assert newest(tmp_path).record["step"] == 4
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_draft_that_cannot_be_finished_goes(tmp_path, file_size_limit):
    """On a disk that is full at any file, the checkpoint before is as it was, and nothing of the new one stays."""
    folder = save(tmp_path, 1)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for limit in (100, 20, 0):  # bytes a file may have: the record fails, then the tensors
        with file_size_limit(limit), pytest.raises(CommandError, match="step-00000002: could not be written: .*large"):
            checkpoint.save(tmp_path, 2, {"note": "x" * 100}, {"state": {}})
        assert list((tmp_path / "checkpoints").iterdir()) == [folder]
        with file_size_limit(limit), pytest.raises(CommandError, match="curve.png: could not be written: .*large"):
            checkpoint.write_whole(tmp_path / "curve.png", b"x" * 101)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_options_that_an_older_version_did_not_have(tmp_path):
    """The older version took every file of a folder, so that its text is what all patterns match."""
    assert "glob" not in json.loads((save(tmp_path, 1) / "checkpoint.json").read_text())["options"]
    assert newest(tmp_path).record["options"]["glob"] == ["*"]


@pytest.mark.parametrize(
    "glob, is_read", [(None, True), (["*.py", "a/*"], True), ([], False), ([""], False), ("*", False)]
)
def test_globs_in_a_checkpoint(tmp_path, glob, is_read):
    save(tmp_path, 1, glob=glob)
    if is_read:
        assert newest(tmp_path).record["options"]["glob"] == glob
    else:
        with pytest.raises(CommandError, match="`options.glob` must be a list of patterns of file names, or null"):
            newest(tmp_path)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: truncate(folder / "model.safetensors"),
        lambda folder: truncate(folder / "checkpoint.json"),
        lambda folder: (folder / "state.safetensors").unlink(),
        lambda folder: (folder / "checkpoint.json").write_text("{}"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * (folder / "model.safetensors").stat().st_size),
    ],
    ids=["short tensors", "short record", "missing tensors", "empty record", "noise"],
)
def test_damaged_checkpoints_are_passed_over(tmp_path, capsys, damage):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    damage(folder)
    assert newest(tmp_path).record["step"] == 1
    assert f"passing over {folder}" in capsys.readouterr().err


def test_nothing_to_read(tmp_path):
    with pytest.raises(CommandError, match="--resume .*: no complete checkpoint"):
        newest(tmp_path)
    with pytest.raises(CommandError, match="--resume .*missing: no such folder"):
        newest(tmp_path / "missing")


@pytest.mark.parametrize("number", [1, 99, "2", None, True])
def test_another_format_is_refused(tmp_path, number):
    path = save(tmp_path, 1) / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": number}))
    with pytest.raises(CommandError, match="no complete checkpoint in this folder; .*: checkpoint.json: its format is"):
        newest(tmp_path)
    with pytest.raises(CommandError, match=f"--resume {path.parent}: checkpoint.json: its format is"):
        newest(path.parent)


def network(seed):
    torch.manual_seed(seed)
    model = Megalodon(CONFIG)
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim == 2) == d], "weight_decay": 0.1 * d} for d in (1, 0)
    ]
    return model, torch.optim.AdamW(groups, lr=0.01)


def descend(model, optimizer, steps):
    for step in range(steps):
        tokens = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()


@pytest.mark.parametrize("before", [0, 3])
def test_model_and_optimizer_go_on_exactly(tmp_path, before):
    model, optimizer = network(0)
    descend(model, optimizer, before)
    parts = {
        "model": checkpoint.model_tensors(model),
        "optimizer": checkpoint.optimizer_tensors(optimizer, model),
        "state": {},
        "random": {"cpu": torch.get_rng_state()},
    }
    checkpoint.save(tmp_path, before, record(before), parts)
    other, its_optimizer = network(1)
    checkpoint.load_model(other, newest(tmp_path))
    checkpoint.load_optimizer(its_optimizer, other, newest(tmp_path))
    descend(model, optimizer, 4)
    descend(other, its_optimizer, 4)
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, another)

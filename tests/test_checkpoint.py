"""Checkpoints of a run: complete or not there, whatever happens while they are written."""

import json
import logging
import os

import pytest
import torch
from killed import killed_at
from torch import nn

from megalodon_ops import Megalodon, MegalodonConfig, MegalodonState
from megalodon_ops.cli import schema
from megalodon_ops.errors import FileError
from megalodon_ops.model import files
from megalodon_ops.training.checkpoint import load_any, load_checkpoint, save_checkpoint

CONFIG = MegalodonConfig(
    num_layers=1, model_dim=4, z_dim=2, value_dim=2, ffn_hidden_dim=2, cema_ndim=1, chunk_size=2, norm_num_groups=1,
    vocab_size=9,
)  # fmt: skip


def record(step, **options):
    """What `train` adds to a checkpoint."""
    options = {
        "data": None, "glob": None, "tokenizer_file": None, "steps": 9, "minutes": None, "preset": "small", "context": "packed", "batch": 1,
        "length": 3, "lr": 0.01, "warmup": 1, "weight_decay": 0.1, "clip": 1.0, "seed": 0, "device": "cpu",
        "dtype": "float32", "eval_every": 1, "checkpoint_every": 1, **options,
    }  # fmt: skip
    return {
        "options": options, "data": {"fingerprint": "0" * 64, "position": {"taken": step, "readers": [[-1, 0]]}},
        "schedule": {"steps": 9, "budget": None, "anchor": [0, 0.0], "end": 9}, "seconds": float(step),
    }  # fmt: skip


def save(run, step, value=None, **options):
    model = Megalodon(CONFIG)
    for parameter in model.parameters():
        nn.init.constant_(parameter, step if value is None else value)
    return save_checkpoint(run, step, model, record=record(step, **options))


def first_weight(run):
    return load_any(run)[0].embed.weight[0, 0].item()


def test_round_trip(tmp_path):
    folder = save(tmp_path, 12)
    for path in (tmp_path, folder, str(folder)):
        found = load_checkpoint(path)
        assert found.folder == folder
        assert found.step == found.record["data"]["position"]["taken"] == 12
        assert found.config == CONFIG
        assert found.state is None and found.optimizer == {}
        assert first_weight(path) == 12.0
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "random.safetensors", "training.json",
    }  # fmt: skip


def test_a_checkpoint_is_a_model(tmp_path):
    """The plain loader of models reads a checkpoint's folder, and a run's only by its checkpoint's name."""
    folder = save(tmp_path, 12)
    assert Megalodon.load(folder).embed.weight[0, 0] == 12
    with pytest.raises(FileNotFoundError, match="it is a run of .*: name a folder in its checkpoints/"):
        Megalodon.load(tmp_path)


def test_the_newest_is_read_and_old_ones_go(tmp_path):
    for step in (8, 9, 10, 99_999_999, 100_000_000):
        save(tmp_path, step)
    assert load_checkpoint(tmp_path).step == 100_000_000
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-99999999", "step-100000000"}


def test_more_are_kept_where_asked(tmp_path):
    for step in range(4):
        save_checkpoint(tmp_path, step, Megalodon(CONFIG), keep=3)
    assert [path.name[-1] for path in sorted((tmp_path / "checkpoints").iterdir())] == ["1", "2", "3"]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_written_stays_beside_a_later_one(tmp_path, keep):
    """As when a run goes on from the checkpoint before a damaged one."""
    save(tmp_path, 9)
    save_checkpoint(tmp_path, 5, Megalodon(CONFIG), keep=keep)
    save_checkpoint(tmp_path, 6, Megalodon(CONFIG), keep=keep)
    names = [path.name[-1] for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["5", "6", "9"][2 - keep :]


def test_the_same_step_again_replaces(tmp_path):
    save(tmp_path, 5, value=1)
    save(tmp_path, 5, value=2)
    assert first_weight(tmp_path) == 2


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("count", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 5, 6, 7)), 4])
@pytest.mark.parametrize("step", [2, 3])
def test_killed_while_writing(tmp_path, monkeypatch, call, count, step):
    """At any flush or rename of the writer a whole checkpoint is read, and the next writing succeeds and tidies up."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    with killed_at(monkeypatch, call, count):
        save(tmp_path, step, value=7)
    assert (load_checkpoint(tmp_path).step, first_weight(tmp_path)) in {(2, 2), (step, 7)}
    save(tmp_path, 4)
    assert load_checkpoint(tmp_path).step == 4
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_draft_that_cannot_be_finished_goes(tmp_path, file_size_limit):
    """On a disk that is full at any file, the checkpoint before is as it was, and nothing of the new one stays."""
    folder = save(tmp_path, 1)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    for limit in (sizes["random.safetensors"] - 1, sizes["config.json"] - 1, 0):
        with file_size_limit(limit), pytest.raises(OSError, match="step-00000002: could not be written: .*large"):
            save(tmp_path, 2)
        assert list((tmp_path / "checkpoints").iterdir()) == [folder]
        with file_size_limit(limit), pytest.raises(OSError, match="curve.png: could not be written: .*large"):
            files.write_whole(tmp_path / "curve.png", b"x" * 10000)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "glob, is_read", [(None, True), (["*.py", "a/*"], True), ([], False), ([""], False), ("*", False)]
)
def test_globs_in_a_checkpoint(tmp_path, glob, is_read):
    save(tmp_path, 0, glob=glob)
    if is_read:
        assert load_checkpoint(tmp_path, check=schema.check).record["options"]["glob"] == glob
    else:
        with pytest.raises(FileError, match="`options.glob` must be a list of patterns of file names, or null"):
            load_checkpoint(tmp_path, check=schema.check)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def noise(path):
    path.write_bytes(b"x" * path.stat().st_size)


DAMAGE = {
    "short tensors": lambda folder: truncate(folder / "model.safetensors"),
    "short record": lambda folder: truncate(folder / "training.json"),
    "missing tensors": lambda folder: (folder / "random.safetensors").unlink(),
    "missing weights": lambda folder: (folder / "model.safetensors").unlink(),
    "missing config": lambda folder: (folder / "config.json").unlink(),
    "empty record": lambda folder: (folder / "training.json").write_text("{}"),
    "noise": lambda folder: noise(folder / "model.safetensors"),
    "a file more": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "an optimizer more": lambda folder: (folder / "optimizer.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_passed_over(tmp_path, caplog, damage):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    DAMAGE[damage](folder)
    with caplog.at_level(logging.WARNING):
        assert load_checkpoint(tmp_path).step == 1
    (line,) = caplog.messages
    assert line.startswith(f"passing over {folder}/")
    with pytest.raises((FileError, FileNotFoundError)):
        load_any(folder)


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileError, match=f"^{tmp_path}: no complete checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/missing: no such folder"):
        load_checkpoint(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}: no model in this folder: "):
        load_any(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=f"^{tmp_path}/file: a file; name its folder"):
        load_any(tmp_path / "file")


@pytest.mark.parametrize("number", [1, 99, "2", None, True])
def test_another_format_is_refused(tmp_path, number):
    path = save(tmp_path, 1) / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": number}))
    with pytest.raises(FileError, match="no complete checkpoint in this folder; .*/training.json: its format is"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileError, match=f"^{path}: its format is .*, and this version reads 3"):
        load_checkpoint(path.parent)


def test_a_checkpoint_of_an_old_version_is_refused_by_its_name(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text('{"format": 2, "megalodon_ops": "0.1.0"}')
    for path in (tmp_path, folder):
        for load in (load_any, load_checkpoint):
            message = r"checkpoint.json: is a checkpoint of format 2, .* of version '0.1.0', reads it"
            with pytest.raises(FileError, match=message):
                load(path)


def network(seed, kind=torch.optim.AdamW, **options):
    torch.manual_seed(seed)
    model = Megalodon(CONFIG)
    groups = [{"params": [p for p in model.parameters() if (p.ndim == 2) == d]} for d in (1, 0)]
    return model, kind(groups, lr=0.01, **options)


def descend(model, optimizer, steps):
    for step in range(steps):
        tokens = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {}), "AMSGrad": (torch.optim.AdamW, {"amsgrad": True}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}), "SGD": (torch.optim.SGD, {}),
}  # fmt: skip


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_model_optimizer_state_and_random_numbers_go_on_exactly(tmp_path, before, kind):
    kind, options = OPTIMIZERS[kind]
    model, optimizer = network(0, kind, **options)
    descend(model, optimizer, before)
    _, state = model(torch.tensor([[1, 2, 3]]), return_state=True)
    save_checkpoint(tmp_path, before, model, optimizer=optimizer, state=state)
    drawn = torch.rand(3)

    other, its_optimizer = network(1, kind, **options)
    found = load_checkpoint(tmp_path)
    found.load_weights(other)
    found.load_optimizer(its_optimizer, other)
    torch.testing.assert_close(found.state, state, rtol=0, atol=0)
    assert isinstance(found.state, MegalodonState)
    found.restore_random()
    assert torch.equal(torch.rand(3), drawn)
    descend(model, optimizer, 4)
    descend(other, its_optimizer, 4)
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, another)


def test_an_optimizer_of_another_kind_is_refused(tmp_path):
    model, optimizer = network(0)
    descend(model, optimizer, 1)
    save_checkpoint(tmp_path, 1, model, optimizer=optimizer)
    _, other = network(0, torch.optim.AdamW, amsgrad=True)
    with pytest.raises(FileError, match="optimizer.safetensors: must be of an optimizer with the same `amsgrad`"):
        load_checkpoint(tmp_path).load_optimizer(other, model)
    _, other = network(0, torch.optim.SGD)
    with pytest.raises(FileError, match="optimizer.safetensors: is the state of AdamW, and the optimizer is SGD"):
        load_checkpoint(tmp_path).load_optimizer(other, model)


def test_what_is_no_record(tmp_path):
    model = Megalodon(CONFIG)
    for wrong in ([], {"step": 1}, {"x": float("nan")}, {"x": object()}):
        with pytest.raises(ValueError, match="^save_checkpoint: `record` must be"):
            save_checkpoint(tmp_path, 1, model, record=wrong)
    assert list(tmp_path.iterdir()) == []

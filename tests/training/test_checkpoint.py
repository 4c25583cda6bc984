"""Checkpoints of a run: complete or absent, whatever happens while they are written."""

import json
import logging
import multiprocessing
import os
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from killed import COUNTS, killed_at
from models import SMALLEST
from mutations import edit, make_folder
from torch import nn
from torch.utils._pytree import tree_leaves

from megalodon_ops import Megalodon, MegalodonConfig, MegalodonState
from megalodon_ops.storage.files import FileError
from megalodon_ops.storage import files
from megalodon_ops.training.run_checkpoint import checkpoints_of, load_any, load_checkpoint, save_checkpoint

CONFIG = MegalodonConfig(**SMALLEST)


def save(run, step, value=None):
    model = Megalodon(CONFIG)
    for parameter in model.parameters():
        nn.init.constant_(parameter, step if value is None else value)
    return save_checkpoint(run, step, model, record={"position": step})


def first_weight(run):
    return load_any(run)[0].embed.weight[0, 0].item()


def test_round_trip(tmp_path):
    folder = save(tmp_path, 12)
    for path in (tmp_path, folder, str(folder)):
        found = load_checkpoint(path)
        assert found.folder == folder
        assert found.step == found.record["position"] == 12
        assert found.config == CONFIG
        assert found.state is None
        assert first_weight(path) == 12.0
    names = "config.json model.safetensors modeling_megalodon.py random.safetensors training.json".split()
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_checkpoint_is_a_model(tmp_path):
    """Megalodon.load reads a checkpoint's folder, but not a run's."""
    folder = save(tmp_path, 12)
    assert Megalodon.load(folder).embed.weight[0, 0] == 12
    with pytest.raises(FileNotFoundError, match="it is a run of .*: name a folder in its checkpoints/"):
        Megalodon.load(tmp_path)


def test_the_newest_is_read_and_old_ones_are_removed(tmp_path):
    for step in (8, 9, 10, 99_999_999, 100_000_000):
        save(tmp_path, step)
    assert load_checkpoint(tmp_path).step == 100_000_000
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-99999999", "step-100000000"}


def test_keep_sets_the_number_of_checkpoints(tmp_path):
    for step in range(4):
        save_checkpoint(tmp_path, step, Megalodon(CONFIG), keep=3)
    assert [path.name[-1] for path in sorted((tmp_path / "checkpoints").iterdir())] == ["1", "2", "3"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_new_checkpoint_stays_beside_later_ones(tmp_path, keep):
    """Later checkpoints exist after a resume from the one before a damaged one."""
    save(tmp_path, 9)
    save_checkpoint(tmp_path, 5, Megalodon(CONFIG), keep=keep)
    save_checkpoint(tmp_path, 6, Megalodon(CONFIG), keep=keep)
    names = [path.name[-1] for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["5", "6", "9"][2 - keep :]


def test_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 5, value=1)
    save(tmp_path, 5, value=2)
    assert first_weight(tmp_path) == 2


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("step", [2, 3])
def test_killed_while_writing(tmp_path, monkeypatch, call, counts, step):
    """After a kill at any flush or rename, a complete checkpoint is read, and the next save tidies up."""
    between = {(1, 1)} if step == 2 else set()  # the old folder is moved away before the rename
    for count in counts:
        run = tmp_path / str(count)
        save(run, 1)
        save(run, 2)
        with killed_at(monkeypatch, call, count):
            save(run, step, value=7)
        assert (load_checkpoint(run).step, first_weight(run)) in {(2, 2), (step, 7)} | between, count
        save(run, 4)
        assert load_checkpoint(run).step == 4, count
        assert not list((run / "checkpoints").glob(".*")), count


def test_an_unfinished_draft_is_removed(tmp_path, file_size_limit):
    """The disk is full at one of the files: the old checkpoint is unchanged, and nothing of the new one stays."""
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


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def noise(path):
    path.write_bytes(b"x" * path.stat().st_size)


DAMAGE = {
    "short tensors": lambda folder: truncate(folder / "model.safetensors"),
    "short record": lambda folder: truncate(folder / "training.json"),
    "huge tensors": lambda folder: os.truncate(folder / "model.safetensors", 1 << 40),  # sparse
    "missing tensors": lambda folder: (folder / "random.safetensors").unlink(),
    "missing weights": lambda folder: (folder / "model.safetensors").unlink(),
    "missing config": lambda folder: (folder / "config.json").unlink(),
    "empty record": lambda folder: (folder / "training.json").write_text("{}"),
    "a digit of the record": lambda folder: edit(folder / "training.json", '"position": 2', '"position": 3'),
    "a name in the record": lambda folder: edit(folder / "training.json", '"position"', '"positiom"'),
    "no sum of the record": lambda folder: edit(folder / "training.json", '"checksum"', '"checksun"'),
    "noise": lambda folder: noise(folder / "model.safetensors"),
    "a folder for a file": lambda folder: make_folder(folder / "config.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_skipped(tmp_path, caplog, damage):
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


RECORDS = {
    "another format": ({"format": 99}, r"Expected `int` <= 4 - at `\$.format`"),
    "a negative step": ({"step": -1}, r"Expected `int` >= 0 - at `\$.step`"),
    "a step in words": ({"step": "one"}, r"Expected `int`, got `str` - at `\$.step`"),
    "no files": ({"files": None}, r"Expected `object`, got `null` - at `\$.files`"),
    "a mesh of no process": ({"mesh": {"data": 0}}, r"Expected `int` >= 1 - at `\$.mesh\[\.\.\.\]`"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_wrong_record_is_one_line_that_names_file_and_field(tmp_path, kind):
    wrong, message = RECORDS[kind]
    path = save(tmp_path, 1) / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    with pytest.raises(FileError, match=f"no complete checkpoint in this folder; {path}: .*{message}"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileError, match=f"^{path}: .*{message}"):
        load_checkpoint(path.parent)


@pytest.mark.parametrize("name", ["step-best", "step-00000010.bak", "step-7", "step-99999999", "best"])
def test_a_users_files_beside_the_checkpoints_stay_unread(tmp_path, name):
    """Copies under other names, and anything that is no folder."""
    folder = save(tmp_path, 10)
    copy = folder.with_name(name)
    if name == "step-99999999":
        copy.write_text("notes")
    else:
        shutil.copytree(folder, copy)
    for step in (20, 30):
        save(tmp_path, step)
    assert load_checkpoint(tmp_path).step == 30
    names = {path.name for path in folder.parent.iterdir()}
    assert names == {"step-00000020", "step-00000030", name}
    shutil.rmtree(folder.with_name("step-00000020"))
    shutil.rmtree(folder.with_name("step-00000030"))
    assert not checkpoints_of(tmp_path)
    with pytest.raises(FileError, match="no complete checkpoint in this folder$"):
        load_checkpoint(tmp_path)


def _load_with_little_memory(run, pipe):
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (8 << 20), -1))
    try:
        load_checkpoint(run, verify=False)
    except OSError as error:
        pipe.send((error.strerror, error.filename))
    else:
        pipe.send("loaded")


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_too_little_memory_is_not_taken_for_a_damaged_file(tmp_path):
    """A complete checkpoint that cannot be mapped is not skipped: the run would resume from the one before."""
    config = replace(CONFIG, vocab_size=300_000)
    for step in (1, 2):
        folder = save_checkpoint(tmp_path, step, Megalodon(config))
    load_checkpoint(tmp_path, verify=False)  # imports what loading needs
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_load_with_little_memory, args=(tmp_path, sender))
    process.start()
    process.join(60)
    assert receiver.poll() and receiver.recv() == ("Cannot allocate memory", f"{folder}/model.safetensors")


def test_files_and_folders_are_written_through_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "file").symlink_to(tmp_path / "real" / "file")
    files.write_whole(tmp_path / "file", b"1")
    files.write_whole(tmp_path / "file", b"2")
    state = Megalodon(CONFIG)(torch.tensor([[1, 2]]), return_state=True)[1].detach()
    (tmp_path / "state").symlink_to(tmp_path / "real" / "state")
    (tmp_path / "model").symlink_to(tmp_path / "real" / "model")
    for _ in range(2):
        state.save(tmp_path / "state", CONFIG)
        Megalodon(CONFIG).save(tmp_path / "model")
    assert all((tmp_path / name).is_symlink() for name in ("file", "state", "model"))
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["file", "model", "state"]
    assert (tmp_path / "real" / "file").read_bytes() == b"2"


def network(seed, kind=torch.optim.AdamW, **options):
    """A model and its optimizer, with two groups of parameters."""
    torch.manual_seed(seed)
    model = Megalodon(CONFIG)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    return model, kind([{"params": matrices}, {"params": others}], lr=0.01, **options)


def descend(model, optimizer, steps):
    for step in range(steps):
        tokens = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()


ADAMW, SGD = torch.optim.AdamW, torch.optim.SGD
OPTIMIZERS = [(ADAMW, {}, 0), (ADAMW, {}, 3), (ADAMW, {"amsgrad": True}, 3), (SGD, {"momentum": 0.9}, 3), (SGD, {}, 3)]


@pytest.mark.parametrize(("kind", "options", "before"), OPTIMIZERS)
def test_model_optimizer_state_and_random_numbers_resume_exactly(tmp_path, kind, options, before):
    model, optimizer = network(0, kind, **options)
    descend(model, optimizer, before)
    _, state = model(torch.tensor([[1, 2, 3]]), return_state=True)
    save_checkpoint(tmp_path, before, model, optimizer=optimizer, state=state)
    drawn = torch.rand(3)

    other, its_optimizer = network(1, kind, **options)
    found = load_checkpoint(tmp_path)
    found.load_weights(other)
    found.load_optimizer(its_optimizer, other)
    torch.testing.assert_close(tree_leaves(found.state), tree_leaves(state), rtol=0, atol=0)
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
    _, other = network(0, torch.optim.SGD)
    with pytest.raises(FileError, match="optimizer.safetensors: is the state of AdamW, and the optimizer is SGD"):
        load_checkpoint(tmp_path).load_optimizer(other, model)


def test_wrong_records_are_refused(tmp_path):
    model = Megalodon(CONFIG)
    for wrong, message in (
        ({"step": 1}, "`record` must not contain step"),
        ({"x": float("nan")}, "JSON"),
        ({"x": {1}}, "JSON"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            save_checkpoint(tmp_path, 1, model, record=wrong)
    assert list(tmp_path.iterdir()) == []

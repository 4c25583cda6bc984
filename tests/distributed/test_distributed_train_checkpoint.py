"""Checkpoints that several processes write together: complete or absent, and readable by any number of processes."""

import functools
import io
import json
import logging
import os
import pickle
import resource
import shutil
import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist
from data_parallel import gather
from models import SMALLEST
from mutations import edit, make_pipe
from torch.distributed.checkpoint import metadata
from torch.utils._pytree import tree_leaves

from megalodon_ops import Megalodon, MegalodonConfig
from megalodon_ops.distributed import make_mesh, parallelize, split
from megalodon_ops.storage import sharded_tensors
from megalodon_ops.storage.files import FileError, file_sha256, remove_drafts
from megalodon_ops.training import Saver, adamw, load_any, load_checkpoint, save_checkpoint
from megalodon_ops.training.record import write_record

SIZES = SMALLEST | dict(model_dim=12, z_dim=4, value_dim=6, ffn_hidden_dim=10, cema_ndim=2, chunk_size=4)
CONFIG = MegalodonConfig(**SIZES | {"norm_num_groups": 2})  # two ranks of `tensor` share a head; shards of 5, 3 and 2
ROWS = 4


def new_run(sizes=None, seed=0):
    """A model and its optimizer, split over the processes of a mesh, and the mesh; in one process without `sizes`."""
    torch.manual_seed(seed)
    model = Megalodon(CONFIG)
    mesh = None
    if sizes is not None:
        mesh = make_mesh(sizes, device_type="cpu")
        model = parallelize(model, mesh)
    return model, adamw(model, lr=0.01), mesh


def run_steps(model, optimizer, mesh, steps):
    for step in range(steps):
        tokens = torch.randint(9, (ROWS, 7), generator=torch.Generator().manual_seed(step))
        batch = tokens[:, :-1], tokens[:, 1:]
        if mesh is not None:
            batch = (split(tensor, mesh, chunk_size=CONFIG.chunk_size) for tensor in batch)
        optimizer.zero_grad()
        model.loss(*batch).backward()
        optimizer.step()


def whole_values(model, optimizer):
    """Every tensor of a model and of its optimizer, whole, as arrays."""
    values = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        values |= {f"{name}/{key}": tensor for key, tensor in optimizer.state[parameter].items()}
    return {name: gather(tensor).clone().numpy() for name, tensor in values.items()}


def state_of_rows(rows):
    """A state whose rows all differ."""
    torch.manual_seed(1)
    tokens = torch.randint(9, (ROWS, 6))
    with torch.no_grad():
        return Megalodon(CONFIG)(tokens, return_state=True)[1][list(rows)]


def rows_of(mesh):
    """The rows of this process."""
    if "data" not in mesh.mesh_dim_names:
        return range(ROWS)
    count = ROWS // mesh["data"].size()
    first = mesh.get_local_rank("data") * count
    return range(first, first + count)


def save_on_mesh(run, sizes):
    model, optimizer, mesh = new_run(sizes)
    run_steps(model, optimizer, mesh, 3)
    values = whole_values(model, optimizer)
    torch.manual_seed(100)
    saver = Saver(run, mesh)
    saver.save(3, model, optimizer=optimizer, state=state_of_rows(rows_of(mesh)), record={"position": 5})
    drawn = torch.rand(3).tolist()
    run_steps(model, optimizer, mesh, 1)  # changes every parameter before the folder exists
    saver.wait()
    return values, drawn


def resume(run, sizes=None):
    """Resume a run, and return its values and the next random numbers; compare the state of this process's rows."""
    model, optimizer, mesh = new_run(sizes, seed=7)
    found = load_checkpoint(run)
    found.load_weights(model)
    found.load_optimizer(optimizer, model)
    if mesh is None:
        state, rows = found.state, range(ROWS)
    else:
        state, rows = found.state_of(mesh), rows_of(mesh)
    torch.testing.assert_close(*map(tree_leaves, (state, state_of_rows(rows))), rtol=0, atol=0)
    found.restore_random()
    drawn = torch.rand(3)
    found.restore_random()
    assert torch.equal(torch.rand(3), drawn)
    return whole_values(model, optimizer), drawn.tolist()


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] == value).all(), name


slow = pytest.mark.slow


@pytest.fixture(scope="module")
def run_on_mesh(ranks, tmp_path_factory):
    """`run_on_mesh(mesh)`: a run of four processes, their values, and the random numbers that rank 0 drew next."""

    @functools.cache
    def run(sizes):
        folder = tmp_path_factory.mktemp("saved")
        return folder, *ranks.run(save_on_mesh, 4, folder, sizes)[0]

    return run


@pytest.fixture
def saved_run(run_on_mesh):
    return run_on_mesh("data=2,chunk=2")


def test_contents_of_a_checkpoint(saved_run):
    run, _, _ = saved_run
    (folder,) = (run / "checkpoints").iterdir()
    assert folder.name == "step-00000003"
    names = ["config.json", "distributed", "modeling_megalodon.py", "training.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    record = json.loads((folder / "training.json").read_text())
    assert record["mesh"] == {"data": 2, "chunk": 2} and record["position"] == 5
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"training.json"}
    assert record["files"].keys() == on_disk
    assert len(on_disk) == 7, "config.json, its module, .metadata and a file of each process"
    for name, facts in record["files"].items():
        assert facts == {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}


RESUMES = [
    ("data=2,chunk=2", "data=2,chunk=2", 4),
    ("data=2,chunk=2", "data=2", 2),
    pytest.param("data=2,chunk=2", "data=1", 1, marks=slow),
    pytest.param("data=2,chunk=2", "chunk=2", 2, marks=slow),
    pytest.param("data=2,tensor=2", "data=2", 2, marks=slow),
    pytest.param("data=2,tensor=2", "tensor=2", 2, marks=slow),
    pytest.param("data=2,tensor=2", "chunk=2,tensor=2", 4, marks=slow),
]


@pytest.mark.parametrize("saved, sizes, world", RESUMES)
def test_any_mesh_resumes(ranks, run_on_mesh, saved, sizes, world):
    """Weights, the optimizer's state, rows and the random state are bit-equal."""
    run, values, drawn = run_on_mesh(saved)
    for found, numbers in ranks.run(resume, world, run, sizes):
        assert_equal(found, values)
        assert numbers == drawn


@pytest.mark.parametrize("saved", ["data=2,chunk=2", pytest.param("data=2,tensor=2", marks=slow)])
def test_one_process_reads_it_without_a_process_group(run_on_mesh, tmp_path, recwarn, saved):
    run, values, _ = run_on_mesh(saved)
    assert_equal(resume(run)[0], values)
    found = load_checkpoint(run)
    assert found.step == 3 and found.config == CONFIG
    weights = {name: value for name, value in values.items() if "/" not in name}
    for loaded in (Megalodon.load(found.folder), load_any(run)[0], load_any(found.folder)[0]):
        assert_equal({name: parameter.detach().numpy() for name, parameter in loaded.named_parameters()}, weights)
    half = Megalodon.load(found.folder, dtype=torch.bfloat16)
    assert half.embed.weight.dtype == torch.bfloat16 and half.layers[0].mega.cema.alpha.dtype == torch.float32
    load_any(run)[0].save(tmp_path / "plain")
    names = ["config.json", "model.safetensors", "modeling_megalodon.py"]
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == names
    plain = Megalodon.load(tmp_path / "plain")
    assert_equal({name: parameter.detach().numpy() for name, parameter in plain.named_parameters()}, weights)
    assert not recwarn.list


@pytest.mark.parametrize("sizes", ["data=2", "tensor=2"])
def test_several_processes_resume_from_the_folder_of_one(ranks, tmp_path, sizes):
    model, optimizer, _ = new_run()
    run_steps(model, optimizer, None, 3)
    save_checkpoint(tmp_path, 3, model, optimizer=optimizer, state=state_of_rows(range(ROWS)))
    for found, _ in ranks.run(resume, 2, tmp_path, sizes):
        assert_equal(found, whole_values(model, optimizer))


def save_slowly(run):
    """Save three times; the first write waits until training has gone on. Return the folders then and at the end."""
    model, optimizer, mesh = new_run("data=2")
    go_on = threading.Event()
    write = sharded_tensors.ArchiveWriter.write_data

    def delayed_write(writer, plan, planner):
        assert go_on.wait(60)
        return write(writer, plan, planner)

    sharded_tensors.ArchiveWriter.write_data = delayed_write
    try:
        saver = Saver(run, mesh, keep=2)
        folders = []
        for step in (1, 2, 3):
            saver.save(step, model, optimizer=optimizer)
            run_steps(model, optimizer, mesh, 1)
            dist.barrier()
            remove_drafts(run / "checkpoints", "step-*")  # as each saving process does
            folders.append(sorted(path.name for path in (run / "checkpoints").glob("step-*")))
            dist.barrier()
            go_on.set()
        saver.wait()
    finally:
        sharded_tensors.ArchiveWriter.write_data = write
    return folders[0], sorted(path.name for path in (run / "checkpoints").iterdir())


def test_training_continues_while_a_checkpoint_is_written(ranks, tmp_path):
    for during, afterwards in ranks.run(save_slowly, 2, tmp_path):
        assert during == [] and afterwards == ["step-00000002", "step-00000003"]


def save_on_a_full_disk(run, rank):
    model, optimizer, mesh = new_run("data=2")
    saver = Saver(run, mesh)
    saver.save(1, model, optimizer=optimizer)
    saver.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        saver.save(2, model, optimizer=optimizer)
        with pytest.raises(OSError) as caught:
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    dist.barrier()
    saver.save(3, model, optimizer=optimizer)
    saver.wait()
    return str(caught.value), folders


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_process(ranks, tmp_path, rank):
    """All processes raise the same line; the folder is removed, and the next one is complete."""
    (one, folders), (other, _) = ranks.run(save_on_a_full_disk, 2, tmp_path, rank)
    assert one == other and "\n" not in one
    assert "step-00000002: could not be written" in one and f"rank {rank}" in one
    assert folders == ["step-00000001"]
    assert load_checkpoint(tmp_path).step == 3


@pytest.fixture
def damaged_checkpoint(saved_run, tmp_path):
    """The newer of two checkpoints in a copy of the run, for a test to damage."""
    run, _, _ = saved_run
    shutil.copytree(run, tmp_path / "run")
    older = tmp_path / "run" / "checkpoints" / "step-00000003"
    newer = older.with_name("step-00000004")
    shutil.copytree(older, newer)
    path = newer / "training.json"
    content = json.loads(path.read_text())
    path.unlink()
    write_record(newer, {**content, "step": 4})
    assert load_checkpoint(tmp_path / "run").step == 4
    return newer


DAMAGE = {
    "short": lambda path: os.truncate(path / "__1_0.distcp", 100),
    "changed": lambda path: (path / "__2_0.distcp").write_bytes(b"x" * (path / "__2_0.distcp").stat().st_size),
    "missing": lambda path: (path / "__3_0.distcp").unlink(),
    "no metadata": lambda path: (path / ".metadata").unlink(),
    "short metadata": lambda path: os.truncate(path / ".metadata", 1000),
    "a digit of the record": lambda path: edit(path.with_name("training.json"), '"position": 5', '"position": 6'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over(damaged_checkpoint, caplog, damage):
    DAMAGE[damage](damaged_checkpoint / "distributed")
    with caplog.at_level(logging.WARNING):
        assert load_checkpoint(damaged_checkpoint.parents[1]).step == 3
    (line,) = caplog.messages
    assert line.startswith(f"passing over {damaged_checkpoint}/") and "\n" not in line
    with pytest.raises((FileError, FileNotFoundError)):
        load_any(damaged_checkpoint)


def test_a_pipe_in_the_place_of_tensors_is_not_opened(damaged_checkpoint):
    make_pipe(damaged_checkpoint / "distributed" / "__1_0.distcp")
    with pytest.raises(FileError, match="__1_0.distcp: must be a file, got a pipe"):
        Megalodon.load(damaged_checkpoint)


class Trap:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("content", [Trap(), [1, 2], {"a": Trap()}], ids=["call", "list", "inside"])
def test_metadata_that_would_run_something_is_refused(damaged_checkpoint, tmp_path, monkeypatch, content):
    """Even if checksums are not compared."""
    monkeypatch.chdir(tmp_path)
    (damaged_checkpoint / "distributed" / ".metadata").write_bytes(pickle.dumps(content))
    for read in (Megalodon.load, load_any, load_checkpoint, partial(load_checkpoint, verify=False)):
        with pytest.raises(FileError, match=r"distributed/\.metadata: ") as caught:
            read(damaged_checkpoint)
        assert str(caught.value).count("\n") == 0
    assert not (tmp_path / "trapped").exists()


def test_metadata_of_python_3_11_2_is_read(monkeypatch):
    """There pickles use `getattr` for members of an enumeration; other uses are refused."""
    kind = metadata._MEM_FORMAT_ENCODING
    monkeypatch.setattr(kind, "__reduce_ex__", lambda member, _: (getattr, (kind, member.name)))
    for member in kind:
        assert sharded_tensors._Unpickler(io.BytesIO(pickle.dumps(member))).load() is member
    monkeypatch.setattr(Trap, "__reduce__", lambda _: (getattr, (torch.Size, "numel")))
    with pytest.raises(AttributeError, match="__members__"):
        sharded_tensors._Unpickler(io.BytesIO(pickle.dumps(Trap()))).load()

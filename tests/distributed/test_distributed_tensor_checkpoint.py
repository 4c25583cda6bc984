"""Checkpoints of a model whose layers are split over processes, read on other meshes and by one process."""

from dataclasses import replace

import pytest
import torch
from models import TINY

from megalodon_ops import Megalodon, MegalodonConfig

pytest.importorskip("torch.distributed.fsdp")
from test_distributed_train_checkpoint import assert_equal, run_steps, whole_values  # noqa: E402

from megalodon_ops.distributed import make_mesh, parallelize  # noqa: E402
from megalodon_ops.training import Saver, adamw, load_checkpoint, save_checkpoint  # noqa: E402

CONFIG = replace(MegalodonConfig(**TINY), ffn_hidden_dim=42, num_heads=1)  # shards of 21, 11 and 10


def new_run(sizes, seed=0):
    torch.manual_seed(seed)
    model, mesh = Megalodon(CONFIG), None
    if sizes is not None:
        mesh = make_mesh(sizes, device_type="cpu")
        model = parallelize(model, mesh)
    return model, adamw(model, lr=0.01), mesh


def values_of(model, optimizer):
    return {name: tensor.numpy() for name, tensor in whole_values(model, optimizer).items()}


def save_on_mesh(run, sizes):
    model, optimizer, mesh = new_run(sizes)
    tokens = torch.arange(20).view(2, 10) % 9
    run_steps(model, optimizer, 2)
    _, state = model(tokens[:1], return_state=True)  # one row on each rank of `data`
    values = values_of(model, optimizer)
    saver = Saver(run, mesh)
    saver.save(2, model, optimizer=optimizer, state=state.detach(), record={"position": 5})
    saver.wait()
    return values


def resume_on_mesh(run, sizes):
    model, optimizer, _ = new_run(sizes, seed=7)
    found = load_checkpoint(run)
    found.load_weights(model)
    found.load_optimizer(optimizer, model)
    return values_of(model, optimizer)


@pytest.fixture(scope="module")
def saved_run(ranks, tmp_path_factory):
    run = tmp_path_factory.mktemp("saved")
    return run, ranks.run(save_on_mesh, 4, run, "data=2,tensor=2")[0]


@pytest.mark.slow
@pytest.mark.parametrize("sizes, count", [("tensor=2", 2), ("data=2", 2), ("chunk=2,tensor=2", 4)])
def test_any_mesh_resumes(ranks, saved_run, sizes, count):
    run, values = saved_run
    for found in ranks.run(resume_on_mesh, count, run, sizes):
        assert_equal(found, values)


@pytest.mark.slow
def test_one_process_resumes(saved_run):
    run, values = saved_run
    model, optimizer, _ = new_run(None, seed=7)
    found = load_checkpoint(run)
    found.load_weights(model)
    found.load_optimizer(optimizer, model)
    assert_equal(values_of(model, optimizer), values)
    tokens = torch.arange(20).view(2, 10)[:1] % 9
    with torch.no_grad():
        _, state = model(tokens, return_state=True)
    for row in range(2):
        torch.testing.assert_close(found.state[[row]].layers[1].cema, state.layers[1].cema, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.state[[row]].layers[0].attention.v, state.layers[0].attention.v)


def test_ranks_resume_from_the_folder_of_one(ranks, tmp_path):
    model, optimizer, _ = new_run(None)
    run_steps(model, optimizer, 2)
    save_checkpoint(tmp_path, 2, model, optimizer=optimizer)
    for found in ranks.run(resume_on_mesh, 2, tmp_path, "tensor=2"):
        assert_equal(found, values_of(model, optimizer))

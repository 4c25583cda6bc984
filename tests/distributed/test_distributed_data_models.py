"""A model with sharded parameters: generation, saving, loading, errors."""

import datetime
import os
import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist
from assertions import message_of
from data_parallel import WITH_ALL, batch_of, gather, mesh_of_all, own_rows, parameters_of
from models import TINY, tiny_model, tokens_of
from torch.distributed import fsdp

import megalodon_ops as mo

from megalodon_ops.distributed import ParallelMegalodon, make_mesh, parallelize
from megalodon_ops.distributed.start import await_workers

PROMPT = tokens_of(4, 13)
NEW_TOKENS = (5, 40)  # that rank 0 and rank 1 generate
SLOW = pytest.mark.slow


def generate(data, param_dtype):
    model = tiny_model(torch.float32, **WITH_ALL).eval()
    model = parallelize(model, mesh_of_all(), data=data, param_dtype=param_dtype)
    rows = own_rows()
    tokens = model.generate(PROMPT[rows], max_new_tokens=NEW_TOKENS[dist.get_rank()], seed=list(range(4))[rows])
    model.loss(*(tensor[rows] for tensor in batch_of(0))).backward()  # training continues
    stream = model.stream(PROMPT[rows], seed=list(range(4))[rows])
    return tokens, stream.state, [next(stream) for _ in range(1 + dist.get_rank())]


@pytest.mark.parametrize("data, param_dtype", [("shard", torch.bfloat16), pytest.param("replicate", None, marks=SLOW)])
def test_ranks_generate_alone(ranks, data, param_dtype):
    model = tiny_model(torch.float32, **WITH_ALL).eval().to(param_dtype or torch.float32)
    results = ranks.run(generate, 2, data, param_dtype)
    for rank, (tokens, state, streamed) in enumerate(results):
        rows = slice(2 * rank, 2 * rank + 2)
        wanted = model.generate(PROMPT[rows], max_new_tokens=NEW_TOKENS[rank], seed=list(range(4))[rows])
        assert torch.equal(tokens, wanted)
        assert state.norm.count.tolist() == [12, 12] and len(streamed) == rank + 1


def save_and_load(folder, overrides):
    model = parallelize(tiny_model(torch.float32, **overrides), mesh_of_all(), param_dtype=torch.bfloat16)
    model.save(folder)
    is_written = os.path.exists(f"{folder}/config.json")
    loaded = parallelize(mo.Megalodon.load(folder), mesh_of_all())
    torch.testing.assert_close(parameters_of(model), parameters_of(loaded), rtol=0, atol=0)
    return is_written


@pytest.mark.parametrize("overrides", [WITH_ALL, pytest.param({}, marks=SLOW)], ids=["all", "plain"])
def test_a_saved_model_loads_in_one_process_and_in_ranks(ranks, tmp_path, overrides):
    assert ranks.run(save_and_load, 2, f"{tmp_path}/model", overrides) == [True, True]
    loaded = mo.Megalodon.load(tmp_path / "model")
    wanted = tiny_model(torch.float32, **overrides)
    torch.testing.assert_close(parameters_of(loaded), parameters_of(wanted), rtol=0, atol=0)


def evaluate():
    model = parallelize(tiny_model(torch.float64).eval(), mesh_of_all())
    rows = own_rows()
    with torch.no_grad():
        logits, state = model(PROMPT[rows, :6], return_state=True)
        more = model(PROMPT[rows, 6:], state=state)
    assert all(hasattr(parameter, "to_local") for parameter in model.parameters()), "nothing stays gathered"
    return torch.cat([logits, more], 1)


def test_logits_are_those_of_the_ranks_own_rows(ranks):
    wanted = tiny_model(torch.float64)(PROMPT).detach()
    torch.testing.assert_close(torch.cat(ranks.run(evaluate, 2)), wanted, rtol=1e-12, atol=1e-12)


def train_after_errors():
    model = parallelize(tiny_model(torch.float64), mesh_of_all())
    tokens, targets = (tensor[own_rows()] for tensor in batch_of(1))
    wrong = tokens.clone()
    wrong[-1, -1] = TINY["vocab_size"]
    losses = []
    for _ in range(2):
        with pytest.raises(IndexError, match="Megalodon: `tokens` must be in"):
            model.loss(wrong, targets)
        model.zero_grad()
        loss = model.loss(tokens, targets)
        loss.backward()
        losses.append((loss.item(), gather(model.embed.weight.grad), gather(model.layers[0].mega.wz.weight.grad)))
    return losses


@pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "reset_iter_state"), reason="this torch cannot go on after an error"
)
def test_after_an_error_in_all_ranks_training_goes_on(ranks):
    model = tiny_model(torch.float64)
    wanted = model.loss(*batch_of(1))
    wanted.backward()
    for losses in ranks.run(train_after_errors, 2):
        for loss, embedding, matrix in losses:
            assert loss == pytest.approx(wanted.item(), rel=1e-12)
            torch.testing.assert_close(embedding, model.embed.weight.grad, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(matrix, model.layers[0].mega.wz.weight.grad, rtol=1e-10, atol=1e-12)


def refusals():
    """Errors on this rank of arguments that are wrong or differ between ranks."""
    rank = dist.get_rank()
    mesh = mesh_of_all()
    model = tiny_model()
    torch.manual_seed(rank)
    other = mo.Megalodon(mo.MegalodonConfig(**TINY))
    calls = [
        lambda: parallelize(tiny_model(**({"num_layers": 3} if rank else {})), mesh),
        lambda: parallelize(other, mesh),
        lambda: parallelize(model, mesh, data="both"),
        lambda: parallelize(model, mesh, data="replicate" if rank else "shard"),
        lambda: parallelize(model, mesh, param_dtype=torch.bfloat16 if rank else None),
        lambda: make_mesh("data=2" if rank else "chunk=2", device_type="cpu"),
        lambda: make_mesh("data=2,chunk=3", device_type="cpu"),
    ]
    texts = [message_of(call) for call in calls]
    assert type(model) is mo.Megalodon, "a refused model stays unchanged"
    model = parallelize(model, mesh)
    assert isinstance(model, ParallelMegalodon)
    return [*texts, message_of(lambda: parallelize(model, mesh), TypeError)]


def test_arguments_that_differ_between_ranks_are_an_error_on_all(ranks):
    first, second = ranks.run(refusals, 2)
    assert first == second
    config, weights, unknown, data, dtype, names, product, twice = first
    layers = "`model.config.num_layers` must be the same on the ranks 0, 1, got 2 on rank 0 and 3 on rank 1."
    assert config == f"parallelize: {layers}"
    assert "`model.embed.weight` must be the same on " in weights and "checksum" in weights
    assert unknown == 'parallelize: `data` must be "shard" or "replicate", got \'both\'.'
    assert "`data` must be the same on " in data and "shard on rank 0 and replicate on rank 1" in data
    assert "`param_dtype` must be the same on " in dtype and "torch.bfloat16 on rank 1" in dtype
    assert "`model` must be a Megalodon or a MegalodonEncoder that is not parallel yet, got " in twice
    assert "`sizes` must be the same on " in names and "{'chunk': 2} on rank 0 and {'data': 2} on rank 1" in names
    assert product == (
        "make_mesh: `sizes` must have a product of 2 for 2 processes, got data 2 x chunk 3 = 6; change a size or the "
        "number of processes."
    )


@pytest.fixture
def ended_process_group(parallelize_runs):
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "sizes, error, words",
    [
        ("dta=2", ValueError, "`sizes` must be sizes of data, chunk and tensor, .* got 'dta=2'."),
        ("data", ValueError, "got 'data'."),
        ("data=0", ValueError, "got 'data=0'."),
        ("data=1,data=1", ValueError, "got 'data=1,data=1'."),
        ("data=-1", ValueError, "got 'data=-1'."),
        ("", ValueError, "got ''."),
        ({}, ValueError, r"got \{\}."),
        ({"data": 1.0}, ValueError, r"got \{'data': 1.0\}."),
        (["data=1"], TypeError, "got list."),
        ("data=2,chunk=2", ValueError, "product of 1 for 1 process, .* start it by torchrun --nproc-per-node 4."),
    ],
    ids=str,
)
def test_wrong_sizes_are_refused_and_leave_no_process_group(sizes, error, words, ended_process_group):
    with pytest.raises(error, match=f"^make_mesh: .*{words}$"):
        make_mesh(sizes, device_type="cpu")
    assert not dist.is_initialized()


def test_dimensions_have_their_order_and_one_process_is_enough(ended_process_group):
    mesh = make_mesh({"tensor": 1, "data": 1}, device_type="cpu", timeout=5)
    assert mesh.mesh_dim_names == ("data", "tensor")
    assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == datetime.timedelta(seconds=5)
    assert isinstance(parallelize(tiny_model(), mesh), ParallelMegalodon)


def test_a_parallel_model_takes_over_all_of_a_model(ended_process_group):
    calls = []
    model = tiny_model(share_emb=True).eval()
    model.layers[0].requires_grad_(False)
    for name, module in (("model", model), ("block", model.layers[0])):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    names = [name for name, _ in model.named_parameters()]
    parallel = parallelize(model, make_mesh("data=1", device_type="cpu"))
    parallel(tokens_of(1, 5))
    assert calls == ["block", "model"] and not parallel.training and not list(model.parameters())
    assert parallel.embed.weight is parallel.output.output.weight
    assert [name for name, _ in parallel.named_parameters()] == names
    assert not any(parameter.requires_grad for parameter in parallel.layers[0].parameters())


class Subclass(mo.Megalodon):
    """A class whose forward could differ."""


def test_wrong_arguments_are_refused(ended_process_group):
    mesh = make_mesh("data=1", device_type="cpu")
    other = dist.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    kinds = "`model` must be a Megalodon or a MegalodonEncoder that is not parallel yet, got"
    quantized = mo.quantize(tiny_model(torch.float32), "int8")
    for model, given, error, words in (
        ("model", mesh, TypeError, f"{kinds} 'model'."),
        (torch.nn.Linear(1, 1), mesh, TypeError, f"{kinds} torch.nn.modules.linear.Linear."),
        (Subclass(tiny_model().config), mesh, TypeError, f"{kinds} test_distributed_data_models.Subclass."),
        (quantized, mesh, ValueError, "`model` must have floating-point weights, got int8 weights."),
        (tiny_model(), None, TypeError, "`mesh` must be a torch.distributed DeviceMesh, got None."),
        (tiny_model(), other, ValueError, "`mesh` must have dimensions named any of data, chunk, tensor, .* got dp."),
    ):
        with pytest.raises(error, match=f"^parallelize: {words}$"):
            parallelize(model, given)
    with pytest.raises(ValueError, match="`param_dtype` must be .*, got torch.int8."):
        parallelize(tiny_model(), mesh, param_dtype=torch.int8)


def wait_for_missing_rank():
    mesh = make_mesh("data=2", device_type="cpu", timeout=2)
    model = parallelize(tiny_model(), mesh)
    if dist.get_rank() == 0:
        return None
    with pytest.raises(RuntimeError, match="(?i)time"):
        model.loss(*(tensor[own_rows()] for tensor in batch_of(0)))
    return True


def test_a_missing_rank_is_an_error_after_the_time_out(ranks):
    assert ranks.run(wait_for_missing_rank, 2, timeout=60)[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_an_error_after_the_time_out(rank, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    words = f"make_mesh: expected 2 processes, but they did not find each other within 0.5 s; this is rank {rank}."
    with pytest.raises(RuntimeError, match=words):
        make_mesh("data=2", device_type="cpu", timeout=0.5)
    assert not dist.is_initialized()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads Linux's states of threads")
def test_a_process_ends_when_the_threads_of_gloo_are_idle():
    """`await_workers` waits for a busy thread with the name of gloo's, at most until its time-out."""
    stop, started = threading.Event(), threading.Event()

    def work():
        with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as file:
            file.write("pt_gloo_runloop")
        started.set()
        while not stop.is_set():
            pass

    worker = threading.Thread(target=work)
    worker.start()
    started.wait()
    begin = time.monotonic()
    await_workers(timeout=0.3)
    assert time.monotonic() - begin >= 0.3, "the thread is busy"
    threading.Timer(0.2, stop.set).start()
    await_workers(timeout=60)
    assert stop.is_set() and time.monotonic() - begin < 30
    worker.join()

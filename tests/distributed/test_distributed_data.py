"""Data parallel: several processes train as one process does on the whole batch."""

import copy
import warnings

import data_parallel
import pytest
import torch
import torch.distributed as dist
from data_parallel import WITH_ALL, batch_of, gather, gradients_of, mesh_of_all, own_rows, parameters_of, train
from data_parallel import train_parallel
from models import TINY, tiny_model, tokens_of

import megalodon_ops as mo
from megalodon_ops.distributed import parallelize

STEPS = 3
SLOW = pytest.mark.slow


def assert_same_training(found, wanted, tolerance=1e-5):
    (losses, norms, parameters), (wanted_losses, wanted_norms, wanted_parameters) = found, wanted
    assert losses == pytest.approx(wanted_losses, rel=tolerance)
    assert norms == pytest.approx(wanted_norms, rel=tolerance)
    assert min(wanted_norms) > 0.5, "every step clips"
    torch.testing.assert_close(parameters, wanted_parameters, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "world_size, data, overrides",
    [
        (2, "shard", {}),
        (2, "replicate", WITH_ALL),
        pytest.param(1, "shard", WITH_ALL, marks=SLOW),
        pytest.param(1, "replicate", {}, marks=SLOW),
        pytest.param(4, "shard", WITH_ALL, marks=SLOW),
        pytest.param(4, "replicate", {}, marks=SLOW),
    ],
    ids=lambda value: "all" if value is WITH_ALL else "plain" if value == {} else str(value),
)
def test_ranks_train_as_one_process_does(ranks, world_size, data, overrides):
    wanted = train(tiny_model(torch.float32, **overrides), STEPS)
    results = ranks.run(train_parallel, world_size, data, STEPS, 1, overrides, {})
    assert all(losses == results[0][0] for losses, _, _ in results), "every rank has the loss of all"
    assert_same_training(results[0], wanted)


def gradients_through_the_state(is_parallel):
    """Nonzero gradients of a loss that reads the last block's new state alone, not its output."""
    model = tiny_model(torch.float64)
    model = parallelize(model, mesh_of_all(), data="shard") if is_parallel else model
    _, state = model(batch_of(1)[0], return_state=True)
    state.layers[-1].cema.abs().square().sum().backward()
    return {name: gather(p.grad) for name, p in model.named_parameters() if p.grad is not None and gather(p.grad).any()}


def test_a_loss_may_read_a_state_alone(ranks):
    """FSDP2 gathers a block's parameters for the gradient of the block's output, beside which the state is returned."""
    wanted = gradients_through_the_state(False)
    found, _ = ranks.run(gradients_through_the_state, 2, True)
    assert wanted.keys() == found.keys() and "layers.1.mega.cema.alpha" in wanted
    torch.testing.assert_close(found, wanted)


def gradients(data):
    model = parallelize(tiny_model(torch.float64), mesh_of_all(), data=data)
    tokens, targets = batch_of(1)
    rows = own_rows()
    found = []
    for reduction in ("mean", "sum", "none"):
        model.zero_grad()
        loss = model.loss(tokens[rows], targets[rows], reduction=reduction)
        total = loss
        if reduction == "none":  # times the number of ranks, over which gradients are averaged
            total = dist.get_world_size() * (loss * weights_of(loss, rows)).sum()
        total.backward()
        found.append((loss.detach(), gradients_of(model)))
    return found


def weights_of(losses, rows):
    weights = torch.linspace(0, 1, data_parallel.ROWS * losses.shape[1], dtype=losses.dtype)
    return weights.view(-1, losses.shape[1])[rows]


@pytest.mark.parametrize("data", ["shard", pytest.param("replicate", marks=SLOW)])
def test_gradients_of_every_reduction_are_those_of_the_whole_batch(ranks, data):
    model = tiny_model(torch.float64)
    tokens, targets = batch_of(1)
    results = ranks.run(gradients, 2, data)
    for i, reduction in enumerate(("mean", "sum", "none")):
        model.zero_grad()
        wanted = model.loss(tokens, targets, reduction=reduction)
        total = (wanted * weights_of(wanted, slice(None))).sum() if reduction == "none" else wanted
        total.backward()
        losses = [result[i][0] for result in results]
        found = torch.cat(losses) if reduction == "none" else losses[0]
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(results[0][i][1], gradients_of(model), rtol=1e-10, atol=1e-12)


def loss_without_targets():
    model = parallelize(tiny_model(torch.float32), mesh_of_all())
    tokens, targets = tokens_of(2, 9), torch.full((2, 9), -100)
    loss = model.loss(tokens, targets)
    loss.backward()
    padded = model.loss(tokens, tokens, lengths=torch.tensor([9, 9]) if dist.get_rank() else torch.tensor([1, 0]))
    return loss.detach(), max(p.grad.to_local().abs().sum().item() for p in model.parameters()), padded.item()


def test_padding_and_batches_without_targets_count_as_in_one_process(ranks):
    tokens = tokens_of(2, 9)
    both = torch.cat([tokens, tokens])
    wanted = tiny_model(torch.float32).loss(both, both, lengths=torch.tensor([1, 0, 9, 9])).item()
    for loss, gradient, padded in ranks.run(loss_without_targets, 2):
        assert loss.isnan() and gradient == 0
        assert padded == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("data", ["shard", pytest.param("replicate", marks=SLOW)])
def test_accumulated_gradients_are_exchanged_once(ranks, data):
    wanted = train(tiny_model(torch.float32), 3, accumulate=2)
    results = ranks.run(train_parallel, 2, data, 3, 2, {}, {})
    assert_same_training(results[0], wanted)


def train_in_bfloat16(data, overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny_model(torch.float32, **overrides)
        model = parallelize(model, mesh_of_all(), data=data, param_dtype=torch.bfloat16)
        found = train(model, STEPS)
    state = model(tokens_of(1, 5), return_state=True)[1]
    return found, {p.dtype for p in model.parameters()}, state.layers[0].cema.dtype, state.layers[0].attention.k.dtype


@pytest.mark.parametrize(
    "data, overrides",
    [("shard", WITH_ALL), pytest.param("replicate", {}, marks=SLOW)],
    ids=["shard-all", "replicate-plain"],
)
def test_matrices_compute_in_bfloat16_and_wide_parameters_do_not(ranks, data, overrides):
    model = tiny_model(torch.float32, **overrides)
    short = copy.deepcopy(model).to(torch.bfloat16).loss(*batch_of(0)).item()
    losses, norms, parameters = train(model, STEPS)
    for found, dtypes, cema, keys in ranks.run(train_in_bfloat16, 2, data, overrides):
        assert found[0][0] == pytest.approx(short, rel=1e-5) and found[0][0] != pytest.approx(losses[0], rel=1e-7)
        assert found[0] == pytest.approx(losses, rel=1e-2) and found[1] == pytest.approx(norms, rel=5e-2)
        assert (dtypes, cema, keys) == ({torch.float32}, torch.complex64, torch.bfloat16)
        # Adam's updates are as large as the rate, whatever the gradient.
        torch.testing.assert_close(found[2], parameters, rtol=1e-2, atol=STEPS * 1e-3)


def initialise_on_meta(overrides):
    torch.manual_seed(7 if dist.get_rank() == 0 else 8)
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = mo.Megalodon(mo.MegalodonConfig(**{**TINY, **overrides}))
    model = parallelize(model, mesh_of_all(), param_dtype=torch.bfloat16)
    initial = parameters_of(model)
    assert torch.equal(torch.get_rng_state(), before)
    local = sum(parameter.to_local().numel() for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert local == pytest.approx(total / 2, rel=0.02)
    model.loss(*batch_of(0)).backward()
    return initial


@pytest.mark.parametrize("overrides", [{}, pytest.param(WITH_ALL, marks=SLOW)], ids=["plain", "all"])
def test_a_model_on_meta_has_the_initial_values_of_one_process(ranks, overrides):
    torch.manual_seed(7)
    wanted = mo.Megalodon(mo.MegalodonConfig(**{**TINY, **overrides}))
    for initial in ranks.run(initialise_on_meta, 2, overrides):
        torch.testing.assert_close(initial, parameters_of(wanted), rtol=0, atol=0)


def shard_every_linear_layer(model):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*model.modules()]:
        if isinstance(module, torch.nn.Linear):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_with_wrapper(wrap):
    model = tiny_model(torch.float64)
    wrapped = wrap(model)
    loss_of = getattr(wrapped, "loss", wrapped)  # DDP has only a forward
    loss = loss_of(tokens_of(4, 9)[own_rows()], tokens_of(4, 10)[:, 1:][own_rows()])
    loss.backward()
    dist.all_reduce(loss.detach())
    return loss.item() / 2, gradients_of(model)


@pytest.mark.parametrize("wrap", [shard_every_linear_layer, torch.nn.parallel.DistributedDataParallel])
def test_torchs_own_wrappers_train_the_loss(ranks, wrap):
    model = tiny_model(torch.float64)
    wanted = model.loss(tokens_of(4, 9), tokens_of(4, 10)[:, 1:])
    wanted.backward()
    for loss, gradients in ranks.run(train_with_wrapper, 2, wrap):
        assert loss == pytest.approx(wanted.item(), rel=1e-12)
        torch.testing.assert_close(gradients, gradients_of(model), rtol=1e-10, atol=1e-12)

"""Data and chunk parallel together: a mesh of four processes trains, generates and evaluates as one process does."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chunk_parallel import cut_over_all_ranks
from data_parallel import gather, gradients_of, parameters_of
from models import TINY, tiny_model, tokens_of
from torch.nn.parallel import DistributedDataParallel

from megalodon_ops.distributed import make_mesh, parallelize, split
from megalodon_ops.evaluation import evaluate

ROWS, LENGTH, C = 4, 37, TINY["chunk_size"]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets; each row has fewer targets that count than the one before."""
    tokens, targets = tokens_of(2 * ROWS, LENGTH).split(ROWS)
    drawn = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(2))
    return tokens, targets.masked_fill(drawn < torch.arange(ROWS)[:, None] / 5, -100)


def train(sizes: str | None, data: str, config: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and norms of two optimizer steps in float64, with the state carried, and the parameters after them."""
    model = tiny_model(torch.float64, **config)
    tokens, targets = batch()
    state = None
    if sizes is not None:
        mesh = make_mesh(sizes, device_type="cpu")
        model = parallelize(model, mesh, data=data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    figures = []
    for start, end in ((0, 2 * C), (2 * C, LENGTH)):
        part, wanted = tokens[:, start:end], targets[:, start:end]
        if sizes is not None:
            part, wanted = (split(tensor, mesh, chunk_size=C) for tensor in (part, wanted))
        loss, state = model.loss(part, wanted, state=state, return_state=True)
        optimizer.zero_grad()
        loss.backward()
        norm = gather(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        state = state.detach()
        figures += [loss.item(), norm.item()]
    return figures, parameters_of(model)


@pytest.mark.parametrize(
    "sizes, data, config",
    [
        ("data=2,chunk=2", "shard", dict(layerwise_ckpt=True, share_emb=True)),
        pytest.param("data=2,chunk=2", "replicate", {}, marks=pytest.mark.slow),
        pytest.param("chunk=4", "shard", dict(swiglu=True), marks=pytest.mark.slow),
    ],
    ids=["shard", "replicate", "chunk alone"],
)
def test_trains_as_one_process(ranks, sizes, data, config):
    figures, parameters = train(None, data, config)
    for found, values in ranks.run(train, 4, sizes, data, config):
        assert found == pytest.approx(figures, rel=1e-10)
        torch.testing.assert_close(values, parameters, rtol=1e-7, atol=1e-8)


def generate() -> tuple[list, float]:
    """Tokens of this rank's prompts, and the nats of a document, which every rank computes."""
    mesh = make_mesh("data=2,chunk=2", device_type="cpu")
    model = parallelize(tiny_model(torch.float64).eval(), mesh)
    first = mesh.get_local_rank("data") * ROWS // 2
    tokens = model.generate(tokens_of(ROWS, LENGTH)[first : first + ROWS // 2], max_new_tokens=5, seed=first)
    return tokens.tolist(), evaluate(model, [tokens_of(1, 40)[0]])[0].nats


def test_generates_and_evaluates_as_one_process(ranks):
    model = tiny_model(torch.float64).eval()
    tokens = model.generate(tokens_of(ROWS, LENGTH), max_new_tokens=5, seed=0).tolist()
    nats = evaluate(model, [tokens_of(1, 40)[0]])[0].nats
    for rank, (found, found_nats) in enumerate(ranks.run(generate, 4)):
        half = rank // 2 * (ROWS // 2)
        assert found == tokens[half : half + ROWS // 2] and found_nats == pytest.approx(nats, rel=1e-10)


def split_batches() -> tuple[list, list[str]]:
    """This rank's parts of two batches, and the errors of wrong calls."""
    mesh = make_mesh("data=2,chunk=2", device_type="cpu")
    row = torch.arange(40).view(1, 40)
    pair = torch.arange(80).view(2, 40)
    piece = split(pair, mesh, chunk_size=C)
    numbers = split(pair.t()[None].repeat(2, 1, 1), mesh, chunk_size=C)[0, :, 0]  # of a batch (2, 40, 2)
    packed = split(pair, mesh, chunk_size=C, cu_seqlens=torch.tensor([0, 13, 40]))
    shifted = split(pair, mesh, chunk_size=C, position=3)
    calls = [
        lambda: split(row, mesh, chunk_size=C),
        lambda: split(pair, "data=2", chunk_size=C),
        lambda: split(pair.tolist(), mesh, chunk_size=C),
        lambda: split(pair, mesh, chunk_size=0),
        lambda: split(pair[0], mesh, chunk_size=C),
        lambda: split(pair, mesh, chunk_size=C, position=C),
        lambda: split(pair, mesh, chunk_size=C, cu_seqlens=torch.tensor([0, 41])),
        lambda: split(pair, mesh, chunk_size=C, cu_seqlens=[0, 40]),
    ]
    errors = []
    for call in calls:
        try:
            errors.append(f"no error: {call()}")
        except (TypeError, ValueError) as error:
            errors.append(str(error))
    dist.barrier()  # no other collective runs here, and a rank that ends closes connections that others may still open
    return [part.tolist() for part in (piece, numbers, packed, shifted)], errors


def test_split(ranks):
    results = ranks.run(split_batches, 4)
    for rank, ((piece, numbers, packed, shifted), errors) in enumerate(results):
        first = rank // 2 * 40  # number at the beginning of this rank's row
        columns = (range(16), range(16, 40))[rank % 2]
        assert piece == [[first + column for column in columns]]
        assert numbers == [*columns]
        columns = (range(21), range(21, 40))[rank % 2]  # cut at a chunk's end: 13 + C, and 3 C - 3
        assert packed == shifted == [[first + column for column in columns]]
        assert len(errors) == 8 and all(re.match(r"split: `\w+` must .*, got .*\.$", error) for error in errors), errors


def stream_through_split_layers() -> float:
    """Largest difference of losses and states of a text in two calls, with sequence and layers split."""
    mesh = make_mesh("chunk=2,tensor=2", device_type="cpu")
    model = parallelize(tiny_model(), mesh, data="replicate")
    unsharded = tiny_model()
    tokens = tokens_of(2, LENGTH)
    state = whole = None
    errors = []
    for part in (tokens[:, : 2 * C], tokens[:, 2 * C :]):
        piece = split(part, mesh, chunk_size=C)
        loss, state = model.loss(piece, piece, state=state, return_state=True)
        wanted, whole = unsharded.loss(part, part, state=whole, return_state=True)
        pairs = [(loss, wanted), (state.layers[1].cema, whole.layers[1].cema), (state.norm.var, whole.norm.var)]
        errors += [(a - b).abs().max().item() for a, b in pairs]
        state, whole = state.detach(), whole.detach()
    return max(errors)


def test_streams_through_layers_that_are_split_too(ranks):
    assert max(ranks.run(stream_through_split_layers, 4)) < 1e-10


def compare_with_ddp() -> None:
    """Compare the gradients that DDP averages over both pieces with those of one process."""
    unsharded, model = tiny_model(), cut_over_all_ranks(tiny_model())
    tokens, targets = batch()
    piece = slice(0, 2 * C) if dist.get_rank() == 0 else slice(2 * C, None)
    training = DistributedDataParallel(model)
    training(tokens[:, piece], targets[:, piece]).backward()
    unsharded.loss(tokens, targets).backward()
    torch.testing.assert_close(gradients_of(model), gradients_of(unsharded), rtol=0, atol=1e-10)


def test_with_ddp(ranks):
    ranks.run(compare_with_ddp, 2)

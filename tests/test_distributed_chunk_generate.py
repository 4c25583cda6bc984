"""Chunk parallel reads prompts together, and generates on every rank what one process generates; what else runs alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chunk_parallel import cut_over_all_ranks
from models import TINY, tiny_model, tokens_of

import megalodon_ops as mo
from megalodon_ops.evaluation import evaluate
from megalodon_ops.model.states import named_tensors

CALLS = {
    "likeliest": dict(temperature=0.0),
    "seeded": dict(seed=3, num_samples=2, top_k=9),
    "by a generator": dict(generator=0),
    "by torch's generator": dict(),
    "left-padded": dict(seed=1, lengths=torch.tensor([37, 20, 1]), padding="left"),
    "right-padded, stopping": dict(seed=1, lengths=torch.tensor([37, 2, 9]), stop_tokens=list(range(9)), return_lengths=True),
    "penalised": dict(seed=5, repetition_penalty=1.3),
}  # fmt: skip


def models(**config: Any) -> tuple[mo.Megalodon, mo.Megalodon]:
    """One that is split over all ranks, and its equal for one process."""
    return cut_over_all_ranks(tiny_model(**config).eval()), tiny_model(**config).eval()


def generates(call: dict[str, Any], past: tuple[int, ...] | None, widths: tuple[int, ...]) -> float:
    """The largest difference of states after generated tokens that are equal, of this rank and of one process."""
    model, alone = models()
    rank = dist.get_rank()
    prompt, state = tokens_of(3, sum(widths)), None
    if past is not None:
        read = tokens_of(3, max(past)).flip(1)
        _, state = alone(read, lengths=torch.tensor(past), return_state=True)
    whole, piece = dict(call), dict(call)
    if "generator" in call:  # the other ranks' are not used
        whole["generator"] = torch.Generator().manual_seed(7)
        piece["generator"] = torch.Generator().manual_seed(7 + rank)
    options = dict(max_new_tokens=12, state=state, return_state=True)
    torch.manual_seed(1)
    expected = alone.generate(prompt, **options, **whole)
    torch.manual_seed(1 + rank)
    found = model.generate(prompt.split(widths, 1)[rank], **options, **piece)
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        assert torch.equal(a, b)
    pairs = zip(named_tensors(found[-1]).values(), named_tensors(expected[-1]).values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("call", CALLS)
def test_generates_what_one_process_generates(ranks, call):
    assert max(ranks.run(generates, 3, CALLS[call], None, (30, 2, 5))) < 1e-10


@pytest.mark.parametrize("past", [(8, 16, 8), (3, 8, 21)], ids=["of whole chunks", "of any length"])
@pytest.mark.parametrize("call", ["seeded", "left-padded"])
def test_goes_on_from_a_past(ranks, call, past):
    assert max(ranks.run(generates, 3, CALLS[call], past, (30, 2, 5))) < 1e-10


def streams_and_evaluates(folder: str) -> None:
    model, alone = models(share_emb=True)
    rank, prompt = dist.get_rank(), tokens_of(1, 33)
    stream = model.stream(prompt.split(17, 1)[rank], seed=0)
    assert type(stream._decoder._model) is mo.Megalodon and stream._decoder.fused
    expected = alone.stream(prompt, seed=0)
    for a, b in itertools.islice(zip(stream, expected), 5):
        assert torch.equal(a, b)
    documents = [tokens_of(30 + n, 1)[:, 0] for n in range(3)]
    for a, b in zip(evaluate(model, documents, contexts=[16, "all"]), evaluate(alone, documents, contexts=[16, "all"])):
        assert a == b
    by_itself = model.alone()
    if rank == 0:  # other ranks need not take part
        assert torch.equal(by_itself(prompt), alone(prompt))
    model.save(folder)
    loaded = mo.Megalodon.load(folder)
    assert all(map(torch.equal, loaded.parameters(), alone.parameters()))
    # MKL's float64 products round by where in memory a matrix begins, on some processors
    torch.testing.assert_close(loaded(prompt), alone(prompt), rtol=0, atol=1e-14)


def test_streams_evaluates_and_saves(ranks, tmp_path):
    ranks.run(streams_and_evaluates, 2, f"{tmp_path}/model")


def rounds_otherwise() -> str:
    """The error of a rank whose output matrix is not that of the other one, when both have generated."""
    model, _ = models()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.output.output.weight.neg_()
    try:
        model.generate(tokens_of(1, 8), max_new_tokens=5, temperature=0.0)
    except ValueError as error:
        return str(error)
    return "no error"


def test_ranks_that_draw_other_tokens_say_so(ranks):
    first, second = ranks.run(rounds_otherwise, 2)
    assert first == second and first.startswith("generate: `generated tokens` must be the same on the ranks 0, 1, got ")


def lone_model_shares_parameters() -> None:
    model, _ = models()
    alone = model.alone()
    assert type(alone) is mo.Megalodon and alone.alone() is alone
    for (name, a), (_, b) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr(), name
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in alone.modules())
    assert model.output.final_norm._forward_pre_hooks
    block = model.layers[0]
    x = torch.randn(1, 5, TINY["model_dim"], dtype=torch.float64)
    assert torch.equal(block(x), model.alone().layers[0](x))  # a block by itself exchanges nothing


def test_a_lone_model_shares_the_parameters(ranks):
    ranks.run(lone_model_shares_parameters, 2)

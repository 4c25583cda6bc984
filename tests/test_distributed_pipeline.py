"""Stages of a model under torch's pipeline schedules give the losses and gradients of one process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from models import TINY, tiny_model, tokens_of

import megalodon_ops as mo

pytest.importorskip("torch.distributed.pipelining")
from megalodon_ops.distributed import pipeline_stage  # noqa: E402

ROWS, MICRO_BATCHES = 4, 4


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """As many targets count in each row, in other places."""
    tokens, targets = tokens_of(2 * ROWS, 21).split(ROWS)
    return tokens, targets.masked_fill((torch.arange(21) + torch.arange(ROWS)[:, None]) % 7 == 0, -100)


def step(schedule: str, config: dict, blocks: list[int] | None, reduction: str):
    """The loss of a step on the last rank, this rank's gradients, and the output of the last stage without gradients."""
    from torch.distributed import pipelining

    rank, ranks, device = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    module = pipeline_stage(tiny_model(**config).train(), rank, ranks, blocks=blocks)
    stage = pipelining.PipelineStage(module, rank, ranks, device)
    loss = partial(module.loss, reduction=reduction)
    runner = getattr(pipelining, schedule)(stage, MICRO_BATCHES, loss_fn=loss, scale_grads=reduction == "mean")
    (tokens, targets), losses = batch(), []
    given = {} if rank < ranks - 1 else dict(target=targets, losses=losses)
    output = runner.step(*([tokens] if rank == 0 else []), **given)
    if rank == ranks - 1:
        output = module.logits(output.detach()).detach()
    total = torch.stack(losses).detach() if losses else None
    return total, output, {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(
    "schedule, config, blocks, reduction, count",
    [
        ("ScheduleGPipe", dict(num_layers=3), None, "mean", 2),
        ("Schedule1F1B", dict(swiglu=True, rescale_nffn=True, scale_emb=True), None, "sum", 2),
        ("Schedule1F1B", dict(num_layers=3, layerwise_ckpt=True), [1, 2], "mean", 2),
        pytest.param("ScheduleGPipe", dict(num_layers=5), None, "mean", 3, marks=pytest.mark.slow),
    ],
    ids=["GPipe", "1F1B", "recomputed", "three stages"],
)
def test_a_step_equals_one_process(ranks, schedule, config, blocks, reduction, count):
    model, (tokens, targets) = tiny_model(**config).train(), batch()
    wanted = model.loss(tokens, targets, reduction=reduction)
    wanted.backward()
    results = ranks.run(step, count, schedule, config, blocks, reduction)
    losses, logits, _ = results[-1]
    torch.testing.assert_close(
        losses.mean() if reduction == "mean" else losses.sum(), wanted.detach(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(logits, model(tokens).detach(), rtol=1e-10, atol=1e-12)
    grads = {name: grad for _, _, own in results for name, grad in own.items()}
    assert sum(len(own) for _, _, own in results) == len(grads), "no parameter is in two stages"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads.pop(name), parameter.grad, rtol=1e-9, atol=1e-11, msg=name)
    assert not grads


def test_a_stage_of_meta_takes_values():
    with torch.device("meta"):
        model = mo.Megalodon(mo.MegalodonConfig(**TINY))
    last = pipeline_stage(model, 1, 2).to_empty(device="cpu")
    last.reset_parameters()
    assert last.embed is None and all(parameter.isfinite().all() for parameter in last.parameters())


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda m: pipeline_stage(m, 0, 3), ValueError, "`stages` must be at most num_layers = 2, got 3."),
        (lambda m: pipeline_stage(m, 2, 2), ValueError, r"`index` must be an integer in \[0, 2\), got 2."),
        (
            lambda m: pipeline_stage(m, 0, 2, blocks=[2, 1]),
            ValueError,
            "`blocks` must be 2 positive numbers .* got .2, 1..",
        ),
        (
            lambda m: pipeline_stage(m.layers, 0, 2),
            TypeError,
            "`model` must be a Megalodon of one process, got .*ModuleList.*",
        ),
        (
            lambda m: pipeline_stage(tiny_model(share_emb=True), 0, 2),
            ValueError,
            "`model` must have share_emb = False .*",
        ),
        (
            lambda m: pipeline_stage(m, 0, 2)(tokens_of(1, 9), lengths=None),
            ValueError,
            ".* a plain batch alone, got .*lengths.*",
        ),
        (lambda m: pipeline_stage(m, 0, 2).loss(None, None), ValueError, "`loss` must be called on the last stage, .*"),
    ],
    ids=["too many", "index", "blocks", "no model", "shared embedding", "sequences", "loss of the first"],
)
def test_wrong_calls(call, error, words):
    with pytest.raises(error, match=f"^pipeline_stage: {words}$"):
        call(tiny_model())

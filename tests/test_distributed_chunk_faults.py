"""Wrong calls of a parallel model: one clear error on every rank, at once, and no rank that waits for another."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_model, tokens_of
from ranks import RankError, Ranks

from megalodon_ops.distributed.model import enable
from megalodon_ops.distributed.vote import agree

AT_ONCE = 20.0  # seconds, on a machine that is busy; the ranks' time-out is longer


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def called(pieces: tuple[int, ...], ours: dict[str, Any], rank_1s: dict[str, Any]) -> tuple[str, float]:
    """The error of a call for which rank 1 has other arguments than the others or has done something before; seconds."""
    begin = time.monotonic()
    return called_now(pieces, ours, rank_1s), time.monotonic() - begin


def called_now(pieces: tuple[int, ...], ours: dict[str, Any], rank_1s: dict[str, Any]) -> str:
    options = ours | (rank_1s if dist.get_rank() == 1 else {})
    model = enable(tiny_model(), dist.group.WORLD)
    length = pieces[dist.get_rank()]
    tokens = options.pop("tokens", tokens_of(2, length))
    if options.pop("frozen", False):
        model.layers[0].requires_grad_(False)
    if options.pop("evaluating", False):
        model.eval()
    if "past" in options:
        _, state = model.alone()(tokens_of(2, options.pop("past")), return_state=True)
        options["state"] = state._replace(layers=state.layers[: options.pop("layers", 2)])
    if "max_new_tokens" in options:
        return error_of(lambda: model.generate(tokens, **options))
    if options.pop("loss", False):
        return error_of(lambda: model.loss(tokens, options.pop("targets", tokens), **options))
    with torch.set_grad_enabled(options.pop("grad", True)):
        return error_of(lambda: model(tokens, **options))


LENGTHS = torch.tensor([20, 9])
FAULTS = {
    "a piece that ends inside of a chunk": (
        (13, 16, 4), {}, {},
        "Megalodon: `tokens` must end at a chunk boundary on every rank but the last, got a piece of rank 0 of its group "
        r"that ends 5 tokens into a chunk of 8 of row 0; split\(tokens, mesh, chunk_size=8\) makes pieces of whole chunks.",
    ),
    "lengths beyond the tokens": (
        (8, 8, 4), dict(lengths=torch.tensor([21, 3])), {}, r"`lengths` must be 2 lengths in \[0, 20\], .* got \[21, 3\]"
    ),
    "offsets of a piece": (
        (8, 8, 4), dict(cu_seqlens=torch.tensor([0, 5, 21])), {}, r"`cu_seqlens` must be ascending offsets of one row"
    ),
    "other lengths": (
        (8, 8, 4), dict(lengths=LENGTHS), dict(lengths=LENGTHS + torch.tensor([0, 1])),
        r"`lengths` must be equal on the ranks of a chunk group 0 to 2, got \[20, 10\] on rank 1 and \[20, 9\] on ranks 0, 2",
    ),
    "no lengths": ((8, 8, 4), dict(lengths=LENGTHS), dict(lengths=None), r"got None on rank 1 and \[20, 9\] on ranks 0, 2"),
    "other rows": ((8, 8, 4), {}, dict(tokens=tokens_of(3, 8)), "`rows of tokens` must be equal .* got 3 on rank 1 and 2"),
    "a token outside": (
        (8, 8, 4), {}, dict(tokens=tokens_of(2, 8) + 50), r"on rank 1 of 3: Megalodon: `tokens` must be in \[0, 31\), got"
    ),
    "a target outside": ((8, 8, 4), dict(loss=True), dict(targets=tokens_of(2, 8) + 50), "on rank 1 of 3: .*`targets` must be"),
    "no integers": ((8, 8, 4), {}, dict(tokens=tokens_of(2, 8) * 1.0), "on rank 1 of 3: Megalodon: `tokens` must be integers"),
    "logits and losses": ((8, 8, 4), {}, dict(loss=True), "`call` must be equal on the ranks 0 to 2, got loss on rank 1"),
    "a reduction": ((8, 8, 4), dict(loss=True), dict(reduction="sum"), "`reduction` must be equal .* got sum on rank 1"),
    "without gradients": ((8, 8, 4), {}, dict(grad=False), r"`torch.is_grad_enabled\(\)` must be equal .* got False on rank 1"),
    "training": ((8, 8, 4), {}, dict(evaluating=True), "`training` must be equal .* got False on rank 1 and True on ranks 0, 2"),
    "frozen parameters": ((8, 8, 4), {}, dict(frozen=True), "`parameters that require gradients` must be equal"),
    "who wants a state": ((8, 8, 4), {}, dict(return_state=True), "`return_state` must be equal .* got True on rank 1"),
    "no state": ((8, 8, 4), {}, dict(past=8), "`state` must be equal .* got given on rank 1 and None on ranks 0, 2"),
    "another past": ((8, 8, 4), dict(past=8), dict(past=16), r"`state.norm.count` must be equal .* got \[16, 16\] on rank 1"),
    "another model's state": ((8, 8, 4), dict(past=8), dict(layers=1), "on rank 1 of 3: Megalodon: `state` must have 2 layers"),
    "a cut beside the past's chunks": ((8, 8, 4), dict(past=3), {}, "ends 3 tokens into a chunk of 8 of row 0"),
    "how many to generate": (
        (8, 8, 4), dict(max_new_tokens=3, temperature=0.0), dict(temperature=0.5), "`temperature` must be equal .* got 0.5 on rank 1"
    ),
    "a prompt outside": (
        (8, 8, 4), dict(max_new_tokens=3), dict(tokens=tokens_of(2, 8) + 50), r"on rank 1 of 3: generate: `prompt` must be in"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_rank_raises_the_same_error(ranks, fault):
    pieces, ours, rank_1s, message = FAULTS[fault]
    errors, seconds = zip(*ranks.run(called, 3, pieces, ours, rank_1s), strict=True)
    assert len({*errors}) == 1 and max(seconds) < AT_ONCE, errors
    assert errors[0].startswith("ValueError: ") and re.search(message, errors[0]), errors[0]


def enables(chunk_sizes: tuple[int, ...]) -> str:
    return error_of(lambda: enable(tiny_model(chunk_size=chunk_sizes[dist.get_rank()]), dist.group.WORLD))


def test_configurations_must_be_equal(ranks):
    errors = ranks.run(enables, 3, (8, 8, 16))
    assert (
        len({*errors}) == 1 and "`config.chunk_size` must be equal on the ranks 0 to 2, got 16 on rank 2" in errors[0]
    )


def waits_for_nobody(what: str) -> list[str]:
    """The errors of two calls, of which rank 1 does not come to the first, or fails amid its layers or its loss."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1)) if what == "away" else dist.group.WORLD
    model, others = enable(tiny_model(), group), dist.get_rank() == 0
    if not others and what == "failing in a layer":
        model.layers[1].mega.wv.register_forward_hook(fail)
    if not others and what == "failing in the loss":
        model.output.output.register_forward_hook(fail)
    if not others and what == "away":
        time.sleep(2)
        return []
    begin = time.monotonic()
    errors = [error_of(lambda: model.loss(tokens_of(1, 8), tokens_of(1, 8)))]
    errors.append(error_of(lambda: model(tokens_of(1, 8))))
    assert time.monotonic() - begin < AT_ONCE
    if what != "away":
        dist.barrier()  # the process group of both is as it was
    return errors


def fail(*_: object) -> None:
    raise ValueError("amid the layers")


@pytest.mark.parametrize("what", ["away", "failing in a layer", "failing in the loss"])
def test_no_rank_waits_for_one_that_is_missing(ranks, what):
    (first, second), of_other = ranks.run(waits_for_nobody, 2, what)
    assert first.startswith(
        "RuntimeError: Megalodon: all ranks 0, 1 must take part in this call, but the exchange has "
    )
    if what != "away":
        left = "RuntimeError: Megalodon: all ranks must have come through their last call, but one of this rank's has failed"
        assert of_other[0] == "ValueError: amid the layers" and second.startswith(left) and of_other[1] == second


def dies() -> None:
    model = enable(tiny_model(), dist.group.WORLD)
    if dist.get_rank() == 1:
        os._exit(1)
    model(tokens_of(1, 8))


@pytest.mark.slow
def test_no_rank_waits_for_one_that_has_died():
    pool, start = Ranks(), time.monotonic()
    try:
        with pytest.raises(
            RankError, match="rank 0: .*(?s:.*)must take part in this call.*(?s:.*)rank 1: the process has ended"
        ):
            pool.run(dies, 2)
    finally:
        pool.close()
    assert time.monotonic() - start < 2 * AT_ONCE


def votes(
    facts: list[dict[str, Any]], faults: list[str | None], teams: list[int], of_team: list[dict[str, Any]]
) -> Any:
    rank = dist.get_rank()
    try:
        return agree(
            dist.group.WORLD, facts[rank], faults[rank], own=[rank, 7], team=teams[rank], of_team=of_team[rank]
        )
    except ValueError as error:
        return str(error)


def test_votes(ranks):
    same, none = [{"a": 1}] * 3, [None] * 3
    assert ranks.run(votes, 3, same, none, [0, 0, 2], [{}, {}, {"b": 1}]) == [[[0, 7], [1, 7], [2, 7]]] * 3
    one_says_2 = "Megalodon: `a` must be equal on the ranks 0 to 2, got 2 on rank 2 and 1 on ranks 0, 1."
    assert ranks.run(votes, 3, [*same[:2], {"a": 2}], none, [0, 0, 0], [{}] * 3) == [one_says_2] * 3
    in_team = "Megalodon: `b` must be equal on the ranks of a chunk group 1, 2, got 5 on rank 2 and 4 on rank 1."
    assert ranks.run(votes, 3, same, none, [0, 1, 1], [{}, {"b": 4}, {"b": 5}]) == [in_team] * 3
    assert ranks.run(votes, 3, same, [None, "f: x.", None], [0] * 3, [{}] * 3) == ["on rank 1 of 3: f: x."] * 3
    assert ranks.run(votes, 3, same, ["f: x."] * 3, [0] * 3, [{}] * 3) == ["f: x."] * 3
    lost = "Megalodon: `a` must be equal on the ranks 0 to 2, got nothing on rank 0 and 1 on ranks 1, 2."
    assert ranks.run(votes, 3, [{}, *same[:2]], none, [0] * 3, [{}] * 3) == [lost] * 3

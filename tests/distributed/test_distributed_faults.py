"""Faults between ranks: different arguments raise the same error on all ranks; a rank that ends ends the others."""

import contextlib
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chunk_parallel import cut_over_all_ranks
from launched import TORCHRUN, free_port
from models import TINY, tiny_model, tokens_of
from ranks import RankError, Ranks

from megalodon_ops import MegalodonState
from megalodon_ops.distributed import make_mesh, parallelize
from megalodon_ops.distributed.rank_checks import check_same_on_ranks

MAX_DELAY = 30.0
"""Seconds until a process notices that it cannot go on, on a busy machine; the processes' time-out is longer"""


@dataclass(frozen=True)
class Fault:
    """A call on three ranks that must raise an error, the same on all."""

    message: str
    """regular expression"""
    options: dict[str, Any] = field(default_factory=dict)
    rank_1: dict[str, Any] = field(default_factory=dict)
    """other options of rank 1"""
    past: tuple[int, int] = (0, 0)
    """tokens in the state of rank 1 and of the others"""
    pieces: tuple[int, ...] = (8, 8, 4)
    rows: int = 2
    """of the state"""


def call_error(fault: Fault) -> str:
    rank = dist.get_rank()
    model = cut_over_all_ranks(tiny_model())
    options = fault.options | (fault.rank_1 if rank == 1 else {})
    tokens = options.pop("tokens", tokens_of(2, fault.pieces[rank]))
    if past := fault.past[0 if rank == 1 else 1]:
        _, options["state"] = model.alone()(tokens_of(fault.rows, past), return_state=True)
    try:
        if options.pop("loss", False):
            model.loss(tokens, tokens, **options)
        else:
            model(tokens, **options)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


LENGTHS = torch.tensor([20, 9])
SMALL = MegalodonState.fresh(tiny_model().config, 2, cache_dtype=torch.int8)
FAULTS = [
    Fault(
        "Megalodon: `tokens` must end at a chunk boundary on every rank but the last, got a piece of rank 0 of its group "
        "that ends 5 tokens into a chunk of 8 of sequence 0; "
        r"split\(tokens, mesh, chunk_size=8\) makes pieces of whole chunks.",
        pieces=(13, 16, 4),
    ),
    Fault(r"`lengths` must be 2 lengths in \[0, 20\], .* got \[21, 3\]", dict(lengths=torch.tensor([21, 3]))),
    Fault("`cu_seqlens` must have shape .* for a batch of one row", dict(cu_seqlens=torch.tensor([0, 5, 21]))),
    Fault("`spans` must be in order, disjoint and in one row of 20", dict(spans=torch.tensor([[0, 5], [20, 40]]))),
    Fault("`starts` must be None where ranks hold pieces of rows", dict(starts=LENGTHS)),
    Fault(r"`lengths` must have shape \(2,\), got \(1,\)", dict(lengths=LENGTHS[:1])),
    Fault(
        r"`lengths` must be the same on the ranks 0, 1, 2, got \[20, 9\] on rank 0 and \[20, 10\] on rank 1\.",
        dict(lengths=LENGTHS),
        dict(lengths=LENGTHS + torch.tensor([0, 1])),
    ),
    Fault(r"got \[20, 9\] on rank 0 and None on rank 1", dict(lengths=LENGTHS), dict(lengths=None)),
    Fault("`rows of tokens` must be .* got 2 on rank 0 and 3 on rank 1", rank_1=dict(tokens=tokens_of(3, 8))),
    Fault("`call` must be .* got logits on rank 0 and loss, mean", rank_1=dict(loss=True)),
    Fault("`call` must be .* got loss, mean .* and loss, sum", dict(loss=True), dict(reduction="sum")),
    Fault("`call` must be .* without -100 .* without 0", dict(loss=True), dict(ignore_index=0)),
    Fault("`return_state` must be .* got False .* True on rank 1", rank_1=dict(return_state=True)),
    Fault("`state` must be .* got None on rank 0 and given on rank 1", past=(8, 0)),
    Fault(r"`state.norm.count` must be .* \[8, 8\] on rank 0 and \[16, 16\] on rank 1", past=(16, 8)),
    Fault("`state` must have 2 sequences, as many as `tokens`, got 3", past=(8, 8), rows=3),
    Fault("ends 3 tokens into a chunk of 8 of sequence 0", past=(3, 3)),
    Fault("`state` must have keys and values in the dtype of the activations.*, got torch.int8", dict(state=SMALL)),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.message[:50])
def test_ranks_of_a_sequence_raise_the_same_error(ranks, fault):
    errors = ranks.run(call_error, 3, fault)
    assert len({*errors}) == 1, errors
    assert errors[0].startswith("ValueError: ") and re.search(fault.message, errors[0]), errors[0]


def compare(values: list[dict[str, Any]]) -> Any:
    try:
        return check_same_on_ranks("f", values[dist.get_rank()], dist.group.WORLD, number=dist.get_rank())
    except ValueError as error:
        return str(error)


def test_a_comparison_names_the_difference(ranks):
    same = {"a": 1, "b": torch.arange(3.0)}
    assert ranks.run(compare, 3, [same] * 3) == [[0, 1, 2]] * 3
    for other, name, words in (
        ({**same, "a": 2}, "a", "1 on rank 0 and 2 on rank 2."),
        ({"b": same["b"]}, "a", "1 on rank 0 and nothing on rank 2."),
        ({**same, "b": torch.arange(3.0) + 1}, "b", "float32 (3,) of checksum "),
    ):
        errors = ranks.run(compare, 3, [same, same, other])
        words = f"f: `{name}` must be the same on the ranks 0, 1, 2, got {words}"
        assert len({*errors}) == 1 and errors[0].startswith(words), errors


def fail(*_):
    raise ValueError("amid the layers")


def fail_in_layer(sizes: str, where: str) -> None:
    """Rank 1 fails in a layer and ends; the other one notices the closed connection."""
    model = parallelize(tiny_model(), make_mesh(sizes, device_type="cpu", timeout=600))
    tokens = tokens_of(1, 16).expand(2, -1)
    layer = model.layers[0].mega.wv
    if dist.get_rank() == 1:
        register = layer.register_forward_hook if where == "forward" else layer.register_full_backward_hook
        register(fail)
    start = time.monotonic()
    try:
        for _ in range(3):
            model.loss(tokens, tokens).backward()
    except ValueError:
        os._exit(1)
    except RuntimeError as error:
        assert dist.get_rank() == 0 and re.search("(?i)connection|closed|peer", str(error)), error
        assert time.monotonic() - start < MAX_DELAY
        return
    raise AssertionError("three steps, and no error")


@pytest.mark.parametrize(("sizes", "where"), [("data=2", "backward"), ("chunk=2", "forward"), ("tensor=2", "backward")])
def test_a_rank_that_ends_ends_the_others(parallelize_runs, sizes, where):
    with contextlib.closing(Ranks()) as ranks, pytest.raises(RankError) as caught:
        ranks.run(fail_in_layer, 2, sizes, where)
    assert str(caught.value) == "rank 1: the process has ended"


FAILING = """
import sys, torch, torch.distributed as dist
import megalodon_ops as mo
from megalodon_ops.distributed import make_mesh, parallelize

def fail(*_):
    raise ValueError("amid the layers")

mesh = make_mesh("data=2", device_type="cpu", timeout=600)
torch.manual_seed(0)
model = parallelize(mo.Megalodon(mo.MegalodonConfig(**CONFIG)), mesh)
if dist.get_rank() == 1:
    model.layers[0].mega.wv.register_full_backward_hook(fail)
tokens = torch.randint(9, (2, 16))
for step in range(3):
    model.loss(tokens, tokens).backward()
"""


@pytest.mark.slow
def test_programs_end_after_one_fails(tmp_path):
    """Without a launcher: Python ends, even if gloo's threads still wait."""
    program = tmp_path / "train.py"
    program.write_text(FAILING.replace("CONFIG", repr(TINY)))
    variables = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2")
    processes = []
    for rank in "01":
        options = dict(env=variables | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen([sys.executable, program], **options))
    try:
        (_, other), (_, failed) = (process.communicate(timeout=120) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], other + failed
    assert "ValueError: amid the layers" in failed
    assert re.search(r"(RuntimeError|DistNetworkError|DistBackendError): .*(?i:connection|closed|peer)", other), other


@pytest.mark.slow
def test_the_last_lines_of_torchrun_are_the_first_failure(tmp_path):
    """The other rank prints one line before. test_distributed_train_launch.py kills a process of `train`."""
    program = tmp_path / "train.py"
    program.write_text(FAILING.replace("CONFIG", repr(TINY)))
    command = [*TORCHRUN, "2", "--master-port", str(free_port()), program]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    last = found.stderr.rpartition("Root Cause")[2].strip().splitlines()
    assert last[-2].startswith("  traceback : ValueError: amid the layers"), found.stderr
    assert "  rank      : 1 (local_rank: 1)" in last, found.stderr
    (line,) = re.findall(r"^\[rank0\]: (.*)$", found.stderr, re.M)
    assert line.startswith("another process has ended, or does not answer: "), line

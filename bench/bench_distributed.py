"""`python -m bench.bench_distributed`: chunk parallel against handing states from rank to rank, on local processes.

Each case is a training step of one long row, cut into equal pieces for P processes. The columns of the table:

- forward s, step s: critical path, as if each rank had its own core and messages took no time. Each process records its
  processor time at every exchange, and the path is computed from these times: the processes share the machine's cores,
  so wall time would depend on the number of cores.
- in step s: the same if no rank begins a block before the others, as when parameters are sharded. Otherwise rank 0 may
  run some blocks ahead of the last rank.
- exchanges in a row, KiB a layer: what a network adds. These are the sequential exchanges of a step, and the bytes that
  a rank sends per layer in the forward and the backward.

The exit status is 1 if the loss or the gradients differ from those of one process. Writes a page and a JSON file.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from megalodon_ops.distributed import chunk, exchange, rank_checks
from megalodon_ops.distributed.parallel_model import ParallelMegalodon, Ranks

import megalodon_ops as mo

from . import machine
from .hand_over import HandOver

CONFIG = dict(num_layers=4, model_dim=256, num_heads=1, z_dim=128, value_dim=512, ffn_hidden_dim=512, cema_ndim=16)
CONFIG |= dict(chunk_size=512, vocab_size=256, norm_num_groups=32)
QUICK = CONFIG | dict(num_layers=2, model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=64, chunk_size=128)


def chunk_parallel(model: mo.Megalodon, before: int) -> mo.Megalodon:
    return ParallelMegalodon(model, Ranks(batch=dist.group.WORLD, chunk=dist.group.WORLD))


def hand_over(model: mo.Megalodon, before: int) -> mo.Megalodon:
    HandOver(model, before)
    return model


WAYS = {"chunk parallel": chunk_parallel, "hand-over": hand_over}
TOLERANCE = 1e-4


class Event(NamedTuple):
    """A point where a rank starts to send, or waits."""

    kind: str
    """start, wait, all (start and wait), send, recv, block (sharded parameters would be gathered here), end"""
    key: str
    """equal for events that belong together"""
    seconds: float
    """processor time since the previous event"""
    bytes: int
    """sent to other ranks"""


class Trace:
    """The events of one training step on this rank."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._counts: dict[str, int] = {}
        self._last = 0.0

    def note(self, kind: str, key: str, sent: int = 0) -> None:
        now = time.thread_time()
        self.events.append(Event(kind, key, now - self._last, sent))
        self._last = now

    def key(self, name: str) -> str:
        self._counts[name] = self._counts.get(name, -1) + 1
        return f"{name} {self._counts[name]}"

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the exchanges made inside."""
        rank, ranks, gather = dist.get_rank(), dist.get_world_size(), exchange.all_gather
        originals = {name: getattr(dist, name) for name in ("all_to_all_single", "all_reduce", "send", "recv")}

        def traced_gather(out: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
            key = self.key("gather")
            asynchronous = options.get("async_op", False)
            self.note("start" if asynchronous else "all", key, value.nbytes * (ranks - 1))
            work = gather(out, value, **options)
            return _Work(work, lambda: self.note("wait", key)) if asynchronous else work

        def all_to_all_single(out: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
            self.note("all", self.key("back"), value.nbytes // ranks * (ranks - 1))
            return originals["all_to_all_single"](out, value, **options)

        def all_reduce(value: torch.Tensor, **options: Any) -> Any:
            self.note("all", self.key("reduce"), value.nbytes * 2 * (ranks - 1) // ranks)
            return originals["all_reduce"](value, **options)

        def send(value: torch.Tensor, other: int) -> Any:
            self.note("send", self.key(f"{rank} to {other}"), value.nbytes)
            return originals["send"](value, other)

        def recv(value: torch.Tensor, other: int) -> Any:
            self.note("recv", self.key(f"{other} to {rank}"))
            return originals["recv"](value, other)

        for function in (all_to_all_single, all_reduce, send, recv):
            setattr(dist, function.__name__, function)
        exchange.all_gather = rank_checks.all_gather = traced_gather
        self._last = time.thread_time()
        try:
            yield
        finally:
            self.note("end", "end")
            exchange.all_gather = rank_checks.all_gather = gather
            for name, function in originals.items():
                setattr(dist, name, function)


class _Work:
    def __init__(self, work: dist.Work, waits: Callable[[], None]) -> None:
        self._work, self._waits = work, waits

    def wait(self) -> None:
        self._waits()
        self._work.wait()


def critical_path(traces: list[list[Event]], *, in_step: bool = False) -> tuple[float, int]:
    """Seconds until the last rank ends, and the number of sequential exchanges until then.

    A rank's clock advances by its own computation, and at a wait to the latest time at which the awaited data was sent.
    Its depth is the same when each exchange counts 1 and computation 0. With `in_step`, no rank begins a block before the
    others, as when parameters are sharded.
    """
    ranks = range(len(traces))
    clocks = [0.0 for _ in ranks]
    depths = [0 for _ in ranks]
    num_done = [0 for _ in ranks]  # events
    sent: dict[str, dict[int, tuple[float, int]]] = {}  # key of the exchange -> sender -> its clock and depth
    waiting: set[int] = set()  # ranks whose clock already includes the computation before their event
    while any(num_done[rank] < len(traces[rank]) for rank in ranks):
        for rank in ranks:
            while num_done[rank] < len(traces[rank]):
                event = traces[rank][num_done[rank]]
                is_barrier = event.kind == "all" or (in_step and event.kind == "block")
                if rank not in waiting:
                    clocks[rank] += event.seconds
                    if is_barrier or event.kind in ("start", "send"):
                        sent.setdefault(event.key, {})[rank] = clocks[rank], depths[rank]
                if is_barrier or event.kind in ("wait", "recv"):
                    arrived = sent.get(event.key, {})
                    num_senders = 1 if event.kind == "recv" else len(traces)
                    if len(arrived) < num_senders:
                        waiting.add(rank)
                        break
                    hops = 0 if event.kind == "block" else 1
                    clocks[rank] = max(clocks[rank], *(clock for clock, _ in arrived.values()))
                    depths[rank] = max(depths[rank], *(depth + hops for _, depth in arrived.values()))
                waiting.discard(rank)
                num_done[rank] += 1
    return max(clocks), max(depths)


class RankResult(NamedTuple):
    """The training steps of one rank; times are the smallest of all steps."""

    rank: int
    forward: list[Event]
    backward: list[Event]
    exchange_seconds: float
    loss: float
    norms: list[float]


def run_rank(
    rank: int, ranks: int, way: str, config: dict[str, Any], tokens: int, steps: int, store: str, out: Any
) -> None:
    """Run `steps` training steps on one rank, and put its `RankResult` into the queue `out`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    in_exchanges = _time_exchanges()
    torch.manual_seed(0)
    model = mo.Megalodon(mo.MegalodonConfig(**config))
    row, targets = torch.randint(config["vocab_size"], (2, 1, tokens), generator=torch.Generator().manual_seed(1))
    piece = slice(rank * tokens // ranks, (rank + 1) * tokens // ranks)
    if ranks > 1:
        model = WAYS[way](model, piece.start)
    forwards, backwards, exchange_seconds = [], [], []
    now = Trace()  # of the pass that runs
    for block in model.layers:
        block.register_forward_pre_hook(lambda *_: now.note("block", now.key("block")))
        block.register_full_backward_pre_hook(lambda *_: now.note("block", now.key("block")))
    for _ in range(steps):
        model.zero_grad()
        now = Trace()
        in_exchanges[0] = 0.0
        with now.recording():
            if way == "hand-over" or ranks == 1:
                loss = model.loss(row[:, piece], targets[:, piece], reduction="sum") / tokens
            else:
                loss = model.loss(row[:, piece], targets[:, piece])
        exchange_seconds.append(in_exchanges[0])
        forwards.append(now.events)
        now = Trace()
        with now.recording():
            loss.backward()
        backwards.append(now.events)
    total = loss.detach().clone()
    grads = [parameter.grad for parameter in model.parameters()]
    for tensor in (total, *grads):
        dist.all_reduce(tensor)
    if ranks > 1 and way != "hand-over":  # each rank has the total loss, and gradients times the number of ranks
        total /= ranks
        for grad in grads:
            grad /= ranks
    norms = [grad.norm().item() for grad in grads]
    out.put(RankResult(rank, _fastest(forwards), _fastest(backwards), min(exchange_seconds), total.item(), norms))
    dist.barrier()
    dist.destroy_process_group()


def _time_exchanges() -> list[float]:
    """Make the exchanges of chunk parallel add their processor time to the only item of the result."""
    spent = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            begin = time.thread_time()
            try:
                return function(*args)
            finally:
                spent[0] += time.thread_time() - begin

        return run

    for name in ("norm_state", "send_end", "receive"):
        setattr(chunk.ShardedSequences, name, timed(getattr(chunk.ShardedSequences, name)))
    return spent


def _fastest(steps: list[list[Event]]) -> list[Event]:
    """The events of a training step, each with its smallest time over all steps."""
    return [min(same, key=lambda event: event.seconds) for same in zip(*steps, strict=True)]


class Row(NamedTuple):
    """Cost of one training step by one way on `ranks` processes."""

    ranks: int
    way: str
    forward: float
    step: float
    """seconds of the critical path"""
    in_step: float
    """seconds of the critical path when no rank begins a block before the others"""
    processors: float
    """processor seconds of all ranks together"""
    exchanges: float
    """share of the forward's processor time spent on end states, their exchange and their merge"""
    depth: int
    """sequential exchanges"""
    bytes_forward: float
    bytes_backward: float
    """bytes sent per layer by the rank that sends the most"""
    loss: float
    norms: list[float]


def measure(ranks: int, way: str, config: dict[str, Any], tokens: int, steps: int) -> Row:
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        args = (ranks, way, config, tokens, steps, f"{folder}/store", out)
        processes = [context.Process(target=run_rank, args=(rank, *args)) for rank in range(ranks)]
        for process in processes:
            process.start()
        results = sorted((out.get(timeout=900) for _ in processes), key=lambda result: result.rank)
        for process in processes:
            process.join()
    forwards = [result.forward for result in results]
    backwards = [result.backward for result in results]
    forward, forward_depth = critical_path(forwards)
    backward, backward_depth = critical_path(backwards)
    forward_processors = _processor_seconds(forwards)
    return Row(
        ranks=ranks,
        way=way if ranks > 1 else "one process",
        forward=forward,
        step=forward + backward,
        in_step=critical_path(forwards, in_step=True)[0] + critical_path(backwards, in_step=True)[0],
        processors=forward_processors + _processor_seconds(backwards),
        exchanges=sum(result.exchange_seconds for result in results) / forward_processors,
        depth=forward_depth + backward_depth,
        bytes_forward=_most_bytes(forwards) / config["num_layers"],
        bytes_backward=_most_bytes(backwards) / config["num_layers"],
        loss=results[0].loss,
        norms=results[0].norms,
    )


def _processor_seconds(traces: list[list[Event]]) -> float:
    return sum(event.seconds for trace in traces for event in trace)


def _most_bytes(traces: list[list[Event]]) -> int:
    """Bytes sent by the rank that sends the most."""
    return max(sum(event.bytes for event in trace) for trace in traces)


def agrees(row: Row, single: Row) -> bool:
    pairs = [(row.loss, single.loss), *zip(row.norms, single.norms, strict=True)]
    return all(abs(a - b) <= TOLERANCE * max(abs(b), 1e-3) for a, b in pairs)


def table(rows: list[Row]) -> str:
    single = rows[0]
    head = (
        "processes | way | forward s | times faster | step s | times faster | in step s | times faster | processors s"
    )
    head += " | exchange, of a forward | exchanges in a row | KiB a layer, forward | backward"
    lines = [head, " | ".join(["---"] * (head.count("|") + 1))]
    for row in rows:
        cells = [str(row.ranks), row.way]
        for seconds, one_process in (
            (row.forward, single.forward),
            (row.step, single.step),
            (row.in_step, single.step),
        ):
            cells += [f"{seconds:.2f}", f"{one_process / seconds:.2f}"]
        exchanges = f"{100 * row.exchanges:.1f} %" if row.way == "chunk parallel" else ""
        sent = (f"{count / 1024:.0f}" if row.ranks > 1 else "" for count in (row.bytes_forward, row.bytes_backward))
        lines.append(" | ".join([*cells, f"{row.processors:.2f}", exchanges, str(row.depth or ""), *sent]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_distributed", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4, 8], metavar="P", help="2 4 8")
    parser.add_argument("--tokens", type=int, help="length of the row, a multiple of P chunks (16,384)")
    parser.add_argument("--steps", type=int, default=3, help="training steps of each way; the smallest times count (3)")
    parser.add_argument("--quick", action="store_true", help="a small model, to test the bench itself")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder for the results")
    options = parser.parse_args()
    config = QUICK if options.quick else CONFIG
    tokens = options.tokens or (8 * config["chunk_size"] if options.quick else 1 << 14)
    if any(count < 2 or tokens % (count * config["chunk_size"]) for count in options.processes):
        parser.error(f"--tokens must be whole chunks of {config['chunk_size']} for each of 2 processes or more")
    load = os.getloadavg()[0]
    rows = [measure(1, "", config, tokens, options.steps)]
    for count in options.processes:
        for way in WAYS:
            rows.append(measure(count, way, config, tokens, options.steps))
            print(f"{count} processes, {way}: {rows[-1].step:.2f} s", file=sys.stderr)
    wrong = [f"{row.ranks} processes, {row.way}" for row in rows if not agrees(row, rows[0])]
    date = datetime.date.today().isoformat()
    facts = {
        "model": ", ".join(f"{name} {value}" for name, value in config.items()),
        "tokens": f"{tokens:,} in one row, float32",
        "load": f"{load:.1f} processes wanted a core when the bench began, {os.getloadavg()[0]:.1f} when it ended",
        **machine.describe(),
    }
    page = [f"# Chunk parallel, {date}", __doc__.split("\n\n", 1)[1].strip()]
    page += ["\n".join(f"- {name}: {value}" for name, value in facts.items()), table(rows)]
    page += [f"Failed: {', '.join(wrong)}"] if wrong else []
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{date}-distributed{'-quick' if options.quick else ''}"
    stem.with_suffix(".md").write_text("\n\n".join(page) + "\n")
    stem.with_suffix(".json").write_text(
        json.dumps(dict(date=date, **facts, rows=[row._asdict() for row in rows]), indent=1) + "\n"
    )
    print(table(rows))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())

"""Threads of a decoded token, which are the package's own: bits, life, signals, forks, and a thread that cannot start."""

import multiprocessing
import os
import re
import resource
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from decoding import by_decoder, model_and_state
from models import tokens_of
from programs import run_python

import megalodon_ops as mo

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

TASKS = Path("/proc/self/task")
SIGNALS = {name: 1 << number - 1 for name, number in {"INT": 2, "TERM": 15, "SEGV": 11, "BUS": 7}.items()}  # in masks


@pytest.fixture(scope="module")
def decode():
    """Decode some tokens with n threads; the linear layers are large enough to use them."""
    sizes = dict(model_dim=256, z_dim=64, value_dim=256, ffn_hidden_dim=256)
    model, state = model_and_state(**sizes)
    pieces = tokens_of(1, 12).split(1, 1)

    def run(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        decoder = mo.Decoder(model, state)
        assert decoder.fused
        return by_decoder(decoder, pieces)

    before = torch.get_num_threads()
    run.expected = run(1)
    torch.set_num_threads(before)
    return run


def agrees(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def in_a_child(decode, function):
    """Call the function in a forked process, with its tasks after a call on one thread; return the result."""
    context = multiprocessing.get_context("fork")
    ours, childs = context.Pipe()

    def run():
        try:
            decode(1)  # libraries that other tests loaded may start a thread, too
            childs.send((function(tasks()), None))
        except BaseException:
            childs.send((None, traceback.format_exc()))

    process = context.Process(target=run)
    process.start()
    assert ours.poll(60), "the child does not answer"
    result, fault = ours.recv()
    process.join()
    assert fault is None, fault
    return result


def tasks() -> set[str]:
    return {task.name for task in TASKS.iterdir()}


def settles(condition) -> bool:
    """Wait up to ten seconds for what other threads make true."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_threads_start_when_needed_and_block_signals(decode):
    def child(before):
        counts = []
        for threads in (1, 2, 4, 3, 1):
            assert agrees(decode(threads), decode.expected)
            counts.append(len(tasks() - before))
        status = [(TASKS / task / "status").read_text() for task in tasks() - before]
        blocked = [int(re.search(r"SigBlk:\s*(\w+)", text)[1], 16) for text in status]
        return counts, [[name for name, bit in SIGNALS.items() if mask & bit] for mask in blocked]

    counts, blocked = in_a_child(decode, child)
    assert counts == [0, 1, 3, 3, 3]
    assert blocked == [["INT", "TERM"]] * 3


def test_a_fork_after_a_decoded_token(decode):
    """Parent and child start new threads."""

    def decode_in(before):
        return agrees(decode(3), decode.expected), len(tasks() - before)

    def child(before):
        return decode_in(before), in_a_child(decode, decode_in), decode_in(before)

    assert in_a_child(decode, child) == ((True, 2),) * 3


def test_python_threads_decode_at_once_and_end_their_threads(decode):
    def child(before):
        with ThreadPoolExecutor(4) as pool:
            start = threading.Barrier(4)

            def run(_):
                start.wait()
                return all(agrees(decode(3), decode.expected) for _ in range(5))

            results = list(pool.map(run, range(4)))
        return results, settles(lambda: tasks() == before)

    assert in_a_child(decode, child) == ([True] * 4, True)


def test_the_caller_runs_what_waiting_threads_have_not_started(decode):
    """On one processor most threads get it after the caller has finished."""

    def child(before):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return [agrees(decode(threads), decode.expected) for threads in (2, 3, 8)], len(tasks() - before)

    assert in_a_child(decode, child) == ([True] * 3, 7)


def test_a_thread_that_cannot_start(decode):
    """The call raises, and one with memory for the thread works."""

    def child(_):
        limits = resource.getrlimit(resource.RLIMIT_AS)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        # Less than a stack; a few of ended threads are left.
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (4 << 20), limits[1]))
        try:
            decode(64)
        except RuntimeError as error:
            message = str(error)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        return message, agrees(decode(64), decode.expected)

    message, works = in_a_child(decode, child)
    assert re.match(r"megalodon_ops: thread \d+ must start, got `.*`; set fewer by torch.set_num_threads.", message)
    assert works


AFFINITY = """
import os, time, torch, megalodon_ops as mo
torch.set_num_threads(2)
model = mo.Megalodon(mo.MegalodonConfig(num_layers=1, model_dim=256, z_dim=64, value_dim=256, ffn_hidden_dim=256,
                                        chunk_size=64, vocab_size=50, norm_num_groups=4))
state = model(torch.ones(1, 3, dtype=torch.long), return_state=True)[1]
torch.ones(1 << 20).exp()  # OpenMP binds the main thread
before = set(os.listdir("/proc/self/task"))
mo.Decoder(model, state)(torch.ones(1, 1, dtype=torch.long))
(ours,) = set(os.listdir("/proc/self/task")) - before
end = time.monotonic() + 10
while os.sched_getaffinity(int(ours)) == os.sched_getaffinity(0) and time.monotonic() < end:
    time.sleep(0.01)  # until the thread has started
print(len(os.sched_getaffinity(0)), len(os.sched_getaffinity(int(ours)) - os.sched_getaffinity(0)))
"""


@pytest.mark.slow  # it starts Python: OpenMP reads the variable when it is loaded
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_threads_take_openmps_places():
    """Own threads would else inherit the one processor to which OpenMP binds the caller."""
    ran = run_python(AFFINITY, OMP_PROC_BIND="true", OMP_PLACES="cores")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["1", "1"]

"""`train` as torchrun starts it: signals, killed and missing processes, threads."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import rows
from launched import TORCHRUN, ended_afterwards, flags, lines_of, workers

from megalodon_ops.cli import processes
from megalodon_ops.training.checkpoint import load_checkpoint


fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this torch has no torch.distributed.fsdp.fully_shard", allow_module_level=True)

from test_distributed_train import assert_losses  # noqa: E402

slow = pytest.mark.slow
LIMIT = 240
"""Seconds that a launch may take on a machine that is busy with other things"""


def start(options, arguments, cwd, program=("-m", "megalodon_ops"), **environment):
    """torchrun in a process group of its own, with a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.Popen(
        [*TORCHRUN, *map(str, options), "--master-port", str(port), *map(str, program), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **environment},
    )  # fmt: skip


def lines_of_the_command(err):
    """What `train` says, without torchrun's own lines."""
    return [line for line in lines_of(err) if re.match("megalodon_ops( train: error)?: ", line)]


def wait_for(condition, process, seconds=LIMIT):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def losses(out):
    return [row for row in rows(out) if "loss" in row] if (out / "metrics.jsonl").exists() else []


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A launch that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start([2], flags(text, out, *LONG), out.parent)
    with ended_afterwards(process):
        printed, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    return out, printed


LONG = ("--steps", 120, "--checkpoint-every", 10, "--eval-every", 50)


@slow
def test_a_launch_prints_what_one_process_prints(whole):
    out, printed = whole
    assert printed.count("bits per byte") == printed.count("2 processes, data=2") == 1
    assert "continued by the model, 3 of 3" in printed
    assert load_checkpoint(out).record["mesh"] == {"data": 2}


@slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(whole, text, tmp_path, seed):
    """The run goes on from the last whole checkpoint: no step is lost, and none is counted twice."""
    draw, out = random.Random(seed), tmp_path / "run"
    process = start([2, "--max-restarts", 3], flags(text, out, *LONG), tmp_path)
    with ended_afterwards(process):
        kills = 0
        for after in sorted(draw.sample(range(5, 110), 2)):
            wait_for(lambda: len(losses(out)) >= after, process)  # noqa: B023
            time.sleep(0.3 * draw.random())
            victims = workers(process)
            if len(victims) == 2:
                os.kill(draw.choice(victims), signal.SIGKILL)
                kills += 1
                wait_for(lambda: workers(process) and not set(victims) & set(workers(process)), process)  # noqa: B023
        printed, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert kills >= 1
    assert [row["step"] for row in losses(out)] == list(range(1, 121))
    assert_losses(out, whole[0], 1e-6)
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000110", "step-00000120"}


@slow
@pytest.mark.parametrize("whom", ["all", "torchrun", "one process"])
def test_signals(text, tmp_path, whom):
    """All stop at one step, with a checkpoint; torchrun passes on what it gets, so a process may get a signal twice."""
    out = tmp_path / "run"
    process = start([2], flags(text, out, "--steps", 100_000, "--checkpoint-every", 100_000), tmp_path)
    with ended_afterwards(process):
        wait_for(lambda: len(losses(out)) > 5, process)
        if whom == "torchrun":
            process.send_signal(signal.SIGTERM)
        elif whom == "one process":
            os.kill(workers(process)[1], signal.SIGTERM)
        else:
            for pid in [*workers(process), process.pid]:
                os.kill(pid, signal.SIGINT)
        printed, err = process.communicate(timeout=LIMIT)
    step = losses(out)[-1]["step"]
    assert f"stopped after step {step}; continue with: " in printed, (printed, err)
    assert load_checkpoint(out).step == step
    assert lines_of_the_command(err) == []


@slow
def test_a_process_that_does_not_answer(text, tmp_path):
    """A stopped process is noticed after --timeout, in one line, and torchrun ends all."""
    process = start([2], flags(text, tmp_path / "run", "--steps", 100_000, "--timeout", 5), tmp_path)
    with ended_afterwards(process):
        wait_for(lambda: len(losses(tmp_path / "run")) > 2, process)
        stopped = workers(process)[1]
        os.kill(stopped, signal.SIGSTOP)
        begin = time.monotonic()
        wait_for(lambda: len(workers(process)) < 2, process, 60)
        assert time.monotonic() - begin < 40
        os.kill(stopped, signal.SIGKILL)
        printed, err = process.communicate(timeout=LIMIT)
    (line,) = lines_of_the_command(err)
    assert "another process of the run has ended, or has not answered within --timeout: " in line


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_process(text, tmp_path, rank):
    """One line, soon after --timeout."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE="2",
        OMP_NUM_THREADS="1",
    )
    result = subprocess.run(
        [sys.executable, "-m", "megalodon_ops", *flags(text, tmp_path / "run", "--timeout", 2)],
        capture_output=True, text=True, timeout=LIMIT, env={**os.environ, **environment},
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = lines_of(result.stderr)
    begin = f"megalodon_ops train: error: rank {rank}: the processes have not found each other, which --timeout gives 2 s for: "
    assert line.startswith(begin)
    assert not (tmp_path / "run").exists()


@slow
def test_what_does_not_divide_is_said_once(text, tmp_path):
    process = start([2], flags(text, tmp_path / "run", "--batch", 3), tmp_path)
    with ended_afterwards(process):
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    (line,) = lines_of_the_command(err)
    assert re.fullmatch(
        r"megalodon_ops train: error: rank [01]: --batch 3: must be a multiple of the mesh's data=2", line
    )
    assert re.search(r"exitcode\s*: 2 ", err), "that of the processes"


@pytest.mark.parametrize(
    "fault, rank, message",
    [
        ("broken backward", 1, None),
        ("unreadable text", 1, "book.txt: Input/output error"),
        pytest.param("missing file", 1, "--data book.txt: no such file or folder", marks=slow),
        pytest.param("full disk", 0, "metrics.jsonl: could not be written: No space left on device", marks=slow),
        pytest.param("bad evaluation", 1, "the loss of the text to predict is nan", marks=slow),
    ],
)
def test_a_process_that_fails_says_why_and_ends_all(text, tmp_path, fault, rank, message):
    """Within seconds, wherever the others wait; they say nothing. A fault of the program has its traceback."""
    program = (Path(__file__).with_name("failing_rank.py"), fault, rank)
    process = start([2], flags(text, tmp_path / "run", "--steps", 6, "--eval-every", 4), tmp_path, program)
    with ended_afterwards(process):
        _, err = process.communicate(timeout=120)  # of processes that wait for each other for ten minutes
    assert process.returncode != 0
    if message is None:
        assert "ZeroDivisionError" in err and lines_of_the_command(err) == []
    else:
        assert lines_of_the_command(err) == [f"megalodon_ops train: error: rank {rank}: {message}"]


@slow
def test_where_torchrun_is_killed_its_processes_stop_with_a_checkpoint(text, tmp_path):
    out = tmp_path / "run"
    process = start([2], flags(text, out, "--steps", 100_000, "--checkpoint-every", 100_000), tmp_path)
    started = []
    try:
        wait_for(lambda: len(losses(out)) > 5, process)
        started = workers(process)
        process.kill()
        process.wait()
        end = time.monotonic() + 60
        while any(map(is_running, started)):
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        for pid in filter(is_running, started):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    assert load_checkpoint(out).step == losses(out)[-1]["step"] > 5


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "environment, expected", [({}, 2), ({"OMP_NUM_THREADS": "1"}, 2), ({"OMP_NUM_THREADS": "3"}, None)]
)
def test_threads(monkeypatch, environment, expected):
    """A share of the cores, but where OMP_NUM_THREADS is the user's; torchrun sets it to 1 where the user has not."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in {**environment, "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    processes.take_a_share_of_the_threads()
    assert taken == ([] if expected is None else [expected])

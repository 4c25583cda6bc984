"""`train` under torchrun: signals, killed and missing processes, threads."""

import os
import random
import re
import signal
import subprocess
import time

from paths import TESTS
import pytest
import torch
from command_line import lines_of, rows, shell
from launched import TORCHRUN, Launch, ended_afterwards, flags, free_port, workers

from megalodon_ops.cli import processes
from megalodon_ops.training.run_checkpoint import load_checkpoint
from test_distributed_train import assert_losses

pytestmark = pytest.mark.usefixtures("parallelize_runs")
slow = pytest.mark.slow
LIMIT = 240
"""Seconds that a launch may take on a busy machine"""


def start(options, arguments, cwd, program=("-m", "megalodon_ops"), **environment):
    """Start torchrun in a process group of its own, with a port of its own."""
    command = [*TORCHRUN, *map(str, options), "--master-port", str(free_port()), *map(str, program), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **environment}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, **pipes, cwd=cwd, start_new_session=True, env=environment)


def lines_of_the_command(err):
    """Lines that `train` prints, without torchrun's own."""
    return [line for line in lines_of(err) if re.match("megalodon_ops( train: error)?: ", line)]


def wait_for(condition, process):
    end = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def losses(out):
    return [row for row in rows(out) if "loss" in row] if (out / "metrics.jsonl").exists() else []


LONG = ("--layers", 2, "--steps", 24, "--checkpoint-every", 6, "--eval-every", 12)


@pytest.fixture(scope="module")
def undisturbed_run(text, tmp_path_factory):
    """A launch without signals or kills: its folder and output."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start([2], flags(text, out, *LONG), out.parent)
    with ended_afterwards(process):
        printed, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    return out, printed


@slow
def test_a_launch_prints_the_same_as_one_process(undisturbed_run):
    out, printed = undisturbed_run
    assert printed.count("bytes     bits per byte") == printed.count("2 processes, data=2") == 1
    assert "continued by the model, 3 of 3" in printed
    assert load_checkpoint(out).record["mesh"] == {"data": 2}


@slow
def test_killed_at_a_random_moment(undisturbed_run, text, tmp_path):
    """Restarted processes find each other and resume from the last complete checkpoint; each step counts once."""
    draw = random.Random()
    out = tmp_path / "run"
    process = start([2, "--max-restarts", 3], flags(text, out, *LONG), tmp_path)
    with ended_afterwards(process):
        after = draw.randrange(2, 20)
        wait_for(lambda: len(losses(out)) >= after, process)
        time.sleep(0.3 * draw.random())
        victims = workers(process)
        assert len(victims) == 2
        os.kill(draw.choice(victims), signal.SIGKILL)
        wait_for(lambda: workers(process) and not set(victims) & set(workers(process)), process)
        printed, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert [row["step"] for row in losses(out)] == list(range(1, 25))
    assert_losses(out, undisturbed_run[0], 1e-6)
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000018", "step-00000024"}


@slow
@pytest.mark.parametrize("whom", ["all", "torchrun"])
def test_signals(text, tmp_path, whom):
    """All stop at one step, with a checkpoint; torchrun forwards its signals, so a process may get one twice.

    test_distributed_train.py sends signals to single processes.
    """
    out = tmp_path / "run"
    process = start([2], flags(text, out, "--steps", 100_000, "--checkpoint-every", 100_000), tmp_path)
    with ended_afterwards(process):
        wait_for(lambda: len(losses(out)) > 5, process)
        if whom == "torchrun":
            process.send_signal(signal.SIGTERM)
        else:
            for pid in [*workers(process), process.pid]:
                os.kill(pid, signal.SIGINT)
        printed, err = process.communicate(timeout=LIMIT)
    step = losses(out)[-1]["step"]
    assert f"stopped after step {step}; continue with: " in printed, (printed, err)
    assert load_checkpoint(out).step == step
    assert lines_of_the_command(err) == []


def test_a_process_that_does_not_answer(text, tmp_path):
    """A stopped process is noticed after --timeout, in one line."""
    out = tmp_path / "run"
    launch = Launch(flags(text, out, "--steps", 100_000, "--timeout", 3), tmp_path)
    first, stopped = launch.processes
    end = time.monotonic() + LIMIT
    while len(losses(out)) < 3 and first.is_alive() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(stopped.pid, signal.SIGSTOP)
    begin = time.monotonic()
    first.join(60)
    assert time.monotonic() - begin < 40
    stopped.kill()
    results = launch.results()
    assert [result.code for result in results] == [2, -signal.SIGKILL], results
    (line,) = lines_of_the_command(results[0].err)
    assert "another process of the run has ended, or has not answered within --timeout: " in line


@slow
def test_a_missing_process(text, tmp_path):
    """One line, soon after --timeout, from a process that has not imported torch before the command."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "1", "WORLD_SIZE": "2"}
    options = dict(capture_output=True, text=True, timeout=LIMIT, env={**os.environ, **environment, "LOCAL_RANK": "0"})
    result = subprocess.run(shell(*flags(text, tmp_path / "run", "--timeout", 2)), **options)
    assert result.returncode == 2
    (line,) = lines_of(result.stderr)
    begin = "megalodon_ops train: error: rank 1: the processes did not find each other within --timeout 2 s: "
    assert line.startswith(begin)
    assert not (tmp_path / "run").exists()


@slow
def test_a_process_that_is_killed_ends_all(text, tmp_path):
    """All end within seconds, and the last lines name the cause. test_distributed_train.py has processes that fail."""
    program = [TESTS / "support" / "killed_rank.py"]
    process = start([2], flags(text, tmp_path / "run", "--steps", 6), tmp_path, program)
    with ended_afterwards(process):
        _, err = process.communicate(timeout=120)  # the processes' own time-out is ten minutes
    assert process.returncode != 0
    *_, cause, _ = lines_of(err)
    assert cause.strip().startswith("traceback : Signal 9 "), err
    assert "rank      : 0 (local" in err.rpartition("Root Cause")[2]
    assert len(lines_of_the_command(err)) == 1, err
    assert [row["step"] for row in losses(tmp_path / "run")] == [1]


@slow
def test_processes_of_a_killed_torchrun_stop_with_a_checkpoint(text, tmp_path):
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
    """A share of the cores, unless the user has set OMP_NUM_THREADS; torchrun sets it to 1 by default."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in {**environment, "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    processes.set_thread_share()
    assert taken == ([] if expected is None else [expected])

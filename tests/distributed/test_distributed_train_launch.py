"""`train` as torchrun starts it: signals, killed and missing processes, threads."""

import os
import random
import re
import signal
import subprocess
import time

from paths import TESTS
import pytest
import torch
from command_line import rows, shell
from launched import TORCHRUN, Launch, ended_afterwards, flags, free_port, lines_of, workers

from megalodon_ops.cli import processes
from megalodon_ops.training.run_checkpoint import load_checkpoint


fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this torch has no torch.distributed.fsdp.fully_shard", allow_module_level=True)

from test_distributed_train import assert_losses  # noqa: E402

slow = pytest.mark.slow
LIMIT = 240
"""Seconds that a launch may take on a machine that is busy with other things"""


def start(options, arguments, cwd, program=("-m", "megalodon_ops"), **environment):
    """torchrun in a process group of its own, with a port of its own."""
    return subprocess.Popen(
        [*TORCHRUN, *map(str, options), "--master-port", str(free_port()), *map(str, program), *arguments],
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


LONG = ("--layers", 2, "--steps", 24, "--checkpoint-every", 6, "--eval-every", 12)


@slow
def test_a_launch_prints_what_one_process_prints(whole):
    out, printed = whole
    assert printed.count("bits per byte") == printed.count("2 processes, data=2") == 1
    assert "continued by the model, 3 of 3" in printed
    assert load_checkpoint(out).record["mesh"] == {"data": 2}


@slow
def test_killed_at_a_random_moment(whole, text, tmp_path):
    """Processes that are started again find each other and go on from the last whole checkpoint: each step counts once."""
    draw, out = random.Random(), tmp_path / "run"
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
    assert_losses(out, whole[0], 1e-6)
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000018", "step-00000024"}


@slow
@pytest.mark.parametrize("whom", ["all", "torchrun"])
def test_signals(text, tmp_path, whom):
    """All stop at one step, with a checkpoint; torchrun passes on what it gets, so a process may get a signal twice.

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
    """One line, soon after --timeout, of a process that has not imported torch before the command."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "1", "WORLD_SIZE": "2"}
    result = subprocess.run(
        shell(*flags(text, tmp_path / "run", "--timeout", 2)),
        capture_output=True, text=True, timeout=LIMIT, env={**os.environ, **environment, "LOCAL_RANK": "0"},
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = lines_of(result.stderr)
    begin = (
        "megalodon_ops train: error: rank 1: the processes have not found each other, which --timeout gives 2 s for: "
    )
    assert line.startswith(begin)
    assert not (tmp_path / "run").exists()


@slow
def test_a_process_that_is_killed_ends_all(text, tmp_path):
    """Within seconds; the last that the user sees is why. test_distributed_train.py has processes that fail."""
    program = [TESTS / "support" / "killed_rank.py"]
    process = start([2], flags(text, tmp_path / "run", "--steps", 6), tmp_path, program)
    with ended_afterwards(process):
        _, err = process.communicate(timeout=120)  # of processes that wait for each other for ten minutes
    assert process.returncode != 0
    *_, why, _ = lines_of(err)
    assert why.strip().startswith("traceback : Signal 9 "), err
    assert "rank      : 0 (local" in err.rpartition("Root Cause")[2]
    assert len(lines_of_the_command(err)) == 1, err
    assert [row["step"] for row in losses(tmp_path / "run")] == [1]


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

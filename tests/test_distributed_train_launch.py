"""`train` as torchrun starts it: signals, killed and missing processes, threads."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from command_line import rows
from launched import TORCHRUN, ended_afterwards, flags, lines_of, workers

from megalodon_ops.cli import launch
from megalodon_ops.training.checkpoint import load_checkpoint


fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this torch has no torch.distributed.fsdp.fully_shard", allow_module_level=True)

from test_distributed_train import assert_losses  # noqa: E402

slow = pytest.mark.slow
LIMIT = 240
"""Seconds that a launch may take on a machine that is busy with other things"""


def start(options, arguments, cwd, **environment):
    """torchrun in a process group of its own, with a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.Popen(
        [*TORCHRUN, *map(str, options), "--master-port", str(port), "-m", "megalodon_ops", *arguments],
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
    assert "continued by the model" in printed
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
    assert lines_of_the_command(err) == [] and not (out / "lock").exists()


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
    assert "/megalodon_ops/" not in err, "no traceback but torchrun's own"


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
    (line,) = result.stderr.splitlines()
    begin = f"megalodon_ops train: error: rank {rank} of 2: the processes have not found each other, which --timeout gives 2 s for: "
    assert line.startswith(begin)
    assert not (tmp_path / "run").exists()


@slow
def test_what_does_not_divide_is_said_once(text, tmp_path):
    process = start([2], flags(text, tmp_path / "run", "--batch", 3), tmp_path)
    with ended_afterwards(process):
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert lines_of_the_command(err) == [
        "megalodon_ops train: error: --batch 3: must be a multiple of the mesh's data=2"
    ]
    assert re.search(r"exitcode\s*: 2 ", err), "that of the processes"


@pytest.mark.parametrize(
    "environment, expected",
    [
        (dict(), None), (dict(OMP_NUM_THREADS="3"), 3), (dict(OMP_NUM_THREADS="1"), 1),
        (dict(OMP_NUM_THREADS="1", TORCHELASTIC_RUN_ID="none"), None),
    ],
    ids=["by hand", "said", "said to be 1", "by torchrun"],
)  # fmt: skip
def test_threads(monkeypatch, environment, expected):
    """A share of the cores, but where OMP_NUM_THREADS is the user's; torchrun sets it to 1 where the user has not."""
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(11)), raising=False)
    monkeypatch.setattr(launch, "_environment_of_the_launcher", lambda: b"PATH=/bin\0HOME=/home\0")
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    launch.take_a_share_of_the_threads()
    assert taken == ([5] if expected is None else [])


def test_a_launch_is_known_by_its_process(tmp_path, monkeypatch):
    """Without an identifier of its own, a launch is the process of torchrun and the moment when that began."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    launch.sign(tmp_path)
    assert not launch.is_of_this_launch(tmp_path), "the first start"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launch.is_of_this_launch(tmp_path)
    mark = tmp_path / launch.LAUNCH
    mark.write_text(re.sub(r"\d+$", "12345", mark.read_text().strip()))
    assert not launch.is_of_this_launch(tmp_path)


def test_a_launch_finds_the_folder_that_it_has_named_itself(tmp_path, monkeypatch):
    """A run without --out has a folder named by the time, which is another when the run is started again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    for name, run_id in (("1", "b"), ("2", "a"), ("3", "b")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / launch.LAUNCH).write_text(f"{run_id}\n")

    class Options:
        pass

    def choose(options):
        return "new"

    assert launch.folder_of_run(Options(), choose) == "new"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert str(launch.folder_of_run(Options(), choose)) == "runs/2"
    assert json.dumps(sorted(os.listdir("runs"))) == '["1", "2", "3"]'

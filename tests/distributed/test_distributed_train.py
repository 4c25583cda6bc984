"""`train` in several processes: the losses of one, one voice, and one end for all."""

import json
import math
import os
import re
import shutil
import signal
from functools import partial

import pytest
import torch.distributed as dist
from command_line import rows, train
from launched import TINY, Launch, command, copy_without_the_last, flags, lines_of

from megalodon_ops import torchrun
from megalodon_ops.cli.console import Progress
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.training import Reader, read_metrics
from megalodon_ops.training.run_checkpoint import load_checkpoint

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this torch has no torch.distributed.fsdp.fully_shard", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("quick")

slow = pytest.mark.slow
STEPS = ("--steps", 6, "--eval-every", 5, "--checkpoint-every", 4, "--optimizer", "muon")
"""Muon moves what is between the embedding and the output, AdamW all else"""
MESHES = {"data=2": 2, "data=2,chunk=2": 4, "data=2,tensor=2": 4}


def assert_losses(out, wanted, tolerance, first=1):
    """The rows of a run from a step on are those of another, each step once."""
    found = {(row["step"], "loss" in row, row.get("final")): row for row in rows(out)}
    assert len(found) == len(rows(out)), "no step is counted twice"
    others = {(row["step"], "loss" in row, row.get("final")): row for row in rows(wanted)}
    assert found.keys() == others.keys()
    for key, row in found.items():
        for name, value in row.items():
            if key[0] >= first and isinstance(value, float):
                assert value == pytest.approx(others[key][name], rel=tolerance), (key, name)


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert train(text, out, *TINY, *STEPS) == 0
    return out


@pytest.fixture(scope="module")
def split(ranks, text, tmp_path_factory):
    """Runs on meshes, each made once: `split(mesh)` gives its folder and what its processes have printed."""
    made = {}

    def run(mesh):
        if mesh not in made:
            out = tmp_path_factory.mktemp("split")
            made[mesh] = out, ranks.run(command, MESHES[mesh], flags(text, out, *STEPS, "--mesh", mesh))
        return made[mesh]

    return run


@pytest.mark.parametrize("mesh", ["data=2", *(pytest.param(mesh, marks=slow) for mesh in MESHES if mesh != "data=2")])
def test_the_losses_are_those_of_one_process(alone, split, mesh):
    out, results = split(mesh)
    assert [result.code for result in results] == [0] * MESHES[mesh], results
    assert_losses(out, alone, 1e-5)
    assert_values_close(load_checkpoint(out), load_checkpoint(alone))


@pytest.mark.parametrize("mesh", ["data=2", pytest.param("chunk=2", marks=slow)])
def test_processes_accumulate_what_one_reads_at_once(ranks, alone, text, tmp_path, mesh):
    options = (*STEPS, "--batch", 2, "--accumulate", 2, "--mesh", mesh)
    results = ranks.run(command, 2, flags(text, tmp_path / "run", *options))
    assert [result.code for result in results] == [0, 0], results
    assert_losses(tmp_path / "run", alone, 1e-5)


def assert_values_close(found, wanted):
    from megalodon_ops import Megalodon

    models = [Megalodon(wanted.config) for _ in range(2)]
    for model, checkpoint in zip(models, (found, wanted), strict=True):
        checkpoint.load_weights(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert (one - other).abs().max() < 1e-3


@pytest.mark.parametrize("mesh, count, batch", [("chunk=2", 2, 1), pytest.param("data=2,chunk=2", 4, 2, marks=slow)])
def test_rows_that_are_cut_between_two_chunks(ranks, text, tmp_path, mesh, count, batch):
    """Documents of 500 bytes in rows that processes share, carried on from batch to batch at any place of a chunk."""
    options = (*STEPS, "--batch", batch, "--length", 193 // batch, "--optimizer", "adamw")
    assert train(text, tmp_path / "alone", *TINY, *options) == 0
    results = ranks.run(command, count, flags(text, tmp_path / "split", *options, "--mesh", mesh))
    assert [result.code for result in results] == [0] * count, results
    assert_losses(tmp_path / "split", tmp_path / "alone", 1e-4)


def test_the_first_process_alone_is_heard(split):
    out, (first, other) = split("data=2")
    assert (other.out, other.err) == ("", "")
    assert f"{out}: 2 processes, data=2; " in first.out
    for words in ("bits per byte", "gzip -9", "continued by the model, 3 of 3"):
        assert words in first.out
    assert "tokens/s=" in first.err and "6/6" in first.err
    assert {path.name for path in out.iterdir()} == {
        ".lock", "checkpoints", "loss_curve.png", "metrics.jsonl", "options.json",
    }  # fmt: skip
    row = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row][-1]
    assert row["tokens"] == 6 * 4 * 48, "of all processes"
    (end,) = [row for row in rows(out) if row.get("final")]
    assert math.isfinite(end["held_out_bits_per_byte"])


@slow
@pytest.mark.parametrize(
    "before, after",
    [(None, "data=2,chunk=2"), ("data=2,chunk=2", "data=2"), ("data=2,tensor=2", None)],
)
def test_a_run_goes_on_in_another_number_of_processes(ranks, alone, split, tmp_path, before, after):
    out = copy_without_the_last(alone if before is None else split(before)[0], tmp_path / "run")
    more = ["train", "--out", str(out), "--resume"]
    if after is None:
        from megalodon_ops.cli import main

        assert main(more) == 0
    else:
        results = ranks.run(command, MESHES[after], [*more, "--mesh", after])
        assert [result.code for result in results] == [0] * MESHES[after], results
    assert_losses(out, alone, 1e-5)
    names = {path.name for folder in (out / "checkpoints").glob("*6") for path in folder.iterdir()}
    assert ("distributed" in names) == (after is not None) and ("model.safetensors" in names) == (after is None)


def command_of_a_rank(text, out, options):
    """Each process has options of its own."""
    return command(flags(text, out, "--steps", 4, *options[dist.get_rank()]))


WRONG = {
    "rows": ([["--batch", 3]] * 2, "--batch 3: must be a multiple of the mesh's data=2"),
    "length": (
        [["--mesh", "chunk=2", "--batch", 1, "--length", 31]] * 2,
        "--length 31: the mesh's chunk=2 shares 1 x 31 tokens, which must be at least 2 chunks of 16, or a multiple of 2 rows",
    ),
    "mesh": ([["--mesh", "data=3"]] * 2, "--mesh data=3: is of 3 processes, and there are 2"),
    "seeds": (
        [["--seed", 1], ["--seed", 2]],
        "--seed must be the same in all processes, got ",
    ),
    "loss": ([["--lr", 1e18]] * 2, "the loss is "),
    "device": ([["--device", "cuda:1"]] * 2, "--device cuda:1: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_said_once(ranks, text, tmp_path, name):
    options, message = WRONG[name]
    results = ranks.run(command_of_a_rank, 2, text, tmp_path / "run", options)
    assert [result.code for result in results] == [2, 2]
    (line,) = lines_of(results[0].err + results[1].err)
    assert re.match(rf"megalodon_ops train: error: rank [01]: {re.escape(message)}", line)


FAULTS = {
    "missing file": (1, "megalodon_ops.cli.train.load_data", CommandError("--data book.txt: no such file or folder")),
    "unreadable text": (1, "megalodon_ops.training.Batches.next", OSError(5, "Input/output error", "book.txt")),
    "full disk": (0, "megalodon_ops.training.Metrics.write", OSError("metrics.jsonl: could not be written: disk full")),
    "bad evaluation": (1, "megalodon_ops.cli.train.evaluate", FloatingPointError("the loss of the text is nan")),
}  # fmt: skip


def break_down(fault):
    """Makes one process unable to do what the fault names."""
    rank, name, error = FAULTS[fault]

    def fail(*_, **__):
        raise error

    if os.environ["RANK"] == str(rank):
        pytest.MonkeyPatch().setattr(name, fail)


def break_the_backward(folder):
    """In rank 1; and torchrun waits for a line of each process."""
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{folder}/{os.environ['RANK']}.json"
    loss_of = Reader.loss

    def loss_without_gradient(reader, batch):
        loss = loss_of(reader, batch)
        loss.register_hook(lambda gradient: 1 / 0)
        return loss

    if os.environ["RANK"] == "1":
        Reader.loss = loss_without_gradient


@pytest.mark.parametrize("fault", FAULTS)
def test_a_process_that_fails_says_why_and_ends_all(text, tmp_path, fault):
    """Within seconds, wherever the others wait, which --timeout gives ten minutes; they say nothing."""
    rank, _, error = FAULTS[fault]
    results = Launch(flags(text, tmp_path / "run", "--steps", 1), tmp_path, partial(break_down, fault)).results(60)
    assert [result.code for result in results] == [2, 2], results
    message = "book.txt: Input/output error" if fault == "unreadable text" else error
    assert lines_of(results[rank].err)[-1] == f"megalodon_ops train: error: rank {rank}: {message}"
    assert not any("error" in line for line in lines_of(results[1 - rank].err)), results


def test_a_fault_of_the_program_has_its_traceback_and_ends_all(text, tmp_path):
    breaks = partial(break_the_backward, tmp_path)
    other, failed = Launch(flags(text, tmp_path / "run", "--steps", 1), tmp_path, breaks).results(60)
    assert (other.code, failed.code) == (2, 1) and not any("error" in line for line in lines_of(other.err)), other
    assert failed.err.startswith("Traceback") and lines_of(failed.err)[-1].startswith("ZeroDivisionError"), failed.err
    follows, first = (json.loads((tmp_path / f"{rank}.json").read_text())["message"] for rank in range(2))
    assert (first["message"], follows["message"]) == ("ZeroDivisionError: division by zero", torchrun.FOLLOWS)
    assert int(first["extraInfo"]["timestamp"]) < int(follows["extraInfo"]["timestamp"])


def test_a_mesh_for_one_process(text, tmp_path, capsys):
    assert train(text, tmp_path / "run", "--mesh", "data=2,chunk=2") == 2
    assert "and there are 1; start them by torchrun --nproc-per-node 4 -m megalodon_ops" in capsys.readouterr().err
    for wrong in ("data", "data=0", "data=2,data=2", "rows=2", "data=-1", "data=\u0662"):
        with pytest.raises(SystemExit) as end:
            train(text, tmp_path / "run", "--mesh", wrong)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def command_with_a_signal(arguments):
    """The second process sends itself a signal while it computes step 3."""

    def patch(changed):
        loss, calls = Reader.loss, []

        def loss_and_signal(reader, batch):
            calls.append(1)
            if len(calls) == 3 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss(reader, batch)

        changed.setattr(Reader, "loss", loss_and_signal)

    return command(arguments, patch=patch)


def test_a_signal_stops_all_at_one_step_and_the_run_goes_on_in_another_mesh(ranks, split, text, tmp_path):
    """One process alone has the signal; test_distributed_train_launch.py sends it to all."""
    whole, _ = split("data=2")
    results = ranks.run(command_with_a_signal, 2, flags(text, tmp_path / "run", *STEPS))
    assert [result.code for result in results] == [128 + signal.SIGTERM] * 2, results
    assert (
        f"stopped after step 3; continue with: python -m megalodon_ops train --out {tmp_path}/run --resume"
        in results[0].out
    )
    assert load_checkpoint(tmp_path / "run").step == 3 == rows(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "loss_curve.png").exists()
    results = ranks.run(command, 2, ["train", "--out", str(tmp_path / "run"), "--resume", "--mesh", "chunk=2"])
    assert [result.code for result in results] == [0, 0], results
    assert_losses(tmp_path / "run", whole, 1e-5)


@slow
def test_minutes_end_all_at_one_step(ranks, text, tmp_path):
    options = ("--minutes", 0.05, "--eval-every", 1000, "--checkpoint-every", 50)
    results = ranks.run(command, 2, flags(text, tmp_path, *options))
    assert [result.code for result in results] == [0, 0], results
    curve = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert load_checkpoint(tmp_path).step == curve[-1]["step"] >= 8
    assert curve[-1]["learning_rate"] < curve[4]["learning_rate"]


class Killed(BaseException):
    pass


def command_that_is_killed(arguments, at):
    """Ends all processes when they have computed step `at`, as far as files and metrics show it."""

    def patch(changed):
        show = Progress.show

        def show_and_die(progress, row):
            show(progress, row)
            if row["step"] == at:
                raise Killed

        changed.setattr(Progress, "show", show_and_die)

    try:
        return command(arguments, patch=patch)
    except Killed:
        return None


@slow
def test_a_launch_that_is_started_again_goes_on(ranks, split, text, tmp_path):
    """The command is the same, without --resume; steps after the last checkpoint are computed again and counted once."""
    whole, _ = split("data=2")
    out = tmp_path / "run"
    arguments = flags(text, out, *STEPS)
    assert ranks.run(command_that_is_killed, 2, arguments, 5) == [None, None]
    assert [row["step"] for row in rows(out) if "loss" in row][-1] == 5
    results = ranks.run(command, 2, arguments)
    assert [result.code for result in results] == [0, 0], results
    assert_losses(out, whole, 1e-6)
    results = ranks.run(command, 2, [*arguments, "--seed", "1"])
    assert [result.code for result in results] == [2, 2]
    assert "--seed: the run in " in results[0].err + results[1].err


def test_processes_go_on_with_a_run_of_their_own_options_alone(ranks, alone, text, tmp_path):
    """Options that are not named are compared, too; a run of others stays as it is, and the same command goes on."""
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    (out / ".lock").unlink(missing_ok=True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    named = flags(text, out, *STEPS)
    no_rate = [word for word in named if word not in ("--lr", "0.01")]
    for arguments, message in (
        (
            ["train", "--data", str(text), "--out", str(out)],
            f"--dim: the run in {out} has 32, got 128; go on with --resume",
        ),
        (no_rate, f"--lr: the run in {out} has 0.01, got 0.04; go on with --resume"),
        (
            [*named, "--steps", "7"],
            f"--steps: the run in {out} has 6, got 7; go on with --resume, or start another run",
        ),
    ):
        results = ranks.run(command, 2, arguments)
        assert [result.code for result in results] == [2, 2], arguments
        assert message in results[0].err + results[1].err
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before
    results = ranks.run(command, 2, named)
    assert [result.code for result in results] == [0, 0], results
    assert f"{out}: finished after step 6" in results[0].out


def test_the_folder_of_several_processes_has_a_name(ranks, text):
    results = ranks.run(command, 2, ["train", "--data", str(text), *TINY])
    assert [result.code for result in results] == [2, 2]
    assert "name the folder of the run with --out DIR" in results[0].err + results[1].err

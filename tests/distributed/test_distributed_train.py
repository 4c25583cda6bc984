"""`train` in several processes: the losses of one process, one output, and a common end."""

import itertools
import json
import math
import os
import re
import shutil
import signal
from functools import partial

import pytest
import torch
import torch.distributed as dist
from command_line import lines_of, rows, train
from data_parallel import parameters_of
from launched import TINY, Launch, command, copy_without_the_last, flags, run_on_ranks

from megalodon_ops import Megalodon, torchrun
from megalodon_ops.cli import main
from megalodon_ops.cli.console import Progress
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.held_out import best_of_run
from megalodon_ops.training import Reader, read_metrics
from megalodon_ops.training.run_checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("quick", "parallelize_runs")

slow = pytest.mark.slow
STEPS = ("--steps", 6, "--eval-every", 5, "--checkpoint-every", 4, "--optimizer", "muon")
"""Muon updates the matrices between the embedding and the output, AdamW the rest"""
MESHES = {"data=2": 2, "data=2,chunk=2": 4, "data=2,tensor=2": 4}


def assert_losses(out, wanted, tolerance, first=1):
    """The metrics of a run from step `first` on are those of another run, each step once."""

    def by_step(run):
        return {(row["step"], "loss" in row, row.get("final")): row for row in rows(run)}

    found, others = by_step(out), by_step(wanted)
    assert len(found) == len(rows(out)), "no step is counted twice"
    assert found.keys() == others.keys()
    for key, row in found.items():
        for name, value in row.items():
            if key[0] >= first and isinstance(value, float):
                assert value == pytest.approx(others[key][name], rel=tolerance), (key, name)


@pytest.fixture(scope="module")
def single_run(text, tmp_path_factory):
    """A run of one process."""
    out = tmp_path_factory.mktemp("single")
    assert train(text, out, *TINY, *STEPS) == 0
    return out


@pytest.fixture(scope="module")
def run_on_mesh(ranks, text, tmp_path_factory):
    """`run_on_mesh(mesh)` returns the folder and the output of a run, which is made once for each mesh."""
    runs = {}

    def run(mesh):
        if mesh not in runs:
            out = tmp_path_factory.mktemp("split")
            runs[mesh] = out, run_on_ranks(ranks, MESHES[mesh], flags(text, out, *STEPS, "--mesh", mesh))
        return runs[mesh]

    return run


@pytest.mark.parametrize("mesh", ["data=2", *(pytest.param(mesh, marks=slow) for mesh in MESHES if mesh != "data=2")])
def test_the_losses_are_those_of_one_process(single_run, run_on_mesh, mesh):
    out, _ = run_on_mesh(mesh)
    assert_losses(out, single_run, 1e-5)
    assert_values_close(load_checkpoint(out), load_checkpoint(single_run))
    best, wanted = best_of_run(out), best_of_run(single_run)
    assert best.step == wanted.step and best.bits_per_byte == pytest.approx(wanted.bits_per_byte, rel=1e-5)
    assert_values_close(load_checkpoint(out / "best"), load_checkpoint(single_run / "best"))


@pytest.mark.parametrize("mesh", ["data=2", pytest.param("chunk=2", marks=slow)])
def test_processes_accumulate_the_batch_of_one(ranks, single_run, text, tmp_path, mesh):
    options = (*STEPS, "--batch", 2, "--accumulate", 2, "--mesh", mesh)
    run_on_ranks(ranks, 2, flags(text, tmp_path / "run", *options))
    assert_losses(tmp_path / "run", single_run, 1e-5)


def test_processes_start_from_the_weights_of_a_model(ranks, single_run, text, tmp_path):
    options = ("--init-from", single_run / "best", *STEPS)
    assert train(text, tmp_path / "one", *TINY, *options) == 0
    run_on_ranks(ranks, 2, flags(text, tmp_path / "two", *options, "--mesh", "data=2"))
    assert_losses(tmp_path / "two", tmp_path / "one", 1e-5)
    continued, new = ([row["loss"] for row in rows(run) if "loss" in row] for run in (tmp_path / "one", single_run))
    assert continued[0] < new[0] - 0.2, "it starts where the other has learned"


def assert_values_close(found, wanted):
    """The weights of two checkpoints are close."""
    models = [Megalodon(wanted.config) for _ in range(2)]
    for model, checkpoint in zip(models, (found, wanted), strict=True):
        checkpoint.load_weights(model)
    torch.testing.assert_close(*map(parameters_of, models), rtol=0, atol=1e-3)


@pytest.mark.parametrize("mesh, count, batch", [("chunk=2", 2, 1), pytest.param("data=2,chunk=2", 4, 2, marks=slow)])
def test_rows_that_are_cut_between_two_chunks(ranks, text, tmp_path, mesh, count, batch):
    """Rows of 500-byte documents, split over processes and carried to the next batch at arbitrary positions of a chunk."""
    options = (*STEPS, "--batch", batch, "--length", 193 // batch, "--optimizer", "adamw")
    assert train(text, tmp_path / "single", *TINY, *options) == 0
    run_on_ranks(ranks, count, flags(text, tmp_path / "split", *options, "--mesh", mesh))
    assert_losses(tmp_path / "split", tmp_path / "single", 1e-4)


def test_only_rank_0_prints(run_on_mesh):
    out, (first, other) = run_on_mesh("data=2")
    assert (other.out, other.err) == ("", "")
    assert f"{out}: 2 processes, data=2; " in first.out
    for words in ("bits per byte", "gzip -9", "continued by the model, 3 of 3"):
        assert words in first.out
    assert "tokens/s=" in first.err and "6/6" in first.err
    names = ".lock best checkpoints loss_curve.png metrics.jsonl options.json".split()
    assert sorted(path.name for path in out.iterdir()) == names
    row = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row][-1]
    assert row["tokens"] == 6 * 4 * 48, "of all processes"
    (end,) = [row for row in rows(out) if row.get("final")]
    assert math.isfinite(end["held_out_bits_per_byte"])


@slow
@pytest.mark.parametrize(
    "before, after",
    [(None, "data=2,chunk=2"), ("data=2,chunk=2", "data=2"), ("data=2,tensor=2", None)],
)
def test_a_run_resumes_in_another_number_of_processes(ranks, single_run, run_on_mesh, tmp_path, before, after):
    out = copy_without_the_last(single_run if before is None else run_on_mesh(before)[0], tmp_path / "run")
    arguments = ["train", "--out", str(out), "--resume"]
    if after is None:
        assert main(arguments) == 0
    else:
        run_on_ranks(ranks, MESHES[after], [*arguments, "--mesh", after])
    assert_losses(out, single_run, 1e-5)
    names = {path.name for folder in (out / "checkpoints").glob("*6") for path in folder.iterdir()}
    assert ("distributed" in names) == (after is not None) and ("model.safetensors" in names) == (after is None)


def command_of_a_rank(text, out, options):
    """Run the command with this rank's own options."""
    return command(flags(text, out, "--steps", 4, *options[dist.get_rank()]))


WRONG = {
    "rows": ([["--batch", 3]] * 2, "--batch 3: must be a multiple of the mesh's data=2"),
    "length": (
        [["--mesh", "chunk=2", "--batch", 1, "--length", 31]] * 2,
        "--length 31: the mesh's chunk=2 cannot split 1 x 31 tokens; give at least 2 chunks of 16 tokens, or a multiple of 2 rows",
    ),
    "mesh": ([["--mesh", "data=3"]] * 2, "--mesh data=3: needs 3 processes, got 2"),
    "seeds": ([["--seed", 1], ["--seed", 2]], "--seed must be the same in all processes, got "),
    "loss": ([["--lr", 1e18]] * 2, "the loss is "),
    "device": ([["--device", "cuda:1"]] * 2, "--device cuda:1: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_one_line(ranks, text, tmp_path, name):
    options, message = WRONG[name]
    results = ranks.run(command_of_a_rank, 2, text, tmp_path / "run", options)
    assert [result.code for result in results] == [2, 2]
    (line,) = lines_of(results[0].err + results[1].err)
    assert re.match(rf"megalodon_ops train: error: rank [01]: {re.escape(message)}", line)


# Fault: rank that fails, function in which it fails, exception.
FAULTS = {
    "missing file": (1, "megalodon_ops.cli.train.load_data", CommandError("--data book.txt: no such file or folder")),
    "unreadable text": (1, "megalodon_ops.training.Batches.next", OSError(5, "Input/output error", "book.txt")),
    "full disk": (0, "megalodon_ops.training.Metrics.write", OSError("metrics.jsonl: could not be written: disk full")),
    "bad evaluation": (1, "megalodon_ops.cli.held_out.evaluate", FloatingPointError("the loss of the text is nan")),
}


def inject_fault(fault):
    """Make the fault's function fail in the fault's process."""
    rank, name, error = FAULTS[fault]

    def fail(*_, **__):
        raise error

    if os.environ["RANK"] == str(rank):
        pytest.MonkeyPatch().setattr(name, fail)


def break_the_backward(folder):
    """Make rank 1's backward fail; torchrun expects an error file of each process."""
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
    """The others end within seconds, though --timeout lets them wait for ten minutes, and print nothing."""
    rank, _, error = FAULTS[fault]
    results = Launch(flags(text, tmp_path / "run", "--steps", 1), tmp_path, partial(inject_fault, fault)).results(60)
    assert [result.code for result in results] == [2, 2], results
    message = "book.txt: Input/output error" if fault == "unreadable text" else error
    assert lines_of(results[rank].err)[-1] == f"megalodon_ops train: error: rank {rank}: {message}"
    assert not any("error" in line for line in lines_of(results[1 - rank].err)), results


def test_a_fault_of_the_program_has_its_traceback_and_ends_all(text, tmp_path):
    patch = partial(break_the_backward, tmp_path)
    other, failed = Launch(flags(text, tmp_path / "run", "--steps", 1), tmp_path, patch).results(60)
    assert (other.code, failed.code) == (2, 1) and not any("error" in line for line in lines_of(other.err)), other
    assert failed.err.startswith("Traceback") and lines_of(failed.err)[-1].startswith("ZeroDivisionError"), failed.err
    follows, first = (json.loads((tmp_path / f"{rank}.json").read_text())["message"] for rank in range(2))
    assert (first["message"], follows["message"]) == ("ZeroDivisionError: division by zero", torchrun.PEER_FAILURE)
    assert int(first["extraInfo"]["timestamp"]) < int(follows["extraInfo"]["timestamp"])


def test_a_mesh_for_one_process(text, tmp_path, capsys):
    assert train(text, tmp_path / "run", "--mesh", "data=2,chunk=2") == 2
    assert "got 1; start them by torchrun --nproc-per-node 4 -m megalodon_ops" in capsys.readouterr().err
    for wrong in ("data", "data=0", "data=2,data=2", "rows=2", "data=-1", "data=\u0662"):
        with pytest.raises(SystemExit) as end:
            train(text, tmp_path / "run", "--mesh", wrong)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def command_with_a_signal(arguments):
    """Run a command; rank 1 sends itself a signal in optimizer step 3."""

    def patch(changed):
        loss = Reader.loss
        step = itertools.count(1)

        def loss_and_signal(reader, batch):
            if next(step) == 3 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss(reader, batch)

        changed.setattr(Reader, "loss", loss_and_signal)

    return command(arguments, patch=patch)


def test_a_signal_stops_all_at_one_step_and_the_run_resumes_on_another_mesh(ranks, run_on_mesh, text, tmp_path):
    """Only one process gets the signal; test_distributed_train_launch.py sends it to all."""
    whole, _ = run_on_mesh("data=2")
    results = ranks.run(command_with_a_signal, 2, flags(text, tmp_path / "run", *STEPS))
    assert [result.code for result in results] == [128 + signal.SIGTERM] * 2, results
    words = f"stopped after step 3; continue with: megalodon-ops train --out {tmp_path}/run --resume"
    assert words in results[0].out
    assert load_checkpoint(tmp_path / "run").step == 3 == rows(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "loss_curve.png").exists()
    run_on_ranks(ranks, 2, ["train", "--out", tmp_path / "run", "--resume", "--mesh", "chunk=2"])
    assert_losses(tmp_path / "run", whole, 1e-5)


@slow
def test_minutes_end_all_at_one_step(ranks, text, tmp_path):
    options = ("--minutes", 0.05, "--eval-every", 1000, "--checkpoint-every", 50)
    run_on_ranks(ranks, 2, flags(text, tmp_path, *options))
    curve = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert load_checkpoint(tmp_path).step == curve[-1]["step"] >= 8
    assert curve[-1]["learning_rate"] < curve[4]["learning_rate"]


class Killed(BaseException):
    pass


def command_that_is_killed(arguments, at):
    """Run a command that ends in all processes after step `at`, without writing anything more."""

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
def test_a_restarted_launch_resumes(ranks, run_on_mesh, text, tmp_path):
    """The command is the same, without --resume; steps after the last checkpoint are recomputed and counted once."""
    whole, _ = run_on_mesh("data=2")
    out = tmp_path / "run"
    arguments = flags(text, out, *STEPS)
    assert ranks.run(command_that_is_killed, 2, arguments, 5) == [None, None]
    assert [row["step"] for row in rows(out) if "loss" in row][-1] == 5
    run_on_ranks(ranks, 2, arguments)
    assert_losses(out, whole, 1e-6)
    results = run_on_ranks(ranks, 2, [*arguments, "--seed", 1], code=2)
    assert "--seed: the run in " in results[0].err + results[1].err


def test_processes_resume_only_a_run_with_the_same_options(ranks, single_run, text, tmp_path):
    """Defaults are compared, too; a run with other options stays unchanged, and the same command resumes."""
    out = tmp_path / "run"
    shutil.copytree(single_run, out)
    (out / ".lock").unlink(missing_ok=True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    named = flags(text, out, *STEPS)
    no_rate = [word for word in named if word not in ("--lr", "0.01")]
    defaults = ["train", "--data", str(text), "--out", str(out)]
    for arguments, option, message in (
        (defaults, "--dim", "has 32, got 128; go on with --resume"),
        (no_rate, "--lr", "has 0.01, got 0.04; go on with --resume"),
        ([*named, "--steps", "7"], "--steps", "has 6, got 7; go on with --resume, or start another run"),
    ):
        results = run_on_ranks(ranks, 2, arguments, code=2)
        assert f"{option}: the run in {out} {message}" in results[0].err + results[1].err
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before
    assert f"{out}: finished after step 6" in run_on_ranks(ranks, 2, named)[0].out


def test_the_folder_of_several_processes_has_a_name(ranks, text):
    results = run_on_ranks(ranks, 2, ["train", "--data", text, *TINY], code=2)
    assert "name the run's folder with --out DIR" in results[0].err + results[1].err

"""`train` in several processes: the losses of one, one voice, and one end for all."""

import math
import os
import re
import signal

import pytest
import torch.distributed as dist
from command_line import rows, train
from launched import TINY, command, copy_without_the_last, flags, lines_of

from megalodon_ops.cli.console import Progress
from megalodon_ops.training import Reader, read_metrics
from megalodon_ops.training.checkpoint import load_checkpoint

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this torch has no torch.distributed.fsdp.fully_shard", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("quick")

slow = pytest.mark.slow
STEPS = ("--steps", 20, "--eval-every", 8, "--checkpoint-every", 10)
MESHES = {"data=2": 2, "data=4": 4, "chunk=2": 2, "data=2,chunk=2": 4, "data=2,tensor=2": 4}


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


@pytest.mark.parametrize(
    "mesh", [mesh if mesh in ("data=2", "data=2,chunk=2") else pytest.param(mesh, marks=slow) for mesh in MESHES]
)
def test_the_losses_are_those_of_one_process(alone, split, mesh):
    out, results = split(mesh)
    assert [result.code for result in results] == [0] * MESHES[mesh], results
    assert_losses(out, alone, 1e-4)
    assert_values_close(load_checkpoint(out), load_checkpoint(alone))


def assert_values_close(found, wanted):
    from megalodon_ops import Megalodon

    models = [Megalodon(wanted.config) for _ in range(2)]
    for model, checkpoint in zip(models, (found, wanted), strict=True):
        checkpoint.load_weights(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert (one - other).abs().max() < 1e-3


@pytest.mark.parametrize(
    "mesh", ["data=2", pytest.param("data=2,tensor=2", marks=slow), pytest.param("chunk=2", marks=slow)]
)
def test_muon_moves_matrices_of_several_processes_as_those_of_one(ranks, text, tmp_path, mesh):
    options = (*STEPS, "--optimizer", "muon")
    assert train(text, tmp_path / "alone", *TINY, *options) == 0
    results = ranks.run(command, MESHES[mesh], flags(text, tmp_path / "split", *options, "--mesh", mesh))
    assert [result.code for result in results] == [0] * MESHES[mesh], results
    assert_losses(tmp_path / "split", tmp_path / "alone", 1e-5)
    again = copy_without_the_last(tmp_path / "split", tmp_path / "again")
    from megalodon_ops.cli import main

    assert main(["train", "--out", str(again), "--resume"]) == 0
    assert_losses(again, tmp_path / "alone", 1e-5)


@pytest.mark.parametrize(
    "mesh, batch, context",
    [
        ("chunk=2", 1, "streamed"),
        pytest.param("data=2,chunk=2", 2, "streamed", marks=slow),
        pytest.param("chunk=2", 1, "packed", marks=slow),
    ],
)
def test_rows_that_are_cut_between_two_chunks(ranks, text, tmp_path, mesh, batch, context):
    """Documents of 500 bytes in rows that processes share, carried on from batch to batch at any place of a chunk."""
    options = (*STEPS, "--batch", batch, "--length", 193 // batch, "--context", context)
    assert train(text, tmp_path / "alone", *TINY, *options) == 0
    results = ranks.run(command, MESHES[mesh], flags(text, tmp_path / "split", *options, "--mesh", mesh))
    assert [result.code for result in results] == [0] * MESHES[mesh], results
    assert_losses(tmp_path / "split", tmp_path / "alone", 1e-4)


def test_the_first_process_alone_is_heard(split):
    out, (first, *others) = split("data=2,chunk=2")
    assert [(result.out, result.err) for result in others] == [("", "")] * 3
    assert f"{out}: 4 processes, data=2,chunk=2; " in first.out
    for words in ("bits per byte", "gzip -9", "peak memory", "continued by the model, 3 of 3"):
        assert words in first.out
    assert "tokens/s=" in first.err and "20/20" in first.err
    assert {path.name for path in out.iterdir()} == {".lock", "checkpoints", "loss_curve.png", "metrics.jsonl"}
    row = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row][-1]
    assert row["tokens"] == 20 * 4 * 48, "of all processes"


@pytest.mark.parametrize(
    "before, after",
    [
        pytest.param("data=4", None, marks=slow),
        pytest.param(None, "data=2,chunk=2", marks=slow),
        pytest.param("data=2", "data=4", marks=slow),
        ("data=2,chunk=2", "data=2"),
        pytest.param("data=4", "chunk=2", marks=slow),
        pytest.param("data=2,tensor=2", "data=2", marks=slow),
    ],
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
    assert_losses(out, alone, 1e-4)
    names = {path.name for folder in (out / "checkpoints").glob("*20") for path in folder.iterdir()}
    assert ("distributed" in names) == (after is not None) and ("model.safetensors" in names) == (after is None)


def command_of_a_rank(text, out, options):
    """Each process has options of its own."""
    return command(flags(text, out, "--steps", 4, *options[dist.get_rank()]))


WRONG = {
    "rows": ([["--batch", 3]] * 2, "--batch 3: must be a multiple of the mesh's data=2"),
    "length": (
        [["--mesh", "chunk=2", "--batch", 1, "--length", 31]] * 2,
        "--length 31: the mesh's chunk=2 shares 1 row of 31 tokens, which must be at least 2 chunks of 16, or a multiple of 2 rows",
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


def test_a_mesh_for_one_process(text, tmp_path, capsys):
    assert train(text, tmp_path / "run", "--mesh", "data=2,chunk=2") == 2
    assert "this is one alone; start them by torchrun --nproc-per-node 4 -m megalodon_ops" in capsys.readouterr().err
    for wrong in ("data", "data=0", "data=2,data=2", "rows=2", "data=-1", "data=\u0662"):
        with pytest.raises(SystemExit) as end:
            train(text, tmp_path / "run", "--mesh", wrong)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def command_with_a_signal(arguments, numbers):
    """Each process sends itself its signal, or none, while it computes step 7."""

    def patch(changed):
        loss, calls = Reader.loss, []

        def loss_and_signal(reader, batch):
            calls.append(1)
            if len(calls) == 7 and numbers[dist.get_rank()]:
                os.kill(os.getpid(), numbers[dist.get_rank()])
            return loss(reader, batch)

        changed.setattr(Reader, "loss", loss_and_signal)

    return command(arguments, patch=patch)


@pytest.mark.parametrize(
    "numbers",
    [
        (0, signal.SIGTERM),
        pytest.param((signal.SIGINT, signal.SIGINT), marks=slow),
        pytest.param((signal.SIGTERM, 0), marks=slow),
    ],
    ids=["one", "all", "first"],
)
def test_a_signal_stops_all_at_one_step_and_the_run_goes_on(ranks, split, text, tmp_path, numbers):
    whole, _ = split("data=2")
    results = ranks.run(command_with_a_signal, 2, flags(text, tmp_path / "run", *STEPS), numbers)
    assert [result.code for result in results] == [128 + max(numbers)] * 2, results
    assert (
        f"stopped after step 7; continue with: python -m megalodon_ops train --out {tmp_path}/run --resume"
        in results[0].out
    )
    assert load_checkpoint(tmp_path / "run").step == 7 == rows(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "loss_curve.png").exists()
    results = ranks.run(command, 2, ["train", "--out", str(tmp_path / "run"), "--resume"])
    assert [result.code for result in results] == [0, 0], results
    assert_losses(tmp_path / "run", whole, 1e-6)


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
    assert ranks.run(command_that_is_killed, 2, arguments, 14) == [None, None]
    assert [row["step"] for row in rows(out) if "loss" in row][-1] == 14
    results = ranks.run(command, 2, arguments)
    assert [result.code for result in results] == [0, 0], results
    assert_losses(out, whole, 1e-6)
    results = ranks.run(command, 2, [*arguments, "--seed", "1"])
    assert [result.code for result in results] == [2, 2]
    assert "--seed: the run in " in results[0].err + results[1].err


def test_the_folder_of_several_processes_has_a_name(ranks, text):
    results = ranks.run(command, 2, ["train", "--data", str(text), *TINY])
    assert [result.code for result in results] == [2, 2]
    assert "name the folder of the run with --out DIR" in results[0].err + results[1].err


def test_bits_of_a_run_are_finite(split):
    out, _ = split("data=2")
    (end,) = [row for row in rows(out) if row.get("final")]
    assert math.isfinite(end["held_out_bits_per_byte"])

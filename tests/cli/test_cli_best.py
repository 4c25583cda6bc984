"""The best checkpoint of a run: the one of the lowest figure, through kills, full disks and resumes."""

import itertools
import shutil

import pytest
import torch
from command_line import lines_of, output, train
from killed import COUNTS, killed_at

from megalodon_ops import Megalodon
from megalodon_ops.cli import main
from megalodon_ops.cli.held_out import Best, best_of_run
from megalodon_ops.training import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("quick")

STEPS = ("--steps", 6, "--eval-every", 2, "--checkpoint-every", 2)


@pytest.fixture
def figures(monkeypatch):
    """`figures(3.0, 2.0)`: the evaluations of the runs that follow give these figures, the last one from then on."""

    def set_figures(*values):
        left = itertools.chain(values, itertools.repeat(values[-1]))
        monkeypatch.setattr("megalodon_ops.cli.train.bits_per_byte", lambda *_: next(left))

    return set_figures


def weights(folder):
    return dict(Megalodon.load(folder).named_parameters())


def assert_best(run, figure, step):
    """The best checkpoint is that of `step`, with this figure; the checkpoint of `step` is there, too."""
    assert best_of_run(run) == Best(figure, step)
    torch.testing.assert_close(weights(run / "best"), weights(run / f"checkpoints/step-0000000{step}"), rtol=0, atol=0)


def test_the_best_is_kept_beside_the_newest_and_named_at_the_end(text, tmp_path, figures, capsys):
    figures(3.0, 2.0, 2.5)
    assert train(text, tmp_path, *STEPS) == 0
    assert_best(tmp_path, 2.0, 4)
    words = f"best on the sample of held-out text: step 4, 2.000 bits per byte; load it with --checkpoint {tmp_path}/"
    assert f"{words}best" in capsys.readouterr().out
    best = {path.name for path in (tmp_path / "best").iterdir()}
    newest = {path.name for path in (tmp_path / "checkpoints/step-00000006").iterdir()}
    assert best == newest - {"optimizer.safetensors", "state.safetensors"}

    resume = ["train", "--out", str(tmp_path), "--resume", "--steps"]
    figures(2.2)
    assert main([*resume, "8"]) == 0
    assert best_of_run(tmp_path) == Best(2.0, 4), "a resumed run knows the figure"
    figures(1.9)
    assert "held-out text: step 9, 1.900" in output(capsys, *resume, "9")
    assert_best(tmp_path, 1.9, 9)


def test_eval_and_generate_take_it(finished, capsys):
    best = best_of_run(finished)
    out = output(capsys, "eval", "--checkpoint", finished / "best")
    assert f"step {best.step}\n" in out
    assert float(out.splitlines()[-1].split()[0]) == pytest.approx(best.bits_per_byte, abs=2e-4)
    output(capsys, "generate", "--checkpoint", finished / "best", "--prompt", "import ", "--tokens", 5)


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("counts", COUNTS)
def test_killed_while_the_best_is_replaced(finished, tmp_path, monkeypatch, call, counts):
    """The old best or the new one is there, complete; the next checkpoint removes the draft."""
    found = load_checkpoint(finished)
    model = Megalodon(found.config)
    found.load_weights(model)
    for count in counts:
        run = tmp_path / str(count)
        shutil.copytree(finished, run)
        before = load_checkpoint(run / "best").step
        record = {**load_checkpoint(run / "best").record, "held_out_bits_per_byte": 0.5}
        ours = {name: record[name] for name in ("options", "data", "schedule", "seconds", "held_out_bits_per_byte")}
        with killed_at(monkeypatch, call, count):
            save_checkpoint(run, 61, model, record=ours, best=True)
        assert load_checkpoint(run / "best").step in (before, 61), count
        assert main(["train", "--out", str(run), "--resume", "--steps", "61", "--checkpoint-every", "61"]) == 0
        assert not list(run.glob(".best*")), count


def test_a_full_disk_leaves_the_best_before(text, tmp_path, figures, capfd, file_size_limit):
    flags = ("--checkpoint-every", 100, "--eval-every", 2, "--steps")
    figures(3.0)
    assert train(text, tmp_path, *flags, 2) == 0
    size = (tmp_path / "best" / "model.safetensors").stat().st_size
    capfd.readouterr()
    figures(2.0)
    resume = ["train", "--out", str(tmp_path), "--resume", *map(str, flags), "4"]
    with file_size_limit(size - 1):
        assert main(resume) == 2
    (line,) = lines_of(capfd.readouterr().err)
    assert line.startswith(f"megalodon_ops train: error: {tmp_path}/best: could not be written: ")
    assert best_of_run(tmp_path) == Best(3.0, 2) and not list(tmp_path.glob(".best*"))
    assert main(resume) == 0
    assert best_of_run(tmp_path) == Best(2.0, 4)


def test_a_damaged_best_is_passed_over_and_a_users_folder_stays(ended, figures, capsys):
    path = ended / "best" / "config.json"
    path.write_text(path.read_text() + "\n")
    figures(9.0)
    resume = ["train", "--out", str(ended), "--resume", "--steps", "61"]
    assert main(resume) == 0
    assert f"passing over {path}: was changed after it was written" in capsys.readouterr().err
    assert best_of_run(ended) == Best(9.0, 61)

    shutil.rmtree(ended / "best")
    (ended / "best").mkdir()
    (ended / "best" / "notes").write_text("precious")
    assert main(resume) == 2
    assert f"{ended}/best is not a checkpoint; move it" in capsys.readouterr().err
    assert (ended / "best" / "notes").read_text() == "precious"

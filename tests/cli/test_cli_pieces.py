"""Parts of the commands: shared evaluation, carried states, the schedule, metrics, the curve, the progress bar."""

import math
import re
from contextlib import nullcontext

import pytest
import torch
from torch.utils._pytree import tree_leaves

from megalodon_ops import Megalodon
from megalodon_ops.cli import main
from megalodon_ops.cli.console import Progress
from megalodon_ops.cli.flags import parse
from megalodon_ops.cli.held_out import bits_per_byte
from megalodon_ops.cli.models import model_config
from megalodon_ops.cli.options import COMMANDS
from megalodon_ops.cli.processes import Processes
from megalodon_ops.cli.settings import new_run
from megalodon_ops.model.model_state import from_named, named_tensors
from megalodon_ops.public_models import MegalodonState
from megalodon_ops.tokenizers import ByteTokenizer
from megalodon_ops.training import START, Batches, Metrics, Reader, Schedule, draw_metrics, read_metrics
from megalodon_ops.training.reader import select


def new_model():
    torch.manual_seed(0)
    return Megalodon(model_config("small", {"model_dim": 32, "num_layers": 2, "chunk_size": 8, "norm_num_groups": 4}))


def test_processes_share_documents():
    """The sum over processes is the bits per byte of one call per document. The last of 9 processes gets no document."""
    model = new_model()
    documents = [bytes(torch.randint(256, (n,)).tolist()) for n in (1, 7, 8, 30, 65, 3)]
    nats = 0.0
    for document in documents:
        logits = model(torch.tensor([[START, *document[:-1]]]))
        nats += torch.nn.functional.cross_entropy(logits[0], torch.tensor(list(document)), reduction="sum").item()
    whole = nats / math.log(2) / sum(map(len, documents))

    class Rank(Processes):
        def gather(self, value):
            return [value]

    for size in (1, 4, 9):
        ranks = [Rank(rank, size) for rank in range(size)]
        bits = [bits_per_byte(model, ByteTokenizer(), documents, nullcontext(), rank) for rank in ranks]
        assert sum(bits) == pytest.approx(whole, rel=1e-5) and (bits[-1] == 0) == (size == 9)
    assert model.training


def test_state_survives_as_tensors():
    reader = Reader(new_model())
    batches = Batches([bytes(range(50)), bytes(range(60, 90))], 2, 11, context="streamed", seed=None)
    with torch.no_grad():
        reader.loss(batches.next())
        rows = reader.rows()
        back = from_named(MegalodonState, named_tensors(rows))
        torch.testing.assert_close(*map(tree_leaves, (back, rows)), rtol=0, atol=0)
        other = Reader(reader.model)
        other.seek(back)
        batch = batches.next()
        assert (batch.carry >= 0).all()
        assert torch.equal(other.loss(batch, "none"), reader.loss(batch, "none"))
        fresh = Reader(reader.model).loss(batch, "none")
        assert not torch.allclose(fresh, reader.loss(batch, "none"))


def test_select_starts_fresh_at_minus_one():
    model = new_model()
    bounds = torch.tensor([0, 5, 12])
    _, state = model(torch.randint(256, (1, 12)), return_state=True, cu_seqlens=bounds)
    tokens = torch.randint(256, (1, 9))
    with torch.no_grad():
        picked = select(state, torch.tensor([1, -1, 0]))
        logits = model(tokens, state=picked, cu_seqlens=torch.tensor([0, 3, 6, 9]))
        one = model(tokens[:, :3], state=select(state, torch.tensor([1])))
        new = model(tokens[:, 3:6])
        two = model(tokens[:, 6:], state=select(state, torch.tensor([0])))
    torch.testing.assert_close(logits, torch.cat([one, new, two], 1), rtol=1e-5, atol=1e-5)


def test_schedule_by_steps():
    schedule = Schedule(lr=1.0, warmup=10, steps=100, minutes=None)
    rates = [schedule.lr(step) for step in range(100)]
    assert [rates[step] for step in (0, 4, 9, 10, 50, 99)] == pytest.approx([0.1, 0.5 * 0.96, 0.91, 0.9, 0.5, 0.01])
    assert schedule.finished(100) and not schedule.finished(99)


def test_schedule_by_minutes():
    """Although steps take twice as long from the middle on, the decay ends with the budget."""
    schedule = Schedule(lr=1.0, warmup=10, steps=None, minutes=1)
    seconds, step = 0.0, 0
    rates = []
    while not schedule.finished(step):
        rates.append(schedule.lr(step))
        pace = 0.1 if seconds < 30 else 0.2
        seconds += pace
        step += 1
        if step % 20 == 0:
            schedule.set_pace(step, seconds, pace)
            other = Schedule(lr=1.0, warmup=10, steps=None, minutes=1)
            other.seek(schedule.position(), step, seconds)
            assert [other.lr(step + i) for i in range(30)] == [schedule.lr(step + i) for i in range(30)]
    assert 58 < seconds < 62
    assert 0.95 < max(rates) <= 1
    assert rates[-1] < 0.01
    assert rates[40:] == sorted(rates[40:], reverse=True)


def test_widths_follow_dim():
    whole = model_config("mega200M", {})
    half = model_config("mega200M", {"model_dim": 512, "value_dim": 640})
    assert (half.z_dim, half.ffn_hidden_dim) == (whole.z_dim // 2, whole.ffn_hidden_dim // 2)
    assert half.value_dim == 640
    assert (whole.vocab_size, whole.num_outputs, whole.eos_token_id) == (257, 257, 256)
    assert model_config("mega1.3B_pg19", {}).num_outputs == 257


@pytest.mark.parametrize(
    ("flags", "rate"), [((), 0.01), (("--dim", 256), 0.005), (("--preset", "mega7.1B"), 3.1e-4), (("--lr", 0.3), 0.3)]
)
def test_the_learning_rate_follows_the_width(tmp_path, flags, rate):
    options = new_run(parse(["train", *map(str, flags)], COMMANDS)[1], tmp_path / "run").options
    assert options.lr == rate and options.record()["lr"] == rate


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.30000000000000004}\n{"step": 3}\n{"st')
    with Metrics(path, step=2) as metrics:
        metrics.write(step=3, loss=0.5)
    assert read_metrics(path) == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.30000000000000004},
        {"step": 3, "loss": 0.5},
    ]


@pytest.fixture
def figures(monkeypatch):
    """Figures that a test draws."""
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig

    def noted(figure, *args, **options):
        drawn.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    return drawn


def test_curve_has_labelled_axes(tmp_path, figures):
    from bench.plots import BLUE, GREY

    rows = [{"step": i, "bits_per_byte": 8.0 / (1 + i)} for i in range(50)]
    rows += [{"step": 20, "held_out_bits_per_byte": 3.0}, {"step": 50, "held_out_bits_per_byte": 2.0, "final": True}]
    draw_metrics(tmp_path / "curve.png", rows, {"gzip -9": 2.2})
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "bits per byte")
    assert {line.get_color() for line in axes.get_lines()} == {BLUE, GREY}  # as on all plots
    labels = [label.get_text() for label in axes.get_legend().get_texts()]
    assert labels == ["training, smoothed", "held-out, a sample of all", "held-out, all", "gzip -9 (2.20)"]
    short = [{"step": i, "bits_per_byte": 8.0 - 0.01 * i} for i in range(3)] + rows[-1:]
    draw_metrics(tmp_path / "short.png", short, {"gzip -9": 9.5})
    for figure in figures:
        (axes,) = figure.axes
        bottom, top = axes.get_ylim()
        for line in axes.get_lines():
            assert any(bottom < bits < top for bits in line.get_ydata()), f"{line.get_label()} is not visible"
    draw_metrics(tmp_path / "nothing.png", [], {})


def test_axes_are_fitted_to_the_curves(tmp_path, figures):
    """A run with --init-from stays between 2.0 and 2.3; a single step is a visible point."""
    continued = [{"step": i, "bits_per_byte": 2.3 - 0.003 * i} for i in range(100)]
    draw_metrics(tmp_path / "a.png", continued)
    draw_metrics(tmp_path / "b.png", continued[:1])
    bottom, top = figures[0].axes[0].get_ylim()
    assert 1.9 < bottom < 2.01 and 2.28 < top < 2.4
    (smooth,) = (line for line in figures[1].axes[0].get_lines() if not line.get_label().startswith("_"))
    assert len(smooth.get_xdata()) == 1 and smooth.get_marker() == "."


def test_runs_are_compared(tmp_path, figures, capsys):
    """Evaluations lie at the tokens or minutes of the training rows of their steps."""
    for number, name in enumerate("ab"):
        with Metrics(tmp_path / name / "metrics.jsonl") as metrics:
            for step in range(1, 5):
                metrics.write(step=step, bits_per_byte=8.0 / step, tokens=step * (number + 1) * 100, seconds=step * 30)
            metrics.write(step=4, held_out_bits_per_byte=3.0)
            metrics.write(step=4, held_out_bits_per_byte=2.5, final=True, compressors={"xz -9": 2.2})
    both = [str(tmp_path / name) for name in "ab"]
    out = ["--out", str(tmp_path / "both.png")]
    for unit in ("tokens", "minutes"):
        assert main(["plot", *both, *out, "--by", unit]) == 0
    assert main(["plot", both[0]]) == 0 and (tmp_path / "a" / "loss_curve.png").exists()
    lines = [figure.axes[0].get_lines() for figure in figures]
    tokens, minutes, one = ({line.get_label(): line.get_xdata()[-1] for line in drawn} for drawn in lines)
    for name, end in (("a", 400), ("b", 800)):
        for label in ("training, smoothed", "held-out, a sample of all", "held-out, all"):
            assert tokens[f"{tmp_path / name}, {label}"] == end and minutes[f"{tmp_path / name}, {label}"] == 2
    assert "xz -9 (2.20)" in one and not any("xz" in label for label in tokens)
    assert len({line.get_color() for line in lines[0]}) == 2
    assert main(["plot", *both]) == main(["plot", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "--out: must name" in said and f"{tmp_path}: no step in metrics.jsonl" in said


def test_the_progress_bar_of_a_timed_run_shows_seconds(capsys):
    with Progress({"step": 7, "seconds": 30.0}, None, 300.0) as progress:
        progress.bar.mininterval = 0
        for step, seconds in ((8, 75.0), (9, 150.0), (30, 299.0), (31, 301.0)):
            progress.show({"step": step, "seconds": seconds, "loss": 1.0, "bits_per_byte": 0.5, "tokens_per_second": 5})
    shown = capsys.readouterr().err
    figures = re.findall(r"(\d+)%\|.*?\| (\d+)/300 s(?:, step=(\d+),)?", shown)
    percent_seconds_step = [("10", "30", ""), ("25", "75", "8"), ("50", "150", "9")]
    assert [*dict.fromkeys(figures)] == [*percent_seconds_step, ("100", "299", "30"), ("100", "300", "31")]
    assert "step/s" not in shown


def test_the_progress_bar_of_a_run_shows_steps(capsys):
    with Progress({"step": 7, "seconds": 30.0}, 10, None) as progress:
        progress.bar.mininterval = 0
        progress.show({"step": 8, "seconds": 75.0, "loss": 1.0, "bits_per_byte": 0.5, "tokens_per_second": 5})
    assert "80%|" in (shown := capsys.readouterr().err) and "| 8/10 [" in shown
    assert "loss=1.000, bits/byte=0.500, tokens/s=5" in shown


def test_a_state_that_every_row_carries_is_not_copied():
    _, state = new_model()(torch.randint(256, (3, 5)), return_state=True)
    assert select(state, torch.arange(3)) is state
    for rows in ([0, 1], [0, 2, 1], [0, 1, -1], [0, 1, 2, 2]):
        assert torch.equal(select(state, torch.tensor(rows)).norm.mean[0], state.norm.mean[0])
        assert len(select(state, torch.tensor(rows)).norm.count) == len(rows)

"""`train`: files and output of a run, stopping, resuming, and protection from damage."""

import argparse
import gzip
import itertools
import json
import lzma
import os
import random
import re
import shutil
import signal
import sys
import time
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from command_line import TINY, Forked, error_of, lines_of, overflow, rows, train
from launched import copy_without_the_last
from torch.utils.flop_counter import FlopCounterMode

from megalodon_ops.cli import held_out, main
from megalodon_ops.cli import train as cli_train
from megalodon_ops.cli.console import StopSignals
from megalodon_ops.cli.evaluate import compressed_bits
from megalodon_ops.cli.options import Train
from megalodon_ops.training import Metrics, adamw, read_metrics, threads
from megalodon_ops.training.run_checkpoint import load_any, load_checkpoint
from megalodon_ops.training.record import write_record

pytestmark = pytest.mark.usefixtures("quick")


def test_the_loss_falls(finished):
    bits = [row["bits_per_byte"] for row in rows(finished) if "bits_per_byte" in row]
    assert len(bits) == 60
    assert 7 < bits[0] < 10
    assert sum(bits[-10:]) / 10 < bits[0] - 2


def test_files_of_a_run(finished):
    evaluations = [row for row in rows(finished) if "held_out_bits_per_byte" in row]
    assert [(row["step"], "final" in row) for row in evaluations] == [(20, False), (40, False), (60, False), (60, True)]
    before, last = (row["held_out_bits_per_byte"] for row in evaluations[-2:])
    assert before == pytest.approx(last, rel=1e-5), "a sample of so little text is all of it"
    assert evaluations[-1]["compressors"].keys() == {"gzip -9", "xz -9"}
    assert (finished / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    folders = sorted((finished / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000050", "step-00000060"]
    assert {path.suffix for folder in folders for path in folder.iterdir()} == {".safetensors", ".json", ".py"}


def test_output_of_a_run(text, tmp_path, capsys):
    assert train(text, tmp_path, "--steps", 3, "--batch", 48) == 0
    out, err = capsys.readouterr()
    (states,) = re.findall(r"([\d.]+) MB of the 48 rows' states; the newest two are kept", out)
    size = (tmp_path / "checkpoints" / "step-00000003" / "state.safetensors").stat().st_size
    assert 1e6 * float(states) == pytest.approx(size, abs=0.06e6)
    for words in ("bits per byte", "gzip -9", "xz -9", "continued by the model, 3 of 3"):
        assert words in out
    for words in ("loss=", "bits/byte=", "tokens/s=", "3/3"):
        assert words in err


@pytest.mark.parametrize(("number", "optimizer"), [(signal.SIGINT, "muon"), (signal.SIGTERM, "adamw")])
def test_interrupt_and_resume(text, tmp_path, monkeypatch, capsys, number, optimizer):
    """Losses after a resume are exactly those of an uninterrupted run, dropout included."""
    flags = ("--steps", 20, "--eval-every", 8, "--dropout", 0.1, "--attention-dropout", 0.1)
    flags += ("--optimizer", optimizer)
    assert train(text, tmp_path / "whole", *flags) == 0

    write = Metrics.write

    def write_and_interrupt(metrics, **row):
        write(metrics, **row)
        if row["step"] == 13:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", write_and_interrupt)
        assert train(text, tmp_path / "parts", *flags) == 128 + number
    assert f"--out {tmp_path}/parts --resume" in capsys.readouterr().out
    assert rows(tmp_path / "parts")[-1]["step"] == 13
    assert (tmp_path / "parts" / "loss_curve.png").exists()
    assert main(["train", "--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_accumulated_batches_equal_a_larger_batch(text, tmp_path):
    """Each row carries its own state, also after a resume."""
    flags = ("--steps", 4, "--checkpoint-every", 3, "--dropout", 0.0)
    assert train(text, tmp_path / "one", *flags, "--batch", 6) == 0
    assert train(text, tmp_path / "three", *flags, "--batch", 2, "--accumulate", 3) == 0
    for one, three in zip(rows(tmp_path / "one"), rows(tmp_path / "three"), strict=True):
        for name in one.keys() - {"compressors"}:
            assert three[name] == pytest.approx(one[name], rel=1e-4), (one["step"], name)
    again = copy_without_the_last(tmp_path / "three", tmp_path / "again")
    assert main(["train", "--out", str(again), "--resume"]) == 0
    assert rows(again) == rows(tmp_path / "three")


def test_a_run_is_repeated_by_its_options_file(text, tmp_path):
    flags = ("--steps", 3, "--seed", 5, "--share-emb")
    assert train(text, tmp_path / "first", *flags) == 0
    config = ["train", "--config", str(tmp_path / "first" / "options.json")]
    assert main([*config, "--out", str(tmp_path / "again")]) == 0
    assert rows(tmp_path / "again") == rows(tmp_path / "first")
    assert main([*config, "--out", str(tmp_path / "other"), "--seed", "6", "--minutes", "0.0001"]) == 0
    files = [tmp_path / name / "options.json" for name in ("first", "again", "other")]
    first, again, other = (json.loads(file.read_text()) for file in files)
    assert first == again
    assert first.pop("steps") == 3 and other == first | {"seed": 6, "minutes": 0.0001}, "--minutes replaces steps"


def test_events_for_tensorboard(text, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(text, tmp_path, "--steps", 3, "--eval-every", 2, "--tensorboard") == 0
    assert main(["train", "--out", str(tmp_path), "--resume", "--steps", "4"]) == 0
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in ("loss", "bits_per_byte", "learning_rate", "gradient_norm", "held_out_bits_per_byte"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({row["step"]: row[name] for row in rows(tmp_path) if name in row}), name


def test_missing_tensorboard_is_reported_before_anything_is_written(text, tmp_path, monkeypatch, capsys):
    for module in ("megalodon_ops.cli.events", "torch.utils.tensorboard"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert train(text, tmp_path / "run", "--tensorboard") == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r'megalodon_ops train: error: needs tensorboard, .*: pip install ".*\[tensorboard\]"\n', err)
    assert not (tmp_path / "run").exists()


def test_a_known_peak_shows_the_model_flops_utilization(text, tmp_path, capsys, monkeypatch):
    """Tokens a second at the peak follow from torch's count of a model's operations on whole chunks."""
    assert train(text, tmp_path, "--steps", 2, "--peak-tflops", 0.01) == 0
    (shown,) = re.findall(r"MFU=([\d.]+)%", capsys.readouterr().err.rpartition("\r")[2])
    model, _, _ = load_any(tmp_path)
    tokens = torch.zeros(1, 32 * model.config.chunk_size, dtype=torch.int64)  # makes one-time work negligible
    with FlopCounterMode(display=False) as counter:
        model.train().loss(tokens, tokens).backward()
    wanted = 2 * 0.01e12 * tokens.numel() / counter.get_total_flops()  # two processes
    options = Train(peak_tflops=0.01)
    assert cli_train.tokens_at_peak(options, model.config, torch.device("cpu"), 2) == pytest.approx(wanted, rel=0.02)
    assert cli_train.tokens_at_peak(Train(), model.config, torch.device("cpu"), 2) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    for_bfloat16 = Train(dtype="bfloat16")  # the card's known peak: 989.5 TFLOP/s
    half = replace(for_bfloat16, peak_tflops=989.5 / 2)
    known, halved = (cli_train.tokens_at_peak(o, model.config, torch.device("cuda"), 1) for o in (for_bfloat16, half))
    assert known == 2 * halved
    utilizations = [row["mfu"] for row in rows(tmp_path) if "mfu" in row]
    assert all(0 < share < 1 for share in utilizations)
    assert float(shown) == pytest.approx(100 * utilizations[-1], abs=0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_that_ends_a_run_is_recorded(number):
    before = signal.signal(number, signal.default_int_handler)  # an ignored signal, as under `nohup`, is not recorded
    try:
        with StopSignals() as signals:
            assert signals.received == 0 and signal.getsignal(number) != signal.default_int_handler
            os.kill(os.getpid(), number)
            assert signals.received == number
            assert signal.getsignal(number) == signal.default_int_handler, "a second one ends the process"
    finally:
        signal.signal(number, before)


def test_the_context_length_is_eight_rows_unless_given(text, tmp_path, capsys):
    losses = []
    for name, flags in {"default": (), "given": ("--context-length", 192), "longer": ("--context-length", 500)}.items():
        assert train(text, tmp_path / name, "--steps", 10, *flags) == 0
        losses.append([row["loss"] for row in rows(tmp_path / name) if "loss" in row])
    assert losses[0] == losses[1] != losses[2]
    summaries = [line for line in capsys.readouterr().out.splitlines() if "to learn from" in line]
    assert ["parts of at most 167 tokens" in line for line in summaries] == [True, True, False], summaries


@pytest.mark.slow
def test_kill_and_resume(text, tmp_path):
    flags = ("--steps", 80, "--checkpoint-every", 10)
    process = Forked("train", "--data", text, "--out", tmp_path / "parts", *TINY, *flags)
    metrics_file = tmp_path / "parts" / "metrics.jsonl"
    while process.is_alive() and not (metrics_file.exists() and metrics_file.read_bytes().count(b"\n") > 30):
        time.sleep(0.005)
    process.kill()
    assert process.wait()[0] == -signal.SIGKILL
    with open(metrics_file, "a") as file:
        file.write('{"step": 9999, "los')
    assert load_checkpoint(tmp_path / "parts").record["step"] >= 20

    assert main(["train", "--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert train(text, tmp_path / "whole", *flags) == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_two_runs_in_one_folder(text, tmp_path, capsys):
    """The second run is refused and changes nothing; once the first is killed, a third resumes."""
    out = tmp_path / "run"
    process = Forked("train", "--data", text, "--out", out, *TINY, "--steps", 100_000, "--checkpoint-every", 5)
    while process.is_alive() and not (out / "checkpoints" / "step-00000005").exists():
        time.sleep(0.005)
    (tmp_path / "link").symlink_to(out)
    for name in (out, tmp_path / "link"):
        for flags in (["--resume"], ["--data", str(text), *TINY]):
            assert main(["train", "--out", str(name), *flags]) == 2
            err = capsys.readouterr().err
            assert f"--out {name}: another command is using it" in err and err.count("\n") == 1
    before = rows(out)
    while process.is_alive() and rows(out)[: len(before) + 1] == before:
        time.sleep(0.005)
    assert process.is_alive() and rows(out)[: len(before)] == before
    process.kill()
    process.wait()
    step = load_checkpoint(out).record["step"]
    assert main(["train", "--out", str(out), "--resume", "--steps", str(step + 1)]) == 0


@pytest.mark.parametrize("link", [False, True])
def test_a_users_file_with_the_locks_name_stays(text, tmp_path, link, capsys):
    (tmp_path / "user_file").write_text("precious")
    out = tmp_path / "run"
    out.mkdir()
    if link:
        (out / ".lock").symlink_to(tmp_path / "user_file")
    else:
        shutil.copy(tmp_path / "user_file", out / ".lock")
    assert train(text, out, "--steps", 1) == (2 if link else 0)
    assert (out / ".lock").read_text() == "precious"
    assert not link or f"{out}/.lock: " in capsys.readouterr().err


def test_a_run_that_cannot_begin_leaves_no_folder(text, tmp_path, capsys):
    assert main(["train", "--data", str(tmp_path / "missing"), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_full_disk(text, tmp_path, capfd, file_size_limit):
    """The error is one line, only the checkpoint before stays, and the run resumes once there is room."""
    flags = ("--steps", 4, "--checkpoint-every", 2)
    assert train(text, tmp_path, *flags[:1], 2) == 0
    (tensors,) = (tmp_path / "checkpoints").glob("step-*2/model.safetensors")
    capfd.readouterr()
    with file_size_limit(tensors.stat().st_size):  # the optimizer's file is larger
        assert main(["train", "--out", str(tmp_path), "--resume", *map(str, flags)]) == 2
    (line,) = lines_of(capfd.readouterr().err)
    assert line.startswith("megalodon_ops train: error: ") and "step-00000004: could not be written" in line
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000000", "step-00000002"]
    assert main(["train", "--out", str(tmp_path), "--resume", *map(str, flags)]) == 0
    assert load_checkpoint(tmp_path).record["step"] == 4


def test_full_disk_in_the_metrics(tmp_path, file_size_limit):
    with Metrics(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(step=1)
        with file_size_limit(20), pytest.raises(OSError, match="metrics.jsonl: could not be written"):
            metrics.write(step=2)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_minutes(text, tmp_path, capsys, monkeypatch):
    """With a clock that advances by 10 ms at each call, independent of the machine's load."""
    ticks = itertools.count()
    monkeypatch.setattr(cli_train, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 100))
    assert train(text, tmp_path, "--minutes", 0.03, "--lr", 0.01, "--eval-every", 1000, "--checkpoint-every", 50) == 0
    curve = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert curve[-1]["seconds"] == pytest.approx(1.8, abs=0.05)
    assert max(row["learning_rate"] for row in curve) > 0.009
    assert curve[-1]["learning_rate"] < 0.003, "the decay ends with the budget"
    bar = re.findall(r"(\d+)%\|[^\r]*\| (\d)/2 s, step=(\d+), loss=", capsys.readouterr().err)
    assert bar and 80 <= int(bar[-1][0]) <= 100 and bar[-1][1] in "12" and int(bar[-1][2]) == curve[-1]["step"]


def test_bfloat16(text, tmp_path):
    assert train(text, tmp_path, "--steps", 20, "--dtype", "bfloat16") == 0
    bits = [row["bits_per_byte"] for row in rows(tmp_path) if "bits_per_byte" in row]
    assert bits[-1] < bits[0] - 1
    assert load_any(tmp_path)[0].embed.weight.dtype == torch.float32


def test_one_document(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(b"to be or not to be, that is the question. " * 30)
    assert train(path, tmp_path / "out", "--steps", 2) == 0


def test_a_finished_run_is_evaluated_again_and_extended(ended, capsys):
    """A resume trains nothing and ends as before; another text or other flags are refused."""
    before = rows(ended)
    checkpoints = {path: path.stat().st_mtime_ns for path in (ended / "checkpoints").rglob("*")}
    resume = ["train", "--out", str(ended), "--resume"]
    for flags in ([], ["--steps", "40"], ["--eval-every", "7"]):
        assert main([*resume, *flags]) == 0
        out = capsys.readouterr().out
        assert f"{ended}: finished after step 60; continue it with a larger --steps or --minutes" in out
        assert re.search(r"this model, step 60 +\d\.\d{3}\n +gzip -9 +\d\.\d{3}\n", out)
        assert rows(ended) == before
    assert main([*resume, "--seed", "7"]) == main([*resume, "--data", __file__]) == 2
    assert rows(ended) == before
    assert {path: path.stat().st_mtime_ns for path in (ended / "checkpoints").rglob("*")} == checkpoints
    assert main([*resume, "--steps", "62"]) == 0
    assert [row["step"] for row in rows(ended) if "loss" in row] == list(range(1, 63))


def test_compressors_without_memory_are_skipped(ended, monkeypatch, capsys):
    def refuse(**_):
        raise MemoryError

    before = rows(ended)
    monkeypatch.setattr(lzma, "LZMACompressor", refuse)
    assert main(["train", "--out", str(ended), "--resume"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"this model, step 60 +\d\.\d{3}\n +compressors are left out: too little memory\n", out)
    assert "continued by the model, 3 of 3" in out
    before[-1]["compressors"] = {}
    assert rows(ended) == before


def test_the_memory_of_compressors_scales_with_the_text():
    """800 KB take less than 32 MiB, where `xz -9` takes 674; the figures are those of `gzip -9` and `xz -9`."""
    documents = [random.Random(seed).randbytes(50_000) * 2 for seed in range(8)]
    tracemalloc.start()
    try:
        found = compressed_bits(documents)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    text = b"".join(documents)
    sizes = {"gzip -9": len(gzip.compress(text, 9)), "xz -9": len(lzma.compress(text, preset=9))}
    assert found == {name: 8 * size / len(text) for name, size in sizes.items()}


@pytest.mark.parametrize("documents", [[b"a" * 700, b"b" * 300], [b"a" * 7, b"b" * 3]], ids=["much", "little"])
def test_the_sample_has_excerpts_at_equal_distances(monkeypatch, documents):
    monkeypatch.setattr(held_out, "EVAL_SAMPLE", (10, 20))  # ten excerpts of 20 bytes
    found = held_out.eval_sample(documents)
    excerpts = [b"a" * 20] * 7 + [b"b" * 20] * 3
    assert found == (excerpts if len(documents[0]) > 20 else documents)


DAMAGE = {
    "noise": b"\xff\xfe\x00\x80",
    "no object": b"17",
    "no step": b'{"loss": 1.0}',
    "step": b'{"step": "1", "bits_per_byte": 2.0}',
    "deep": b"[" * 100_000,
}


def test_damaged_metrics_are_dropped_in_one_line(ended, capsys):
    metrics_file = ended / "metrics.jsonl"
    whole = rows(ended)
    lines = metrics_file.read_bytes().splitlines(keepends=True)
    for name, damage in DAMAGE.items():
        metrics_file.write_bytes(b"".join([*lines[:5], damage + b"\n", *lines[5:]]))
        assert rows(ended) == whole, name
        assert capsys.readouterr().err == f"megalodon_ops: {metrics_file}: damaged lines left out: 1\n", name
    damaged = [damage + b"\n" for damage in DAMAGE.values()]
    metrics_file.write_bytes(b"".join([*lines[:5], *damaged, *lines[5:]]))
    assert main(["train", "--out", str(ended), "--resume", "--steps", "61"]) == 0
    (line,) = lines_of(capsys.readouterr().err)
    assert line == f"megalodon_ops: {metrics_file}: damaged lines left out: {len(DAMAGE)}"
    assert rows(ended)[: len(whole) - 1] == whole[:-1], "all but the last line of a finished run"


def test_a_position_outside_the_text_is_reported_in_one_line(ended, capsys):
    path = max((ended / "checkpoints").iterdir()) / "training.json"
    record = json.loads(path.read_text())
    record["data"]["position"]["readers"][0] = [0, 10**9]
    path.unlink()
    write_record(path.parent, record)
    assert main(["train", "--out", str(ended), "--resume", "--steps", "61"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{path}: Batches.seek: `position` must have" in err


@pytest.mark.parametrize(
    "put", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["folder", "pipe", "device"]
)
def test_metrics_that_are_not_a_file(put, ended, capsys):
    metrics_file = ended / "metrics.jsonl"
    metrics_file.unlink()
    put(metrics_file)
    for steps in ("60", "61"):
        assert main(["train", "--out", str(ended), "--resume", "--steps", steps]) == 2
        err = capsys.readouterr().err
        words = f"megalodon_ops train: error: {metrics_file}: must be a file, got a"
        assert err.startswith(words) and err.count("\n") == 1


def test_non_finite_losses_end_a_run_in_one_line(ended, capsys):
    overflow(ended)
    assert main(["train", "--out", str(ended), "--resume", "--steps", "61"]) == 2
    (line,) = lines_of(capsys.readouterr().err)
    assert line == "megalodon_ops train: error: the loss is nan at step 61; a lower --lr may help"


def test_the_optimizer_is_adamw(finished):
    """The fused optimizer is torch's plain AdamW up to rounding, with equal bits on any number of threads."""
    found = load_checkpoint(finished)
    record = argparse.Namespace(**found.record["options"])

    def after_steps(number_of_threads, **kind):
        model, _, _ = load_any(finished)
        optimizer = adamw(model, lr=record.lr, weight_decay=record.weight_decay)
        for group in optimizer.param_groups:
            group.update(kind)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            with threads(number_of_threads):
                optimizer.step()
        assert torch.get_num_threads() == 1
        return dict(model.named_parameters())

    fused = after_steps(1)
    torch.testing.assert_close(fused, after_steps(1, fused=False, foreach=False), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused, after_steps(2), rtol=0, atol=0)
    before = load_any(finished)[0].embed.weight
    torch.testing.assert_close(fused["embed.weight"], before, rtol=0, atol=0.1)
    assert not torch.equal(fused["embed.weight"], before)


@pytest.mark.parametrize(
    "gib, fix",
    {
        2.5: r"takes 5\.\d GiB of memory, and there are 2\.5 here; it fits with --layerwise-ckpt$",
        1.5: r"it fits with --layerwise-ckpt --batch 32 --accumulate 4$",
        0.01: r"make --dim, --layers, --batch or --length smaller$",
    }.items(),
)
def test_a_run_that_does_not_fit_names_the_flags_that_make_it_fit(tmp_path, capsys, monkeypatch, gib, fix):
    monkeypatch.setattr("megalodon_ops.cli.train.available_memory", lambda: int(gib * 2**30))
    sizes = "--dim 256 --layers 6 --length 512 --batch 64 --accumulate 2".split()
    assert re.search(fix, error_of(capsys, "train", *sizes, "--out", tmp_path / "run").strip())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_curve_is_drawn_at_checkpoints(tmp_path, text, monkeypatch):
    drawn = []
    monkeypatch.setattr("megalodon_ops.cli.train.draw_metrics", lambda path, rows, *_: drawn.append(rows[-1]["step"]))
    assert train(text, tmp_path / "run", "--steps", 6, "--checkpoint-every", 2) == 0
    assert drawn[:2] == [2, 4] and drawn[-1] == 6

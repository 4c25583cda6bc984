"""Harness of the benches on the CPU and on a GPU: checks before timing, choice of the best rival, summaries."""

import dataclasses
import math
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from models import tiny_model

from bench import bench_encoder, bench_onnx, bench_small_weights, bench_stream, gpu, harness, llama_cpp_model
from bench import machine, plain_models, report, stream_memory, summary
from bench.harness import OURS, Case, Disagreement, Effort, Path

X = torch.arange(4.0)


class Event:
    """A CUDA event that uses the host's clock."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture(autouse=True)
def restored_process(monkeypatch):
    """Keep the harness from trimming this process's memory, and restore its number of threads."""
    monkeypatch.setattr(machine, "reset_peak_memory", lambda: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "cuda"])
def hardware(request, monkeypatch):
    """The processor, or a simulated card."""
    if request.param == "cuda":
        card = SimpleNamespace(L2_cache_size=1 << 10)
        simulated = dict(Event=Event, synchronize=lambda: None, get_device_properties=lambda device: card)
        simulated |= dict(memory_allocated=lambda: 5, max_memory_allocated=lambda: 12)
        for name, value in (simulated | {"reset_peak_memory_stats": lambda: None}).items():
            monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(harness, "hardware", {"cpu": machine, "cuda": gpu}[request.param])
    return request.param


def case(*paths, expected=lambda: (2 * X,)):
    work = dict(name="twice", shape="4", dtype="fp32", units=4, bytes=32.0)
    return Case(**work, paths=list(paths), expected=expected, tolerance=1e-6)


def measured(*paths, threads=(1,), **options):
    return list(harness.measure("test", case(*paths, **options), threads, Effort(samples=3, seconds=10.0)))


def twice(offset=0.0, seconds=0.0):
    def call():
        time.sleep(seconds)
        return (2 * X + offset,)

    return call


def test_paths_that_agree_are_timed(hardware):
    (result,) = measured(Path(OURS, twice()), Path("slower", twice(seconds=2e-3)))
    assert [len(t.warm) for t in result.timings] == [3, 3] and [len(t.cold) for t in result.timings] == [3, 3]
    assert result.best_rival.path == "slower" and result.best_rival.median >= 2e-3
    assert [t.error for t in result.timings] == [0, 0]
    if hardware == "cuda":
        assert [t.peak_memory for t in result.timings] == [7, 7]


def test_wrong_results_of_ours_are_not_timed(hardware):
    for offset in (1e-3, math.nan):
        with pytest.raises(Disagreement, match="twice, 4, fp32: error"):
            measured(Path(OURS, twice(offset)), Path("right", twice()))
    with pytest.raises(Disagreement, match="shape"):
        measured(Path(OURS, lambda: (X[:2],)))


def test_wrong_and_failing_paths_do_not_compete(hardware):
    def fails():
        raise RuntimeError

    (result,) = measured(
        Path(OURS, twice(seconds=1e-3)),
        Path("right", twice(seconds=2e-3)),
        Path("wrong", twice(offset=1)),
        Path("fails", fails),
        Path("other work", lambda: (X,), rival=False, checked=False),
    )
    assert result.best_rival.path == "right"
    notes = {t.path: t.note for t in result.timings}
    assert notes["wrong"].startswith("misses the tolerance") and notes["fails"] == "failed: RuntimeError"
    assert all(t.warm for t in result.timings if t.path != "fails")


@pytest.mark.parametrize(("seconds", "calls", "note"), [(0.02, 2, "one call"), (0.3, 1, "one call, no warm-up")])
def test_slow_rivals_get_one_call(seconds, calls, note, monkeypatch):
    monkeypatch.setattr(harness, "_SLOW", 0.01)
    monkeypatch.setattr(harness, "_VERY_SLOW", 0.25)
    slow = mock.Mock(side_effect=twice(seconds=seconds))
    (result,) = measured(Path(OURS, twice()), Path("slow", slow))
    rival = result.timings[1]
    assert (slow.call_count, len(rival.warm), rival.note) == (calls, 1, note) and rival.warm[0] >= seconds


@pytest.mark.parametrize("all_peaks", [False, True])
def test_the_peaks_of_slow_rivals_are_read_on_request(all_peaks, monkeypatch):
    monkeypatch.setattr(harness, "_VERY_SLOW", 0.01)
    monkeypatch.setattr(harness, "_SLOW", 0.01)
    monkeypatch.setattr(machine, "reset_peak_memory", lambda: 5)
    monkeypatch.setattr(machine, "peak_memory_since", lambda in_use: None if in_use is None else in_use + 2)
    slow, slower = twice(seconds=0.02), twice(seconds=0.03)
    paths = [Path(OURS, twice()), Path("slow", slow), Path("slower", slower)]
    timed = dataclasses.replace(case(*paths, expected=slow), all_peaks=all_peaks)
    (result,) = harness.measure("test", timed, [1], Effort(samples=3, seconds=10.0))
    assert [t.peak_memory for t in result.timings] == [7, *([7, 7] if all_peaks else [None, None])]


def test_with_fewer_threads_only_the_best_rival_is_timed(two_threads):
    first, second = measured(
        Path(OURS, twice()), Path("best", twice()), Path("slower", twice(seconds=0.02)), threads=(1, 2)
    )
    assert (first.threads, second.threads) == (2, 1)
    assert [t.path for t in second.timings] == [OURS, "best"] and not second.ours.cold


def test_memory_of_a_stream_is_sampled_at_powers_of_two(monkeypatch):
    sizes = iter([100 << 20, 101 << 20, 103 << 20])
    monkeypatch.setattr(stream_memory, "resident_bytes", lambda: next(sizes))
    samples = stream_memory.sample(iter(range(100, 2501, 100)), 2500)
    assert [count for count, _ in samples] == [1000, 2000, 2500]
    assert stream_memory.growth(samples) == pytest.approx(0.03)
    assert stream_memory.table({"reading": samples}).endswith("| reading | 2,500 | 103.0 | +3.0 |")


def test_streams_pass_all_their_tokens():
    model = tiny_model(torch.float32).eval()
    assert list(stream_memory.read(model, 20)) == [8, 16, 20] and list(stream_memory.decode(model, 3)) == [1, 2, 3]
    assert stream_memory.resident_bytes() > 10 << 20


def test_states_of_a_stream_do_not_depend_on_its_pieces():
    coarse, fine = (case.paths[0].call() for case in bench_stream.cases(quick=True, gpu=False))
    torch.testing.assert_close(coarse, fine, rtol=1e-4, atol=1e-4)


def test_pages_show_the_newest_results():
    if not summary.RESULTS.exists():
        pytest.skip("needs bench/results, which a source distribution does not contain")
    page, root = summary.Page(summary.newest()), summary.RESULTS.parents[1]
    assert len(page.readme_table()) == 2 + len(summary.README)
    assert "\n".join(page.readme_table()) in (root / "README.md").read_text(), "run python -m bench.summary"
    for works in (summary.OPS, summary.MODELS):
        assert len(page.performance_table(works)) >= 2 + len(works)
        assert "\n".join(page.performance_table(works)) in (root / "docs" / "performance.md").read_text()
    if (page := summary.newest_page_with(summary.ENCODER)) is not None:
        assert "\n".join(page.encoder_table()) in (root / "docs" / "performance.md").read_text()
    page = summary.newest_page_with(summary.LLAMA_CPP)
    assert "\n".join(page.weights_table()) in (root / "docs" / "cpu.md").read_text(), "run python -m bench.summary"


def test_small_weights_without_llama_cpp_say_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(bench_small_weights, "INSTALLED", False)
    first = next(bench_small_weights.cases(quick=True, gpu=False))
    assert "pip install llama-cpp-python gguf" in capsys.readouterr().err
    assert [path.name for path in first.paths] == [OURS, "int4", "bfloat16", "float32"]
    for path in first.paths:
        path.before()
        assert [logits.shape for logits in path.call()] == [(1, 1, 256)] * bench_small_weights.DECODED


@pytest.mark.slow  # torch's exporter takes half a minute
def test_ways_of_decoding_agree():
    """Twice, as the second run starts again from the same state."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    (case,) = bench_onnx.cases(quick=True, gpu=False)
    assert [path.name for path in case.paths] == [OURS, "a call of the model", "onnxruntime"]
    for path in case.paths * 2:
        path.before()
        assert harness.relative_error(path.call(), case.expected()) < case.tolerance, path.name


@torch.no_grad()
def test_llama_cpp_has_the_logits_of_the_plain_llama():
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    llama = plain_models.Llama(vocab=256, dim=128, num_layers=2, hidden=192)
    tokens = torch.randint(256, (1, 40))
    expected = llama(tokens)[:, -1:]
    for kind, bound in {"F32": 1e-3, "BF16": 2e-2, "Q8_0": 2e-2, "Q4_0": 0.3}.items():
        model = llama_cpp_model.LlamaCpp(llama, kind, 64)
        model.read(tokens[:, :30], 0)
        model.read(tokens[:, 10:], 30)  # the next call goes back to `past` 30 and forgets these tokens
        assert harness.relative_error([model.read(tokens[:, 30:], 30)], [expected]) < bound


def test_the_encoders_paths_agree_and_are_summarized(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_encoder, "LENGTHS", (1 << 14, 1 << 17))
    effort = Effort(samples=1, seconds=0.01, compiled=False, attempts=1)
    cases = bench_encoder.cases(quick=True, gpu=False)
    short, long = [result for case in cases for result in harness.measure("encoder", case, [1], effort)]
    assert short.best_rival.path == "plain torch" and [t.path for t in long.timings] == [OURS]
    assert {"plain torch", "Transformer encoder"} <= {t.path for t in short.timings}
    page = tmp_path / "2026-01-02-cpu-encoder.md"
    page.write_text(f"- processor: a\n- cores: 1\n\n{report.paths_table([short, long])}\n")
    head, _, *rows = summary.Page(page).encoder_table()
    assert head.startswith(
        f"| 1 cores of an a, 2026-01-02; tokens/s; MiB | {OURS} | plain torch | Transformer encoder |"
    )
    milliseconds = 1e3 * short.ours.median
    shown = float(rows[0].split(" | ")[1].replace(",", ""))
    assert rows[0].startswith("| 256 positions | ") and abs(shown * milliseconds / 256_000 - 1) < 0.01
    assert rows[1].startswith("| 2,048 positions | ") and rows[1].split(" | ")[2].strip(" |") == ""

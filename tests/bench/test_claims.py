"""The programs in bench/claims: the Llama, models with a part exchanged, training that resumes, commands."""

import dataclasses
import itertools
import json
import math
import re
import signal
from pathlib import Path
from unittest import mock

from paths import DOCS
import pytest
import torch
import torch.nn.functional as F

import megalodon_ops as mo
from megalodon_ops.evaluation import evaluate
from megalodon_ops.training import Batches, Reader

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure  # noqa: E402

from bench import plots  # noqa: E402
from bench.claims import ablation, context, encoder, gecko_loss, gecko_tasks, long_loss, loss, memory  # noqa: E402
from bench.claims import models, report, runs, speed, task_runs, train, verdict  # noqa: E402
from bench.claims.__main__ import CLAIMS, OTHER_CLAIMS, main  # noqa: E402
from bench.claims.llama import Llama, WindowState, hidden_units, group_by_length  # noqa: E402

CONFIG = dataclasses.replace(train.config("tiny", 8), num_layers=2)
WINDOW = 6  # tokens in a state of the Llama
ABLATIONS = [*models.ABLATIONS]
RESULTS = Path(report.__file__).with_name("results")
CLAIMS_PAGE = (DOCS / "claims.md").read_text()
SECTIONS = dict(re.findall(r"^## ([\w ]+)\n(.*?)(?=^## )", CLAIMS_PAGE, re.M | re.S))
TITLES = {name: name.capitalize() for name in ("loss", "speed", "memory", "context", "tasks", "encoder")}
TITLES |= {"ablation": "Parts", "gecko-tasks": "Successor", "gecko-loss": "Text", "long-loss": "Longer runs"}
TITLES |= {"forecast": "Forecasts"}
COLOURS = {models.MEGALODON: plots.BLUE, models.LLAMA: plots.ORANGE, encoder.TRANSFORMER: plots.ORANGE}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(256, (1, 31), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama():
    return models.build(models.LLAMA, CONFIG, window=WINDOW, seed=0)


def nats(model, inputs, targets, **options):
    return model.loss(inputs, targets, reduction="none", **options)


@pytest.mark.parametrize("size", train.SIZES)
def test_sizes_are_equal_up_to_half_a_hidden_unit(size):
    config = train.config(size, 64)
    unit = 3 * config.num_layers * config.model_dim  # parameters: a row or column of 3 matrices in each layer
    llama = Llama.sized_like(config, window=8)
    assert abs(llama.num_parameters() - config.num_parameters()) <= unit / 2
    assert hidden_units(config) > config.model_dim


def test_the_llama_is_that_of_transformers(llama, tokens):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = llama.net(inputs).logits
    torch.testing.assert_close(llama(inputs), logits)
    torch.testing.assert_close(llama.loss(inputs, targets), F.cross_entropy(logits[0], targets[0]))
    assert llama.net.config._attn_implementation == "sdpa" and llama.net.config.hidden_act == "silu"


def test_packed_documents_do_not_see_each_other(llama, tokens):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    bounds = torch.tensor([0, 3, 3, 17, 19, 30])
    packed = nats(llama, inputs, targets, cu_seqlens=bounds)
    single = [nats(llama, inputs[:, a:b], targets[:, a:b]) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
    torch.testing.assert_close(packed, torch.cat(single, 1))
    assert [sorted(group) for group in group_by_length([3, 14, 2, 11])] == [[1, 3], [0, 2]]


def test_a_state_is_a_window_of_tokens(llama, tokens):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    _, state = nats(llama, inputs[:, :20], targets[:, :20], return_state=True)
    assert [past.tolist() for past in state.past] == [inputs[0, 20 - WINDOW : 20].tolist()]
    got = nats(llama, inputs[:, 20:24], targets[:, 20:24], state=state)
    torch.testing.assert_close(got, nats(llama, inputs[:, 20 - WINDOW : 24], targets[:, 20 - WINDOW : 24])[:, WINDOW:])


def test_states_are_picked_and_reset():
    state = WindowState([torch.tensor([1, 2]), torch.tensor([3])])
    picked = state[torch.tensor([1, 0, 1])]
    assert [past.tolist() for past in picked.past] == [[3], [1, 2], [3]] and picked.num_sequences == 3
    assert [past.tolist() for past in picked.reset([1]).past] == [[3], [], [3]]
    assert [past.tolist() for past in picked.reset(torch.tensor([True, False, False])).past] == [[], [1, 2], [3]]


def test_the_llama_is_evaluated_in_the_same_windows(llama):
    """Windows of 8 tokens without a past; then whole documents in pieces that see a state's tokens."""
    documents = [torch.randint(256, (length,)) for length in (40, 23, 9)]
    by_hand = 0.0
    for document in documents:
        for begin in range(0, len(document) - 1, 8):
            inputs, targets = document[begin : begin + 8], document[begin + 1 : begin + 9]
            by_hand += nats(llama, inputs[None, : len(targets)], targets[None]).sum().item()
    small, whole = evaluate(llama, documents, contexts=[8, "all"], piece=WINDOW)
    assert small.nats == pytest.approx(by_hand, rel=1e-5) and small.tokens == whole.tokens == 69
    sliding = 0.0
    for document in documents:
        for begin in range(0, len(document) - 1, WINDOW):
            past, n = min(begin, WINDOW), min(WINDOW, len(document) - 1 - begin)
            window = document[begin - past : begin + n + 1]
            sliding += nats(llama, window[None, :-1], window[None, 1:])[:, past:].sum().item()
    assert whole.nats == pytest.approx(sliding, rel=1e-5)
    with pytest.raises(TypeError, match="`model` must be a Megalodon, got torch.nn"):
        evaluate(torch.nn.Linear(1, 1), documents)


def test_a_reader_carries_the_window(llama):
    batches = Batches([bytes(range(65, 115))], rows=1, length=10, seed=None)
    reader = Reader(llama)
    for _ in range(2):
        found = reader.loss(batches.next(), "none")
    ids = torch.tensor([[256, *range(65, 115)]])  # 256: begin of a document
    torch.testing.assert_close(found, nats(llama, ids[:, 10 - WINDOW : 20], ids[:, 11 - WINDOW : 21])[:, WINDOW:])


@pytest.mark.parametrize("name", ABLATIONS)
def test_exchanged_models_differ_stream_and_learn(name, tokens):
    model, whole = (models.build(each, CONFIG, window=8, seed=0) for each in (name, models.MEGALODON))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    found = nats(model, inputs, targets)
    assert (found - nats(whole, inputs, targets)).abs().max() > 1e-3
    first, state = nats(model, inputs[:, :13], targets[:, :13], return_state=True)
    second = nats(model, inputs[:, 13:], targets[:, 13:], state=state)
    torch.testing.assert_close(torch.cat((first, second), 1), found, rtol=1e-4, atol=1e-5)
    packed = nats(model, inputs, targets, cu_seqlens=torch.tensor([0, 13, 30]))
    torch.testing.assert_close(packed[:, 13:], nats(model, inputs[:, 13:], targets[:, 13:]))
    model.loss(inputs, targets).backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(torch.isfinite(p.grad).all() for p in trainable)
    assert sum(bool(p.grad.any()) for p in trainable) > 0.8 * len(trainable)
    assert abs(sum(p.numel() for p in model.parameters()) / CONFIG.num_parameters() - 1) < 0.01


def test_layer_norm_does_not_depend_on_the_past():
    norm = models.build("layer norm", CONFIG, window=8, seed=0).layers[0].mega.timenorm
    x = torch.randn(2, 5, CONFIG.model_dim)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (CONFIG.model_dim,)))


def test_ema_is_real_and_no_ema_is_the_identity():
    _, q, _, _ = models.build("ema", CONFIG, window=8, seed=0).layers[0].mega.cema.coefficients()
    assert not q.imag.any() and (q.real > 0).all()
    x = torch.randn(2, 5, CONFIG.model_dim)
    assert models.build("no ema", CONFIG, window=8, seed=0).layers[0].mega.cema(x) is x


def test_plain_attention_does_not_normalize():
    mega = models.build("plain attention", CONFIG, window=8, seed=0).layers[0].mega
    z, v = torch.randn(1, 8, CONFIG.z_dim), torch.randn(1, 8, CONFIG.value_dim)
    found = mo.normalized_attention(z, v, mega.gamma, mega.beta, num_heads=1, chunk_size=8, eps=mega.config.norm_eps)
    angle = torch.arange(8.0)[:, None] * 10000.0 ** (-torch.arange(0, CONFIG.z_dim, 2) / CONFIG.z_dim)
    pairs = torch.view_as_complex(z[0].unflatten(-1, (-1, 2)).contiguous())
    rotated = torch.view_as_real(pairs * torch.exp(1j * angle)).flatten(1)
    plain = F.scaled_dot_product_attention(rotated[None], rotated[None], v, is_causal=True)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_one_hop_adds_to_the_halfs_own_input():
    block = models.build("one hop", CONFIG, window=8, seed=0).layers[0]
    x = torch.randn(1, 5, CONFIG.model_dim)
    torch.testing.assert_close(block(x), block.mega(x) + block.nffn(block.mega(x)))


DOCUMENTS = [bytes((7 * i + j) % 251 for j in range(90)) for i in range(5)]
RECIPE = train.Recipe(tokens=8 * 2 * 12, rows=2, length=12, lr=1e-2, warmup=2)  # 8 steps


@pytest.mark.parametrize("name, optimizer", [(models.MEGALODON, "muon"), (models.LLAMA, "adamw")])
def test_interrupted_training_gives_the_same_losses(name, optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    carries = name == models.MEGALODON
    recipe = RECIPE._replace(optimizer=optimizer)

    def trained(scratch, stop=None):
        model = models.build(name, CONFIG, window=WINDOW, seed=1)
        reader_loss = Reader.loss
        calls = 0

        def counted(self, batch, reduction="mean"):
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return reader_loss(self, batch, reduction)

        def evaluation():
            return {"first": next(model.parameters()).sum().item(), "step": calls}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Reader, "loss", counted)
            options = dict(seed=3, carries=carries, context_length=24)
            result = train.train_on_text(model, recipe, DOCUMENTS, scratch, evaluation=evaluation, **options)
            return result, calls

    whole, _ = trained(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut.pt", stop=6)
    resumed, calls = trained(tmp_path / "cut.pt")
    assert calls == 8 - 5 and resumed["curve"] == whole["curve"] and resumed["steps"] == 8
    assert [at["step"] for at in whole["looks"].values()] == [2, 4, 8] and [*whole["looks"]] == ["0.25", "0.5", "1"]
    assert [at["step"] for at in resumed["looks"].values()] == [2, 4, 3]  # the first two come from the scratch file
    assert all(resumed["looks"][part]["first"] == whole["looks"][part]["first"] for part in whole["looks"])


def test_both_models_read_the_same_batches(tmp_path, monkeypatch):
    batches = {}
    for name in loss.MODELS:
        reader_loss = Reader.loss

        def recorded(self, batch, reduction="mean", name=name, reader_loss=reader_loss):
            batches.setdefault(name, []).append(batch.tokens)
            return reader_loss(self, batch, reduction)

        with monkeypatch.context() as patch:
            patch.setattr(Reader, "loss", recorded)
            model = models.build(name, CONFIG, window=WINDOW, seed=1)
            train.train_on_text(model, RECIPE, DOCUMENTS, tmp_path / f"{name}.pt", seed=3, carries=name != models.LLAMA)
    assert torch.equal(torch.cat(batches["megalodon"], 1), torch.cat(batches["llama"], 1))


def test_a_loss_that_is_not_finite_is_a_result(tmp_path):
    model = models.build(models.MEGALODON, CONFIG, window=WINDOW, seed=1)
    position = dict(position=lambda: {}, seek=lambda _: None)

    def nan_loss():
        return model.embed.weight.sum() * math.nan

    result = train.train(model, RECIPE, nan_loss, tmp_path / "x.pt", **position)
    assert result["train_loss"] is None and result["steps"] == 1 and json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("name", loss.MODELS)
def test_the_command_trains_one_model(name, small, tmp_path, capsys):
    command = ["--model", name, "--size", "tiny", "--tokens", "600", "--length", "32", "--data", small[-1]]
    train.main([*command, "--out", str(tmp_path / "run")])
    content = json.loads((tmp_path / "run" / "result.json").read_text())
    assert content["settings"]["model"] == name and content["result"]["steps"] == 2
    shown = json.loads(capsys.readouterr().out)
    assert shown["held_out_bits_per_byte"] == content["result"]["held_out_bits_per_byte"] and "curve" not in shown
    assert all(4 < bits < 12 for bits in shown["held_out_bits_per_byte"].values()) and shown["parameters"] > 30_000


def test_sweeps_continue_beyond_their_ends():
    """The best rate is at an end: the sweep goes on by factors of 2, at most twice. None: the loss of a planned run."""
    assert loss.sweep(lambda rate: abs(math.log(rate / 2e-3)), (1e-3, 2e-3, 4e-3)) == 2e-3
    falling = mock.Mock(side_effect=lambda rate: -rate)
    assert loss.sweep(falling, (1.0, 2.0, 4.0)) == 16.0
    assert falling.call_args_list == [mock.call(rate) for rate in (1, 2, 4, 8, 16)]
    assert loss.sweep(lambda rate: math.inf if rate > 1 else rate, (1.0, 2.0, 4.0)) == 0.25
    assert loss.sweep(lambda rate: None, (1.0, 2.0, 4.0)) == 2.0
    assert loss.sweep(lambda rate: -rate if rate <= 4 else None, (1.0, 2.0, 4.0)) == 4.0


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Arguments of quick runs on a text of a few kilobytes, with even smaller settings."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_bytes(b" ".join(b"%d" % (j * j + i) for j in range(400)))
    monkeypatch.setattr(loss, "QUICK", {"tiny": 600})
    monkeypatch.setattr(loss, "LENGTH", 32)
    monkeypatch.setattr(loss, "RATES", (2e-3,))
    monkeypatch.setattr(loss, "EXTRA_RATES", 0)
    monkeypatch.setattr(gecko_loss, "QUICK", ("tiny", 600))
    monkeypatch.setattr(gecko_loss, "LENGTH", 128)
    for module, name in itertools.product((gecko_loss, gecko_tasks), ("MEGALODONS", "PARTS")):
        monkeypatch.setattr(module, name, getattr(module, name)[-2:])
    for module in (gecko_loss, gecko_tasks):
        monkeypatch.setattr(module, "ENTRANTS", [*module.MEGALODONS, *module.PARTS])
    monkeypatch.setattr(gecko_tasks, "RATES", {"mqar": 4e-3, "needle": 1e-3})
    monkeypatch.setattr(long_loss, "QUICK", ("tiny", 256, 270))
    monkeypatch.setattr(long_loss, "ROWS", {32: 2, 64: 1})
    monkeypatch.setattr(long_loss, "RATES", dict.fromkeys(loss.MODELS, (2e-3,)))
    monkeypatch.setattr(ablation, "QUICK", ("tiny", 600))
    monkeypatch.setattr(context, "QUICK", ("tiny", 4096, 1 << 11))
    monkeypatch.setattr(task_runs, "QUICK", ("tiny", 1, 2))
    monkeypatch.setattr(task_runs, "RATES", (1e-3, 4e-3))
    monkeypatch.setattr(task_runs, "TASKS", {name: task_runs.TASKS[name] for name in ("mqar", "needle")})
    monkeypatch.setattr(task_runs, "TIMES", (1, 2))
    monkeypatch.setattr(speed, "QUICK", ("tiny", 16, [32, 64]))
    words = encoder.TASKS["words"]._replace(max_length=2000, batch=2000)
    monkeypatch.setattr(encoder, "TASKS", encoder.TASKS | {"words": words})
    return ["--quick", "--out", str(tmp_path / "out"), "--threads", "1", "--data", str(folder)]


SLOW = [
    pytest.param(claim, marks=pytest.mark.slow)
    for claim in ("tasks", "speed", "ablation", "long-loss", "gecko-tasks", "gecko-loss", "encoder")
]


@pytest.mark.parametrize("claim", ["loss", "context", *SLOW])
def test_a_claim_from_its_runs_to_its_page(claim, small, tmp_path, capsys, monkeypatch):
    assert main([claim, "--plan", *small]) == 0
    planned = capsys.readouterr().out
    assert not (tmp_path / "out").exists() and "left on 2 quiet cores" in planned
    assert main([claim, *small]) == 0
    results = tmp_path / "out" / f"{claim}-quick.jsonl"
    found = runs.results(results).values()
    assert len(found) >= int(planned.split(f"{claim}: ")[1].split()[0])
    assert not list((tmp_path / "out" / f"{claim}-quick-unfinished").glob("*.pt"))
    assert all(len(line) < 4_000 for line in results.read_text().splitlines())
    assert all(c["machine"]["torch"] == torch.__version__ and c["seconds"] >= 0 and c["date"] for c in found)
    monkeypatch.setattr(runs.machine, "describe", None)  # a further run would call it
    assert main([claim, *small]) == 0
    assert main(["report", *small]) == 0
    page = capsys.readouterr().out
    verdicts = (verdict.HELD, verdict.NOT_HELD, verdict.UNDECIDED)
    assert re.search(r"^# .*: a quick run \((.*)\)$", page, re.M)[1] in verdicts
    assert "says nothing about the claim" in page and (tmp_path / "out" / f"{claim}-quick.png").stat().st_size > 5000


@pytest.mark.parametrize("claim", TITLES)
def test_plots_have_labelled_axes_plain_numbers_and_the_colours_of_all_plots(claim):
    path = RESULTS / f"{claim}.jsonl"
    if not path.exists():
        pytest.skip("needs bench/claims/results, which a source distribution does not hold")
    figure = Figure()
    (CLAIMS | OTHER_CLAIMS)[claim].plot([*runs.results(path).values()], figure)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel() or figure.get_supylabel()
        for axis in (axes.xaxis, axes.yaxis):
            texts = [label.get_text() for label in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True))]
            assert not any("$" in text for text in texts), texts
        for line in axes.get_lines():
            name = line.get_label().split()[0].strip(",").lower()
            assert line.get_color() == COLOURS.get(name, line.get_color()), line.get_label()
            assert line.get_color() in (plots.BLUE, plots.ORANGE, plots.GREEN, plots.RED, plots.INK, plots.GREY)


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,]*\d(?:\.\d+)?", text)]


@pytest.mark.parametrize("claim", TITLES)
def test_pages_and_verdicts_are_those_of_the_results(claim):
    path = RESULTS / f"{claim}.jsonl"
    found = [*runs.results(path).values()]
    module = (CLAIMS | OTHER_CLAIMS)[claim]
    page = "\n".join(report.page_of(claim, module, found, claim)) + "\n"
    assert path.with_suffix(".md").read_text() == page, "run python -m bench.claims report"
    row = re.search(rf"^\| \[.*\]\(\.\./bench/claims/results/{claim}\.md\) \| (.*?) \|", CLAIMS_PAGE, re.M)
    assert row[1] == module.verdicts(found)["claim"]
    cells = re.findall(r"(?<=\| )[\d,]+(?:\.\d+)?(?= \|)", SECTIONS[TITLES[claim]])
    measured = numbers(page)

    def is_measured(cell):
        half_of_the_last_digit = 0.51 * 10.0 ** -len(cell.partition(".")[2])
        return min(abs(numbers(cell)[0] - number) for number in measured) <= half_of_the_last_digit

    wrong = [cell for cell in cells if not is_measured(cell)]
    assert len(cells) > 10 and not wrong


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "QUICK", ("tiny", 64, [2048]))
    monkeypatch.setattr(memory, "QUICK_STREAMS", {models.MEGALODON: 2000, models.LLAMA: 2000})
    assert main(["memory", "--quick", "--out", str(tmp_path)]) == 0
    page = report.report("memory", memory, tmp_path / "memory-quick.jsonl")
    assert "training, beyond memory in use | megalodon | 2,048" in page and "reading a stream" in page


def test_other_settings_are_not_mixed(tmp_path):
    session = runs.Session("loss", tmp_path)
    assert session.run("a", lambda scratch, x: {"y": x}, seconds=1.0, x=1) == {"y": 1}
    assert session.run("a", None, seconds=1.0, x=1) == {"y": 1}  # not run again
    with pytest.raises(SystemExit, match="loss.jsonl: a has other settings"):
        session.run("a", None, seconds=1.0, x=2)
    assert runs.Session("loss", tmp_path, plan=True).run("b", None, seconds=1.0, x=2) is None


def test_a_stopped_claim_says_how_to_resume(tmp_path, capsys, monkeypatch):
    def stop(session, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(loss, "run", stop)
    assert main(["loss", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().out == "loss: stopped; the same command resumes it\n"
    monkeypatch.setattr(loss, "run", lambda session, data: signal.pause())
    assert main(["loss", "--out", str(tmp_path), "--hours", "0.00001"]) == 130


def test_the_plan_of_everything_fits_a_night(tmp_path, capsys):
    assert main(["all", "--plan", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CLAIMS) + 1 and float(lines[-1].split()[1]) <= 14 and lines[-1].endswith("h")
    with pytest.raises(SystemExit, match="holds no results"):
        main(["report", "--out", str(tmp_path)])

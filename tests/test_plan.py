"""A plan's arithmetic, its refusals, and `python -m megalodon_ops plan`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import megalodon_ops as mo
from megalodon_ops.cli import main
from megalodon_ops.distributed.plan import CARDS, Card, plan
from megalodon_ops.distributed.plan.exchange import Group

PAPER = mo.MegalodonConfig.preset("paper7B")
MESH = {"data": 128, "chunk": 2}


def test_the_papers_arrangement():
    found = plan(PAPER, MESH, context=32768, recompute=True)
    assert (found.devices, found.tokens, found.tokens // found.devices) == (256, 4_194_304, 16_384)
    assert found.fits and not plan(PAPER, MESH, context=32768).fits
    assert found.memory.parameters == pytest.approx(4 * PAPER.num_parameters() / 256, rel=1e-2)
    # 6 operations a parameter of a product and token, and what attention needs
    products = found.flops.by_part["matrix products"] + found.flops.by_part["output and loss"]
    assert products / 16384 == pytest.approx(6 * (PAPER.num_parameters() - 32000 * 4096), rel=2e-3)
    pairs = 4 * 4096 * 4097 // 2
    assert found.flops.by_part["attention"] == 32 * pairs * (2 * (1024 + 8192) + 2 * (3 * 1024 + 2 * 8192))
    by_name = {exchange.name: exchange for exchange in found.exchange}
    numbers = 32 * (2 * 64 * 2 + 2 * 4096 * 16) + 2 * 64 * 2  # float32; a norm's are float64
    assert by_name["states, backward"].received == 4 * numbers


def test_parts_add_up():
    plain, again = (plan(PAPER, MESH, context=32768, recompute=recompute).memory for recompute in (False, True))
    for memory in plain, again:
        peak = memory.peak
        parts = memory.parameters + memory.optimizer + memory.batch + memory.rotary + memory.states
        assert memory.total == parts + peak.activations + peak.gradients + peak.gathered + peak.temporary
    assert plain.kept == again.kept and plain.kept_recomputing == again.kept_recomputing
    whole, inputs = sum(plain.kept.values()), sum(plain.kept_recomputing.values())
    assert inputs < whole / 20 and plain.peak.activations <= whole
    assert inputs - again.kept["loss"] < again.peak.activations < inputs + whole / 32  # one block's, beside the inputs


def test_what_each_dimension_divides():
    one = plan(PAPER, {}, context=32768, batch=4, recompute=True)
    for name in ("data", "chunk", "tensor"):
        two = plan(PAPER, {name: 2}, context=32768, batch=4, recompute=True)
        for part in ("matrix products", "attention", "output and loss"):
            assert 2 * two.flops.by_part[part] == one.flops.by_part[part]
        assert 2 * two.flops.by_part["CEMA"] == pytest.approx(one.flops.by_part["CEMA"], rel=1e-3)  # coefficients, once
        assert two.memory.parameters == pytest.approx(one.memory.parameters / 2, rel=1e-3)
        assert two.memory.total < one.memory.total
        assert two.at_peak.step < one.at_peak.step


def test_replicas_exchange_gradients_alone():
    sharded, replicated = (plan(PAPER, {"data": 8}, context=4096, data=data) for data in ("shard", "replicate"))
    assert [exchange.name for exchange in replicated.exchange] == ["gradients, all-reduce"]
    assert replicated.memory.parameters == pytest.approx(8 * sharded.memory.parameters, rel=1e-3)


def test_links():
    card = Card("test", 1.0, 1.0, 1.0, 1.0, link=10.0, network=1.0, source="")
    assert Group(1, 1).seconds(80, card, 8) == 0
    assert Group(8, 1).seconds(80, card, 8) == pytest.approx(7.0)  # 70 bytes over a link of 10
    assert Group(16, 1).seconds(160, card, 8) == pytest.approx(max(15.0, 80 / 8))  # eight adapters fetch 80 bytes
    assert Group(2, 8).seconds(80, card, 8) == pytest.approx(40.0)  # one in each of two nodes
    assert Group(4, 2).seconds(80, card, 8) == pytest.approx(6.0)  # every other device of a node


def test_half_the_rates_take_twice_the_time():
    whole, half = (plan(PAPER, MESH, context=32768, efficiency=share) for share in (1.0, 0.5))
    assert whole.at_peak == whole.estimate == half.at_peak
    assert half.estimate.step == pytest.approx(2 * whole.estimate.step)
    slow = plan(PAPER, {"data": 256}, context=4096, efficiency=(1.0, 1.0, 1e-3))
    assert slow.estimate.bound == "links" and slow.at_peak.bound == "compute"


def test_cards_name_their_sources():
    for card in CARDS.values():
        assert "https://" in card.source and card.bfloat16 > card.float32 and card.memory > 1e10
        assert card.peak(torch.bfloat16) == card.bfloat16 and card.peak(torch.float32) == card.float32


WRONG = {
    "config": (dict(config=3), TypeError, "`config` must be a MegalodonConfig, got 3"),
    "no mesh": (dict(mesh=4), TypeError, "`mesh` must be sizes of data, chunk and tensor"),
    "mesh's names": (dict(mesh={"rows": 2}), ValueError, "`mesh` must have dimensions named data, chunk or tensor, got 'rows'"),
    "mesh's sizes": (dict(mesh={"data": 0}), ValueError, "`mesh` must be a positive integer below 2^31, got 0"),
    "batch": (dict(batch=3), ValueError, "`mesh` must have a size of data that divides the batch's sequences (3), got 128"),
    "groups": (dict(mesh={"tensor": 3}), ValueError, "`mesh` must have a size of tensor that divides the norm groups (64), got 3"),
    "chunks": (dict(mesh={"chunk": 3}), ValueError, "`mesh` must have a size of chunk that divides the chunks of the context (8), got 3"),
    "part of a chunk": (dict(context=5000), ValueError, "`context` must be whole chunks of 4,096 where chunk = 2, got 5,000"),
    "context": (dict(context=0), ValueError, "`context` must be a positive integer below 2^31, got 0"),
    "card": (dict(card="abacus"), ValueError, "`card` must be a Card, or one of a100-40"),
    "dtype": (dict(dtype=torch.int64), ValueError, "`dtype` must be torch.float32, bfloat16 or float16, got torch.int64"),
    "autocast": (dict(autocast=True, dtype=torch.float32), ValueError, "`autocast` must go with a 16-bit `dtype`"),
    "data": (dict(data="split"), ValueError, '`data` must be "shard" or "replicate", got \'split\''),
    "efficiency": (dict(efficiency=0.0), ValueError, "`efficiency` must be above 0 and at most 1, got 0.0"),
    "efficiencies": (dict(efficiency=[1.0, 0.5]), ValueError, "`efficiency` must be one number or three, got 2"),
    "recompute": (dict(recompute=1), TypeError, "`recompute` must be True or False, got 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    changed, error, message = WRONG[name]
    arguments = {"config": PAPER, "mesh": MESH, "context": 32768, **changed}
    with pytest.raises(error) as raised:
        plan(arguments.pop("config"), arguments.pop("mesh"), **arguments)
    assert str(raised.value).startswith(f"plan: {message}") and "\n" not in str(raised.value)


# the command

TO_THE_PAPER = "plan --preset paper7B --devices 256 --mesh data=128,chunk=2 --context 32768 --card a100".split()


def test_table(capsys):
    assert main(TO_THE_PAPER) == 0
    table = capsys.readouterr().out
    for title in (
        "memory of a device", "kept for the backward", "operations, forward and backward", "received by a device",
        "seconds of a step", "beside the paper's arrangement",
    ):  # fmt: skip
        assert re.search(rf"^{title} ", table, re.M)
    assert "DOES NOT FIT" in table and "is an assumption" in table and max(map(len, table.splitlines())) <= 140
    assert main([*TO_THE_PAPER, "--recompute"]) == 0
    table = capsys.readouterr().out
    assert "DOES NOT FIT" not in table and " left" in table and "computed again" in table
    main(["plan", "--preset", "mega1.3B"])
    assert "the paper" not in capsys.readouterr().out


def test_numbers_of_the_table_are_those_of_json(capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert main([*TO_THE_PAPER, "--json", str(file)]) == 0
    table, figures = capsys.readouterr().out, json.loads(file.read_text())
    assert main([*TO_THE_PAPER, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == figures
    assert f"{figures['memory']['total'] / 1e9:,.2f}  of 80.00" in table and not figures["fits"]
    assert f"{figures['estimate']['tokens_per_second']:,.0f}" in table
    assert figures["card"]["name"] == "a100-80" and figures["mesh"] == {"data": 128, "chunk": 2, "tensor": 1}
    rows = re.findall(r"^  .* ([\d.]+)$", table.partition("memory of a device")[2].partition("at the peak")[0], re.M)
    assert sum(map(float, rows)) == pytest.approx(figures["memory"]["total"] / 1e9, abs=0.05)


def test_a_runs_model(finished, capsys):
    config = mo.Megalodon.load(next(finished.glob("checkpoints/step-*"))).config
    for path in (
        finished,
        next(finished.glob("checkpoints/step-*")),
        next(finished.glob("checkpoints/step-*")) / "config.json",
    ):
        assert main(["plan", "--config", str(path), "--context", "64"]) == 0
        assert f"{config.num_parameters():,} parameters" in capsys.readouterr().out
    assert main(["plan", "--config", str(finished), "--layers", "5", "--vocab", "900", "--json", "-"]) == 0
    planned = json.loads(capsys.readouterr().out)["config"]
    assert planned["num_layers"] == 5 and planned["vocab_size"] == 900 and planned["model_dim"] == config.model_dim


def test_figures_of_a_card_may_be_given(capsys):
    given = "plan --card cpu --memory 64 --tflops 2 --bandwidth 100 --dtype float32 --json -".split()
    assert main(given) == 0
    card = json.loads(capsys.readouterr().out)["card"]
    assert (card["memory"], card["float32"], card["bandwidth"], card["kind"]) == (64e9, 2e12, 100e9, "cpu")
    assert main("plan --card h100 --tflops 600 --json -".split()) == 0
    card = json.loads(capsys.readouterr().out)["card"]
    assert (card["bfloat16"], card["float32"]) == (600e12, CARDS["h100"].float32)


def test_model_flags_are_those_of_train(capsys):
    flags = "plan --dim 256 --layers 3 --swiglu --recompute --dtype autocast --optimizer-dtype bfloat16 --replicate --json -"
    assert main([*flags.split(), "--devices", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["model_dim"] == 256 and found["config"]["swiglu"] and found["recompute"]
    assert (
        found["memory"]["optimizer"]
        == found["memory"]["parameters"]
        == 4 * mo.MegalodonConfig(**found["config"]).num_parameters()
    )


ERRORS = {
    "--mesh data=3,chunk=2 --devices 7": "--mesh data=3,chunk=2: has 6 processes, got --devices 7",
    "--mesh rows=2": "argument --mesh: must be sizes of data, chunk and tensor such as data=2,chunk=2, got 'rows=2'",
    "--mesh data=0": "argument --mesh: must have sizes of at least 1",
    "--mesh data=2 --batch 3": "--mesh: must have a size of data that divides the batch's sequences (3), got 2",
    "--preset mega7.3B --mesh tensor=3": "size of tensor that divides the norm groups (64), got 3",
    "--preset mega7.3B --mesh chunk=3": "size of chunk that divides the chunks of the context (8), got 3",
    "--card cpu": "--card cpu: has no data sheet; give --memory, --tflops, --bandwidth",
    "--card cpu --devices 2 --memory 9 --tflops 1 --bandwidth 9": "give --link, --network",
    "--card abacus": "argument --card: invalid choice: 'abacus'",
    "--efficiency 0.4 0.3": "--efficiency: must be one share, or three, got 2",
    "--efficiency 1.5": "argument --efficiency: must be above 0 and at most 1, got 1.5",
    "--config /nowhere": "--config /nowhere/config.json: no such file",
    "--param-dtype bfloat16 --dtype float32": "--param-dtype bfloat16: needs --dtype bfloat16, got float32",
    "--dim 33": "--norm-groups: must be a divisor of --dim = 33",
    "--context 10000000000": "--context: must be a positive integer below 2^31, got 10000000000\n",
}


@pytest.mark.parametrize("flags", ERRORS)
def test_errors_are_one_line(flags, capsys):
    try:
        code = main(["plan", *flags.split()])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("megalodon_ops plan: error: ") and ERRORS[flags] in err


def test_the_page_shows_what_is_printed(capsys):
    page = (Path(__file__).parents[1] / "docs" / "plan.md").read_text()
    main([*TO_THE_PAPER, "--recompute"])
    assert capsys.readouterr().out.strip() in re.sub(r"^    ", "", page, flags=re.M)

"""A plan's arithmetic, its refusals, and `python -m megalodon_ops plan`."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex

from paths import DOCS
import pytest
import torch

import megalodon_ops as mo
from megalodon_ops.cli import main
from megalodon_ops.distributed.measure import AGAIN, OTHERS, PRODUCTS
from megalodon_ops.distributed.plan import CARDS, Card, _seconds, plan


PAPER = mo.MegalodonConfig.preset("paper7B")
MESH = {"data": 128, "chunk": 2}


def test_the_papers_arrangement():
    found = plan(PAPER, MESH, context=32768, recompute=True)
    assert (found.devices, found.tokens, found.tokens // found.devices) == (256, 4_194_304, 16_384)
    assert found.fits and not plan(PAPER, MESH, context=32768).fits
    assert found.memory["parameters"] == pytest.approx(4 * PAPER.num_parameters() / 256, rel=1e-2)
    # 6 operations a parameter of a product and token, and what attention needs of the pairs of a chunk
    pairs = 4 * 4096 * 4097 // 2
    attention = 32 * pairs * (2 * (1024 + 8192) + 2 * (3 * 1024 + 2 * 8192))
    products = 6 * 16384 * (PAPER.num_parameters() - 32000 * 4096)
    assert found.operations[PRODUCTS] == pytest.approx(products + attention, rel=2e-3)
    numbers = 32 * (2 * 64 * 2 + 2 * 4096 * 16) + 2 * 64 * 2  # float32; a norm's are float64
    assert found.exchange["states, backward"] == 4 * numbers


def test_what_recomputation_leaves():
    plain, again = (plan(PAPER, MESH, context=32768, recompute=recompute) for recompute in (False, True))
    inputs = 32 * 16384 * 4096 * 2
    assert inputs < again.memory["activations"] < inputs + plain.memory["activations"] / 32
    assert plain.operations[AGAIN] == 0 < again.operations[AGAIN] < again.operations[PRODUCTS] / 3


def test_what_each_dimension_divides():
    one = plan(PAPER, {}, context=32768, batch=4, recompute=True)
    for name in ("data", "chunk", "tensor"):
        two = plan(PAPER, {name: 2}, context=32768, batch=4, recompute=True)
        for kind, count in one.operations.items():
            assert 2 * two.operations[kind] == pytest.approx(count, rel=1e-6)
        assert two.memory["parameters"] == pytest.approx(one.memory["parameters"] / 2, rel=1e-3)
        assert two.bytes < one.bytes
        assert two.step < one.step


def test_replicas_exchange_gradients_alone():
    sharded, replicated = (plan(PAPER, {"data": 8}, context=4096, data=data) for data in ("shard", "replicate"))
    assert list(replicated.exchange) == ["gradients, all-reduce"]
    assert replicated.memory["parameters"] == pytest.approx(8 * sharded.memory["parameters"], rel=1e-3)


def test_links():
    card = Card("test", 1.0, 1.0, 1.0, 1.0, link=10.0, network=1.0)

    def seconds(total: int, devices: int, stride: int) -> float:
        return _seconds(total, devices, stride, card)

    assert seconds(80, 1, 1) == 0
    assert seconds(80, 8, 1) == pytest.approx(7.0)  # 70 bytes over a link of 10
    assert seconds(160, 16, 1) == pytest.approx(150 / 8)  # eight adapters fetch for the node what each member lacks
    assert seconds(80, 2, 8) == pytest.approx(40.0)  # one in each of two nodes
    assert seconds(80, 4, 2) == pytest.approx(6.0)  # every other device of a node


def test_half_the_rates_take_twice_the_time():
    whole, half = (plan(PAPER, MESH, context=32768, efficiency=rate) for rate in (1.0, 0.5))
    assert half.step == pytest.approx(2 * whole.step)
    slow = dataclasses.replace(CARDS["a100-80"], link=1e9, network=1e9)
    found = plan(PAPER, {"data": 256}, context=4096, card=slow)
    assert (
        found.seconds["exchange beside computation"] < found.step < 1.01 * found.seconds["exchange beside computation"]
    )


def test_each_rate_bounds_what_it_should():
    config = mo.MegalodonConfig.preset("mega200M")
    card = Card("test", 1e9, 1e8, 1e12, 1e10, 1.0, 1.0)
    found = plan(config, {}, context=2048, card=card, efficiency=1.0)
    expected = found.operations[PRODUCTS] / 1e9 + found.operations[OTHERS] / 1e8
    assert found.seconds["operations"] == pytest.approx(expected)
    moved = 5 * found.memory["activations"]
    assert found.seconds["activations in memory"] == pytest.approx(moved / 1e10, rel=1e-6)


WRONG = {
    "mesh's names": (dict(mesh={"rows": 2}), ValueError, "`mesh` must have dimensions named data, chunk or tensor, got 'rows'"),
    "mesh's sizes": (dict(mesh={"data": 0}), ValueError, "`mesh` must be a positive integer below 2^31, got 0"),
    "batch": (dict(batch=3), ValueError, "`mesh` must have a size of data that divides the batch's sequences (3), got 128"),
    "groups": (dict(mesh={"tensor": 3}), ValueError, "`mesh` must have a size of tensor that divides the norm groups (64), got 3"),
    "chunks": (dict(mesh={"chunk": 3}), ValueError, "`mesh` must have a size of chunk that divides the chunks of the context (8), got 3"),
    "part of a chunk": (dict(context=10240), ValueError, "`mesh` must have a size of chunk that divides the chunks of the context (2.5), got 2"),
    "memory": (
        dict(config=mo.MegalodonConfig(working_memory=True), mesh={"tensor": 2}), ValueError,
        "`mesh` must have tensor = 1 for a model with a working memory or attention to two chunks, got 2",
    ),
    "context": (dict(context=0), ValueError, "`context` must be a positive integer below 2^31, got 0"),
    "storage": (dict(param_dtype=torch.bfloat16, autocast=True), ValueError, "`param_dtype` must be float32, or `dtype` without"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", [{"card": "abacus"}, {"data": "split"}])
def test_unknown_names(wrong):
    with pytest.raises(KeyError, match=next(iter(wrong.values()))):
        plan(PAPER, MESH, context=32768, **wrong)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    changed, error, message = WRONG[name]
    arguments = {"config": PAPER, "mesh": MESH, "context": 32768, **changed}
    with pytest.raises(error) as raised:
        plan(arguments.pop("config"), arguments.pop("mesh"), **arguments)
    assert str(raised.value).startswith(f"plan: {message}") and "\n" not in str(raised.value)


# the command

TO_THE_PAPER = "plan --preset paper7B --mesh data=128,chunk=2 --context 32768 --card a100-80".split()


def test_table(capsys):
    assert main(TO_THE_PAPER) == 0
    table = capsys.readouterr().out
    for title in (
        "GB of a device at the peak",
        "TFLOP of a device",
        "GB that a device receives",
        "seconds of a step, at 0.5",
    ):
        assert re.search(rf"^{title} ", table, re.M)
    assert "DOES NOT FIT" in table and max(map(len, table.splitlines())) <= 120
    assert main([*TO_THE_PAPER, "--recompute"]) == 0
    table = capsys.readouterr().out
    assert "DOES NOT FIT" not in table and "fits, " in table
    assert "\nleft out: " in table and "\npublished: 6 % slower" in table
    assert main(["plan", "--preset", "mega200M"]) == 0
    table = capsys.readouterr().out
    assert "\nleft out: " in table and "published" not in table


def test_numbers_of_the_table_are_those_of_json(capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert main([*TO_THE_PAPER, "--json", str(file)]) == 0
    table, figures = capsys.readouterr().out, json.loads(file.read_text())
    assert main([*TO_THE_PAPER, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == figures
    assert f"{figures['bytes'] / 1e9:,.2f} of 80.00 GB" in table and not figures["fits"]
    assert f"{figures['tokens'] / figures['step']:,.0f}" in table
    assert figures["card"]["name"] == "a100-80" and figures["mesh"] == {"data": 128, "chunk": 2, "tensor": 1}
    rows = re.findall(r"^  .* ([\d.]+)$", table.partition("TFLOP")[0], re.M)
    assert sum(map(float, rows)) == pytest.approx(figures["bytes"] / 1e9, abs=0.05)


def test_model_flags_are_those_of_train(capsys):
    flags = "plan --dim 256 --layers 3 --swiglu --recompute --dtype autocast --replicate --json -"
    assert main([*flags.split(), "--mesh", "data=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["config"]["model_dim"] == 256
        and found["config"]["vocab_size"] == 257
        and found["config"]["swiglu"]
        and found["operations"][AGAIN]
    )
    assert found["memory"]["parameters"] == 4 * mo.MegalodonConfig(**found["config"]).num_parameters()


ERRORS = {
    "--mesh rows=2": "--mesh: must be sizes of data, chunk and tensor such as data=2,chunk=2, got 'rows=2'",
    "--mesh data=0": "--mesh: must have sizes of at least 1",
    "--mesh data=2 --batch 3": "--mesh: must have a size of data that divides the batch's sequences (3), got 2",
    "--preset mega7.3B --mesh tensor=3": "size of tensor that divides the norm groups (64), got 3",
    "--preset mega7.3B --mesh chunk=3": "size of chunk that divides the chunks of the context (8), got 3",
    "--card abacus": "argument --card: invalid choice: 'abacus'",
    "--efficiency 1.5": "--efficiency: must be a number <= 1.0, got '1.5'",
    "--param-dtype bfloat16 --dtype float32": "--param-dtype: must be float32, or `dtype` without autocast, got torch.bfloat16",
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


def test_the_page_shows_what_its_command_prints(capsys):
    page = (DOCS / "plan.md").read_text()
    command = re.search(r"^    python -m megalodon_ops (plan .*?[^\\])$", page, re.M | re.S)[1]
    assert main(shlex.split(command.replace("\\\n", ""))) == 0
    assert capsys.readouterr().out.strip() in re.sub(r"^    ", "", page, flags=re.M)

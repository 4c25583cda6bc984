"""Errors of `plan`, and `megalodon-ops plan`."""

import json
import re
import shlex
from dataclasses import replace

import pytest
from paths import DOCS

import megalodon_ops as mo
from megalodon_ops.cli import main
from megalodon_ops.cli.sizes import configurations
from megalodon_ops.distributed.plan import plan

PAPER = mo.MegalodonConfig.preset("paper7B", layerwise_ckpt=True)
PAPER_RUN = dict(config=PAPER, mesh={"data": 128, "chunk": 2}, context=32768, device="cuda")
WRONG = {
    "`mesh` must have dimensions named data, chunk or tensor, got 'rows'.": dict(mesh={"rows": 2}),
    "`mesh` must be a positive integer below 2^31, got 0": dict(mesh={"data": 0}),
    "`mesh` must have a dimension `tensor` whose size divides norm_num_groups = 64, got 3.": dict(mesh={"tensor": 3}),
    "`context` must be a multiple of the mesh's chunk = 2 times the chunk size 4096, got 12288.": dict(context=12288),
    '`device` must be "cpu" or "cuda", got \'abacus\'.': dict(device="abacus"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls(message):
    with pytest.raises(ValueError, match=f"^plan: {re.escape(message)}.*$"):
        plan(**PAPER_RUN | WRONG[message])


def test_the_page_shows_the_output_of_its_command(capsys, tmp_path):
    page = (DOCS / "plan.md").read_text()
    file = tmp_path / "plan.json"
    figures = vars(plan(**PAPER_RUN))
    command = re.search(r"^    megalodon-ops (plan .*?[^\\])$", page, re.M | re.S)[1]
    words = shlex.split(command.replace("\\\n", ""))
    assert main([*words, "--json", str(file)]) == 0
    table = capsys.readouterr().out.strip()
    assert table in re.sub(r"^    ", "", page, flags=re.M)
    assert json.loads(file.read_text()) == figures | {"config": PAPER.to_dict()}
    assert main([*words, "--json", "-"]) == 0
    assert capsys.readouterr().out == file.read_text()
    for kind, count in {**figures["memory"], **figures["exchange"]}.items():
        assert float(re.search(rf"{re.escape(kind)} +([\d.]+)", table)[1]) == pytest.approx(count / 1e9, abs=5e-3)


def test_model_flags_are_those_of_train(capsys):
    flags = "plan --dim 256 --layers 3 --swiglu --layerwise-ckpt --dtype autocast --replicate --mesh data=2 --json -"
    assert main(flags.split()) == 0
    found = json.loads(capsys.readouterr().out)
    config = mo.MegalodonConfig(**found["config"])
    assert (config.num_layers, config.model_dim, config.swiglu, config.vocab_size) == (3, 256, True, 257)
    expected = plan(config, {"data": 2}, context=8 * config.chunk_size, autocast=True, data="replicate")
    assert (found["memory"], found["operations"]) == (expected.memory, expected.operations)


def test_a_table_names_what_makes_each_configuration_fit(capsys):
    """The flags that it names are the first that suffice: fewest parts of a batch, recomputed layers only if needed."""
    flags = "plan --params 1M --memory 0.2GB --batch 16 --context 512 --chunk 256 --dtype autocast"
    assert main(flags.split()) == 0
    _, *lines = capsys.readouterr().out.splitlines()

    def size(config, batch, recomputes):
        return plan(replace(config, layerwise_ckpt=recomputes), {}, context=512, batch=batch, autocast=True).bytes

    fits = ["--layerwise-ckpt", "--layerwise-ckpt", "--layerwise-ckpt --batch 8 --accumulate 2"]
    for line, config, text in zip(lines, configurations({"chunk_size": 256}, None), fits):
        shown = line.split(maxsplit=7)
        assert shown[:2] == [f"{config.num_parameters():,}", f"{config.model_dim}"] and shown[7] == text
        assert shown[5:7] == [f"{size(config, 16, on) / 1e9:.2f}" for on in (False, True)]
        assert (size(config, 16, True) <= 2e8) == (text == "--layerwise-ckpt") and size(config, 16, False) > 2e8
    assert size(config, 8, True) <= 2e8 < size(config, 8, False)


@pytest.mark.parametrize("text", ["50 M", "8GiB", "-1", "0.1", "nan"])
def test_amounts_are_numbers_with_a_unit(text, capsys):
    with pytest.raises(SystemExit):
        main(["plan", f"--params={text}"])
    assert f"--params: must be a number such as 50M or 8GB, got '{text}'" in capsys.readouterr().err

"""`bench.kernel_choice`: each way runs its own kernel, and a slower choice is marked."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from bench import kernel_choice, machine
from bench.harness import OURS, Result, Timing
from megalodon_ops import _C
from megalodon_ops.ops.linear import linear as linear_module


BF16, F32 = torch.bfloat16, torch.float32
WAYS = [(BF16, {}), (BF16, {"backward": True}), (BF16, {"backward": True, "autocast": True}), (F32, {})]


@pytest.mark.parametrize(("dtype", "options"), WAYS, ids=str)
def test_each_way_runs_its_kernel(monkeypatch, dtype, options):
    launch = mock.Mock(side_effect=linear_module.launch)
    monkeypatch.setattr(linear_module, "launch", launch)
    case = kernel_choice.case(dtype, 3, 64, 96, **options)
    found = {}
    for path in case.paths[1:]:
        launch.reset_mock()
        path.call()
        found[path.name] = {call.args[0] for call in launch.call_args_list}
        assert kernel_choice.chosen_way(replace(case, paths=[path])) == path.name
    expected = {"few": {"linear_few_rows"}, "many": {"linear_many_rows"}, "torch": set()}
    on_amx = _C.active_isa() == "v4_amx" and dtype == BF16  # has no kernel for many rows
    assert found == {name: expected[name] for name in found} and len(found) == 3 - ("backward" in options) - on_amx


def test_a_choice_that_is_not_the_fastest_is_marked():
    def row(chosen="", **milliseconds):
        timings = [
            Timing(name, rival=name != OURS, warm=[1e-3 * time], error=1e-3 if name == "few" else 0.0)
            for name, time in {OURS: 1.0, **milliseconds}.items()
        ]
        sizes = {"bench": "", "case": "forward", "shape": "T 1 I 2 O 3", "dtype": "float32", "threads": 2}
        units = {"units": 1, "unit": "element", "flops": None, "bytes": None}
        result = Result(**sizes, **units, tolerance=1e-4, timings=timings)
        return kernel_choice.row(result, chosen)

    line, is_slower = row(few=0.1, many=0.5, torch=0.8)
    assert is_slower and line == "|forward, float32, T 1 I 2 O 3|1.000|0.100|0.500|0.800| **many: 2.00 times as fast**|"
    assert not row(many=0.97, torch=2.0)[1]
    assert not row("many", many=0.5, torch=0.49)[1] and row("many", many=0.5, torch=0.4)[1]


def test_the_program(monkeypatch, capsys):
    monkeypatch.setattr(machine, "reset_peak_memory", lambda: None)
    monkeypatch.setattr("sys.argv", ["kernel_choice", "--quick"])
    assert kernel_choice.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|product|chosen|few|many|torch||" and len(lines) == 2 + 3 * 3 + 1 + 1

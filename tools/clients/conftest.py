"""Gives PEFT's tests our models, and its tables our layers; leaves out cases of other models; marks those that fail."""

import re
from pathlib import Path
from typing import Any

import peft.utils.constants
import pytest
import torch

import megalodon_ops.hf as hf

torch.set_num_threads(1)
# Lists of models in PEFT's tests, and how the names of the classes end that are tested instead.
MODELS = {
    "PEFT_DECODER_MODELS_TO_TEST": "ForCausalLM",
    "SMALL_GRID_MODELS": "ForCausalLM",
    "PEFT_SEQ_CLS_MODELS_TO_TEST": "ForSequenceClassification",
    "PEFT_TOKEN_CLS_MODELS_TO_TEST": "ForTokenClassification",
    "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST": "Model",
}
LAYERS = {"q_proj": "wz", "k_proj": "wr", "v_proj": "wv", "o_proj": "wh1"}
LAYERS |= {"gate_proj": "fc1", "up_proj": "fc1", "down_proj": "fc2"}
for _name, _table in vars(peft.utils.constants).items():
    if _name.endswith("_MODULES_MAPPING") and "llama" in _table:
        for _config in (hf.MegalodonHFConfig, hf.MegalodonEncoderHFConfig):
            _table[_config.model_type] = list(dict.fromkeys(LAYERS.get(layer, layer) for layer in _table["llama"]))
_replaced: set[str] = set()


def pytest_pycollect_makeitem(name: str, obj: Any) -> None:
    """Replace a list before pytest makes the cases that have it as their parameter."""
    if name in MODELS:
        obj[:] = sorted(config.parent.name for config in Path().glob(f"Megalodon*{MODELS[name]}/config.json"))
        _replaced.add(name)


def is_of_other_model(item: pytest.Item) -> bool:
    return item.path.parent.name == "peft_tests" and ("-Megalodon" not in item.name or "Question" in item.nodeid)


class Problem(pytest.Item):
    """A case that fails; its name says why."""

    def runtest(self) -> None:
        raise AssertionError(self.name)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> Any:
    """Leave out cases and mark exceptions; options of pytest then select cases, but deselect no problem."""
    problems = [f"PEFT's tests lack {name}" for name in MODELS if name not in _replaced]
    config.hook.pytest_deselected(items=[item for item in items if is_of_other_model(item)])
    items[:] = [item for item in items if not is_of_other_model(item)]
    for line in Path("exceptions.tsv").read_text().splitlines():
        pattern, reason = line.split("\t")
        cases = [item for item in items if re.fullmatch(pattern, ".".join(item.nodeid.split("::")[1:]))]
        if not cases:
            problems.append(f"exceptions.tsv names no case by {pattern}")
        for case in cases:
            case.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    result = yield
    items.extend(Problem.from_parent(session, name=problem) for problem in problems)
    return result

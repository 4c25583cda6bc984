"""Gives PEFT's tables our layers, as they hold those of the models that it knows, and leaves out cases of other models."""

from __future__ import annotations

import peft.utils.constants
import pytest
import torch

import megalodon_ops.hf as hf

torch.set_num_threads(1)
LAYERS = {"q_proj": "wz", "k_proj": "wr", "v_proj": "wv", "o_proj": "wh1"}
LAYERS |= {"gate_proj": "fc1", "up_proj": "fc1", "down_proj": "fc2"}
for _name, _table in vars(peft.utils.constants).items():
    if _name.endswith("_MODULES_MAPPING") and "llama" in _table:
        for _config in (hf.MegalodonHFConfig, hf.MegalodonEncoderHFConfig):
            _table[_config.model_type] = list(dict.fromkeys(LAYERS.get(layer, layer) for layer in _table["llama"]))


def is_of_other_model(item: pytest.Item) -> bool:
    return item.path.parent.name == "peft_tests" and ("-Megalodon" not in item.name or "Question" in item.nodeid)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if is_of_other_model(item)])
    items[:] = [item for item in items if not is_of_other_model(item)]

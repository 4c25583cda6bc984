"""transformers' own tests of models, training and configurations, for every class."""

import unittest
from typing import Any

import torch
from client_models import CLASSES, SIZES
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin


class Inputs:
    """Configuration and inputs, as each model's tests in transformers define them."""

    batch_size, seq_length = 3, 7
    num_hidden_layers, num_attention_heads, hidden_size = 2, 2, 32

    def __init__(self, model_class: type) -> None:
        self.causal_lm_class = self.model_class = model_class
        self.is_training = not model_class.__name__.endswith("Model")  # has a loss

    def get_config(self) -> Any:
        return self.model_class.config_class(**SIZES)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        tokens = ids_tensor([self.batch_size, self.seq_length], SIZES["vocab_size"] - 3) + 3
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class Common(ModelTesterMixin, TrainingTesterMixin):
    model_tester, has_attentions = None, False

    def setUp(self) -> None:
        self.model_tester = Inputs(*self.all_model_classes)

    def _prepare_for_class(self, inputs: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = super()._prepare_for_class(inputs, model_class)
        if return_labels and self.model_tester.is_training:
            tokens = inputs["input_ids"]
            inputs["labels"] = torch.zeros_like(tokens[:, 0] if "Sequence" in model_class.__name__ else tokens)
        return inputs

    def _create_text_training_batch(self, *sizes: int, **named_sizes: int) -> dict[str, torch.Tensor]:
        batch = super()._create_text_training_batch(*sizes, **named_sizes)
        classifies = "Classification" in self.model_tester.model_class.__name__
        if not classifies:
            return batch
        return self._prepare_for_class(batch, self.model_tester.model_class, return_labels=True)

    def test_config(self) -> None:
        ConfigTester(self, self.model_tester.model_class.config_class, **SIZES).run_common_tests()


for _class in CLASSES:
    _name = f"Test{_class.__name__}"
    globals()[_name] = type(
        _name, (Common, unittest.TestCase), {"all_model_classes": (_class,), "__module__": __name__}
    )

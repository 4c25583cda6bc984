"""The same random numbers for each test of `megalodon_ops.hf`, in whatever order tests run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)

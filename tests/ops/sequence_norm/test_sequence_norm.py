"""sequence_norm against torch's group norm, and means that dwarf the spread. See also test_ops.py."""

import pytest
import torch
from assertions import assert_close, assert_matches_reference
from backends import DEVICES, each_implementation
from calls import evaluate, forward
from cases import sequence_norm_case

import megalodon_ops as mo

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@each_implementation
@pytest.mark.parametrize("G", [1, 3, 12], ids=["one group", "groups", "a group a channel"])
def test_sequence_norm_is_torchs_group_norm(G, implementation, backend):
    case = sequence_norm_case(B=2, L=40, G=G, width=12 // G, dtype=torch.float64, eps=1e-3)
    x, weight, bias = case.tensors.values()
    expected = torch.nn.functional.group_norm(x.transpose(1, 2), G, 1 + weight, bias, 1e-3).transpose(1, 2)
    assert_close(forward(implementation.sequence_norm, case)["y"], expected, tolerance=1e-12)


@pytest.mark.parametrize("backend", DEVICES, indirect=True)
def test_a_mean_that_dwarfs_the_spread(backend):
    """Statistics keep their digits through both passes."""
    case = sequence_norm_case(B=2, L=70, G=2, width=8, mean=1e4, std=1e-2, lengths=[70, 33])
    assert_matches_reference(evaluate(mo.sequence_norm, case), case)

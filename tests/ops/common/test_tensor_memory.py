"""Checks of a tensor's memory in the bindings."""

import pytest
import torch
from assertions import assert_refuses
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops.ops.linear import linear


class ListShape(Tensor):
    @property
    def shape(self) -> list[int]:
        return list(super().shape)


def resized_away(*shape: int, offset: int = 0) -> Tensor:
    tensor = torch.ones(offset + torch.Size(shape).numel())[offset:].view(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("offset", [0, 5])
def test_a_tensor_without_storage_is_not_read(offset):
    x, zeros = torch.ones(1, 4, 8), torch.zeros(8)
    away = resized_away(8, offset=offset)
    assert_refuses(ValueError, "timestep_norm", "bias", lambda: mo.timestep_norm(x, zeros, away, num_groups=2))
    with torch.no_grad():
        assert_refuses(ValueError, "linear", "bias", lambda: linear.linear(x, torch.ones(8, 8), away))


def test_a_shape_that_is_not_a_tuple_is_refused():
    zeros = torch.zeros(8).as_subclass(ListShape)
    x = torch.ones(1, 4, 8)
    assert_refuses(ValueError, "timestep_norm", "weight", lambda: mo.timestep_norm(x, zeros, zeros, num_groups=2))


@pytest.mark.parametrize("overlapping", ["position", "v"])
def test_a_state_that_is_written_in_place_shares_no_memory(overlapping):
    C, H, K = 4, 2, 8
    memory = torch.zeros(2 * C * H * K)
    k, apart = memory[: C * H * K].view(1, C, H, K), memory[C * H * K :].view(1, C, H, K)
    tensors = {"k": k, "v": apart, "position": torch.ones(1, dtype=torch.int64)}
    tokens = [torch.ones(1, 1, H, K) for _ in range(3)]
    options = {"chunk_size": C, "inplace_state": True, "return_state": True}
    _, state = mo.chunked_attention(*tokens, state=mo.AttentionState(**tensors), **options)  # adjacent, without overlap
    assert state.position == 2
    inside = {"position": memory[4:6].view(torch.int64), "v": memory[4 : 4 + C * H * K].view(1, C, H, K)}
    before = memory.clone()
    overlaid = mo.AttentionState(**tensors | {overlapping: inside[overlapping]})
    name = f"`state.{overlapping}`"
    with pytest.raises(ValueError, match=f"{name}.*must not overlap|must not overlap.*{name}"):
        mo.chunked_attention(*tokens, state=overlaid, **options)
    assert torch.equal(memory, before)

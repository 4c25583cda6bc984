"""A decoded token on CUDA: what it launches outside of a graph, and the bits of the layers.

Tensors are on the CPU, where functions of torch and of Python are those of CUDA, and kernels run on the emulator.
"""

from collections import Counter

import pytest
import torch
from decoding import assert_equal, by_decoder, by_layers, model_and_state
from models import tokens_of
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import megalodon_ops as mo
from megalodon_ops import _C
from megalodon_ops.ops.cema import cema_coefficients
from megalodon_ops.ops.gated_silu import gated_silu
from megalodon_ops.ops.linear import linear

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class _TorchLaunches(TorchDispatchMode):
    """Counts calls of torch that compute; views and new tensors launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "megalodon_ops":
            with self:  # counts what the op's Python calls
                return func.redispatch(_CPU, *args, **kwargs)
        schema = func._schema
        if not (func.is_view or schema.name.startswith(("aten::empty", "aten::new_empty", "aten::_unsafe_view"))):
            self.counts[schema.name.removeprefix("aten::")] += 1
        return func(*args, **kwargs)


@pytest.fixture
def cuda(emulator, monkeypatch):
    """Within the test, tensors take the paths of CUDA tensors; returns the emulator."""
    for module in cema_coefficients, gated_silu:
        monkeypatch.setattr(module, "has_cpu_kernel", lambda x: False)
    monkeypatch.setattr(linear, "CHOICES", {})
    monkeypatch.setattr(mo.Decoder, "_may_record", lambda self, autocast: False)
    monkeypatch.setattr(mo.Decoder, "_fused_dtype", lambda self, autocast: self._dtype)
    call = emulator.call

    def call_uncounted(*args, **kwargs):
        with _disable_current_modes():
            call(*args, **kwargs)

    monkeypatch.setattr(emulator, "call", call_uncounted)
    with emulator.replacing(_C):
        yield emulator


def launches_of_a_token(emulator, num_layers: int) -> tuple[Counter, Counter]:
    """Launches of the kernels and of torch's functions, by name, in a bfloat16 model."""
    decoder = mo.Decoder(*model_and_state(torch.bfloat16, num_layers=num_layers, chunk_size=80, seen=66))
    token = tokens_of(1, 1)
    emulator.module.reset_counters()
    with _TorchLaunches() as by_torch:
        decoder(token)
    return Counter(emulator.module.launched()), by_torch.counts


def test_launches_of_a_decoded_token(cuda):
    """In each layer, and around the layers; more launches than these have a reason."""
    one, one_torch = launches_of_a_token(cuda, num_layers=1)
    two, two_torch = launches_of_a_token(cuda, num_layers=2)
    assert two - one == Counter(
        timestep_norm_fwd_kernel=1,
        cema_step_kernel=1,
        normalized_qk_fwd_warp_kernel=1,
        layer_norm_fwd_kernel=2,
        chunked_attention_step_kernel=1,
        chunked_attention_merge_kernel=1,
        chunked_attention_state_kernel=1,
        linear_few_rows_kernel=7,
    )
    assert one - (two - one) == Counter(timestep_norm_fwd_kernel=1, linear_few_rows_kernel=1)
    assert two_torch - one_torch == Counter(add=1)  # the residual of the FFN
    outside = Counter(embedding=1, _to_copy=1, _foreach_copy_=2)  # logits are float32; states of two dtypes
    assert one_torch - (two_torch - one_torch) == outside


@pytest.mark.parametrize(
    ("dtype", "rows", "length"), [(torch.float32, 1, 1), (torch.bfloat16, 4, 2), (torch.float32, 3, 3)], ids=str
)
def test_a_decoder_agrees_with_the_layers(cuda, dtype, rows, length):
    """For up to 8 tokens of all rows, products take the kernel."""
    for overrides in ({}, dict(swiglu=True, rescale_nffn=True)):
        model, state = model_and_state(dtype, rows, num_layers=1, **overrides)
        pieces = tokens_of(rows, 3 * length).split(length, 1)
        cuda.module.reset_counters()
        found = by_decoder(mo.Decoder(model, state), pieces)
        fused = "linear_few_rows_kernel" in cuda.module.launched()
        assert fused is (rows * length <= 8)
        tolerance = 2e-6 if dtype == torch.float32 else 2e-2
        assert_equal(found, by_layers(model, state, pieces), tolerance)

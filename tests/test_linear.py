"""linear: that oneDNN's products are F.linear up to rounding, when they are taken, and the switch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from megalodon_ops import linear as module
from megalodon_ops.linear import choose, linear, linear_fwd

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def onednn(monkeypatch):
    """Every product through oneDNN, however small."""
    monkeypatch.setattr(module, "_WORTH_WITH_GRADIENTS", 1)
    monkeypatch.setattr(module, "USES_ONEDNN", True)


def inputs(*shape, I=24, O=40, bias=True):  # noqa: E741
    gen = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*shape, I, generator=gen), torch.randn(O, I, generator=gen)
    return [t.requires_grad_() for t in ((x, weight, torch.randn(O, generator=gen)) if bias else (x, weight))]


@needs_onednn
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 33), (2, 3, 5), (0, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(shape, bias, onednn):
    tensors = inputs(*shape, bias=bias)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = linear(*tensors), F.linear(*exact)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(y, tensors, dy)
    for found, wanted in zip((y, *grads), (expected, *torch.autograd.grad(expected, exact, dy.double())), strict=True):
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_strided_inputs_and_frozen_weights(onednn):
    x, weight = torch.randn(6, 10).t()[:, ::2].requires_grad_(), torch.randn(3, 4).t()
    y = linear(x, weight)
    torch.testing.assert_close(y, F.linear(x, weight))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.ones(10, 4) @ weight)


@needs_onednn
def test_second_derivatives(onednn):
    tensors = inputs(5)
    for function in (linear, F.linear):
        (dx,) = torch.autograd.grad(function(*tensors).pow(3).sum(), tensors[0], create_graph=True)
        second = torch.autograd.grad(dx.pow(2).sum(), tensors)
        if function is linear:
            found = second
    for a, b in zip(found, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


@needs_onednn
def test_opcheck(onednn):
    torch.library.opcheck(linear_fwd, inputs(2, 5))


def test_small_products_16_bit_types_and_autocast_are_torchs(monkeypatch):
    def fail(*args):
        raise AssertionError

    monkeypatch.setattr(module, "linear_fwd", fail)
    monkeypatch.setattr(module, "USES_ONEDNN", True)
    x, weight = torch.randn(7, 24), torch.randn(40, 24)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    monkeypatch.setattr(module, "_WORTH_WITH_GRADIENTS", 1)
    for dtype in (torch.bfloat16, torch.float64):
        assert linear(x.to(dtype), weight.to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with pytest.raises(AssertionError):
        linear(x, weight)


@pytest.mark.parametrize("choice", ["torch", pytest.param("onednn", marks=needs_onednn)])
def test_variable_decides(choice):
    done = subprocess.run(
        [sys.executable, "-c", "from megalodon_ops.linear import USES_ONEDNN; print(USES_ONEDNN)"],
        env=os.environ | {"MEGALODON_OPS_LINEAR": choice}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(choice == "onednn"), done.stderr


@needs_onednn
@pytest.mark.parametrize(("vendor", "mkl", "expected"), [("GenuineIntel", True, False), ("AuthenticAMD", True, True),
                                                         ("AuthenticAMD", False, False)])  # fmt: skip
def test_onednn_is_for_processors_on_which_mkl_is_slow(monkeypatch, tmp_path, vendor, mkl, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"vendor_id : {vendor}\n")
    monkeypatch.setattr(module, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert choose("auto") == expected


def test_a_wrong_choice_is_refused():
    with pytest.raises(ImportError, match="MEGALODON_OPS_LINEAR must be auto, torch or onednn, got blas"):
        choose("blas")


@needs_onednn
def test_without_gradients_smaller_products_are_worth_it(monkeypatch):
    monkeypatch.setattr(module, "USES_ONEDNN", True)
    calls, x, weight = [], torch.randn(1, 512), torch.randn(256, 512)
    monkeypatch.setattr(module, "linear_fwd", lambda *args: calls.append(args) or F.linear(*args))
    linear(x, weight)
    assert not calls
    with torch.no_grad():
        linear(x, weight)
        assert len(calls) == 1
        linear(x[:, :8], weight[:, :8])
        assert len(calls) == 1

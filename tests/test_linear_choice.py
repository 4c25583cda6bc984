"""linear: which way of computing it is taken, what is left to torch, and the switch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import run_python
from torch.utils._pytree import tree_map

from megalodon_ops import _C
from megalodon_ops import linear as module
from megalodon_ops.linear import linear, linear_fwd


def taken(monkeypatch) -> list[str]:
    """The ops that are called from now on, by name."""
    calls: list[str] = []
    for name in ("linear_few_rows", "linear_fwd"):
        monkeypatch.setattr(module, name, lambda *args, name=name: calls.append(name) or F.linear(*args))
    return calls


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rows", [1, 32, 33])
@pytest.mark.parametrize("uses_many_rows", [False, True])
def test_which_way_is_taken(monkeypatch, uses_many_rows, rows, gradients):
    monkeypatch.setattr(module, "USES_MANY_ROWS", uses_many_rows)
    monkeypatch.setattr(module, "USES_AMX", False)
    calls, x, weight = taken(monkeypatch), torch.randn(rows, 24), torch.randn(40, 24)
    with torch.set_grad_enabled(gradients):
        linear(x, weight)
        assert calls == ([] if gradients else ["linear_few_rows"] if rows <= 32 else ["linear_fwd"] * uses_many_rows)
        calls.clear()
        monkeypatch.setattr(module, "_WORTH", rows * 24 * 40)
        linear(x, weight)
        assert not gradients or calls == ["linear_fwd"] * uses_many_rows
        calls.clear()
        for way in ("USES_KERNELS", "USES_MANY_ROWS"):
            monkeypatch.setattr(module, way, False)
        linear(x, weight)
        assert not calls


@torch.no_grad()
def test_which_kernel_is_taken(monkeypatch):
    launched: list[str] = []
    monkeypatch.setattr(module, "launch", lambda name, *args: launched.append(name) or getattr(_C, name)(*args))
    monkeypatch.setattr(module, "USES_MANY_ROWS", True)
    monkeypatch.setattr(module, "USES_AMX", False)
    monkeypatch.setitem(module._MANY_ROWS, torch.float32, 129)
    x, weight = torch.randn(3, 43, 24), torch.randn(40, 24)
    transposed = weight.t().contiguous().t()
    for x_, weight_, name in [(x, weight, "many"), (x[:2], weight, "few"), (x[:2], transposed, "many")]:
        torch.testing.assert_close(linear_fwd(x_, weight_, None), F.linear(x_, weight_))
        assert launched.pop() == f"linear_{name}_rows"


@pytest.mark.parametrize("gradients", [False, True])
def test_when_amx_is_taken(monkeypatch, gradients):
    monkeypatch.setattr(module, "USES_MANY_ROWS", True)
    monkeypatch.setattr(module, "USES_AMX", True)
    monkeypatch.setattr(module, "_WORTH", 16 * 24 * 40)
    calls, weight = taken(monkeypatch), torch.randn(40, 24)
    with torch.set_grad_enabled(gradients):
        linear(torch.randn(15, 24), weight)
        assert calls == ([] if gradients else ["linear_few_rows"])
        calls.clear()
        linear(torch.randn(2, 8, 24), weight)
        assert calls == ["linear_fwd"]
        linear(torch.randn(16, 24), weight[:39])
        assert calls == ["linear_fwd"] * (1 if gradients else 2)
        linear(torch.randn(16, 0), weight[:, :0])
        assert len(calls) == (1 if gradients else 2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dots", [False, True])
def test_when_autocast_without_gradients_takes_the_kernel(monkeypatch, dtype, dots):
    monkeypatch.setattr(module, "USES_SHORT_MANY_ROWS", True)
    monkeypatch.setattr(module, "_HAS_BFLOAT16", dots)
    calls, x, weight = taken(monkeypatch), torch.randn(64, 24), torch.randn(40, 24)
    with torch.autocast("cpu", dtype):
        assert linear(x, weight).dtype == linear(x[:63], weight).dtype == dtype
    assert calls == ["linear_fwd"] * (dtype == torch.float16 or not dots)


@torch.no_grad()
def test_what_torch_is_left_with(monkeypatch):
    monkeypatch.setattr(module, "USES_MANY_ROWS", True)
    monkeypatch.setattr(module, "USES_SHORT_MANY_ROWS", False)
    calls, x, weight = taken(monkeypatch), torch.randn(33, 24), torch.randn(40, 24)
    for dtype in (torch.bfloat16, torch.float64):
        assert linear(x.to(dtype), weight.to(dtype)).dtype == dtype
    assert linear(x[:0], weight).shape == (0, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
        assert linear(x[:1], weight).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="same dtype|dtype"):
        linear(x[:1], weight.double())
    assert not calls


class Doubled(torch.Tensor):
    """Twice what it wraps, as a quantised weight is something else than what it stores."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrapped(a):
            return 2 * a.inner if isinstance(a, cls) else a

        return func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs or {}))


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("gradients", [True, False])
def test_tensors_of_other_types_are_left_to_torch(rows, gradients):
    x, weight = torch.randn(rows, 24), torch.randn(40, 24)
    doubled = torch.Tensor._make_wrapper_subclass(Doubled, weight.shape, dtype=weight.dtype)
    doubled.inner = weight
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(linear(x, doubled), F.linear(x, 2 * weight))


def test_variable_leaves_all_to_torch():
    ways = "m.USES_KERNELS, m.USES_AMX, m.USES_MANY_ROWS, m.USES_SHORT_MANY_ROWS"
    done = run_python(f"import megalodon_ops.linear as m; print({ways})", MEGALODON_OPS_LINEAR="torch")
    assert done.stdout.split() == ["False"] * 4, done.stderr


def test_a_wrong_choice_is_refused():
    done = run_python("import megalodon_ops", MEGALODON_OPS_LINEAR="blas")
    assert "ImportError: megalodon_ops: MEGALODON_OPS_LINEAR must be auto or torch, got blas" in done.stderr


@pytest.mark.parametrize(("vendor", "mkl", "expected"), [("GenuineIntel", True, False), ("AuthenticAMD", True, True),
                                                         ("AuthenticAMD", False, False)])  # fmt: skip
def test_mkl_is_slow_on_other_makers_processors(monkeypatch, tmp_path, vendor, mkl, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"vendor_id : {vendor}\n")
    monkeypatch.setattr(module, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert module._mkl_is_slow() == expected

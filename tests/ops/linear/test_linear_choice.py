"""linear: choice of the implementation, fallback to torch, environment variable."""

import importlib.util
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from assertions import every_case
from torch.utils._pytree import tree_map

from megalodon_ops import _C
from megalodon_ops.ops.common import definition as library
from megalodon_ops.ops.linear import linear as module
from megalodon_ops.ops.linear.linear import KernelChoice, choices, linear, linear_fwd


def record_calls(monkeypatch) -> list[str]:
    """Record the names of ops that linear calls from now on."""
    calls: list[str] = []
    for name in ("linear_few_rows", "linear_fwd"):
        monkeypatch.setattr(module, name, lambda *args, name=name: calls.append(name) or F.linear(*args))
    return calls


def expected(choice: KernelChoice, rows: int, size: int, gradients: bool) -> list[str]:
    if gradients:
        return ["linear_fwd"] if choice.training_from is not None and size >= choice.training_from else []
    if rows <= choice.few_rows_to:
        return ["linear_few_rows"]
    return [] if choice.many_rows_from is None else ["linear_fwd"]


CHOICES = {
    "torch": KernelChoice(few_rows_to=32),
    "many rows": KernelChoice(few_rows_to=32, many_rows_from=129, training_from=33 * 24 * 40),
    "AMX": KernelChoice(few_rows_to=15, many_rows_from=16, training_from=16 * 24 * 40),
    "AMX, bfloat16": KernelChoice(few_rows_to=8),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_choice_of_the_op(monkeypatch, choice, gradients):
    monkeypatch.setitem(module.CHOICES, torch.float32, choice)
    calls, weight = record_calls(monkeypatch), torch.randn(40, 24)
    with torch.set_grad_enabled(gradients):
        for rows in (1, 8, 9, 15, 16, 32, 33, 200):
            linear(torch.randn(rows, 24), weight)
            assert calls == expected(choice, rows, rows * 24 * 40, gradients), rows
            calls.clear()
        for rows, inner in ((0, 24), (16, 0)):  # without elements
            linear(torch.randn(rows, inner), weight[:, :inner])
        assert not calls
        monkeypatch.setattr(module, "CHOICES", {})
        linear(torch.randn(8, 24), weight)
        assert not calls


def test_choices_by_processor():
    """One case for each row of the table in docs/cpu.md."""
    float32, bfloat16, float16, float64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    for isa, mkl_is_slow, has_many, many_rows_from, training_from in [  # the last two: of bfloat16
        ("generic", False, set(), None, None),
        ("generic", True, {float32}, None, None),
        ("neon_bf16", False, set(), None, None),
        ("v2", False, {bfloat16, float16}, 64, 1 << 20),
        ("v3", True, {float32, bfloat16, float16}, 64, 1 << 20),
        ("v4", True, {float32, bfloat16, float16}, 64, 1 << 20),
        ("v4_bf16", True, {float32, bfloat16, float16}, 129, 1 << 29),
        ("v4_amx", False, {float32}, None, None),
    ]:
        table = choices(isa, mkl_is_slow)
        assert {dtype for dtype, choice in table.items() if choice.many_rows_from is not None} == has_many
        assert table[bfloat16].many_rows_from == many_rows_from
        assert table[bfloat16].training_from == training_from
        assert table[float64] == KernelChoice(few_rows_to=32)
        assert table[float16].casts_here == (float16 in has_many) and table[float32].casts_here is False
        assert table[bfloat16].casts_here == (isa in ("v2", "v3", "v4"))


@torch.no_grad()
def test_choice_of_the_kernel(monkeypatch):
    launched: list[str] = []
    monkeypatch.setattr(module, "launch", lambda name, *args: launched.append(name) or getattr(_C, name)(*args))
    choice = KernelChoice(few_rows_to=32, many_rows_from=129, training_from=1)
    monkeypatch.setitem(module.CHOICES, torch.float32, choice)
    x, weight = torch.randn(3, 43, 24), torch.randn(40, 24)
    transposed = weight.t().contiguous().t()
    for x_, weight_, name in [(x, weight, "many"), (x[:2], weight, "few"), (x[:2], transposed, "many")]:
        torch.testing.assert_close(linear_fwd(x_, weight_, None), F.linear(x_, weight_))
        assert launched.pop() == f"linear_{name}_rows"


@torch.no_grad()
@pytest.mark.parametrize("casts", [False, True])
def test_autocast_without_gradients_may_take_the_kernel(monkeypatch, casts):
    choice = KernelChoice(few_rows_to=32, many_rows_from=64, training_from=1, casts_here=casts)
    monkeypatch.setitem(module.CHOICES, torch.bfloat16, choice)
    calls, x, weight = record_calls(monkeypatch), torch.randn(64, 24), torch.randn(40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == linear(x[:63], weight).dtype == torch.bfloat16
    assert calls == (["linear_fwd"] if casts else [])


@pytest.mark.parametrize(
    ("choice", "reads_on", "cached"),
    [(KernelChoice(8), False, True), (KernelChoice(8), True, False), (KernelChoice(8, None, 1), False, False)],
    ids=["torch", "torch reads on", "kernel"],
)
def test_torch_caches_cast_weights_of_products_that_it_computes(monkeypatch, choice, reads_on, cached):
    monkeypatch.setitem(module.CHOICES, torch.bfloat16, choice)
    monkeypatch.setattr(module, "_READS_ON", reads_on)
    x, weight = torch.randn(4, 24), torch.randn(40, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        products = [linear(x, weight) for _ in range(2)]
    first, second = (cast_of_weight(y.grad_fn) for y in products)
    assert (first is second) == cached


def cast_of_weight(node):
    """Node of the graph that casts the weight."""
    while node.name() != "ToCopyBackward0":
        (node,) = (following for following, _ in node.next_functions if following is not None)
    return node


@torch.no_grad()
def test_fallback_to_torch(monkeypatch):
    monkeypatch.setattr(module, "CHOICES", choices("generic", mkl_is_slow=True))
    calls, x, weight = record_calls(monkeypatch), torch.randn(33, 24), torch.randn(40, 24)
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
    """Twice the tensor that it wraps: like a quantised weight, its value is not what it stores."""

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


class ReadsOn(torch.autograd.Function):
    """F.linear as torch 2.13 computes it with AMX: it reads rows up to a multiple of 32 numbers, with weight 0."""

    @staticmethod
    def product(x, weight):
        y, more = F.linear(x, weight), -x.shape[-1] % 32
        if x.is_contiguous() or x.stride(1) != 1 or not more:
            return y
        return y + 0 * x.as_strided((len(x), more), x.stride(), x.storage_offset() + x.shape[1]).sum(1, keepdim=True)

    @staticmethod
    def forward(ctx, x, weight, bias):
        assert bias is None
        ctx.save_for_backward(x, weight)
        return ReadsOn.product(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return ReadsOn.product(dy, weight.t()), ReadsOn.product(dy.t(), x.t()), None


def reading_on(x, weight, bias=None):
    return ReadsOn.apply(x, weight, bias)


def between_nan(t):
    """t between columns of NaN."""
    wide = t.new_full((len(t), t.shape[1] + 64), torch.nan)
    wide[:, 32:-32] = t
    return wide[:, 32:-32]


@pytest.mark.parametrize("product", [F.linear, reading_on], ids=["torch's", "AMX's"])
@pytest.mark.parametrize("gradients", [False, True])
def test_memory_between_rows_is_not_read(monkeypatch, product, gradients):
    if product is reading_on:
        monkeypatch.setattr(module, "_READS_ON", True)
        monkeypatch.setattr(module, "CHOICES", choices("v4_amx", mkl_is_slow=False))
    monkeypatch.setattr(module, "F", SimpleNamespace(linear=product))

    def results(layout, rows, inner, outer):
        gen = torch.Generator().manual_seed(0)
        shapes = (rows, inner), (outer, inner), (rows, outer)
        x, weight, dy = (layout(torch.randn(shape, generator=gen).bfloat16()) for shape in shapes)
        if not gradients:
            return [linear(x, weight)]
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = linear(x, weight)
        return [y, *torch.autograd.grad(y, (x, weight), dy)]

    with torch.set_grad_enabled(gradients), every_case() as case:
        for sizes in itertools.product((1, 9, 64), (24, 33, 64, 100), (24, 64, 100)):
            with case(sizes):
                for found, wanted in zip(results(between_nan, *sizes), results(torch.clone, *sizes), strict=True):
                    torch.testing.assert_close(found, wanted)


def imported_again(monkeypatch, variable):
    """Import the module with this environment variable, without defining its ops again."""
    monkeypatch.setenv("MEGALODON_OPS_LINEAR", variable)
    monkeypatch.setattr(library, "define_op", lambda *_, **__: None)
    spec = importlib.util.spec_from_file_location("megalodon_ops.ops.linear.linear_again", module.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return again


def test_environment_variable_keeps_torch(monkeypatch):
    assert imported_again(monkeypatch, "torch").CHOICES == {}
    assert imported_again(monkeypatch, "auto").CHOICES == module.CHOICES


def test_a_wrong_environment_variable_is_refused(monkeypatch):
    with pytest.raises(ImportError, match="megalodon_ops: MEGALODON_OPS_LINEAR must be auto or torch, got blas"):
        imported_again(monkeypatch, "blas")


@pytest.mark.parametrize(
    ("vendor", "mkl", "expected"),
    [("GenuineIntel", True, False), ("AuthenticAMD", True, True), ("AuthenticAMD", False, False)],
)
def test_mkl_is_slow_on_processors_of_other_vendors(monkeypatch, tmp_path, vendor, mkl, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"vendor_id : {vendor}\n")
    monkeypatch.setattr(module, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert module._mkl_is_slow() == expected

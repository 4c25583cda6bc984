"""Every kernel, type and choice of kernel once at real sizes: the first two minutes on a GPU. Without one, small sizes.

Results and gradients are compared with the CPU's kernels in float64. With MEGALODON_OPS_SMOKE, a file, the outcomes are
appended to it, one line of JSON for each case, from which bench/gpu.sh makes its table of kernels.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from paths import ROOT
import pytest
import torch
from assertions import assert_all_close
from backends import needs_gpu
from calls import evaluate, forward
from cases import BUILDERS, Case, OPS, generator, randn
from emulated import A100
from test_cuda import case_on, run, to

import megalodon_ops as mo
from megalodon_ops import _C
from megalodon_ops.ops.chunked_attention import dense_attention
from megalodon_ops.ops.linear.linear import linear_few_rows

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPES = (BF16, F16, F32, F64)
TOLERANCE = {BF16: 3e-2, F16: 5e-3, F32: 2e-4, F64: 1e-9}  # of the largest value
SCANS = {"B": 4, "L": 1000, "D": 770, "N": 16}
NORM = {"B": 8, "L": 2048, "G": 32, "width": 32}
WIDE = {"B": 4, "L": 4096, "H": 1, "K": 256, "V": 2048, "C": 2048, "scale": 1 / 16}
NARROW = {"B": 2, "L": 2048, "H": 8, "K": 64, "V": 64, "C": 1024, "scale": 1 / 8}
ONE_HEAD = {"B": 1, "L": 70, "H": 1, "C": 40}
ATTENTION, TWO_TYPES = "chunked_attention", (BF16, F32)


class SmokeCase(NamedTuple):
    op: str
    types: tuple[torch.dtype, ...]
    sizes: dict  # on a GPU
    small: dict  # those of `sizes` that differ on the emulator


ROWS = {  # fields of SmokeCase
    # B L D N is at least 2^28, from which on the tensor cores are used; N 4: their gradients, and the scan's outputs.
    "cema, tensor cores": ("cema", (BF16,), dict(B=8, L=2048, D=1024, N=16), dict(L=128, D=8, N=5)),
    "cema, tensor cores, 4 modes": ("cema", (BF16,), dict(B=8, L=4096, D=2048, N=4), dict(L=128, D=8)),
    "cema, scans": ("cema", TYPES, SCANS, dict(B=2, L=140, D=6, N=3)),
    "cema, scans of elements": ("cema", TWO_TYPES, SCANS | dict(D=771), dict(B=2, L=140, D=5, N=3)),
    "cema, 40 modes and a state": (
        "cema",
        TWO_TYPES,
        dict(B=3, L=700, D=256, N=40, state=True, lengths=[700, 0, 33]),
        dict(L=70, D=4, lengths=[70, 0, 33]),
    ),
    "cema, steps": ("cema", TYPES, dict(B=32, L=1, D=2048, N=16, state=True), dict(B=2, D=8, N=3)),
    "cema_end_state": ("cema_end_state", TYPES, dict(B=4, L=1000, D=512, N=16), dict(B=2, L=70, D=6, N=3)),
    "timestep_norm": ("timestep_norm", TYPES, NORM, dict(B=2, L=70, G=2)),
    "timestep_norm, elements": ("timestep_norm", TYPES, NORM | dict(width=31), dict(B=2, L=70, G=2, width=5)),
    "timestep_norm, wide groups and a state": (
        "timestep_norm",
        TYPES,
        NORM | dict(L=300, G=2, width=1024, count=7, lengths=[300, 0, 1, 64, 65, 300, 2, 128]),
        dict(L=70, width=264, lengths=[70, 0, 1, 64, 65, 9, 2, 7]),
    ),
    "timestep_norm_end_state": ("timestep_norm_end_state", TYPES, NORM, dict(B=2, L=70, G=2)),
    "normalized_qk, warps": ("normalized_qk", TYPES, dict(B=2, L=4096, H=4, K=64, C=2048), dict(L=20, C=16)),
    "normalized_qk, blocks": ("normalized_qk", TYPES, dict(B=2, L=2048, H=2, K=1024, C=1024), dict(L=9, C=16)),
    "normalized_qk, elements": ("normalized_qk", TYPES, dict(B=2, L=2048, H=2, K=250, C=1024), dict(L=9, C=16)),
    "attention, 200M": (ATTENTION, (BF16, F16, F32), WIDE, dict(B=1, L=70, C=40, K=64, V=264)),
    "attention, 64 channels": (ATTENTION, TYPES, NARROW, dict(B=1, L=140, H=1, C=70)),
    "attention, 128 channels": (ATTENTION, TWO_TYPES, NARROW | dict(K=128, V=128), ONE_HEAD),
    "attention, elements, DropKey": (ATTENTION, TWO_TYPES, NARROW | dict(K=63, V=100, dropkey=0.1), ONE_HEAD),
    "attention, 256 columns of short chunks": (ATTENTION, (BF16, F16), NARROW | dict(V=256, C=512), ONE_HEAD),
    "attention, 264 channels": (ATTENTION, (BF16,), NARROW | dict(K=264), dict(B=1, L=20, H=1, C=20)),
    "attention, whole chunks": (ATTENTION, TWO_TYPES, NARROW | dict(causal=False), ONE_HEAD),
    "attention, steps": (ATTENTION, TYPES, WIDE | dict(B=8, L=1, state=True), dict(B=2, C=70, V=520)),
    "attention, from a state": (
        ATTENTION,
        TWO_TYPES,
        NARROW | dict(B=4, L=500, H=2, V=128, C=512, state=True),
        dict(B=2, L=70, C=48),
    ),
}
CASES = {name: SmokeCase(*row) for name, row in ROWS.items()}
LIBRARIES = ("attention, 200M", "attention, 64 channels", "attention, 128 channels", "attention, whole chunks")
KERNELS = {
    name
    for path in (ROOT / "cuda").rglob("*.cu*")
    for name in re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", path.read_text())
}


def gradients(function: Callable, case: Case):
    """Outputs, and gradients of the first one alone, so that states have none."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors.items()}
    outputs = forward(function, Case(case.op, leaves, case.options, case.dtype))
    (name, *_), gen = OPS[case.op].outputs, generator(1)
    grad = randn(gen, *outputs[name].shape, dtype=case.dtype).to(outputs[name])
    found = torch.autograd.grad(outputs[name], list(leaves.values()), grad)
    return {n: o.detach() for n, o in outputs.items()} | {f"d{n}": g for n, g in zip(leaves, found, strict=True)}


def results(case: Case):
    alone = OPS[case.op].outputs and "state" not in case.tensors and "mean" not in case.tensors
    if alone:
        return gradients(getattr(mo, case.op), case)
    return run(case.op, case) if case_device(case) == "cuda" else evaluate(getattr(mo, case.op), case)


def case_device(case: Case) -> str:
    return next(iter(case.tensors.values())).device.type


def by_tolerance(found: dict, case: Case) -> dict[float, dict]:
    groups = defaultdict(dict)
    wide = F64 if case.dtype == F64 else F32
    for name, value in found.items():
        dtype = value.dtype if value.dtype in (BF16, F16) else wide
        groups[TOLERANCE[dtype]][name] = value
    return groups


def check(
    name: str,
    case: Case,
    launch: Callable[[Case], tuple[dict, set[str]]],
    compute: Callable[[Case], dict] = results,
) -> set[str]:
    """Compare a launch with `compute` on the CPU in float64; record the outcome and the kernels that ran."""
    kernels, error, failed = set(), "", None
    try:
        found, kernels = launch(case)
        right = compute(case.double())
        known = {name: ~value.isnan() for name, value in right.items()}  # rows of a cache that no one reads hold NaN
        for tolerance, values in by_tolerance(found, case).items():  # a state of a bfloat16 case is float32
            assert_all_close(
                {name: value.to(right[name].dtype)[known[name]] for name, value in values.items()},
                {name: right[name][known[name]] for name in values},
                tolerance=tolerance,
                terms=case.terms,
            )
    except Exception as problem:
        error = str(problem).partition("\n")[0] or type(problem).__name__
        failed = problem
    if record := os.environ.get("MEGALODON_OPS_SMOKE"):
        row = {"case": name, "dtype": str(case.dtype), "kernels": sorted(kernels), "error": error}
        with Path(record).open("a") as file:
            print(json.dumps(row), file=file)
    if failed:
        end_after_a_fault()
        raise failed
    return kernels


def end_after_a_fault() -> None:
    """End a worker of pytest-xdist whose GPU context is lost: every later case would fail, a new worker takes them."""
    if torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


CHOICES = [(name, dtype, False) for name in CASES for dtype in CASES[name].types]
CHOICES += [(name, dtype, True) for name in LIBRARIES for dtype in CASES[name].types]


def norm_case(rows: int, width: int, dtype: torch.dtype) -> Case:
    gen = generator(0)
    x, dy = (randn(gen, rows, width, dtype=F64).to(dtype) for _ in range(2))
    weight, bias = (randn(gen, width, dtype=F64).to(F64 if dtype == F64 else F32) for _ in range(2))
    return Case("layer_norm", {"x": x, "weight": weight, "bias": bias}, {"dy": dy}, dtype, terms=1.0)


def norm_results(case: Case) -> dict:
    """Results of layer_norm and rms_norm, and the sums of their gradients."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors.items()}
    y, z = mo.layer_norm(*leaves.values()), mo.rms_norm(leaves["x"], leaves["weight"])
    grads = torch.autograd.grad((y, z), [*leaves.values()], [case.options["dy"]] * 2)
    return {"y": y.detach(), "z": z.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def product_case(rows: int, width: int, columns: int, dtype: torch.dtype) -> Case:
    gen = generator(0)
    shapes = {"x": (rows, width), "weight": (columns, width), "bias": (columns,)}
    shapes |= dict.fromkeys(("value", "add"), (rows, columns))
    return Case("linear", {name: randn(gen, *shape, dtype=F64).to(dtype) for name, shape in shapes.items()}, {}, dtype)


def product_results(case: Case) -> dict:
    x, weight, bias, *others = case.tensors.values()
    return {"y": linear_few_rows(x, weight, bias, True, *others)}


def products_by_layers(case: Case) -> dict:
    x, weight, bias, value, add = case.tensors.values()
    return {"y": mo.gated_silu(mo.linear(x, weight, bias), value) + add}


def run_on_card(compute: Callable[[Case], dict], case: Case) -> tuple[dict, set[str]]:
    """Results, on the CPU, and the names of the kernels that a profiler saw."""
    on_card = case_on("cuda", case)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found = to("cpu", compute(on_card))
        torch.cuda.synchronize()
    events = " ".join(event.key for event in profile.key_averages())
    return found, {kernel for kernel in KERNELS if kernel in events}


OTHERS = {  # without a case among OPS: the case and its sizes, results by the kernels, and on the CPU
    "norms, vectors": (norm_case, (16384, 1024), norm_results, norm_results),
    "norms, elements": (norm_case, (4096, 771), norm_results, norm_results),
    "norms, sums beyond shared memory": (norm_case, (512, 16384), norm_results, norm_results),
    "products, mega200M's output": (product_case, (1, 1024, 32000), product_results, products_by_layers),
    "products, 8 rows": (product_case, (8, 1024, 2048), product_results, products_by_layers),
    "products, elements": (product_case, (3, 1023, 512), product_results, products_by_layers),
}


@needs_gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_others_at_real_sizes(name, dtype):
    build, sizes, by_kernels, on_cpu = OTHERS[name]
    assert check(name, build(*sizes, dtype), lambda case: run_on_card(by_kernels, case), on_cpu)


@needs_gpu
@pytest.mark.parametrize(("name", "dtype", "libraries"), CHOICES, ids=str)
def test_at_real_sizes(name, dtype, libraries, monkeypatch):
    op, sizes = CASES[name].op, CASES[name].sizes
    if not libraries:
        monkeypatch.setattr(dense_attention, "TABLE", ())

    name = f"{name}, libraries" if libraries else name
    kernels = check(name, BUILDERS[op](dtype=dtype, **sizes), lambda case: run_on_card(results, case))
    assert kernels or libraries, "the profiler saw none of our kernels"


@pytest.mark.parametrize("name", LIBRARIES)
def test_real_sizes_take_the_libraries(name):
    sizes = CASES[name].sizes
    tokens, chunk = sizes["B"] * sizes["L"], min(sizes["C"], sizes["L"])
    assert dense_attention.path_by_shapes("forward", BF16, tokens, sizes["H"], sizes["K"], sizes["V"], chunk)


def emulated(emulator, case: Case, compute: Callable[[Case], dict] = results) -> tuple[dict, set[str]]:
    emulator.reset()
    emulator.set_order("random", shared_limit=A100)
    emulator.module.set_launch_sizes({"cema_tile": 128} if case.dtype == BF16 else {})
    try:
        with emulator.replacing(_C):
            found = compute(case)
    finally:
        emulator.module.set_launch_sizes({})
    return found, emulator.launched()


def test_the_cases_launch_every_kernel(emulator):
    """Small sizes of the same cases on the emulator: no kernel is left out."""
    launched = set()
    for name, (op, types, sizes, small) in CASES.items():
        case = BUILDERS[op](dtype=types[0], **sizes | small)
        launched |= check(name, case, lambda case: emulated(emulator, case))
    for name, sizes in ("norms, vectors", (9, 40)), ("products, 8 rows", (5, 40, 70)):
        build, _, by_kernels, on_cpu = OTHERS[name]
        launched |= check(name, build(*sizes, BF16), lambda case: emulated(emulator, case, by_kernels), on_cpu)
    assert launched >= KERNELS, KERNELS - launched

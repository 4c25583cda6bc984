"""`python -m bench.kernel_choice`: products for which `KernelChoice` is not the fastest way on this machine.

`mo.linear` is timed as it chooses, then with each way forced by another choice: the kernel for few rows ("few"), the
kernel for many rows ("many"), and torch alone. Two kinds of calls:

- without gradients: x has 1 to 2,048 rows, around which choices change; the cache is empty, as when a model's weights
  are read from memory;
- with gradients (forward and backward): x has 128 rows and more, in each type and in bfloat16 under autocast.

Prints the milliseconds of each product, and a mark where the choice takes at least 5 % more than the fastest way. A way
whose results differ by more than rounding is no rival.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops import _C
from megalodon_ops.ops.linear import linear as linear_module
from megalodon_ops.ops.linear.linear import CHOICES, KernelChoice

from .harness import OURS, Case, Effort, Outputs, Path, Result, measure, way

SHAPES = ((512, 2048), (2048, 1024))  # (I, O)
ROWS = (1, 8, 15, 16, 32, 63, 64, 128, 129, 512, 2048)
TRAINING_ROWS = (128, 512, 2048)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SLOWER = 1.05
ALL = 1 << 40  # more rows than any x has
WAYS = {
    "few": KernelChoice(ALL),
    "many": KernelChoice(0, 1, training_from=1, casts_here=True),
    "torch": None,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_choice", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes and one sample, to test this program")
    quick = parser.parse_args().quick
    if not CHOICES:
        parser.error("MEGALODON_OPS_LINEAR must be auto, got torch, which chooses nothing; unset it")
    mo.keep_freed_memory()
    torch.manual_seed(0)
    effort = Effort(samples=1, seconds=0.01, attempts=1) if quick else Effort()
    columns = ("product", "chosen", *WAYS, "")
    print("|".join(["", *columns, ""]), "|".join(["", *["---"] * len(columns), ""]), sep="\n")
    slower = 0
    for case in cases(quick):
        (result,) = measure("kernel_choice", case, [torch.get_num_threads()], effort)
        line, is_slower = row(result, chosen_way(case))
        print(line, flush=True)
        slower += is_slower
    print(f"{slower} products where another way is at least {SLOWER - 1:.0%} faster")
    return 0


def cases(quick: bool) -> Iterator[Case]:
    shapes = ((64, 96),) if quick else SHAPES
    for dtype in TOLERANCES:
        for inputs, outputs in shapes:
            for rows in ROWS[:2] if quick else ROWS:
                yield case(dtype, rows, inputs, outputs)
            for rows in TRAINING_ROWS[:1] if quick else TRAINING_ROWS:
                yield case(dtype, rows, inputs, outputs, backward=True)
                if dtype == torch.bfloat16:
                    yield case(dtype, rows, inputs, outputs, backward=True, autocast=True)


def case(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, *, backward: bool = False, autocast: bool = False
) -> Case:
    own = torch.float32 if autocast else dtype
    x = torch.randn(rows, inputs).to(own)
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).to(own)
    dy = torch.randn(rows, outputs).to(dtype)

    def forced(choice: dict[torch.dtype, KernelChoice]) -> Callable[[], Outputs]:
        def product(x: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=autocast):
                return mo.linear(x, weight)

        call = way(product, [x, weight], [dy], backward=backward)

        def run() -> Outputs:
            with mock.patch.dict(linear_module.CHOICES, choice, clear=True):
                return call()

        return run

    without_kernel = {"few"} if backward else set()
    if _C.active_isa() == "v4_amx" and dtype != torch.float32:
        without_kernel.add("many")
    ways = {name: choice for name, choice in WAYS.items() if name not in without_kernel}
    paths = [Path(name, forced({dtype: choice} if choice else {})) for name, choice in ways.items()]
    return Case(
        name=("forward + backward" if backward else "forward") + ", autocast" * autocast,
        shape=f"T {rows} I {inputs} O {outputs}",
        dtype=str(dtype).removeprefix("torch."),
        paths=[Path(OURS, forced(dict(CHOICES))), *paths],
        expected=way(lambda x, weight: x @ weight.T, [x.double(), weight.double()], [dy.double()], backward=backward),
        tolerance=TOLERANCES[dtype],
        units=dy.numel(),
        cold=not backward,
        fewer_threads=False,
    )


def chosen_way(case: Case) -> str:
    """Name of the way that `mo.linear` chooses; "" if forward and backward run different kernels."""
    launch = linear_module.launch
    kernels = set()

    def note(name: str, *args) -> None:
        kernels.add(name)
        launch(name, *args)

    with mock.patch.object(linear_module, "launch", note):
        case.paths[0].call()
    return {"": "torch", "linear_few_rows": "few", "linear_many_rows": "many"}.get("".join(kernels), "")


def row(result: Result, chosen: str) -> tuple[str, bool]:
    """Line of the table, and True if a way with correct results is faster than the chosen one."""
    times = {t.path: 1e3 * statistics.median(t.cold or t.warm) for t in result.timings if t.cold or t.warm}
    rivals = {t.path for t in result.timings if t.rival and (t.error or 0) <= result.tolerance} & times.keys()
    fastest = min(rivals, key=times.get)
    time = min(times[OURS], times.get(chosen, times[OURS]))  # both are times of the same kernels
    is_slower = time > SLOWER * times[fastest]
    cells = [f"{times[name]:.3f}" if name in times else "" for name in (OURS, *WAYS)]
    mark = f" **{fastest}: {time / times[fastest]:.2f} times as fast**" if is_slower else ""
    return "|".join(["", f"{result.case}, {result.dtype}, {result.shape}", *cells, mark, ""]), is_slower


if __name__ == "__main__":
    raise SystemExit(main())

"""cema: forward and backward, from 2,048 to a million positions.

Work per element of x: 6 multiply-adds for each of N states (4 to update a complex state, 2 to read it), 1 for omega:
    forward   flops 12 N + 2     bytes: x in, y out
    backward  flops 36 N + 4     3 times the forward: states again, their adjoint, and the sums for q, gamma, p
              bytes: x and dy in, dx out
Coefficients and states are D N numbers and are not counted.
"""

from collections.abc import Iterator, Sequence

import torch

import megalodon_ops as mo

from . import baselines
from .harness import DTYPES, OURS, Case, Path, way

N = 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    short = 32 if quick else 1
    f32, bf16 = torch.float32, torch.bfloat16
    # Each case: rows, positions, channels, dtype.
    if gpu:
        rivals = ("blocks", "compiled", "fft")
        for batch, length, dim in ((8, 2048, 1024), (1, 4096, 4096), (4, 4096, 2048)):
            yield _case(batch, length // short, dim, bf16, rivals=rivals)
            yield _case(batch, length // short, dim, bf16, backward=True, rivals=rivals)
        yield _case(8, 2048 // short, 1024, f32, rivals=rivals)
        yield _case(8, 2048 // short, 1024, f32, backward=True, rivals=rivals)
        yield _case(1, 1048576 // short, 64, f32)
        return
    yield _case(1, 2048 // short, 1024, f32, rivals=("blocks", "fft", "loop"))
    yield _case(1, 8192 // short, 1024, f32, rivals=("blocks", "fft"))
    yield _case(1, 8192 // short, 1024, f32, backward=True, rivals=("blocks", "fft"))
    yield _case(1, 8192 // short, 1024, bf16)
    yield _case(1, 8192 // short, 1024, bf16, backward=True)
    yield _case(1, 32768 // short, 1024, f32)
    yield _case(8, 2048 // short, 512, f32, rivals=("blocks",))
    yield _case(8, 2048 // short, 512, f32, backward=True)
    for length in (8192, 65536):  # few channels: threads split the length
        yield _case(1, length // short, 64, f32)
    yield _case(1, 1048576 // short, 64, f32, rivals=())
    yield _case(1, 1048576 // short // 4, 64, f32, backward=True, rivals=())


def _case(
    batch: int,
    length: int,
    dim: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    rivals: Sequence[str] = ("blocks",),
) -> Case:
    torch.manual_seed(0)
    x, dy = (torch.randn(batch, length, dim, dtype=dtype) for _ in range(2))
    coefficients = [t.detach() for t in mo.ComplexEMA(dim, N).coefficients()]
    inputs = (x, *coefficients)
    wide = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in inputs]

    def call(op, tensors=inputs, dy=dy):
        return way(op, tensors, [dy], backward=backward)

    ways = {
        "blocks": Path("blocks of matrix products", call(baselines.cema_blocks)),
        "compiled": Path("blocks, torch.compile", call(torch.compile(baselines.cema_blocks)), compiled=True),
        "fft": Path("FFT convolution", call(baselines.cema_fft)),
        "loop": Path("loop over time", call(baselines.cema_loop)),
    }
    elements, size = x.numel(), x.element_size()
    return Case(
        name="forward + backward" if backward else "forward",
        shape=f"B {batch} L {length} D {dim} N {N}",
        dtype=DTYPES[dtype],
        paths=[Path(OURS, call(mo.cema)), *(ways[name] for name in rivals)],
        expected=call(baselines.cema_blocks, wide, dy.double()),
        tolerance=TOLERANCE[dtype],
        units=elements,
        flops=elements * ((48 * N + 6) if backward else (12 * N + 2)),
        bytes=elements * size * (5 if backward else 2),
        fewer_threads=dtype == torch.float32,
    )

"""Norms and gates around the linear layers: layer_norm, rms_norm and gated_silu, forward and backward.

Bytes: norms and silu read x and write y; the backward reads x and dy, and writes dx. Silu with a value also reads the
value in both passes, and writes dvalue in the backward. Flops are not counted, as memory bounds the ops; conversions and
exponentials bound them only for bf16 data in the cache.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import megalodon_ops as mo

from . import baselines
from .harness import DTYPES, OURS, Case, Path, way

Op = Callable[..., Tensor]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    if gpu:  # there the ops call torch's own functions
        return
    length = 1024 if quick else 8192
    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            x, value = (torch.randn(1, length, 2048, dtype=dtype) for _ in range(2))
            affine = [0.1 * torch.randn(2048) for _ in range(2)]
            yield _case(
                "layer_norm", mo.layer_norm, baselines.layer_norm, (x, *affine), backward=backward, num_activations=1
            )
            yield _case(
                "rms_norm", mo.rms_norm, baselines.rms_norm, (x, affine[0]), backward=backward, num_activations=1
            )
            yield _case("silu", mo.gated_silu, baselines.gated_silu, (x,), backward=backward, num_activations=1)
            yield _case(
                "gated_silu", mo.gated_silu, baselines.gated_silu, (x, value), backward=backward, num_activations=2
            )


def _case(name: str, ours: Op, plain: Op, inputs: tuple[Tensor, ...], *, backward: bool, num_activations: int) -> Case:
    """`num_activations`: number of inputs that are as large as the output. torch.compile competes in float32."""
    x = inputs[0]
    dy = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))

    def call(op, tensors=inputs, dy=dy):
        return way(op, tensors, [dy], backward=backward)

    paths = [Path(OURS, call(ours)), Path("torch's functions", call(plain))]
    if x.dtype == torch.float32:
        paths.append(Path("the same, torch.compile", call(torch.compile(plain)), compiled=True))
    return Case(
        name=f"{name} forward" + " + backward" * backward,
        shape=f"L {x.shape[1]} D {x.shape[2]}",
        dtype=DTYPES[x.dtype],
        paths=paths,
        expected=call(plain, [t.float() for t in inputs], dy.float()),
        tolerance=TOLERANCE[x.dtype],
        units=x.numel(),
        bytes=x.numel() * x.element_size() * ((num_activations + 1) + backward * (2 * num_activations + 1)),
    )

"""The products of linear layers at shapes of the 25M model and of the 200M preset, and the loss of the output matrix.

T rows, I inputs, O outputs. With few rows, as in decoding, reading the weights is the limit: see the cold results.

    forward   flops 2 T I O     bytes: x, weights in, y out
    backward  flops 4 T I O     bytes: x, weights, dy in, dx and dweights out
    loss      the same, but its logits y need not be written
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import megalodon_ops as mo

from . import baselines
from .harness import DTYPES, OURS, Case, Path, forward_backward, way

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = ((512, 2048), (1024, 2560))
FEW_ROWS = ((1, torch.float32), (8, torch.float32), (32, torch.float32), (1, torch.bfloat16), (32, torch.bfloat16))


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    if gpu:  # there `mo.linear` calls torch's own function
        return
    rows = 256 if quick else 2048
    for backward in (False, True):
        for inputs, outputs in SHAPES:
            yield _case(rows, inputs, outputs, torch.float32, backward=backward)
    yield _case(rows, 512, 2048, torch.bfloat16, backward=True)
    for few, dtype in FEW_ROWS:
        yield _case(few, 1024, 2560, dtype, cold=True)
    yield _loss(rows, 512, 2048 if quick else 8192)


def _case(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, *, backward: bool = False, cold: bool = False
) -> Case:
    x = torch.randn(rows, inputs, dtype=dtype)
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype)
    dy = torch.randn(rows, outputs, dtype=dtype)

    def call(op, tensors=(x, weight), dy=dy):
        return way(op, tensors, [dy], backward=backward)

    paths = [Path(OURS, call(mo.linear)), Path("F.linear", call(F.linear))]
    if not backward and dtype == torch.float32 and baselines.HAS_ONEDNN_LINEAR:
        paths.append(Path("oneDNN", call(baselines.onednn_linear)))
    return Case(
        name="linear forward" + " + backward" * backward,
        shape=f"T {rows} I {inputs} O {outputs}",
        dtype=DTYPES[dtype],
        paths=paths,
        expected=call(F.linear, [x.double(), weight.double()], dy.double()),
        tolerance=TOLERANCE[dtype],
        units=dy.numel(),
        flops=2 * dy.numel() * inputs * (1 + 2 * backward),
        bytes=x.element_size() * ((x.numel() + weight.numel()) * (3 if backward else 1) + dy.numel() * (1 + backward)),
        cold=cold,
        fewer_threads=False,
    )


def _loss(tokens: int, dim: int, classes: int) -> Case:
    hidden, weight = torch.randn(tokens, dim), torch.randn(classes, dim) * dim**-0.5
    targets = torch.randint(classes, (tokens,))

    def call(loss: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32):
        tensors = [hidden.to(dtype), weight.to(dtype)]
        return forward_backward(lambda *tensors: loss(*tensors, targets), tensors, [torch.ones((), dtype=dtype)])

    def plain(product: Callable[[Tensor, Tensor], Tensor]):
        return lambda hidden, weight, targets: F.cross_entropy(product(hidden, weight), targets)

    return Case(
        name="loss, forward + backward",
        shape=f"T {tokens} D {dim} V {classes}",
        dtype="fp32",
        paths=[
            Path(OURS, call(mo.linear_cross_entropy)),
            Path("F.linear, cross_entropy", call(plain(F.linear))),
            Path("our product, cross_entropy", call(plain(mo.linear)), rival=False),
        ],
        expected=call(plain(F.linear), torch.float64),
        tolerance=TOLERANCE[torch.float32],
        units=tokens,
        unit="token",
        flops=6 * tokens * dim * classes,
        bytes=8 * (hidden.numel() + weight.numel()),
        cold=False,
        fewer_threads=False,
    )

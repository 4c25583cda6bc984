"""The float32 products of linear layers, forward and backward, at shapes of the 25M model and of the 200M preset.

Flops: 2 T I O forward, as many again for the gradient of x and for that of the weights. Bytes: each matrix once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from megalodon_ops.linear import linear

from . import baselines
from .harness import OURS, Case, Path, forward, forward_backward

TOLERANCE = 1e-5
SHAPES = ((512, 2048), (1024, 2560))


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    if gpu:  # torch's own function
        return
    rows = 256 if quick else 2048
    for backward in (False, True):
        for inputs, outputs in SHAPES:
            x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs) * inputs**-0.5
            dy = torch.randn(rows, outputs)

            def call(op, tensors=(x, weight), dy=dy, backward=backward):
                return forward_backward(op, tensors, [dy]) if backward else forward(op, *tensors)

            paths = [Path(OURS, call(linear)), Path("F.linear", call(F.linear))]
            if not backward and baselines.HAS_ONEDNN_LINEAR:
                paths.append(Path("oneDNN", call(baselines.onednn_linear)))
            yield Case(
                name="linear forward" + " + backward" * backward,
                shape=f"T {rows} I {inputs} O {outputs}",
                dtype="fp32",
                paths=paths,
                expected=call(F.linear, [x.double(), weight.double()], dy.double()),
                tolerance=TOLERANCE,
                units=dy.numel(),
                flops=2 * dy.numel() * inputs * (1 + 2 * backward),
                bytes=4 * (x.numel() + weight.numel() + dy.numel()) * (1 + 2 * backward),
                cold=False,
                fewer_threads=False,
            )

"""Measure the errors in docs/numerics.md, against float64.

    python docs/error_tables.py            # print the tables
    python docs/error_tables.py --write    # write them into the page

An error is max |got - expected| / max |expected| over a tensor. Expected values come from `megalodon_ops.reference` in
float64, on inputs rounded to the measured dtype; "plain torch" is the reference in that dtype. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import megalodon_ops as mo
import torch
import torch.nn.functional as F
from torch import Tensor

PAGE = Path(__file__).parent / "numerics.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def widened(tensor: Tensor) -> Tensor:
    """Convert to float64 or complex128."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def error(got: Tensor, expected: Tensor) -> float:
    return ((widened(got) - expected).abs().max() / expected.abs().max()).item()


def forward_backward(op: Callable, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of sum(output * weight) for the inputs."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    y = op(*inputs)
    return [y.detach(), *torch.autograd.grad((y * weight.to(y.dtype)).sum(), inputs)]


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable, Callable, list[Tensor]]]:
    """Yield name, our op, plain torch and inputs: activations in `dtype`, parameters in float32."""
    L, D, N, G, H, K, V = 600, 64, 16, 4, 2, 32, 64  # letters of docs/ops/index.md
    chunk = 256
    vocabulary = 5000

    def both(name: str, **options) -> tuple[Callable, Callable]:
        """Return our op and its reference, with the same options."""
        return partial(getattr(mo, name), **options), partial(getattr(mo.reference, name), **options)

    x = torch.randn(1, L, D).to(dtype)
    yield "cema", *both("cema"), [x, *mo.ComplexEMA(D, N).coefficients()]
    affine = [0.1 * torch.randn(D), 0.1 * torch.randn(D)]
    norms = both("timestep_norm", num_groups=G)
    yield "timestep_norm", *norms, [x, *affine]
    yield "timestep_norm, mean 100 times the spread", *norms, [(x.float() + 100).to(dtype), *affine]
    z, v = torch.randn(1, L, H * K).to(dtype), torch.randn(1, L, H * V).to(dtype)
    qk_affine = [0.1 * torch.randn(2, H * K), 0.1 * torch.randn(2, H * K)]
    attention = both("normalized_attention", num_heads=H, chunk_size=chunk)
    yield "normalized_attention", *attention, [z, v, *qk_affine]
    q, k = (torch.randn(1, L, H, K).to(dtype) for _ in range(2))
    attention = both("chunked_attention", chunk_size=chunk, scale=K**-0.5)
    yield "chunked_attention", *attention, [q, k, v.unflatten(-1, (H, V))]
    yield "layer_norm", *both("layer_norm"), [x, *affine]
    yield "gated_silu", *both("gated_silu"), [x, torch.randn(1, L, D).to(dtype)]
    hidden, matrix = torch.randn(4 * L, D).to(dtype), (torch.randn(vocabulary, D) * D**-0.5).to(dtype)
    targets = torch.randint(vocabulary, (4 * L,))

    def plain_loss(x, weight):
        logits = F.linear(x, weight)
        return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets)

    yield "linear_cross_entropy", lambda x, w: mo.linear_cross_entropy(x, w, targets), plain_loss, [hidden, matrix]


def op_table() -> list[tuple[str, ...]]:
    """Return a row for each op: by dtype, our errors, then plain torch's, as "output, largest of a gradient"."""
    rows = {}
    for dtype in DTYPES.values():
        torch.manual_seed(0)
        for name, ours, plain, inputs in cases(dtype):
            weight = torch.randn_like(ours(*inputs), dtype=torch.float32).to(dtype)
            expected = forward_backward(plain, [widened(t) for t in inputs], weight)
            for op in (ours, plain):
                got = forward_backward(op, inputs, weight)
                errors = [error(a, b) for a, b in zip(got, expected, strict=True)]
                rows.setdefault(name, [name]).append(f"{errors[0]:.0e}, {max(errors[1:]):.0e}")
    return [tuple(row) for row in rows.values()]


def stream_table() -> list[tuple[str, ...]]:
    """Return rows of errors at the end of a stream, read in one call and in calls of 1,000 positions."""
    torch.manual_seed(0)
    D, N = 8, 4
    x = torch.randn(1, 1_000_000, D) + 10
    q = torch.polar(torch.full((D, N), 1 - 1e-5), torch.rand(D, N))
    p, gamma = torch.full((D, N), 1e-2), torch.ones(D, N, dtype=torch.complex64)
    coefficients = (p, q, gamma, torch.zeros(D))

    def norm(x, state):
        affine = torch.zeros(2, D, dtype=x.dtype)
        _, state = mo.timestep_norm(x, *affine, num_groups=2, state=state, return_state=True)
        return state, state.mean

    def cema(x, state):
        like_x = [widened(t) for t in coefficients] if x.dtype == torch.float64 else coefficients
        _, state = mo.cema(x, *like_x, state=state, return_state=True)
        return state, state

    rows = []
    for name, call in ("timestep_norm, mean", norm), ("cema with radius 0.99999, state", cema):
        _, expected = call(x.double(), None)
        _, whole = call(x, None)
        state = None
        for part in x.split(1000, dim=1):
            state, in_pieces = call(part, state)
        rows.append((name, f"{error(whole, expected):.0e}", f"{error(in_pieces, expected):.0e}"))
    return rows


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


def tables() -> dict[str, str]:
    """Return the tables by the names that mark their places in the page."""
    header = ("op", *(title for label in DTYPES for title in (label, f"plain torch, {label}")))
    return {
        "ops": markdown(header, op_table()),
        "streams": markdown(("after 1,000,000 positions", "one call", "1,000 calls"), stream_table()),
    }


def page_pattern(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- {name}: begin -->\n\n).*?(\n\n<!-- {name}: end -->)", re.S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    write = parser.parse_args().write
    for name, table in tables().items():
        print(f"{table}\n")
        if write:
            page, count = page_pattern(name).subn(
                lambda match, table=table: match[1] + table + match[2], PAGE.read_text()
            )
            assert count == 1, f"{PAGE}: no place for the table {name}"
            PAGE.write_text(page)

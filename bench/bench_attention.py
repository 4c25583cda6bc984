"""chunked_attention and normalized_qk: forward and backward.

chunked_attention, per pair of a query and a visible key; a chunk of C positions has C (C + 1) / 2 pairs a head:
    forward   flops 2 K + 2 V a pair             scores, output; the softmax is not counted
              bytes: q, k, v in, o out
    backward  flops 6 K + 4 V a pair             scores again, dv, dP, dq, dk
              bytes: q, k, v, o, do in, dq, dk, dv out
normalized_qk, an element of z:
    forward   flops 13 (norm 3; gain, offset and rotation of q and k: 10)      bytes: z in, q, k out
    backward  flops 24 (rotations 6, gains 4, dgamma and dbeta 6, norm 8)      bytes: z, dq, dk in, dz out
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

import megalodon_ops as mo

from . import baselines
from .harness import DTYPES, OURS, Case, Path, way

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
FAST_RIVALS = ("row blocks", "sdpa")
RIVALS = ("masked", *FAST_RIVALS)


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    short = 8 if quick else 1
    L, C = 8192 // short, 2048 // short
    if gpu:
        for H in (1, 4):  # heads of the presets, from 200M to 7B
            wide = dict(C=C, K=256, V=2048 // short, H=H, dtype=torch.bfloat16, rivals=RIVALS)
            for backward in (False, True):
                yield _attention(2 * L // H, **wide, backward=backward)
        for K, V, H in ((64, 512, 4), (64, 64, 8)):
            for dtype in DTYPES:
                for backward in (False, True):
                    yield _attention(2 * L, C=C, K=K, V=V, H=H, dtype=dtype, backward=backward)
        for backward in (False, True):
            yield _qk(2 * L, Z=256, H=1, C=C, dtype=torch.bfloat16, backward=backward, compiled=True)
        return
    for dtype in DTYPES:
        wide = dict(C=C, K=256, V=2048 // short, H=1, dtype=dtype)
        yield _attention(L, **wide, rivals=(*RIVALS, "compiled") if dtype == torch.float32 else RIVALS)
        yield _attention(L, **wide, backward=True)
    for dtype in DTYPES:
        yield _attention(L, C=C, K=64, V=512 // short, H=4, dtype=dtype, backward=True)
    for dtype in DTYPES:
        square = dict(C=C // 2, K=64, V=64, H=8, dtype=dtype)
        yield _attention(L, **square)
        yield _attention(L, **square, backward=True)
    for dtype in DTYPES:
        for backward in (False, True):
            yield _qk(L, Z=256, H=1, C=C, dtype=dtype, backward=backward, compiled=dtype == torch.float32 and backward)


def _attention(
    L: int,
    *,
    C: int,
    K: int,
    V: int,
    H: int,
    dtype: torch.dtype,
    backward: bool = False,
    rivals: Sequence[str] = FAST_RIVALS,
) -> Case:
    torch.manual_seed(0)
    q, k = (torch.randn(1, L, H, K, dtype=dtype) * K**-0.25 for _ in range(2))  # scores of variance 1
    v, do = (torch.randn(1, L, H, V, dtype=dtype) for _ in range(2))

    def call(op, tensors=(q, k, v), do=do):
        return way(partial(op, chunk_size=C), tensors, [do], backward=backward)

    ways = {
        "masked": Path("matmul, mask, softmax, matmul", call(baselines.attention_masked)),
        "row blocks": Path("the same by blocks of rows", call(baselines.attention_row_blocks)),
        "sdpa": Path("SDPA", call(baselines.attention_sdpa)),
        "compiled": Path("masked, torch.compile", call(torch.compile(baselines.attention_masked)), compiled=True),
    }
    pairs = (L // C) * (C * (C + 1) // 2) * H
    return Case(
        name="chunked_attention " + ("forward + backward" if backward else "forward"),
        shape=f"L {L} C {C} K {K} V {V} H {H}",
        dtype=DTYPES[dtype],
        paths=[Path(OURS, call(mo.chunked_attention)), *(ways[name] for name in rivals)],
        expected=call(baselines.attention_row_blocks, [t.float() for t in (q, k, v)], do.float()),
        tolerance=TOLERANCE[dtype],
        units=L * H * V,
        flops=pairs * ((8 * K + 6 * V) if backward else (2 * K + 2 * V)),
        bytes=L * H * q.element_size() * ((6 * K + 6 * V) if backward else (2 * K + 2 * V)),
        cold=False,
        fewer_threads=H == 1 and not backward,
    )


def _qk(L: int, *, Z: int, H: int, C: int, dtype: torch.dtype, backward: bool, compiled: bool) -> Case:
    torch.manual_seed(0)
    inputs = (torch.randn(1, L, Z, dtype=dtype), 0.1 * torch.randn(2, Z), 0.1 * torch.randn(2, Z))
    douts = [torch.randn(1, L, H, Z // H, dtype=dtype) for _ in range(2)]
    plain = partial(baselines.normalized_qk, num_heads=H, rotary=baselines.rotary(L, C, Z // H, inputs[0].device))

    def call(op, tensors=inputs, douts=douts):
        return way(op, tensors, douts, backward=backward)

    paths = [Path(OURS, call(partial(mo.normalized_qk, num_heads=H, chunk_size=C))), Path("eager", call(plain))]
    if compiled:
        paths.append(Path("torch.compile", call(torch.compile(plain)), compiled=True))
    size = inputs[0].element_size()
    return Case(
        name="normalized_qk " + ("forward + backward" if backward else "forward"),
        shape=f"L {L} Z {Z} H {H} C {C}",
        dtype=DTYPES[dtype],
        paths=paths,
        expected=call(plain, [t.float() for t in inputs], [t.float() for t in douts]),
        tolerance=TOLERANCE[dtype],
        units=L * Z,
        flops=L * Z * (37 if backward else 13),
        bytes=L * Z * size * (7 if backward else 3),
    )

"""`chunked_attention` of dense batches on CUDA by torch's libraries, where operation counts favour these.

Two paths through the libraries compute whole chunks. Both return o and the log-sum-exp, as the kernels do, so forward
and backward may take different paths.

- "flash", for V = K: torch's flash attention.
- "products", for causal attention with V much larger than K: matrix products with the probabilities of some chunks,
  which are kept in memory. The kernel first computes the rows' log-sum-exp lse, without values. Additional columns of q
  and k subtract lse inside the product q k^T, so that log P = s - lse is rounded to 16 bits, not s:

      forward, a strip of rows     P = exp(scale [q, -lse / scale] [k, 1]^T), 0 right of the diagonal;  o = P V
      backward, a strip of rows    P as above;  dP = dO V^T;  dS = P (dP - rowsum(P dP));  dQ = scale dS K
      backward, a strip of keys    dV = P^T dO;  dK = scale dS^T Q

  A strip of rows uses the keys up to its end, a strip of keys the rows from its start. P, dP and dS have the dtype of
  q; products accumulate as in torch.

docs/cuda.md has the estimates of time and memory.
"""

import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.definition import empty_like, launch
from ..common.states import accumulation_dtype


DIRECTIONS = "forward", "backward"


class Shapes(NamedTuple):
    """Shapes that a path computes: pairs of a smallest and a largest size. Sizes must be multiples of 8."""

    path: str
    directions: tuple[str, ...]
    """directions that the path computes; the kernels compute the others"""
    dtypes: tuple[torch.dtype, ...]
    key_dim: tuple[int, int]
    value_dim: tuple[int, float]
    chunk: tuple[int, float]
    """positions of a chunk; of the sequence, if that is shorter"""
    predicted: tuple[tuple[int, int | None], ...] = ()
    """Predicted microseconds on an H100, forward and backward: the minimum time of the kernels by their machine code,
    and the library's time by published rates (`python -m bench.predict`). Not measured on a GPU. Sizes:
    16,384 tokens, C 2048, the largest K, the smallest V, 8 heads (flash) or 1"""


_16_BITS = (torch.bfloat16, torch.float16)
TABLE = (  # path, directions, dtypes, key_dim, value_dim, chunk, predicted
    Shapes("flash", DIRECTIONS, _16_BITS, (64, 64), (64, 64), (1024, math.inf), ((164, 131), (572, 325))),
    Shapes("flash", DIRECTIONS, _16_BITS, (128, 128), (128, 128), (1024, math.inf), ((208, 231), (645, 590))),
    Shapes("flash", ("backward",), _16_BITS, (256, 256), (256, 256), (2048, math.inf), ((415, 494), (1031, None))),
    Shapes("products", ("forward",), _16_BITS, (64, 256), (2048, math.inf), (1024, 8192), ((415, 183), (397, 458))),
    Shapes("products", DIRECTIONS, (torch.float32,), (64, 256), (2048, math.inf), (1024, 5792)),
)
"""Directions and shapes that libraries compute; a (C, C) matrix of "products" fits WORKSPACE"""
_ENVIRONMENT = os.environ.get("MEGALODON_OPS_ATTENTION", "auto")
if _ENVIRONMENT == "kernels":
    TABLE = ()
elif _ENVIRONMENT != "auto":
    raise ImportError(f"megalodon_ops: MEGALODON_OPS_ATTENTION must be auto or kernels, got {_ENVIRONMENT}.")
LEAST_ROWS = 16384
"""Fewest rows of a batch for a path: tokens x heads for "flash", tokens for "products"."""

WORKSPACE = 128 << 20
"""Most bytes of the (C, C) matrices of the chunks computed at once. The backward has two such blocks, P and dS; the
forward has a strip of P"""
_STRIP = 256  # a strip's rows are a multiple of this
_STRIPS = 8  # most strips of a chunk
_ROWS = 2048  # fewest rows of a product
_WIDTH = 8  # additional columns for lse, so many that rows stay aligned
_UNIT = 256.0  # divided by this, lse / scale up to 1e7 fits float16
_LEAST_SCALE = 2.0**-10  # bounds lse / scale; flash attention needs a scale above 0


def path_by_shapes(
    direction: str, dtype: torch.dtype, tokens: int, heads: int, key_dim: int, value_dim: int, chunk: int
) -> str | None:
    """Return the path of a dense batch by its sizes; None: the kernels.

    Example:
        >>> import torch
        >>> from megalodon_ops.ops.chunked_attention.dense_attention import path_by_shapes
        >>> path_by_shapes("forward", torch.bfloat16, tokens=16384, heads=1, key_dim=256, value_dim=2048, chunk=2048)
        'products'
    """
    sizes = key_dim, value_dim, chunk
    for path, directions, dtypes, *bounds, _ in TABLE:
        rows = tokens * heads if path == "flash" else tokens
        fits = all(low <= size <= high and size % 8 == 0 for size, (low, high) in zip(sizes, bounds))
        if fits and direction in directions and dtype in dtypes and rows >= LEAST_ROWS:
            return path
    return None


def path_of(direction: str, q: Tensor, k: Tensor, v: Tensor, chunk_size: int, causal: bool, scale: float) -> str | None:
    """Return the path that torch's settings allow; None: the kernels, which also refuse wrong arguments."""
    if not q.is_cuda or q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or q.shape[:3] != v.shape[:3]:
        return None
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        return None
    if torch.are_deterministic_algorithms_enabled() or scale < _LEAST_SCALE:
        return None
    batch, length, heads, key_dim = q.shape
    chunk = min(chunk_size, length)
    path = path_by_shapes(direction, q.dtype, batch * length, heads, key_dim, v.shape[3], chunk)
    if path == "flash":
        cuda = torch.backends.cuda
        return path if cuda.is_flash_attention_available() and cuda.flash_sdp_enabled() else None
    return path if causal and (q.dtype != torch.float32 or _tf32_is_allowed()) else None


def _tf32_is_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # new in torch 2.9
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def compute(
    direction: str, path: str, tensors: Sequence[Tensor], chunk_size: int, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    """Return o and lse of a dense batch q, k, v ("forward"), or dq, dk and dv for do, q, k, v, o, lse ("backward").

    The functions get chunks (N, C, H, ...): the whole ones, then the shorter last ones of rows.
    """
    function = _FUNCTIONS[path][DIRECTIONS.index(direction)]
    batch, length = tensors[0].shape[:2]
    whole = length - length % chunk_size  # positions of each row in whole chunks
    parts = []
    with torch.autocast(tensors[0].device.type, enabled=False):
        for start, end in (0, whole), (whole, length):
            if start < end:
                shape = -1, min(chunk_size, end - start)
                chunks = (t[:, start:end].reshape(*shape, *t.shape[2:]).contiguous() for t in tensors)
                parts.append([t.view(batch, end - start, *t.shape[2:]) for t in function(*chunks, scale, causal)])
        return tuple(torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts))


_flash = torch.ops.aten._scaled_dot_product_flash_attention
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward


def _flash_fwd(q, k, v, scale, causal):
    by_head = (t.transpose(1, 2) for t in (q, k, v))
    o, lse, *_ = _flash(*by_head, dropout_p=0.0, is_causal=causal, scale=scale)
    return [t.transpose(1, 2).contiguous() for t in (o, lse)]


def _flash_bwd(do, q, k, v, o, lse, scale, causal):
    *by_head, lse = (t.transpose(1, 2) for t in (do, q, k, v, o, lse))
    length = q.shape[1]
    no_dropout = q.new_empty(2, dtype=torch.int64)  # unused seed and offset of a generator
    grads = _flash_backward(
        *by_head, lse.contiguous(), None, None, length, length, 0.0, causal, no_dropout, no_dropout, scale=scale
    )
    return [t.transpose(1, 2).contiguous() for t in grads]


def _products_fwd(q, k, v, scale, _causal):
    o = empty_like(v)
    lse = q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
    no_values, no_state = v[..., :0], (None,) * 3
    options = q.shape[1], True, scale, 0.0, None, None  # chunk size, causal, scale, dropkey, its seed, spans
    launch("chunked_attention_fwd", q, k, no_values, *no_state, *options, no_values, lse)
    size, strips = _blocks(q)
    for q_, k_, columns, v_, o_ in _matrices(size, q, k, _columns(lse, scale, q.dtype), v, o):
        rows, keys = _extended(q_, k_, columns)
        for strip in strips:
            seen = slice(strip.stop)
            p = _product(rows[:, strip], keys[:, seen].mT, scale).exp_().tril_(strip.start)
            o_[:, strip].baddbmm_(p, v_[:, seen], beta=0)
    return o, lse


def _products_bwd(do, q, k, v, _o, lse, scale, _causal):
    grads = tuple(map(empty_like, (q, k, v)))
    size, strips = _blocks(q)
    all_p, all_ds = q.new_empty(2, size, q.shape[1], q.shape[1])
    for q_, k_, columns, v_, do_, dq, dk, dv in _matrices(size, q, k, _columns(lse, scale, q.dtype), v, do, *grads):
        rows, keys = _extended(q_, k_, columns)
        for strip in strips:
            seen = slice(strip.stop)
            p = _product(rows[:, strip], keys[:, seen].mT, scale).exp_().tril_(strip.start)
            dp = _product(do_[:, strip], v_[:, seen].mT, 1.0).tril_(strip.start)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, strip].baddbmm_(ds, k_[:, seen], beta=0, alpha=scale)
            all_p[: len(p), strip, seen], all_ds[: len(p), strip, seen] = p, ds
        p, ds = all_p[: len(p)], all_ds[: len(p)]
        for strip in strips:
            seeing = slice(strip.start, None)
            dk[:, strip].baddbmm_(ds[:, seeing, strip].mT, q_[:, seeing], beta=0, alpha=scale)
            dv[:, strip].baddbmm_(p[:, seeing, strip].mT, do_[:, seeing], beta=0)
    return grads


_FUNCTIONS = {"flash": (_flash_fwd, _flash_bwd), "products": (_products_fwd, _products_bwd)}  # of DIRECTIONS


def _blocks(q: Tensor) -> tuple[int, list[slice]]:
    """Return the number of chunks that are computed at once, and the strips of a chunk."""
    chunks, C = q.shape[:2]
    size = min(chunks, max(WORKSPACE // (C * C * q.element_size()), 1))
    height = math.ceil(max(C / _STRIPS, _ROWS / size) / _STRIP) * _STRIP
    return size, [slice(i, i + height) for i in range(0, C, height)]


def _matrices(size: int, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield the parts (n, C, E) of each tensor (N, C, H, E): at most `size` chunks of one head."""
    for first in range(0, len(tensors[0]), size):
        for head in range(tensors[0].shape[2]):
            yield [t[first : first + size, :, head] for t in tensors]


def _columns(lse: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return columns (N, C, H, 8) whose sum is -lse / scale / 256: 3 bfloat16 values (7 for float64) and zeros.

    Each value is exact in float16 and TF32.
    """
    rest = lse / (-_UNIT * scale)
    parts = []
    for _ in range(3 if lse.dtype == torch.float32 else 7):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1]
    return F.pad(torch.stack(parts, -1).to(dtype), (0, _WIDTH - len(parts)))


def _extended(q: Tensor, k: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k with 8 more columns, (n, C, K + 8) each; their product is q k^T - lse / scale."""
    return torch.cat((q, columns), -1), F.pad(k, (0, _WIDTH), value=_UNIT)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale a b, scaled before rounding."""
    return a.new_empty(len(a), a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=scale)

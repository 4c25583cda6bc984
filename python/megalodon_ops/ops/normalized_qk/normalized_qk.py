"""`normalized_qk`: the queries and keys of normalized attention, from one shared z."""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..common.arrays import call_with_arrays
from ..common.definition import autocast, call, define_op, int64_or_none, launch
from ..common.states import accumulation_dtype
from ..common.flops import num_tokens
from ..common.spans import as_spans
from ..common.checks import MIN_POSITIVE, check_number, check_rank, check_size

_MAX_KERNEL_ROWS = 32
"""maximum size of a table that the kernel `rotary_rows` computes, for decoding; torch computes larger tables"""


def normalized_qk(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    num_heads: int,
    chunk_size: int,
    rope_base: float = 10000.0,
    eps: float = 1e-5,
    position: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Per-head RMS norm of `z`, one affine map for queries and one for keys, rotary position embedding.

    .. math::
        \hat z = z / \sqrt{\mathrm{mean}_{head}(z^2) + \epsilon}, \qquad
        q = \mathrm{rope}(\hat z (1 + \gamma_0) / \sqrt K + \beta_0), \quad
        k = \mathrm{rope}(\hat z (1 + \gamma_1) / \sqrt K + \beta_1)

    Args:
        z: (B, L, H * K) float32, float64, bfloat16 or float16, K even.
        gamma, beta: (2, H * K) float32, or float64 for a float64 `z`; row 0 for queries, row 1 for keys.
        num_heads: H.
        chunk_size: C. The rotary position restarts with each chunk.
        rope_base: angle of the pair (2i, 2i + 1) at position m is m * rope_base^(-2i/K).
        eps: added to the mean square.
        position: (S,) int64, index of each sequence's first token inside its chunk; None: zeros.
        cu_seqlens, lengths, starts, spans: sequences as in :func:`cema`.

    Returns:
        Queries and keys, (B, L, H, K) in z's dtype, zero at tokens in no sequence. Angles are computed in float64.

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. Second derivatives are not supported.

    z, gamma and beta have gradients; of the activations, only z is kept for the backward.

    Arrays of other libraries: see :mod:`megalodon_ops.ops.common.arrays`.

    Source: arXiv 2404.08801, section 3.3, and the released code. The mathematics:
    :func:`megalodon_ops.reference.normalized_qk`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> z, zeros = torch.tensor([[[3.0, 4.0]]]), torch.zeros(2, 2)
        >>> q, k = mo.normalized_qk(z, zeros, zeros, num_heads=1, chunk_size=8, eps=0.0)
        >>> q.flatten()
        tensor([0.6000, 0.8000])
    """
    if not isinstance(z, Tensor):
        return call_with_arrays(normalized_qk, **locals())
    check_rank("normalized_qk", "z", z, "(B, L, H * K)", 3)
    spans = as_spans("normalized_qk", z, cu_seqlens, lengths, starts, spans)
    grid = dict(chunk_size=chunk_size, position=position, spans=spans)
    return rotated_queries_and_keys(z, gamma, beta, None, num_heads=num_heads, rope_base=rope_base, eps=eps, **grid)


def rotated_queries_and_keys(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rotary: Tensor | None,
    *,
    num_heads: int,
    chunk_size: int,
    rope_base: float,
    eps: float,
    position: Tensor | None,
    spans: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`normalized_qk` with a table from :func:`rotary_table`; None: the op makes its own."""
    check_rank("normalized_qk", "z", z, "(B, L, H * K)", 3)
    num_heads = check_size("normalized_qk", "num_heads", num_heads)
    chunk_size = check_size("normalized_qk", "chunk_size", chunk_size)
    rope_base = check_number("normalized_qk", "rope_base", rope_base, "a positive finite number", MIN_POSITIVE)
    eps = check_number("normalized_qk", "eps", eps, "a finite number of at least 0", 0.0)
    (z,) = autocast(z)
    sequences = (int64_or_none(position), spans)
    return call(normalized_qk_fwd, z, gamma, beta, rotary, num_heads, chunk_size, rope_base, eps, *sequences)


def rotary_table(rows: int, key_dim: int, rope_base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return cosine and sine of position * rope_base^(-2i/K), (rows, K / 2, 2) on `device`, rounded once from float64.

    Callers on the CPU share one table. On other devices each call copies a table from the host, and the caller must
    keep it: a CUDA graph captured with a table knows only its address.
    """
    if device.type == "meta":
        return torch.empty((rows, (key_dim + 1) // 2, 2), dtype=dtype, device=device)
    may_be_fake = _get_current_dispatch_mode() is not None  # a fake mode's tensors must not reach other calls
    make = _make_table if may_be_fake else _shared_table
    return make(rows, key_dim, rope_base, dtype, torch.device("cpu")).to(device)


def _make_table(rows: int, key_dim: int, rope_base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # so that autograd can save the shared table
        return rotary_table_of(torch.arange(rows, device=device), key_dim, rope_base, dtype)


def rotary_table_of(positions: Tensor, key_dim: int, rope_base: float, dtype: torch.dtype) -> Tensor:
    """Return the rows of a :func:`rotary_table` at arbitrary positions (n,)."""
    angle = positions.double()[:, None] * rotary_frequencies(key_dim, rope_base, positions.device)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).to(dtype)


def rotary_frequencies(key_dim: int, rope_base: float, device: torch.device) -> Tensor:
    """Return the frequencies in radians per position, (K / 2,) float64."""
    return rope_base ** -(torch.arange(0, key_dim, 2, dtype=torch.float64, device=device) / key_dim)


def _rotary_rows(end, frequencies, length, wide):
    table = _rotary_rows_fake(end, frequencies, length, wide)
    if end.is_cpu and 0 < end.numel() * length <= _MAX_KERNEL_ROWS:
        launch("rotary_rows", end.contiguous(), frequencies, length, table)
        return table
    positions = end[:, None] + torch.arange(-length, 0, device=end.device)
    angle = positions.flatten().double()[:, None] * frequencies
    rows = torch.stack((angle.cos(), angle.sin()), dim=-1)
    return table.copy_(rows) if len(rows) else table.zero_()


def _rotary_rows_fake(end, frequencies, length, wide):
    """The table has at least one row: `normalized_qk` refuses a table without rows."""
    rows = max(end.shape[0] * length, 1)
    return frequencies.new_empty((rows, frequencies.shape[0], 2), dtype=torch.float64 if wide else torch.float32)


_shared_table = functools.lru_cache(maxsize=16)(_make_table)  # CPU tables only: no CPU kernel keeps an address


def _with_table(kernel, *args):
    """Call the kernel of the forward or the backward, with a table of its own if none is given."""
    *tensors, rotary, num_heads, chunk_size, rope_base, eps, position, spans = args
    if rotary is None:
        z, _, _ = tensors[-3:]
        rotary = _own_table(z, num_heads, chunk_size, rope_base, position)
    return kernel(*tensors, rotary, num_heads, chunk_size, rope_base, eps, position, spans)


def _own_table(z: Tensor, num_heads: int, chunk_size: int, rope_base: float, position: Tensor | None) -> Tensor:
    """Return a table with a row for every possible position: on the CPU a shared one, on a GPU a new one.

    So a captured CUDA graph needs no table that lives as long as the graph, and no copy from the host.
    """
    longest = z.shape[1]
    if z.is_cpu:  # rounded up, so that few tables serve all lengths
        longest = 1 << max(longest - 1, 0).bit_length()
    rows = chunk_size if position is not None else min(chunk_size, longest)
    make = rotary_table if z.is_cpu else _make_table
    return make(rows, z.shape[-1] // num_heads, rope_base, accumulation_dtype(z.dtype), z.device)


def _fwd_fake(z, gamma, beta, rotary, num_heads, *_):
    shape = (*z.shape[:-1], num_heads, z.shape[-1] // num_heads)
    return z.new_empty(shape), z.new_empty(shape)


normalized_qk_bwd = define_op(
    "normalized_qk_bwd(Tensor dq, Tensor dk, Tensor z, Tensor gamma, Tensor beta, Tensor? rotary, int num_heads, "
    "int chunk_size, float rope_base, float eps, Tensor? position, Tensor? spans) "
    "-> (Tensor dz, Tensor dgamma, Tensor dbeta)",
    wrapper=_with_table,
    # normalized; of q and of k: rotated, dgamma, dbeta; dnormalized, dz
    flops=lambda z, spans: num_tokens(z, spans) * z.shape[2] * (3 + 2 * (3 + 2 + 1) + 3 + 5),
)
normalized_qk_fwd = define_op(
    "normalized_qk_fwd(Tensor z, Tensor gamma, Tensor beta, Tensor? rotary, int num_heads, int chunk_size, "
    "float rope_base, float eps, Tensor? position, Tensor? spans) -> (Tensor q, Tensor k)",
    wrapper=_with_table,
    fake=_fwd_fake,
    backward=normalized_qk_bwd,
    # normalized; of q and of k: affine, rotated
    flops=lambda z, spans: num_tokens(z, spans) * z.shape[2] * (3 + 2 * (2 + 3)),
)
rotary_rows = define_op(
    "rotary_rows(Tensor end, Tensor frequencies, int length, bool wide) -> Tensor",
    kernel=_rotary_rows,
    fake=_rotary_rows_fake,
    flops=lambda: 0,
)
"""rotary table (S L, K / 2, 2), float64 if `wide`, of the L = `length` positions before `end` (S,) of each sequence"""

"""Spans: where the sequences of a batch (B, L, ...) lie, for everything below the public functions.

A span is the first and the last-plus-one position of a sequence in the flattened batch (B * L). Spans are int64, in
order, disjoint, and within one row each. None stands for a dense batch: each row is a sequence. Two layouts hold the
spans, and kernels distinguish them:

    (B, 1, 2)   one span at the start of each row, from `lengths`; launchers divide their work by rows
    (S, 2)      all others; from `cu_seqlens`, a view of the offsets with strides (1, 1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_device, check_tensor, short_text


def as_spans(
    op: str,
    x: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    spans: Tensor | None,
) -> Tensor | None:
    """Return the spans of x (B, L, ...) from the arguments of a public function; None for a dense batch.

    Args:
        cu_seqlens: (S + 1,) int64 or int32 offsets of sequences packed into one row (B = 1).
        lengths: (B,) positions of each row, from the row's first or from that of `starts`.
        starts: (B,) first position of each row. Without `lengths`, rows reach to their end.
        spans: (S, 2), or (B, 1, 2) where each row begins with its span.

    Checks dtypes, shapes and devices, and `starts` on the CPU. Kernels on the CPU check the other values.

    Example:
        >>> import torch
        >>> from megalodon_ops.ops.common.spans import as_spans
        >>> as_spans("cema", torch.zeros(2, 5, 1), None, torch.tensor([3, 2]), torch.tensor([2, 1]), None)
        tensor([[2, 5],
                [6, 8]])
    """
    if cu_seqlens is None and lengths is None and starts is None and spans is None:
        return None
    if not isinstance(x, Tensor) or x.dim() < 2:
        return None  # the caller refuses x
    B, L = x.shape[:2]
    given = {"cu_seqlens": cu_seqlens, "spans": spans, "starts": starts, "lengths": lengths}
    given = {name: _as_int64(op, name, tensor, x) for name, tensor in given.items() if tensor is not None}
    first, *others = given
    if others and first != "starts":
        raise ValueError(f"{op}: `{others[0]}` must be None where `{first}` is given.")
    for name, tensor in given.items():
        shape, is_right = tuple(tensor.shape), True
        if name == "cu_seqlens":
            expected, is_right = "(S + 1,) for a batch of one row", B == 1 and len(shape) == 1 and shape[0] > 0
        elif name == "spans":
            expected, is_right = "(S, 2), or (B, 1, 2)", len(shape) > 1 and shape in ((shape[0], 2), (B, 1, 2))
        else:
            expected, is_right = f"({B},)", len(shape) == 1 and shape[0] == B
        if not is_right:
            raise ValueError(f"{op}: `{name}` must have shape {expected}, got {shape} for B = {B}.")
    tensor, is_traced = given[first], torch.compiler.is_compiling()
    if first == "cu_seqlens":
        if is_traced or tensor.shape[0] == 1:  # compiled code may copy a view without its strides
            return torch.stack((tensor[:-1], tensor[1:]), 1)
        return tensor.contiguous().unfold(0, 2, 1)
    if first == "spans":
        return tensor if tensor.stride() == (1, 1) else tensor.contiguous()
    row = torch.arange(B, device=x.device) * L
    if first == "lengths":
        return torch.stack((row, row + tensor), 1)[:, None]
    if type(starts) is Tensor and starts.is_cpu and not is_traced:
        _check_starts(op, L, tensor, given.get("lengths"))
    return torch.stack((row + tensor, row + L if lengths is None else row + tensor + given["lengths"]), 1)


def argument_of(spans: Tensor) -> tuple[str, Tensor]:
    """Return the name of the argument from which :func:`as_spans` made these spans, and its values."""
    if spans.dim() == 3:
        return "lengths", (spans[..., 1] - spans[..., 0]).flatten()
    if spans.stride() == (1, 1):
        return "cu_seqlens", torch.cat((spans[:1, 0], spans[:, 1]))
    return "spans", spans


def token_sequences(x: Tensor, spans: Tensor | None) -> Tensor:
    """Return the sequence of each token of x (B, L, ...), (B, L) int64; S, the number of sequences, for padding."""
    B, L = x.shape[:2]
    token = torch.arange(B * L, device=x.device)
    if spans is None:
        return (token // max(L, 1)).view(B, L)
    if spans.shape[0] == 0:
        return torch.zeros_like(token).view(B, L)
    begins, ends = spans.reshape(-1, 2).T.contiguous()
    last = torch.searchsorted(begins, token, right=True) - 1  # the last sequence that has begun
    return last.where((last >= 0) & (token < ends[last.clamp(min=0)]), spans.shape[0]).view(B, L)


def _as_int64(op: str, name: str, tensor: Tensor, x: Tensor) -> Tensor:
    check_tensor(op, name, tensor)
    check_device(op, name, tensor, x)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: `{name}` must be int64 or int32, got {tensor.dtype}.")
    return tensor.long()


def _check_starts(op: str, L: int, starts: Tensor, lengths: Tensor | None) -> None:
    firsts = starts.tolist()
    counts = [L - first for first in firsts] if lengths is None else lengths.tolist()
    for row, (first, count) in enumerate(zip(firsts, counts)):
        if not 0 <= first <= L:
            raise ValueError(f"{op}: `starts` must be in [0, {L}], got {short_text(first)} at {row}.")
        if not 0 <= count <= L - first:
            raise ValueError(
                f"{op}: `lengths` must be in [0, {L - first}] for a row of {L} positions that starts at {first}, got "
                f"{short_text(count)} at {row}."
            )


def read_spans(op: str, x: Tensor, spans: Tensor | None) -> list[tuple[int, int]]:
    """Return (begin, end) of each sequence among the B L tokens of x (B, L, ...). Waits for the device."""
    B, L = x.shape[:2]
    if spans is None:
        return [(row * L, (row + 1) * L) for row in range(B)]
    pairs, last, by_row = [*map(tuple, spans.reshape(-1, 2).tolist())], 0, spans.dim() == 3
    for s, (begin, end) in enumerate(pairs):
        in_row = begin == s * L if by_row else last <= begin
        if not (in_row and begin <= end <= B * L and (begin == end or begin // L == (end - 1) // L)):
            name, _ = argument_of(spans)
            if name == "lengths":
                raise ValueError(f"{op}: `lengths` must be in [0, {L}], got {short_text(end - begin)} at {s}.")
            if name == "cu_seqlens":
                offset, at = (begin, s) if begin < last else (end, s + 1)
                expected = f"non-decreasing offsets in [0, {L}], got {short_text(offset)} at {at}"
                raise ValueError(f"{op}: `cu_seqlens` must be {expected}.")
            raise ValueError(
                f"{op}: `spans` must be in order, disjoint and within one row of {L} positions each, got "
                f"[{short_text(begin)}, {short_text(end)}) at {s}."
            )
        last = end
    return pairs


def num_sequences(batch: int, spans: Tensor | None) -> int:
    """Return S, the number of spans or of rows."""
    return batch if spans is None else spans.shape[0]


def num_positions(x: Tensor, spans: Tensor | None) -> Tensor:
    """Return the number of positions of each sequence of x (B, L, ...), (S,)."""
    if spans is None:
        return torch.full((x.shape[0],), x.shape[1], device=x.device)
    return (spans[..., 1] - spans[..., 0]).flatten()

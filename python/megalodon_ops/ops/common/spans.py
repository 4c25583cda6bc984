"""Spans: where the sequences of a batch (B, L, ...) lie, for everything below the public functions.

A span is the first and the last-plus-one position of a sequence in the flattened batch (B * L). Spans are int64, in
order, disjoint, and within one row each. None stands for a dense batch: each row is a sequence. Three layouts hold the
spans, and kernels distinguish them:

    (B, 1, 2)   one span at the start of each row, from `lengths`; launchers divide their work by rows
    (S + 1,)    offsets, from `cu_seqlens`: each span ends where the next one begins
    (S, 2)      all others
"""

import torch
from torch import Tensor

from .checks import check_device, check_tensor, short_text


def as_spans(
    op: str, x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, starts: Tensor | None, spans: Tensor | None
) -> Tensor | None:
    """Return the spans of x (B, L, ...) from the arguments of a public function; None for a dense batch.

    Args:
        cu_seqlens: (S + 1,) int64 or int32 offsets of sequences packed into one row (B = 1).
        lengths: (B,) positions of each row, from the row's first or from that of `starts`.
        starts: (B,) first position of each row. Without `lengths`, rows reach to their end.
        spans: any of the three layouts.

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
    if cu_seqlens is not None:
        # The usual call skips the functions below, which cost as much as all other checks of a short call.
        if type(cu_seqlens) is Tensor and cu_seqlens.dtype is torch.int64 and cu_seqlens.is_cpu and x.is_cpu:
            fits = cu_seqlens.dim() == x.shape[0] == 1 and cu_seqlens.numel() and cu_seqlens.is_contiguous()
            if fits and lengths is None and starts is None and spans is None:
                return cu_seqlens
        return _as_int64(op, "cu_seqlens", cu_seqlens, x, spans=spans, starts=starts, lengths=lengths)
    if spans is not None:
        return _as_int64(op, "spans", spans, x, starts=starts, lengths=lengths)
    L = x.shape[1]
    row = torch.arange(x.shape[0], device=x.device) * L
    counts = None if lengths is None else _as_int64(op, "lengths", lengths, x)
    if starts is None:
        return torch.stack((row, row + counts), 1).unsqueeze(1)
    firsts = _as_int64(op, "starts", starts, x)
    if type(starts) is Tensor and starts.is_cpu and not torch.compiler.is_compiling():
        _check_starts(op, L, firsts, counts)
    begins = row + firsts
    return torch.stack((begins, row + L if counts is None else begins + counts), 1)


def argument_of(spans: Tensor) -> tuple[str, Tensor]:
    """Return the name of the argument from which :func:`as_spans` made these spans, and its values."""
    if spans.dim() == 3:
        return "lengths", spans.diff().flatten()
    return "cu_seqlens" if spans.dim() == 1 else "spans", spans


def pairs_of(spans: Tensor) -> Tensor:
    """Return spans of any layout as (S, 2)."""
    return torch.stack((spans[:-1], spans[1:]), 1) if spans.dim() == 1 else spans.reshape(-1, 2)


def token_sequences(x: Tensor, spans: Tensor | None) -> Tensor:
    """Return the sequence of each token of x (B, L, ...), (B, L) int64; S, the number of sequences, for padding."""
    B, L = x.shape[:2]
    token = torch.arange(B * L, device=x.device)
    if spans is None:
        return (token // max(L, 1)).view(B, L)
    if (S := num_sequences(B, spans)) == 0:
        return torch.zeros_like(token).view(B, L)
    begins, ends = pairs_of(spans).T.contiguous()
    last = torch.searchsorted(begins, token, right=True) - 1  # the last sequence that has begun
    return last.where((last >= 0) & (token < ends[last.clamp(min=0)]), S).view(B, L)


def _as_int64(op: str, name: str, tensor: Tensor, x: Tensor, **others: Tensor | None) -> Tensor:
    """Check the argument `name` of sequences in x, and that the `others` are None."""
    for other, value in others.items():
        if value is not None:
            raise ValueError(f"{op}: `{other}` must be None where `{name}` is given.")
    check_tensor(op, name, tensor)
    check_device(op, name, tensor, x)
    if tensor.dtype is not torch.int64 and tensor.dtype is not torch.int32:
        raise TypeError(f"{op}: `{name}` must be int64 or int32, got {tensor.dtype}.")
    B, shape = x.shape[0], tensor.shape
    if len(shape) == 1:
        fits = shape[0] == B if name in ("lengths", "starts") else shape[0] > 0 and (B == 1 or name == "spans")
    else:
        fits = name == "spans" and shape[-1:] == (2,) and (len(shape) == 2 or shape == (B, 1, 2))
    if not fits:  # B is only a text here, as it would be a constant in an exported program
        texts = {"cu_seqlens": "(S + 1,) for a batch of one row", "spans": "(S, 2), (B, 1, 2) or (S + 1,)"}
        raise ValueError(
            f"{op}: `{name}` must have shape {texts.get(name, f'({B},)')}, got {tuple(shape)} for B = {B}."
        )
    return tensor.long().contiguous()


def _check_starts(op: str, L: int, starts: Tensor, lengths: Tensor | None) -> None:
    firsts = starts.tolist()
    counts = [0] * len(firsts) if lengths is None else lengths.tolist()
    for row, (first, count) in enumerate(zip(firsts, counts)):
        if not 0 <= first <= L:
            raise ValueError(f"{op}: `starts` must be in [0, {L}], got {short_text(first)} at {row}.")
        if not 0 <= count <= L - first:
            expected = f"in [0, {L - first}] for a row of {L} positions that starts at {first}"
            raise ValueError(f"{op}: `lengths` must be {expected}, got {short_text(count)} at {row}.")


def read_spans(op: str, x: Tensor, spans: Tensor | None) -> list[tuple[int, int]]:
    """Return (begin, end) of each sequence among the B L tokens of x (B, L, ...). Waits for the device."""
    B, L = x.shape[:2]
    if spans is None:
        return [(row * L, (row + 1) * L) for row in range(B)]
    pairs = [(begin, end) for begin, end in pairs_of(spans).tolist()]
    last = 0  # the end of the sequence before
    name = "spans" if spans.dim() == 1 and B > 1 else argument_of(spans)[0]
    for s, (begin, end) in enumerate(pairs):
        in_row = begin == s * L if name == "lengths" else last <= begin
        if not (in_row and begin <= end <= B * L and (begin == end or begin // L == (end - 1) // L)):
            expected = f"in order, disjoint and within one row of {L} positions each"
            at = s
            got = f"[{short_text(begin)}, {short_text(end)})"
            if name == "lengths":
                expected, got = f"in [0, {L}]", short_text(end - begin)
            elif name == "cu_seqlens":
                expected = f"non-decreasing offsets in [0, {L}]"
                got, at = (short_text(begin), s) if begin < last else (short_text(end), s + 1)
            raise ValueError(f"{op}: `{name}` must be {expected}, got {got} at {at}.")
        last = end
    return pairs


def num_sequences(batch: int, spans: Tensor | None) -> int:
    """Return S, the number of spans or of rows."""
    return batch if spans is None else spans.shape[0] - int(spans.dim() == 1)


def num_positions(x: Tensor, spans: Tensor | None) -> Tensor:
    """Return the number of positions of each sequence of x (B, L, ...), (S,)."""
    if spans is None:
        return torch.full((x.shape[0],), x.shape[1], device=x.device)
    return spans.diff().flatten()

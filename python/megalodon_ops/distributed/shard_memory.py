r"""The working memory of a piece of a sequence, which goes on from what the pieces before it have written.

A chunk turns a memory M into (1 - r) M + r P^T (V - F M), which is affine in M once its shares r are known, and these
follow from the masses z alone, which add up. So over the pieces before a piece, in order,

    z <- log(exp(z) + exp(z_j));  M <- A_j M + B_j

There are two exchanges. First all ranks send z_j, which takes no pass. Then a piece in which the sequence begins runs,
and its end is B, with an A of 0; meanwhile another one writes a memory of K columns more, which begins as (0 | I) and
ends as (B | A). Those run after the second exchange. The last rank, of which no one asks A and B, waits for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from ..ops.adaptive_working_memory.adaptive_working_memory import kept_rows, read_and_write, read_write_and_keep
from ..ops.common.definition import accumulation_dtype
from ..ops.common.states import WorkingMemoryState
from .exchange import send_to_all
from .pieces import Pieces

NOTHING = -1e4
"""The mass of a memory that nothing was written to. Keys of twice as much write nothing, to such a one either."""


def memory_of_piece(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, visible_chunks: int, state: WorkingMemoryState | None,
    cu_seqlens: Tensor | None, lengths: Tensor | None, to_end: bool, inplace: bool, pieces: Pieces, group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`read_write_and_keep` of a piece, always to its end.

    Args:
        q, k, v, cu_seqlens, lengths: where attention sees two chunks, the chunk before the piece comes first if there is
            one.
        state: what the sequences that begin in the piece go on from; the row of one that began before it is any. None:
            all begin from nothing.
    """
    rows, added = visible_chunks * chunk_size, (visible_chunks - 1) * chunk_size if pieces.sources else 0
    if state is None:
        state = _new(k, v, rows, pieces.count if pieces.is_packed else len(k))
    grid, sequences = (chunk_size, visible_chunks), (cu_seqlens, lengths)
    begin, end = (added + column for column in pieces.tail or (0, k.shape[1] - added))
    of_open = WorkingMemoryState(*(x[-1:] for x in state)) if pieces.is_packed else state
    opens_here = pieces.open_begins_here() and len(of_open.mass) > 0
    if not opens_here:
        begin, end = 0, (k.shape[1] - added) // chunk_size * chunk_size  # the steps that the piece writes
    open_k, open_v = k[:, begin:end], v[:, begin:end]
    masses = _sent(_mass_after(open_k, *grid, of_open) if opens_here else _mass_of(open_k), group)
    mass = torch.cat([torch.full_like(masses[:1], NOTHING), masses[[*pieces.sources]]]).logsumexp(0)
    if not pieces.sources:
        o, *after = read_write_and_keep(q, k, v, *grid, state, *sequences, True, inplace)
        memory = after[0][-1:].sum(0, keepdim=True) if pieces.is_packed else after[0]
        ends = _sent(F.pad(memory, (0, k.shape[3])), group)
        return o + (masses[:0].sum() + ends[:0].sum()), *after  # what is sent counts in the backward, as on all ranks
    if opens_here:
        _, memory, _ = read_and_write(open_k.detach(), open_k, open_v, *grid, of_open, None, None, True)
        change = F.pad(memory, (0, k.shape[3]))
    else:
        change = _change(open_k, open_v, chunk_size, mass, is_asked=pieces.after is not None)
    ends = _sent(change, group)
    memory = ends[:0].sum(0)[..., : v.shape[3]]
    for source in pieces.sources:
        more, factor = ends[source].split([v.shape[3], k.shape[3]], -1)
        memory = factor @ memory + more
    begun = _new(k, v, rows, len(memory))
    begun = begun._replace(memory=memory, mass=mass, k=begun.k + 2 * NOTHING, position=begun.position + rows)
    if pieces.is_packed:
        begun = WorkingMemoryState(*(torch.cat([one, others[1:]]) for one, others in zip(begun, state)))
    return read_write_and_keep(q, k, v, *grid, begun, *sequences, True, inplace)


def _new(k: Tensor, v: Tensor, rows: int, sequences: int) -> WorkingMemoryState:
    """The state of sequences that have not begun, for keys and values of so many rows."""
    (H, K), V = k.shape[2:], v.shape[3]
    memory = k.new_zeros(sequences, H, K, V, dtype=accumulation_dtype(k.dtype))
    keys, values = (k.new_zeros(sequences, rows, H, width) for width in (K, V))
    position = torch.zeros(sequences, dtype=torch.int64, device=k.device)
    return WorkingMemoryState(memory, torch.zeros_like(memory[..., 0]), keys, position, values)


def _mass_of(k: Tensor) -> Tensor:
    """(R, H, K) of what keys (R, n, H, K) write."""
    return F.pad(k.to(accumulation_dtype(k.dtype)), (0, 0, 0, 0, 1, 0), value=NOTHING).logsumexp(1)


def _mass_after(k: Tensor, chunk_size: int, visible_chunks: int, state: WorkingMemoryState) -> Tensor:
    """(R, H, K) after keys (R, n, H, K) that follow a state."""
    rows, n, device = state.k.shape[1], k.shape[1], k.device
    kept = kept_rows(state.position, chunk_size, visible_chunks)[:, None]
    written = ((kept + n) // chunk_size - visible_chunks + 1) * chunk_size
    cached = torch.arange(rows, device=device)
    counts = torch.cat([(cached < kept) & (cached < written), kept + torch.arange(n, device=device) < written], 1)
    is_begun = (state.position >= rows)[:, None, None]
    logits = torch.cat([state.k, k], 1).masked_fill(~counts[..., None, None], 2 * NOTHING)
    return torch.logaddexp(state.mass.where(is_begun, NOTHING), _mass_of(logits))


def _change(k: Tensor, v: Tensor, chunk_size: int, mass: Tensor, *, is_asked: bool) -> Tensor:
    """(R, H, K, V + K), B and A, of writing complete chunks to a memory of this mass; zeros, if it is not asked for."""
    (R, H, K), V = mass.shape, v.shape[3]
    if not is_asked:
        return mass.mul(0)[..., None].expand(R, H, K, V + K)
    v = F.pad(v, (0, K))
    identity = F.pad(torch.eye(K, dtype=mass.dtype, device=mass.device), (V, 0)).expand(R, H, K, V + K)
    start = _new(k, v, chunk_size, R)
    start = start._replace(memory=identity, mass=mass, position=start.position + chunk_size)
    return read_and_write(k.detach(), k, v, chunk_size, 1, start, None, None, True)[1]


def _sent(value: Tensor, group: ProcessGroup) -> Tensor:
    """(P, ...) of all ranks."""
    values, _, work = send_to_all(value, None, group)
    work.wait()
    return values

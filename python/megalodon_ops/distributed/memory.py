r"""The working memory that a piece of a sequence begins with, from what the pieces before it have written.

A chunk turns a memory M into (1 - r) M + r P^T (V - F M), which is affine in M once its shares r are known, and these
follow from the masses z alone, which add up. So over the pieces before a piece, in order,

    z <- log(exp(z) + exp(z_j));  M <- A_j M + B_j

A piece in which the sequence begins knows its own end: M is B, and A is 0. Another one writes a memory of K columns
more, which begins as (0 | I) and ends as (B | A). This takes two exchanges and a second pass over what is written; the
last rank, after which no one asks, leaves that pass out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from ..ops.adaptive_working_memory import end_position, read_and_write
from ..ops.library import accumulation_dtype
from ..ops.states import WorkingMemoryState
from .exchange import send_to_all
from .pieces import Pieces

NOTHING = -1e4
"""The mass of a memory that nothing was written to. Keys of twice as much write nothing, to such a one either."""


def memory_of_piece(
    k: Tensor, v: Tensor, chunk_size: int, visible_chunks: int, state: WorkingMemoryState | None, pieces: Pieces,
    group: ProcessGroup,
) -> WorkingMemoryState:  # fmt: skip
    """The state that the S sequences of a piece begin with.

    Args:
        k, v: (B, L, H, ...) as of the op. Where attention sees two chunks, those of the chunk before the piece come first
            if there is one.
        state: what the sequences that begin in the piece go on from; the row of one that began before it is any. None:
            all begin from nothing.
    """
    rows, added = visible_chunks * chunk_size, (visible_chunks - 1) * chunk_size if pieces.sources else 0
    if state is None:
        state = _new(k, v, rows, pieces.count if pieces.is_packed else len(k))
    if begins_here := pieces.open_begins_here():
        first, last, of_open = 0, k.shape[1], state
        if pieces.is_packed:
            first, last = (added + column for column in pieces.tail)
            of_open = WorkingMemoryState(*(x[-1:] for x in (state if pieces.count else _new(k, v, rows, 1))))
        written = k[:, first:last], v[:, first:last]
        memory, mass = _end(*written, chunk_size, visible_chunks, of_open)
        end = F.pad(memory, (0, k.shape[3]))
    else:
        steps = (k.shape[1] - added) // chunk_size * chunk_size
        written = k[:, :steps], v[:, :steps]
        mass = F.pad(written[0].to(state.mass.dtype), (0, 0, 0, 0, 1, 0), value=NOTHING).logsumexp(1)
    masses = _sent(mass, group)
    mass = torch.cat([torch.full_like(masses[:1], NOTHING), masses[[*pieces.sources]]]).logsumexp(0)
    if not begins_here:
        end = _change(*written, chunk_size, mass, is_asked=pieces.after is not None)
    ends = _sent(end, group)
    memory = ends[:0].sum(0)[..., : v.shape[3]]
    for source in pieces.sources:
        more, factor = ends[source].split([v.shape[3], k.shape[3]], -1)
        memory = factor @ memory + more
    if not pieces.sources:  # the sums of nothing take part in the backward, as on all ranks
        return state._replace(memory=state.memory + memory, mass=state.mass + masses[:0].sum(0))
    begun = _new(k, v, rows, len(memory))
    begun = begun._replace(memory=memory, mass=mass, k=begun.k + 2 * NOTHING, position=begun.position + rows)
    if not pieces.is_packed:
        return begun
    return WorkingMemoryState(*(torch.cat([one, others[1:]]) for one, others in zip(begun, state)))


def _new(k: Tensor, v: Tensor, rows: int, sequences: int) -> WorkingMemoryState:
    """The state of sequences that have not begun, for keys and values of so many rows."""
    (H, K), V = k.shape[2:], v.shape[3]
    memory = k.new_zeros(sequences, H, K, V, dtype=accumulation_dtype(k.dtype))
    keys, values = (k.new_zeros(sequences, rows, H, width) for width in (K, V))
    position = torch.zeros(sequences, dtype=torch.int64, device=k.device)
    return WorkingMemoryState(memory, torch.zeros_like(memory[..., 0]), keys, position, values)


def _end(
    k: Tensor, v: Tensor, chunk_size: int, visible_chunks: int, state: WorkingMemoryState
) -> tuple[Tensor, Tensor]:
    """Memory and mass after the steps of sequences that begin with a state."""
    _, memory, mass = read_and_write(k.detach(), k, v, chunk_size, visible_chunks, state, None, None, True)
    is_written = end_position(k, state, None, None) >= visible_chunks * chunk_size
    return memory, mass.where(is_written[:, None, None], NOTHING)


def _change(k: Tensor, v: Tensor, chunk_size: int, mass: Tensor, *, is_asked: bool) -> Tensor:
    """(R, H, K, V + K), B and A, of writing complete chunks to a memory of this mass; zeros, if it is not asked for."""
    (R, H, K), V = mass.shape, v.shape[3]
    if not is_asked:
        return (0 * mass)[..., None].expand(R, H, K, V + K)
    v = F.pad(v, (0, K))
    start = _new(k, v, chunk_size, R)
    identity = F.pad(torch.eye(K, dtype=mass.dtype, device=mass.device), (V, 0)).expand(R, H, K, V + K)
    start = start._replace(memory=identity, mass=mass, position=start.position + chunk_size)
    return read_and_write(k.detach(), k, v, chunk_size, 1, start, None, None, True)[1]


def _sent(value: Tensor, group: ProcessGroup) -> Tensor:
    """(P, ...) of all ranks."""
    values, _, work = send_to_all(value, None, group)
    work.wait()
    return values

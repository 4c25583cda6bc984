r"""The working memory of a piece of a sequence, continued from the pieces before it.

A chunk turns a memory M into (1 - r) M + r P^T (V - F M), in the letters of adaptive_working_memory_reference.py. The
shares r depend only on the masses z, so for given z this is affine in M. With the mass z_j that piece j writes and its
affine map M -> A_j M + B_j, the initial state of a piece follows from the pieces j before it, in order:

    z <- log(exp(z) + exp(z_j));  M <- A_j M + B_j

There are two exchanges. First, all ranks send z_j, which needs no pass. Then a piece in which the sequence begins runs
its op; its final memory is B, with A = 0. Meanwhile every other piece writes a memory with K more columns, from (0 | I)
to (B | A), and runs its op after the second exchange. The last rank skips (B | A), which no rank needs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from ..ops.adaptive_working_memory.adaptive_working_memory import num_cached_rows, read_and_write, read_write_and_keep
from ..ops.common.states import WorkingMemoryState, accumulation_dtype
from .exchange import send_to_all
from .pieces import Pieces

EMPTY_MASS = -1e4
"""Mass of a memory without writes. Keys of twice this value write nothing, even to such a memory."""


def memory_of_piece(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, visible_chunks: int, state: WorkingMemoryState | None,
    spans: Tensor | None, to_end: bool, inplace: bool, cached_rows: Tensor | None,
    pieces: Pieces, group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run :func:`read_write_and_keep` on a piece, with the memory of earlier pieces, to the end of the piece.

    Args:
        q, k, v, spans: those of the piece; if attention sees two chunks, with the chunk before it, if there is one.
        state: initial state of the sequences that begin in the piece, with arbitrary rows for others. None: empty.
        to_end: ignored; the op always runs to the end.
    """
    rows = visible_chunks * chunk_size
    added = (visible_chunks - 1) * chunk_size if pieces.sources else 0
    if state is None:
        state = _empty(k, v, rows, pieces.num_sequences if pieces.is_packed else len(k))
    chunks = (chunk_size, visible_chunks)
    begin, end = pieces.tail or (0, k.shape[1] - added)
    begin, end = added + begin, added + end
    open_state = WorkingMemoryState(*(x[-1:] for x in state)) if pieces.is_packed else state
    is_new = pieces.open_sequence_is_new() and len(open_state.mass) > 0
    if not is_new:
        begin, end = 0, (k.shape[1] - added) // chunk_size * chunk_size  # the positions that the piece writes
    open_k, open_v = k[:, begin:end], v[:, begin:end]
    masses = _gather(_mass_after(open_k, *chunks, open_state) if is_new else _mass(open_k), group)
    mass = torch.cat([torch.full_like(masses[:1], EMPTY_MASS), masses[[*pieces.sources]]]).logsumexp(0)
    if not pieces.sources:
        o, *after = read_write_and_keep(q, k, v, *chunks, state, spans, True, inplace)
        memory = after[0][-1:].sum(0, keepdim=True) if pieces.is_packed else after[0]  # without a sequence 0
        maps = _gather(F.pad(memory, (0, k.shape[3])), group)
        return o + (masses[:0].sum() + maps[:0].sum()), *after  # all ranks take part in the backward of exchanges
    if is_new:
        _, memory, _ = read_and_write(open_k.detach(), open_k, open_v, *chunks, open_state, None, True)
        own_map = F.pad(memory, (0, k.shape[3]))
    else:
        own_map = _affine_map(open_k, open_v, chunk_size, mass, is_needed=pieces.next_rank is not None)
    maps = _gather(own_map, group)
    memory = maps[:0].sum(0)[..., : v.shape[3]]
    for source in pieces.sources:
        b, a = maps[source].split([v.shape[3], k.shape[3]], -1)
        memory = a @ memory + b
    initial = _empty(k, v, rows, len(memory))
    initial = initial._replace(memory=memory, mass=mass, k=initial.k + 2 * EMPTY_MASS, position=initial.position + rows)
    if pieces.is_packed:
        initial = WorkingMemoryState(*(torch.cat([one, others[1:]]) for one, others in zip(initial, state)))
    return read_write_and_keep(q, k, v, *chunks, initial, spans, True, inplace)


def _empty(k: Tensor, v: Tensor, rows: int, sequences: int) -> WorkingMemoryState:
    """Empty state of `sequences` sequences, with room for `rows` keys and values each."""
    (H, K), V = k.shape[2:], v.shape[3]
    memory = k.new_zeros(sequences, H, K, V, dtype=accumulation_dtype(k.dtype))
    keys, values = (k.new_zeros(sequences, rows, H, width) for width in (K, V))
    position = torch.zeros(sequences, dtype=torch.int64, device=k.device)
    return WorkingMemoryState(memory, torch.zeros_like(memory[..., 0]), keys, position, values)


def _mass(k: Tensor) -> Tensor:
    """Mass (R, H, K) that keys (R, n, H, K) write."""
    return F.pad(k.to(accumulation_dtype(k.dtype)), (0, 0, 0, 0, 1, 0), value=EMPTY_MASS).logsumexp(1)


def _mass_after(k: Tensor, chunk_size: int, visible_chunks: int, state: WorkingMemoryState) -> Tensor:
    """Mass (R, H, K) after keys (R, n, H, K) that follow a state."""
    rows, n, device = state.k.shape[1], k.shape[1], k.device
    num_kept = num_cached_rows(state.position, chunk_size, visible_chunks)[:, None]
    num_written = ((num_kept + n) // chunk_size - visible_chunks + 1) * chunk_size
    cached, new = torch.arange(rows, device=device), num_kept + torch.arange(n, device=device)
    is_written = torch.cat([(cached < num_kept) & (cached < num_written), new < num_written], 1)
    has_memory = (state.position >= rows)[:, None, None]
    logits = torch.cat([state.k, k], 1).masked_fill(~is_written[..., None, None], 2 * EMPTY_MASS)
    return torch.logaddexp(state.mass.where(has_memory, EMPTY_MASS), _mass(logits))


def _affine_map(k: Tensor, v: Tensor, chunk_size: int, mass: Tensor, *, is_needed: bool) -> Tensor:
    """(B | A) (R, H, K, V + K) of complete chunks that are written to a memory with this mass; zeros if not needed."""
    (R, H, K), V = mass.shape, v.shape[3]
    if not is_needed:
        return mass.mul(0)[..., None].expand(R, H, K, V + K)
    v = F.pad(v, (0, K))
    identity = F.pad(torch.eye(K, dtype=mass.dtype, device=mass.device), (V, 0)).expand(R, H, K, V + K)
    start = _empty(k, v, chunk_size, R)
    start = start._replace(memory=identity, mass=mass, position=start.position + chunk_size)
    return read_and_write(k.detach(), k, v, chunk_size, 1, start, None, True)[1]


def _gather(value: Tensor, group: ProcessGroup) -> Tensor:
    """Gather the values of all ranks (P, ...)."""
    values, _, work = send_to_all(value, None, group)
    work.wait()
    return values

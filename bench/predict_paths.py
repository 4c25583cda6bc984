"""Paths of the CUDA kernels: launches, with their grids and loops, by sizes. For predict.py."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

Sizes = dict[str, int]
VALUE_LOADS = r"LDSM\S*\.MT88"  # transposed loads of values
SCORE_LOADS = r"LDSM\S*\.M88"  # loads of queries and keys


@dataclass
class Launch:
    """Grid and loop counts of a launch. An opcode names the loop that has most of it, outside of inner loops."""

    kernel: str
    blocks: float  # with work
    threads: int
    memory: float  # bytes of its tensors, each once
    shared: int = 0  # dynamic bytes per block
    trips: dict[str, float] = field(default_factory=dict)  # of the loop, by opcode
    work: dict[str, float] = field(default_factory=dict)  # instead of trips: how many of the opcode a warp runs
    once: float = 1  # share of the code outside of loops that a warp runs


# Paths: sizes -> launches. Dense bf16 batches of T tokens in whole chunks or long rows, aligned, without a state.
def attention_fwd(T: int, C: int, K: int, V: int, H: int, keys: int = 64) -> Iterator[Launch]:
    """chunked_attention_mma.cuh; a warp of 16 rows skips the tiles of keys that its rows do not see."""
    if V > 128:
        columns, keys = 256, keys if C >= 1024 else 32
    elif K > 128:
        columns, keys = 128, 32
    else:
        columns, keys = (128, 64) if V > 64 else (64, 48)
    depth = math.ceil(K / 64) * 64
    rows = range(0, C, 128)  # first rows of the blocks
    tiles = sum(math.ceil((row + 128) / keys) for row in rows) / len(rows)
    visible = sum((row + 16 * warp + 15) // keys + 1 for row in rows for warp in range(8)) / len(rows) / 8
    yield Launch(
        kernel=f"chunked_attention_fwd_mma_kernel<bf16, {columns}, {keys}>",
        blocks=T / 128 * H * math.ceil(V / columns),
        threads=256,
        memory=4 * T * H * (K + V),
        shared=2 * (128 * max(depth, columns) + keys * (depth + columns)),
        trips={VALUE_LOADS: visible, SCORE_LOADS: visible * depth / 64},
        work={"LDGSTS": tiles * keys * (depth + columns) / 2048},
    )


def attention_bwd(T: int, C: int, K: int, V: int, H: int) -> Iterator[Launch]:
    """chunked_attention_bwd.cuh, all rounds as one: n (n + 1) / 2 tiles of a chunk are on or below the diagonal."""
    n = math.ceil(C / 128)
    chunks = T / C * H
    tiles = chunks * n * (n + 1) / 2
    tile_bytes = 2 * 2 * 128 * 128  # P and dS

    def launch(name: str, *, blocks: float, slabs: float, memory: float, once: float, **trips: float) -> Launch:
        return Launch(
            kernel=f"chunked_attention_bwd_{name}_kernel<TensorProduct<bf16, true>>",
            blocks=blocks,
            threads=256,
            memory=memory + tiles * tile_bytes,
            shared=2 * 6 * 128 * 64,
            trips={"DEPBAR": slabs} | trips,
            work={"HMMA": 64 * slabs, "LDGSTS": 8 * slabs},
            once=once,
        )

    slabs = math.ceil(K / 64) + math.ceil(V / 64)
    yield launch("scores", blocks=tiles, slabs=slabs, memory=4 * T * H * (K + V), once=1)
    blocks = chunks * n * (2 * math.ceil(K / 128) + math.ceil(V / 128))
    # A block multiplies for keys or for queries: half of the code.
    yield launch("products", blocks=blocks, slabs=n + 1, memory=4 * T * H * (2 * K + V), once=0.5, SHFL=1)


def _cema(T: int, D: int, N: int, backward: bool, by_products: bool = False) -> Iterator[Launch]:
    """cema_scan.cuh, up to 32 modes; by products cema_mma_scan.cuh and cema_mma.cuh. Omits table, carry and finish."""
    tile = next(t for t in (32, 64, 128, 256, 512) if t == 512 or T * D * N >> 16 < t * t)
    lanes = max(4, 1 << (N - 1).bit_length())
    max_modes = 4 if lanes == 4 else 8
    scans = 2 if backward else 1
    tensor = 2 * T * D  # bytes
    states = T / tile * lanes * D * 8

    def launch(name: str, modes: int, memory: float, unroll: int, runs: int = 0, scans: int = 1) -> Launch:
        blocks = T / tile * math.ceil(D / 2 * lanes / modes / 128) * scans
        return Launch(name, blocks, 128, memory, trips={"FFMA": tile / unroll, r"LDG\.E\.64": runs})

    def launch_products(phase: str, memory: float, **stored: float) -> Launch:
        groups = math.ceil(T / 2048)
        columns = math.ceil(D / 16)
        trips = {"HMMA": 2 * 8, r"LDG\.E\.64": 2, r"LDG\.E\.128": 2, **stored}
        kernel = f"cema_mma_{phase}_kernel<{lanes // 4}>"
        return Launch(kernel, columns * groups, 256, memory, shared=67712, trips=trips)

    if by_products:
        states = T / 128 * lanes * D * 8
    if by_products and not backward:
        yield launch_products("local", tensor + states)
    elif by_products:
        groups = math.ceil(T / 1024)
        columns = math.ceil(D / 16)
        shares = min(groups, max(1, 264 // columns))
        rounds = groups / shares
        modes = rounds * math.ceil(lanes / 8)
        trips = {"HMMA": rounds * 8, "FFMA": 2 * 8 * modes, r"LDG\.E\.64": modes, r"LDG\.E\.128": rounds}
        kernel = f"cema_tiles_kernel<{1 if lanes == 4 else 2}>"
        yield Launch(kernel, columns * shares, 256, 2 * tensor + 4 * states, shared=92416, trips=trips)
        yield Launch("cema_cross_kernel<float>", D * lanes / 32, 512, 5 * states)
    else:
        yield launch(f"cema_local_kernel<bf16, {max_modes}>", max_modes, scans * (tensor + states), 8, scans=scans)
    if by_products:
        yield launch_products("output", 2 * tensor + states, **{r"STG\.E\.128": 4})
    else:
        output = f"cema_output_kernel<bf16, {max_modes}, {lanes // max_modes}, false, true>"
        yield launch(output, max_modes, 2 * tensor + states, 8, runs=1)
    if backward and not by_products:
        yield launch("cema_sums_kernel<bf16, true>", 4, 2 * (tensor + states), 4, runs=1)


def timestep_norm_fwd(T: int, D: int, G: int) -> Iterator[Launch]:
    """timestep_norm_fwd.cuh, groups of at most 256 channels. Omits the carry between the launches."""
    blocks = T / 64 * math.ceil(D / 256)
    yield Launch("timestep_norm_fwd_moments_kernel<bf16, 8, true>", blocks, 256, 2 * T * D)
    yield Launch("timestep_norm_fwd_kernel<bf16, 8, true>", blocks, 256, 4 * T * D + 12 * T * G)


def timestep_norm_bwd(T: int, D: int, G: int) -> Iterator[Launch]:
    """timestep_norm_bwd.cuh, groups of at most 256 channels. Omits the carry and the sums of the shares."""
    slices = math.ceil(D / 256)
    tiles = T / 64
    sums = 8 * T * G
    max_shares = min(max(2**18 // D, 32), 256)
    per_share = math.ceil(tiles / max_shares)
    yield Launch("timestep_norm_bwd_sums_kernel<bf16, 8, true>", tiles * slices, 256, 4 * T * D + 12 * T * G + sums)
    blocks = tiles / per_share * slices
    trips = {r"LDG\.E\.128": 2 * per_share}
    yield Launch("timestep_norm_bwd_kernel<bf16, 8>", blocks, 256, 6 * T * D + 12 * T * G + sums, trips=trips)


def normalized_qk_fwd(T: int, C: int, K: int, H: int) -> Iterator[Launch]:
    """normalized_qk_fwd.cuh, K up to 256: a warp takes 8 tokens of a head."""
    yield Launch("normalized_qk_fwd_warp_kernel<bf16, 8, true>", T / 8 * H / 4, 128, 6 * T * H * K, trips={"SHFL": 8})


def normalized_qk_bwd(T: int, C: int, K: int, H: int) -> Iterator[Launch]:
    """normalized_qk_bwd.cuh, K up to 256. Omits the sums of the shares."""
    part = max(16, math.ceil(T / 256 / 8) * 8)
    yield Launch(
        "normalized_qk_bwd_warp_kernel<bf16, 8, 1, true>", T / part * H, 256, 8 * T * H * K, trips={"SHFL": part / 8}
    )


def attention_step(T: int, cached: int, K: int, V: int, H: int) -> Iterator[Launch]:
    """chunked_attention_step.cuh: T sequences of one token, each with `cached` keys, K from 256. Omits the merge."""
    yield Launch(
        kernel="chunked_attention_step_kernel<bf16, 8>",
        blocks=T * H * math.ceil(cached / 64) * math.ceil(V / 512),
        threads=128,
        memory=2 * T * H * cached * (K + V),
        shared=4 * (K + 1024 + 64),
        trips={r"LDS\.128": 4 * math.ceil(K / 256), "CS2R": 8},
    )


def cema_step(T: int, D: int, N: int, steps: int) -> Iterator[Launch]:
    """cema_step.cuh: T sequences of one token."""
    blocks = math.ceil(D * N / 256)
    rows = min(T, max(1, 1024 // blocks))
    yield Launch("cema_step_kernel<bf16>", blocks * rows, 256, 16 * T * D * N + 4 * T * D, trips={"FFMA": T / rows})


KERNELS = {
    "attention forward": attention_fwd,
    "attention forward by short tiles": lambda **sizes: attention_fwd(**sizes, keys=32),  # with less shared memory
    "attention backward": attention_bwd,
    "cema forward": lambda **sizes: _cema(**sizes, backward=False, by_products=True),
    "cema forward by scans": lambda **sizes: _cema(**sizes, backward=False),  # also on cards with less shared memory
    "cema backward": lambda **sizes: _cema(**sizes, backward=True, by_products=True),
    "cema backward by scans": lambda **sizes: _cema(**sizes, backward=True),
    "timestep_norm forward": timestep_norm_fwd,
    "timestep_norm backward": timestep_norm_bwd,
    "normalized_qk forward": normalized_qk_fwd,
    "normalized_qk backward": normalized_qk_bwd,
    "attention forward of a token": attention_step,
    "cema forward of a token": cema_step,
}
_CEMA = ("cema forward", "cema forward by scans", "cema backward", "cema backward by scans")
ATTENTION = ("attention forward", "attention backward")
SHAPES: dict[str, tuple[Sizes, tuple[str, ...]]] = {
    "200M": ({"T": 16384, "C": 2048, "K": 256, "V": 2048, "H": 1}, (*ATTENTION, "attention forward by short tiles")),
    "7B": ({"T": 16384, "C": 4096, "K": 256, "V": 2048, "H": 4}, ATTENTION),
    "small heads": ({"T": 16384, "C": 2048, "K": 64, "V": 64, "H": 8}, ATTENTION),
    "cema of 8 x 2048": ({"T": 16384, "D": 1024, "N": 16}, _CEMA),
    "norm of 8 x 2048": ({"T": 16384, "D": 1024, "G": 32}, ("timestep_norm forward", "timestep_norm backward")),
    "qk of 8 x 2048": ({"T": 16384, "C": 2048, "K": 256, "H": 1}, ("normalized_qk forward", "normalized_qk backward")),
    "200M, 8 sequences": ({"T": 8, "cached": 2048, "K": 256, "V": 2048, "H": 1}, ("attention forward of a token",)),
    "cema, 8 sequences": ({"T": 8, "D": 1024, "N": 16, "steps": 1}, ("cema forward of a token",)),
}

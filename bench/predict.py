"""`python -m bench.predict`: lower bounds of a card's time for each kernel of a path, from its machine code.

Each instruction of the installed kernels counts as often as a warp runs it at the given shape: loops by their trips, the
rest once. Blocks for DropKey or unaligned elements are not counted. A floor is the time that one resource is busy; the
largest floor is the bound. bench/README.md says how to read the tables.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import megalodon_ops as mo
import torch

from . import gpu, sass
from . import sass_loops as loops

SIZES = dict[str, int]


@dataclass(frozen=True)
class Card:
    """Public figures of a card. An SM issues 4 warps' instructions and moves 128 bytes of shared memory a clock."""

    architecture: int
    sms: int
    ghz: float  # boost
    memory: float  # GB/s
    l2: int  # bytes a clock
    tensor: int  # bf16 operations per clock and SM, by mma.sync
    fp32: int  # lanes per SM
    shared: int  # KiB per SM
    warps: int  # most per SM
    source: str
    flash: tuple[float, float] | None = None  # TFLOP/s of flash attention for K = V = 64, forward and backward


_HOPPER = "H100 white paper; mma.sync reaches 0.62 of the peak's 4096 (arXiv 2402.13499); L2: not public, the A100's"
_FLASH = (262, 264)  # arXiv 2407.08608, figures 5 (causal, C 2048) and 6 (not causal), H100
CARDS = {
    "A100": Card(80, 108, 1.41, 2039, 5120, 2048, 64, 164, 64, "A100 white paper, 80 GB SXM"),
    "H100": Card(90, 132, 1.755, 3352, 5120, 2540, 128, 228, 64, _HOPPER, _FLASH),
    "H200": Card(90, 132, 1.755, 4800, 5120, 2540, 128, 228, 64, f"H200 data sheet; {_HOPPER}", _FLASH),
    "4090": Card(
        89, 128, 2.52, 1008, 2048, 512, 128, 100, 48, "Ada white paper; L2 5 TB/s, as chipsandcheese.com found"
    ),
}
SPECIAL = 16  # lanes per SM for MUFU
AVOID = r"^(LDG|STG)\S*\.U?16|-?0x(d2511f53|cd9e8d57|2daee0ad|326172a9)"  # single 16-bit elements; Philox's factors
VALUE_LOADS, SCORE_LOADS = r"LDSM\S*\.MT88", r"LDSM\S*\.M88"  # transposed loads of values, loads of queries and keys


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
def attention_fwd(T: int, C: int, K: int, V: int, H: int) -> Iterator[Launch]:
    """chunked_attention_mma.cuh; a warp of 16 rows skips the tiles of keys that its rows do not see."""
    columns, keys = (256, 32) if V > 128 else (128, 32 if K > 128 else 64) if V > 64 or K > 128 else (64, 48)
    depth, rows = math.ceil(K / 64) * 64, range(0, C, 128)
    tiles = sum(math.ceil((row + 128) / keys) for row in rows) / len(rows)
    visible = sum((row + 16 * warp + 15) // keys + 1 for row in rows for warp in range(8)) / len(rows) / 8
    yield Launch(
        f"chunked_attention_fwd_mma_kernel<bf16, {columns}, {keys}>", T / 128 * H * math.ceil(V / columns), 256,
        memory=4 * T * H * (K + V), shared=2 * (128 * max(depth, columns) + keys * (depth + columns)),
        trips={VALUE_LOADS: visible, SCORE_LOADS: visible * depth / 64}, work={"LDGSTS": tiles * keys * (depth + columns) / 2048},
    )  # fmt: skip


def attention_bwd(T: int, C: int, K: int, V: int, H: int) -> Iterator[Launch]:
    """chunked_attention_bwd.cuh, all rounds as one: n (n + 1) / 2 tiles of a chunk are on or below the diagonal."""
    n, chunks = math.ceil(C / 128), T / C * H
    tiles = chunks * n * (n + 1) / 2
    k_tiles, v_tiles, tile_bytes = math.ceil(K / 128), math.ceil(V / 128), 2 * 2 * 128 * 128  # P and dS

    def launch(name: str, blocks: float, slabs: float, memory: float, once: float, **trips: float) -> Launch:
        work, trips = {"HMMA": 64 * slabs, "LDGSTS": 8 * slabs}, {"DEPBAR": slabs} | trips
        kernel = f"chunked_attention_bwd_{name}_kernel<TensorProduct<bf16, true>>"
        return Launch(kernel, blocks, 256, memory + tiles * tile_bytes, 2 * 6 * 128 * 64, trips, work, once)

    yield launch("scores", tiles, math.ceil(K / 64) + math.ceil(V / 64), 4 * T * H * (K + V), 1)
    # A block multiplies for keys or for queries.
    yield launch("products", chunks * n * (2 * k_tiles + v_tiles), n + 1, 4 * T * H * (2 * K + V), 0.5, SHFL=1)


def _cema(T: int, D: int, N: int, backward: bool, by_products: bool = False) -> Iterator[Launch]:
    """cema_scan.cuh, up to 32 modes; by products cema_mma_scan.cuh and cema_mma.cuh. Omits table, carry and finish."""
    tile = next(t for t in (32, 64, 128, 256, 512) if t == 512 or T * D * N >> 16 < t * t)
    lanes = max(4, 1 << (N - 1).bit_length())
    max_modes, scans = 4 if lanes == 4 else 8, 1 + backward
    tensor, states = 2 * T * D, T / tile * lanes * D * 8

    def launch(name: str, modes: int, memory: float, unroll: int, runs: int = 0, scans: int = 1) -> Launch:
        blocks = T / tile * math.ceil(D / 2 * lanes / modes / 128) * scans
        return Launch(name, blocks, 128, memory, trips={"FFMA": tile / unroll, r"LDG\.E\.64": runs})

    def launch_products(phase: str, memory: float, **stored: float) -> Launch:
        groups, columns = math.ceil(T / 2048), math.ceil(D / 16)
        trips = {"HMMA": 2 * 8, r"LDG\.E\.64": 2, r"LDG\.E\.128": 2, **stored}
        kernel = f"cema_mma_{phase}_kernel<{lanes // 4}>"
        return Launch(kernel, columns * groups, 256, memory, 67712, trips)

    if by_products:
        tile, states = 128, T / 128 * lanes * D * 8
    if by_products and not backward:
        yield launch_products("local", tensor + states)
    elif by_products:
        groups, columns = math.ceil(T / 1024), math.ceil(D / 16)
        shares = min(groups, max(1, 264 // columns))
        mode_trips = groups / shares * math.ceil(lanes / 8)
        yield Launch(
            f"cema_tiles_kernel<{1 if lanes == 4 else 2}>", columns * shares, 256, 2 * tensor + 4 * states, 92416,
            {"HMMA": groups / shares * 8, "FFMA": 2 * 8 * mode_trips, r"LDG\.E\.64": mode_trips, r"LDG\.E\.128": groups / shares},
        )  # fmt: skip
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


KERNELS = {
    "attention forward": attention_fwd,
    "attention backward": attention_bwd,
    "cema forward": lambda **sizes: _cema(**sizes, backward=False, by_products=True),
    "cema forward by scans": lambda **sizes: _cema(**sizes, backward=False),  # also on cards with less shared memory
    "cema backward": lambda **sizes: _cema(**sizes, backward=True, by_products=True),
    "cema backward by scans": lambda **sizes: _cema(**sizes, backward=True),
    "timestep_norm forward": timestep_norm_fwd,
}
_CEMA = ("cema forward", "cema forward by scans", "cema backward", "cema backward by scans")
_ATTENTION = ("attention forward", "attention backward")
SHAPES: dict[str, tuple[SIZES, tuple[str, ...]]] = {
    "200M": ({"T": 16384, "C": 2048, "K": 256, "V": 2048, "H": 1}, _ATTENTION),
    "7B": ({"T": 16384, "C": 4096, "K": 256, "V": 2048, "H": 4}, _ATTENTION),
    "small heads": ({"T": 16384, "C": 2048, "K": 64, "V": 64, "H": 8}, _ATTENTION),
    "cema of 8 x 2048": ({"T": 16384, "D": 1024, "N": 16}, _CEMA),
    "norm of 8 x 2048": ({"T": 16384, "D": 1024, "G": 32}, ("timestep_norm forward",)),
}


def library(path: str, card: Card, T: int, C: int, K: int, V: int, H: int) -> tuple[str, float] | None:
    """Name and microseconds of torch's library path for attention; None without a public rate.

    Matrix products: (1 + 1/8) C / 2 pairs a row at 0.6 of the tensor cores' peak, 4 or 18 bytes a pair at 3/4 of the memory
    rate. Flash attention: C / 2 pairs a row; its backward has 2.5 times the products of its forward.
    """
    forward = path == "attention forward"
    if K == V == 64 and card.flash:
        return "flash attention", (1 if forward else 2.5) * 2 * T * H * C / 2 * (K + V) / card.flash[not forward] / 1e6
    if V < 2048:
        return None
    peak = card.sms * card.ghz * (4096 if card.architecture == 90 else card.tensor) / 1e3  # TFLOP/s
    pairs, width = T * H * C / 2 * 9 / 8, K + 8 + V if forward else 3 * K + 8 + 2 * V
    return "products", 2 * pairs * width / (0.6 * peak) / 1e6 + pairs * (4 if forward else 18) / (
        0.75 * card.memory
    ) / 1e3


def instructions(code: loops.Code, launch: Launch) -> Counter[str]:
    """Instructions that a warp runs, by opcode."""
    outside, bodies = code.bodies(AVOID)
    total = Counter({opcode: count * launch.once for opcode, count in outside.items()})
    for counts, are_trips in ((launch.trips, True), (launch.work, False)):
        for opcode, times in counts.items():
            body = max(bodies, key=lambda body, opcode=opcode: count_matching(body, opcode))
            if not count_matching(body, opcode):
                raise ValueError(f"{launch.kernel}: expected a loop with {opcode}, got none")
            for name, count in body.items():
                total[name] += count * times / (1 if are_trips else count_matching(body, opcode))
    return total


def count_matching(counts: Counter[str], opcode: str) -> float:
    """Number of instructions whose opcode matches from its beginning."""
    return sum(count for name, count in counts.items() if re.match(opcode, name))


def access_bytes(opcode: str) -> int:
    """Bytes that one access of a warp moves."""
    if opcode.startswith("LDSM"):
        return 128 * int(opcode[-1]) if opcode[-1] in "24" else 128
    width = re.search(r"\.[US]?(128|64|16|8)\b", opcode)
    return 32 * (int(width[1]) // 8 if width else 4)


def floors(code: loops.Code, launch: Launch, card: Card) -> dict[str, float]:
    """Microseconds that each resource is busy, if no SM waits for another one."""
    counts, warps = instructions(code, launch), launch.blocks * launch.threads / 32

    def count(pattern: str) -> float:
        return count_matching(counts, pattern)

    def moved_bytes(pattern: str) -> float:
        return sum(n * access_bytes(opcode) for opcode, n in counts.items() if re.match(pattern, opcode))

    cycles = {
        "issue": counts.total() / 4,
        "shared": moved_bytes("LDS|STS|LDGSTS") / 128,
        "tensor": (4096 * count(r"HMMA\.16816") + 2048 * count(r"HMMA\.1688\b")) / card.tensor,
        "fp32": 32 * count(r"F(FMA|MUL|ADD)\b") / card.fp32,
        "special": 32 * count("MUFU") / SPECIAL,
    }
    by_resource = {name: n * warps / min(launch.blocks, card.sms) / card.ghz / 1e3 for name, n in cycles.items()}
    l2 = moved_bytes("LDG|STG") * warps / card.l2 / card.ghz / 1e3
    return by_resource | {"L2": l2, "memory": launch.memory / card.memory / 1e3}


def blocks_at_once(code: loops.Code, launch: Launch, card: Card) -> int:
    """Blocks that fit on one SM, by its warps, registers (65,536) and shared memory."""
    warps, kernel = launch.threads // 32, code.kernel
    registers = 65536 // (warps * math.ceil(kernel.registers / 8) * 8 * 32)
    return max(1, min(card.warps // warps, registers, (card.shared << 10) // (launch.shared + kernel.shared + 1024)))


def table(
    codes: dict[str, loops.Code], card: Card, shapes: Iterable[str], measured: dict[tuple[str, str], float]
) -> str:
    """Markdown tables: floors of each launch; then those of each path, with library and measured times."""
    names = ("issue", "shared", "tensor", "fp32", "special", "L2", "memory")
    rows = [("kernel", "blocks", "waves", *names, "binds")]
    path_rows = [("shape", "path", "least us", "by libraries", "measured us")]
    for shape in shapes:
        sizes, paths = SHAPES[shape]
        for path in paths:
            least = 0.0
            for launch in KERNELS[path](**sizes):
                code = codes[launch.kernel]
                times = floors(code, launch, card)
                binding = max(times, key=times.__getitem__)
                least += times[binding]
                waves = launch.blocks / card.sms / blocks_at_once(code, launch, card)
                kernel = launch.kernel.replace("chunked_", "").replace("_kernel", "")
                cells = (f"{times[name]:.0f}" for name in names)
                rows.append((f"`{kernel}`", f"{launch.blocks:.0f}", f"{waves:.1f}", *cells, binding))
            other = library(path, card, **sizes) if path in _ATTENTION else None
            us = measured.get((shape, path))
            cells = "{} {:.0f}".format(*other) if other else "", f"{us:.0f}" if us else ""
            path_rows.append((shape, path, f"{least:.0f}", *cells))
    return f"{_markdown(rows)}\n\n{_markdown(path_rows)}"


def _markdown(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def measure(shapes: Iterable[str], device: str = "cuda") -> dict[tuple[str, str], float]:
    """Microseconds of each path's call on the current GPU, best of several."""
    found = {}
    for shape in shapes:
        sizes, paths = SHAPES[shape]
        call, inputs = _call(sizes, device)
        out = call()
        backward = partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True)
        for path in paths:
            if path.endswith("by scans"):  # not used at these sizes
                continue
            way = {"forward": call, "backward": backward}[path.split()[1]]
            gpu.timed(way, 3)
            found[shape, path] = 1e6 * min(gpu.timed(way, 20)[0] for _ in range(5))
    return found


def _call(sizes: SIZES, device: str) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A call of the op at these sizes, and its inputs."""

    def new(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(size, dtype=dtype, device=device).requires_grad_()

    bf16, T, D, N = torch.bfloat16, sizes["T"], sizes.get("D", 0), sizes.get("N", 0)
    if "K" in sizes:
        inputs = [new(T // sizes["C"], sizes["C"], sizes["H"], sizes[width], dtype=bf16) for width in "KKV"]
        return partial(mo.chunked_attention, *inputs, chunk_size=sizes["C"], scale=sizes["K"] ** -0.5), inputs
    if N:
        q = torch.polar(torch.full((D, N), 0.9), torch.rand(D, N)).to(device).requires_grad_()
        inputs = [new(8, T // 8, D, dtype=bf16), new(D, N), q, new(D, N, dtype=torch.complex64), new(D)]
        return partial(mo.cema, *inputs), inputs
    inputs = [new(8, T // 8, D, dtype=bf16), new(D), new(D)]
    return partial(mo.timestep_norm, *inputs, num_groups=sizes["G"]), inputs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__)
    parser.add_argument("--card", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--measure", action="store_true", help="only the current GPU, with measured times of its calls")
    options = parser.parse_args()
    cards, measured = options.card, {}
    if options.measure:
        name = torch.cuda.get_device_name()
        cards = [card for card in CARDS if card in name]
        if not cards:
            raise SystemExit(f"predict: expected one of {', '.join(CARDS)}, got {name}; add its figures to CARDS.")
        measured = measure(options.shape)
    paths = [(path, *SHAPES[shape]) for shape in options.shape for path in SHAPES[shape][1]]
    names = {launch.kernel for path, sizes, _ in paths for launch in KERNELS[path](**sizes)}
    for name in cards:
        card = CARDS[name]
        codes = loops.codes_of(sass.installed(), names, card.architecture)
        (architecture,) = {code.kernel.architecture for code in codes.values()}
        print(f"\n## {name}, {card.sms} SMs at {card.ghz} GHz; code for sm_{architecture}\n\n{card.source}\n")
        print(table(codes, card, options.shape, measured))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

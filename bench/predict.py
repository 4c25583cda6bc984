"""`python -m bench.predict`: lower bounds of a card's time for each kernel of a path, from its machine code.

Each instruction of the installed kernels counts as often as a warp runs it at the given shape: loops by their trips, the
rest once. Blocks for DropKey or unaligned elements are not counted. A floor is the time that one resource is busy; the
largest floor is the bound. bench/README.md says how to read the tables.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import megalodon_ops as mo
import torch
from megalodon_ops.ops.chunked_attention import dense_attention

from . import gpu, predict_decoding, sass
from . import sass_loops as loops
from .predict_cards import CARDS, Card, card_of
from .predict_paths import ATTENTION, KERNELS, SHAPES, Launch, Sizes


SPECIAL = 16  # lanes per SM for MUFU
AVOID = r"^(LDG|STG)\S*\.U?16|-?0x(d2511f53|cd9e8d57|2daee0ad|326172a9)"  # single 16-bit elements; Philox's factors


def library(path: str, card: Card, T: int, C: int, K: int, V: int, H: int) -> tuple[str, float] | None:
    """Name and microseconds of torch's library path for attention; None without a public rate.

    Matrix products: (1 + 1/8) C / 2 pairs a row at 0.6 of the tensor cores' peak, 4 or 18 bytes a pair at 3/4 of the memory
    rate. Flash attention: C / 2 pairs a row; its backward has 2.5 times the products of its forward.
    """
    forward = path == "attention forward"
    forward_rate, backward_rate = card.flash.get(K, (None, None)) if K == V else (None, None)
    if rate := forward_rate if forward else backward_rate:
        return "flash attention", (1 if forward else 2.5) * 2 * T * H * C / 2 * (K + V) / rate / 1e6
    if V < 2048:
        return None
    peak = card.sms * card.ghz * (4096 if card.architecture == 90 else card.tensor) / 1e3  # TFLOP/s
    pairs = T * H * C / 2 * 9 / 8
    width = K + 8 + V if forward else 3 * K + 8 + 2 * V
    products = 2 * pairs * width / (0.6 * peak) / 1e6
    moves = pairs * (4 if forward else 18) / (0.75 * card.memory) / 1e3
    return "products", products + moves


def instructions(code: loops.Code, launch: Launch) -> Counter[str]:
    """Instructions that a warp runs, by opcode. A launch gives a loop's trips, or how often its opcode runs."""
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
    counts = instructions(code, launch)
    warps = launch.blocks * launch.threads / 32

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
    warps = launch.threads // 32
    registers = warps * 32 * math.ceil(code.kernel.registers / 8) * 8  # allotted in units of 8 per thread
    shared = launch.shared + code.kernel.shared + 1024  # 1 KiB is reserved per block
    return max(1, min(card.warps // warps, 65536 // registers, (card.shared << 10) // shared))


Times = dict[tuple[str, str], tuple[float, float | None]]
"""Microseconds by shape and path: of the kernels and, for attention, of the libraries"""


def table(codes: dict[str, loops.Code], card: Card, shapes: Iterable[str], measured: Times) -> str:
    """Markdown tables: floors of each launch; then those of each path, beside libraries and measured times."""
    rows, path_rows = rows_of(codes, card, shapes, measured)
    return f"{_markdown(rows)}\n\n{_markdown([PATH_HEAD, *path_rows])}"


PATH_HEAD = ("shape", "path", "least us", "by kernels", "by libraries", "by libraries, predicted")
Rows = list[tuple[str, ...]]


def rows_of(codes: dict[str, loops.Code], card: Card, shapes: Iterable[str], measured: Times) -> tuple[Rows, Rows]:
    """Rows of both tables, those of launches with their head."""
    names = ("issue", "shared", "tensor", "fp32", "special", "L2", "memory")
    rows = [("kernel", "blocks", "waves", *names, "binds")]
    path_rows = []
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
            other = library(path, card, **sizes) if path in ATTENTION else None
            times = map(_us, measured.get((shape, path), (None, None)))
            path_rows.append((shape, path, f"{least:.1f}", *times, "{} {:.0f}".format(*other) if other else ""))
    return rows, path_rows


def times_without_floors(measured: Times) -> Rows:
    """Rows of the second table for a card that CARDS lacks."""
    return [(shape, path, "", _us(ours), _us(library), "") for (shape, path), (ours, library) in measured.items()]


def _us(time: float | None) -> str:
    return f"{time:.1f}" if time else ""


def _markdown(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def measure(shapes: Iterable[str], device: str = "cuda") -> Times:
    """Time each path's call on the current GPU, best of 20, by kernels and by the libraries of its shape.

    Each call finds nothing of its tensors in the L2 cache, as floors assume. Libraries are timed in both directions, also
    where the op uses the kernels in one of them.
    """
    with torch.device(device):
        flush = gpu.cache_flusher() if device == "cuda" else lambda: None
    found = {}
    libraries = [row._replace(directions=dense_attention.DIRECTIONS) for row in dense_attention.TABLE]
    for shape in shapes:
        sizes, paths = SHAPES[shape]
        for path in paths:
            if path.endswith(("by scans", "by short tiles")):  # not used at these sizes
                continue
            times = []
            for table in ((), libraries) if path in ATTENTION else ((),):  # an empty table: kernels
                with patch.object(dense_attention, "TABLE", table), torch.set_grad_enabled("a token" not in path):
                    call, inputs = _call(sizes, device)
                    out = call()
                    if path.split()[1] == "backward":
                        outs = out if isinstance(out, tuple) else (out,)
                        douts = [torch.randn_like(o) for o in outs]
                        call = partial(torch.autograd.grad, outs, inputs, douts, retain_graph=True)
                    gpu.timed(call, 3)
                    seconds = []
                    for _ in range(20):
                        flush()
                        seconds.append(gpu.timed(call, 1)[0])
                    times.append(1e6 * min(seconds))
            found[shape, path] = times[0], times[1] if len(times) > 1 else None
    return found


def _call(sizes: Sizes, device: str) -> tuple[Callable[[], object], list[torch.Tensor]]:
    """A call of the op at these sizes, and its inputs."""

    def new(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(size, dtype=dtype, device=device).requires_grad_()

    bf16 = torch.bfloat16
    T = sizes["T"]
    D, N, H = (sizes.get(name, 0) for name in "DNH")  # 0: a size that the op lacks
    if "cached" in sizes:
        C = sizes["cached"]
        inputs = [new(T, 1, H, sizes[width], dtype=bf16) for width in "KKV"]
        cache = [new(T, C, H, sizes[width], dtype=bf16).detach() for width in "KV"]
        state = mo.AttentionState(*cache, torch.full((T,), C - 1, device=device))
        return partial(mo.chunked_attention, *inputs, chunk_size=C, scale=sizes["K"] ** -0.5, state=state), inputs
    if "V" in sizes:
        inputs = [new(T // sizes["C"], sizes["C"], H, sizes[width], dtype=bf16) for width in "KKV"]
        return partial(mo.chunked_attention, *inputs, chunk_size=sizes["C"], scale=sizes["K"] ** -0.5), inputs
    if H:
        width = H * sizes["K"]
        inputs = [new(8, T // 8, width, dtype=bf16), new(2, width), new(2, width)]
        return partial(mo.normalized_qk, *inputs, num_heads=H, chunk_size=sizes["C"]), inputs
    if N:
        rows = T if "steps" in sizes else 8
        q = torch.polar(torch.full((D, N), 0.9), torch.rand(D, N)).to(device).requires_grad_()
        inputs = [new(rows, T // rows, D, dtype=bf16), new(D, N), q, new(D, N, dtype=torch.complex64), new(D)]
        return partial(mo.cema, *inputs), inputs
    inputs = [new(8, T // 8, D, dtype=bf16), new(D), new(D)]
    return partial(mo.timestep_norm, *inputs, num_groups=sizes["G"]), inputs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__)
    parser.add_argument("--card", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--measure", action="store_true", help="only the current GPU, with measured times of its calls")
    parser.add_argument("--json", type=Path, help="file for the rows of the last card's second table")
    options = parser.parse_args()
    cards, measured = options.card, {}
    if options.measure:
        name = torch.cuda.get_device_name()
        card = card_of(name)
        cards = [card] if card else []
        measured = measure(options.shape)
        if not card:
            rows = times_without_floors(measured)
            print(f"\n## {name}\n\nNo floors: CARDS has no figures of this card.\n\n{_markdown([PATH_HEAD, *rows])}")
            if options.json:
                options.json.write_text(json.dumps(rows))
            return 0
    names = set()
    for sizes, paths in map(SHAPES.get, options.shape):
        names |= {launch.kernel for path in paths for launch in KERNELS[path](**sizes)}
    for name in cards:
        card = CARDS[name]
        codes = loops.codes_of(sass.installed(), names, card.architecture)
        (architecture,) = {code.kernel.architecture for code in codes.values()}
        print(f"\n## {name}, {card.sms} SMs at {card.ghz} GHz; code for sm_{architecture}\n\n{card.source}\n")
        print(table(codes, card, options.shape, measured))
        if options.json:
            options.json.write_text(json.dumps(rows_of(codes, card, options.shape, measured)[1]))
    decoding = predict_decoding.rows("mega200M", {name: CARDS[name] for name in cards})
    print(f"\n## A decoded token of mega200M in bfloat16\n\n{_markdown(decoding)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

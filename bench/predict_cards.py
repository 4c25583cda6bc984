"""Public figures of cards, for the predictions of predict.py."""

from dataclasses import dataclass, field


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
    flash: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    """TFLOP/s of flash attention by K = V, forward and backward; None: not published"""


# L2 rates in TB/s, by the L2 benchmark of github.com/te42kyfo/gpu-benches with 512 KB a block, for sets of 12 to 25 MB.
# Other cards take the rate of the nearest one.
#   A100: 5.4 (white paper: 7.2); H100 PCIe: 6.9; L40: 5.2
#   H200: 9.7 to 9.9 at a clock of up to 1.98 GHz, here 9.0 for 1.755 GHz
_HOPPER = "H100 white paper; mma.sync reaches 0.62 of the peak's 4096 (arXiv 2402.13499); L2: gpu-benches"
_FLASH = {64: (262, 264), 128: (298, 291), 256: (278, None)}
"""arXiv 2407.08608, figures 5 (causal, C 2048) and 6 (not causal), H100"""
_BLACKWELL = "data sheet of the DGX: 75 TFLOP/s in fp32, 8 TB/s; mma.sync, L2: the H100's, unverified"
_ADA = "Ada white paper; L2 5 TB/s, as chipsandcheese.com found on the 4090 and gpu-benches on the L40"
# Columns: architecture, SMs, GHz, memory, L2, tensor, fp32, shared, warps, source, and flash where it is published.
CARDS = {
    "A100": Card(80, 108, 1.41, 2039, 3840, 2048, 64, 164, 64, "A100 white paper, 80 GB SXM; L2: gpu-benches"),
    "A100 40GB": Card(80, 108, 1.41, 1555, 3840, 2048, 64, 164, 64, "A100 white paper, 40 GB; L2: gpu-benches"),
    "H100": Card(90, 132, 1.755, 3352, 5120, 2540, 128, 228, 64, _HOPPER, _FLASH),
    "H100 PCIe": Card(90, 114, 1.755, 2039, 3930, 2540, 128, 228, 64, f"data sheet: 51 TFLOP/s in fp32; {_HOPPER}"),
    "H100 NVL": Card(90, 132, 1.785, 3938, 5120, 2540, 128, 228, 64, f"data sheet: 60 TFLOP/s in fp32; {_HOPPER}"),
    "H200": Card(90, 132, 1.755, 4800, 5120, 2540, 128, 228, 64, f"H200 data sheet; {_HOPPER}", _FLASH),
    "L40S": Card(89, 142, 2.52, 864, 2048, 1024, 128, 100, 48, f"data sheet: 91.6 and 362 TFLOP/s; {_ADA}"),
    "4090": Card(89, 128, 2.52, 1008, 2048, 512, 128, 100, 48, _ADA),
    "B200": Card(100, 148, 1.965, 8000, 5120, 2540, 128, 228, 64, _BLACKWELL),
}
"""Cards by words that torch's name for them has"""


def card_of(name: str) -> str | None:
    """Most specific key in CARDS for the card that torch calls `name`; None if there is none, or for a slice (MIG)."""
    words = name.replace("-", " ").split()
    found = [] if "MIG" in words else [key for key in CARDS if set(key.split()) <= set(words)]
    return max(found, key=lambda key: len(key.split()), default=None)

"""What devices can do, as their makers say: rates that no program passes, not rates that one was measured to reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_GB, _TFLOPS = 1e9, 1e12
_SUPERPOD = "https://docs.nvidia.com/dgx-superpod/reference-architecture-scalable-infrastructure-h100/latest/dgx-superpod-components.html"
_BASEPOD = "https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai/latest/core-components.html"


@dataclass(frozen=True)
class Card:
    """One device: peak rates, memory, and what joins it to others.

    Example:
        >>> from megalodon_ops.distributed.plan import CARDS
        >>> f"{CARDS['a100-80'].bfloat16 / 1e12:g} TFLOP/s"
        '312 TFLOP/s'
    """

    name: str
    bfloat16: float
    """operations a second of dense matrix products in bfloat16"""
    float32: float
    """operations a second in float32, by the vector units, as torch computes matrix products unless told otherwise"""
    memory: float
    """bytes; a vendor's GB is read as 1e9, which is less than a card has and leaves room for the driver's context"""
    bandwidth: float
    """bytes a second of that memory"""
    link: float
    """bytes a second that a device receives from others of its node"""
    network: float
    """bytes a second that a device receives from other nodes: the node's adapters over its devices"""
    source: str
    kind: str = "cuda"
    """"cuda" or "cpu": which of the package's paths runs"""

    def peak(self, dtype: torch.dtype) -> float:
        """Operations a second of matrix products in this dtype."""
        return self.bfloat16 if dtype in (torch.bfloat16, torch.float16) else self.float32


_A100 = dict(bfloat16=312 * _TFLOPS, float32=19.5 * _TFLOPS, link=300 * _GB, network=25 * _GB)
_A100_SOURCE = (
    "https://glennklockwood.com/garden/processors/A100 (after NVIDIA's data sheet: 312 TFLOPS dense, NVLink 300 + 300 GB/s); "
    f"200 Gb/s a device, half of DGX H100's: {_SUPERPOD}"
)
_HOPPER = dict(bfloat16=1979 / 2 * _TFLOPS, float32=67 * _TFLOPS, link=450 * _GB, network=50 * _GB)
CARDS = {
    card.name: card
    for card in (
        Card("a100-40", memory=40 * _GB, bandwidth=1555 * _GB, source=_A100_SOURCE, **_A100),
        Card("a100-80", memory=80 * _GB, bandwidth=2039 * _GB, source=_A100_SOURCE, **_A100),
        Card(
            "h100", memory=80 * _GB, bandwidth=3350 * _GB, **_HOPPER,
            source="https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html (SXM; 1,979 TFLOPS are with sparsity, half "
            f"of it dense; NVLink 900 GB/s both ways); 400 Gb/s a device: {_BASEPOD}",
        ),
        Card(
            "h200", memory=141 * _GB, bandwidth=4800 * _GB, **_HOPPER,
            source="https://itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html (H100's chip with other memory); "
            f"400 Gb/s a device: {_BASEPOD}",
        ),
        Card(
            "b200", bfloat16=2250 * _TFLOPS, float32=80 * _TFLOPS, memory=180 * _GB, bandwidth=8000 * _GB, link=900 * _GB,
            network=50 * _GB,
            source="https://glennklockwood.com/garden/processors/B200 (HGX, 1,000 W); 1,440 GB in eight: "
            f"https://docs.nvidia.com/dgx/dgxb200-user-guide/introduction-to-dgxb200.html; 400 Gb/s a device: {_BASEPOD}",
        ),
    )
}  # fmt: skip
"""Cards by name; a CPU has no data sheet that fits all, so its figures are the caller's"""

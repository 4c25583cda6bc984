"""`plan --params` and `plan --memory`: a table of configurations between the presets, and what makes each fit.

Depth grows with width as from preset to preset, from 43 channels a layer to 128. Of Transformers, the loss depends
strongly on the number of parameters, and very weakly on depth against width (Kaplan et al., arXiv 2001.08361, section 3).
"""

import bisect
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy
import torch

from megalodon_ops import Megalodon, MegalodonConfig
from megalodon_ops.cli.models import model_config
from megalodon_ops.distributed.plan import Plan
from megalodon_ops.ops.common.memory import available_memory
from megalodon_ops.training import adamw

PRESETS = ("small", "mega200M", "mega1.3B", "mega7.3B")
WIDTHS = (128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096)
ROWS = 3
"""Configurations to print on each side of the wanted number of parameters, or of the largest that fits"""


def configurations(flags: dict[str, Any], vocab_size: int | None) -> list[MegalodonConfig]:
    """Return a configuration for each width, shaped as the largest preset of at most this width, smallest first."""
    presets = [MegalodonConfig.preset(name) for name in PRESETS]
    widths = [preset.model_dim for preset in presets]
    depths = [preset.num_layers for preset in presets]
    result = []
    for width in WIDTHS:
        number = bisect.bisect(widths, width) - 1
        depth = round(math.exp(numpy.interp(math.log(width), numpy.log(widths), numpy.log(depths))))
        shape = dict(model_dim=width, num_layers=depth, num_heads=presets[number].num_heads)
        config = model_config(PRESETS[number], {**shape, **flags}, ends=False)
        config = dataclasses.replace(config, vocab_size=vocab_size or config.vocab_size)
        if config not in result:  # flags may fix the width
            result.append(config)
    return result


def show(
    configs: list[MegalodonConfig], costs: Callable[..., Plan], batch: int, params: int | None, memory: int | None,
    measure: bool,
) -> None:  # fmt: skip
    """Print the configurations near `params`, or near the largest whose costs(config, batch) fit in `memory` bytes."""
    sizes = [config.num_parameters() for config in configs]
    if params is not None:
        middle = min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i] / params)))
    else:
        middle = bisect.bisect(configs, memory, key=lambda config: costs(config, batch).bytes) - 1
    columns = "parameters    dim  layers  heads  chunk       GB  GB, --layerwise-ckpt" + "  tokens/s" * measure
    print(columns + "  fits" * (memory is not None))
    for config in configs[max(middle - ROWS, 0) : middle + ROWS + 1]:
        plain = costs(dataclasses.replace(config, layerwise_ckpt=False), batch).bytes / 1e9
        recomputed = costs(dataclasses.replace(config, layerwise_ckpt=True), batch).bytes / 1e9
        line = f"{config.num_parameters():>10,} {config.model_dim:6} {config.num_layers:7} {config.num_heads:6}"
        line += f" {config.chunk_size:6} {plain:8,.2f} {recomputed:21,.2f}"
        if measure:
            line += f" {tokens_per_second(config):9,.0f}" if plain * 1e9 < available_memory() else f" {'-':>9}"
        print(line + (f"  {fitting_flags(config, costs, batch, memory)}" if memory is not None else ""))


def fitting_flags(
    config: MegalodonConfig, costs: Callable[..., Plan], batch: int, memory: int, accumulate: int = 1, processes: int = 1
) -> str:  # fmt: skip
    """Return "yes" if a step fits, else the flags of `train` that make it fit, else "no".

    batch: rows of a process, in each of `accumulate` batches of a step. It is halved until the step fits.
    """
    for parts in [1 << i for i in range(batch.bit_length()) if batch % (1 << i) == 0]:
        flags = f"--batch {batch // parts * processes} --accumulate {parts * accumulate}" if parts > 1 else ""
        for recomputes in (False, True):
            if costs(dataclasses.replace(config, layerwise_ckpt=recomputes), batch // parts).bytes <= memory:
                return f"{'--layerwise-ckpt ' * recomputes}{flags}".strip() or "yes"
    return "no"


def tokens_per_second(config: MegalodonConfig) -> float:
    """Return the speed of a training step of one chunk on this machine's CPU: the better of two after a first."""
    model = Megalodon(config)
    optimizer = adamw(model, lr=1e-4)
    tokens = torch.randint(config.vocab_size, (1, config.chunk_size + 1))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        model.loss(tokens[:, :-1], tokens[:, 1:] % config.num_outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    return config.chunk_size / min(times[1:])

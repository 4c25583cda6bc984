"""`plan`: what a training step will take on devices that one need not have."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator

import torch

from megalodon_ops import MegalodonConfig
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.flags import flag_of
from megalodon_ops.cli.models import configured
from megalodon_ops.cli.options import Plan as Options
from megalodon_ops.distributed.measure import AGAIN
from megalodon_ops.distributed.plan import Plan, plan
from megalodon_ops.files import write_whole

GIGA, TERA = 1e9, 1e12
LEFT_OUT = "launches, scratch memory, fragmentation, reading of data, slower devices"
PUBLISHED = (
    "6 % slower than Llama-2 at 4K, 32 % faster at 32K,\n"
    "94 % of the 4K speed with chunk parallel (arXiv 2404.08801, on 256 A100)"
)
"""The paper's speeds of training MEGALODON-7B"""


def run(options: Options) -> int:
    config = configured(options.preset, options.of_config(), ends=False)
    vocab = options.vocab or MegalodonConfig.preset(options.preset).vocab_size
    config = dataclasses.replace(config, vocab_size=vocab)
    try:
        found = plan(config, **arguments_of(options, config))
    except ValueError as error:
        name, _, fault = str(error).removeprefix("plan: `").partition("` ")
        raise CommandError(f"{flag_of(name)}: {fault.removesuffix('.')}") from error
    text, file = json.dumps(dataclasses.asdict(found), indent=1) + "\n", options.json
    if file is not None and str(file) != "-":
        write_whole(file, text.encode())
    sys.stdout.write(text if str(file) == "-" else "\n".join([*lines(found, options), ""]))
    return 0


def arguments_of(options: Options, config: MegalodonConfig) -> dict[str, object]:
    """What :func:`plan` takes, beside the configuration."""
    autocast = options.dtype == "autocast"
    return {
        "mesh": dict(options.mesh or {}),
        "context": options.context or 8 * config.chunk_size,
        "card": options.card,
        "dtype": torch.bfloat16 if autocast else getattr(torch, options.dtype),
        "autocast": autocast,
        "param_dtype": getattr(torch, options.param_dtype),
        "data": "replicate" if options.replicate else "shard",
        **{name: getattr(options, name) for name in ("batch", "recompute", "efficiency")},
    }


def lines(found: Plan, options: Options) -> Iterator[str]:
    """The table."""
    sizes = ",".join(f"{name}={size}" for name, size in found.mesh.items() if size > 1) or "one process"
    parameters = found.config.num_parameters()
    yield f"{parameters:,} parameters, {found.tokens:,} tokens a step on {found.devices:,} x {found.card.name}, {sizes}"
    for title, figures, unit, digits in (
        ("GB of a device at the peak of a step", found.memory, GIGA, 2),
        ("TFLOP of a device in a step", found.operations, TERA, 3),
        ("GB that a device receives in a step", found.exchange, GIGA, 4),
        (f"seconds of a step, at {options.efficiency:g} of the peak rates, which is assumed", found.seconds, 1, 4),
    ):
        yield f"\n{title}"
        yield from (f"  {name:45}{figure / unit:12,.{digits}f}" for name, figure in figures.items())
    left = (found.card.memory - found.bytes) / GIGA
    verdict = f"fits, {left:,.2f} left" if found.fits else f"DOES NOT FIT, {-left:,.2f} too many"
    yield f"\n{found.bytes / GIGA:,.2f} of {found.card.memory / GIGA:,.2f} GB: {verdict}"
    rate = found.card.float32 if options.dtype == "float32" else found.card.bfloat16
    used = (sum(found.operations.values()) - found.operations[AGAIN]) / found.step / rate
    speed = found.tokens / found.step
    yield f"{found.step:,.4f} seconds a step: {speed:,.0f} tokens a second, {speed / found.devices:,.0f} on each device"
    yield f"the model's operations are {used:.0%} of the peak rate"
    yield f"left out: {LEFT_OUT}"
    if options.preset == "paper7B":
        yield f"published: {PUBLISHED}"

"""`plan`: memory, operations and exchanged bytes of a training step, for devices that you need not have."""

import dataclasses
import functools
import json

import torch

from megalodon_ops import MegalodonConfig
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.flags import flag_of
from megalodon_ops.cli.models import model_config
from megalodon_ops.cli.options import Plan as Options
from megalodon_ops.cli.sizes import configurations, show
from megalodon_ops.distributed.plan import Plan, plan
from megalodon_ops.storage.files import write_whole


def run(options: Options) -> int:
    mesh = options.mesh or {}
    if options.memory is not None and options.memory < 10**6:
        raise CommandError(f"--memory {options.memory}: is in bytes, less than a megabyte; add a unit, such as 8GB")

    @functools.cache
    def costs_of(config: MegalodonConfig, batch: int | None) -> Plan:
        dtype = torch.float32 if options.dtype == "float32" else torch.bfloat16
        types = dict(dtype=dtype, autocast=options.dtype == "autocast", param_dtype=getattr(torch, options.param_dtype))
        sizes = dict(context=options.context or 8 * config.chunk_size, batch=batch)
        data = "replicate" if options.replicate else "shard"
        return plan(config, mesh, device=options.device, data=data, **sizes, **types)

    try:
        if options.params is not None or options.memory is not None:
            configs = configurations(options.config_fields(), options.vocab)
            batch = options.batch or mesh.get("data", 1)
            show(configs, costs_of, batch, options.params, options.memory, options.measure)
            return 0
        config = model_config(options.preset, options.config_fields(), ends=False)
        vocab = options.vocab or MegalodonConfig.preset(options.preset).vocab_size
        costs = costs_of(dataclasses.replace(config, vocab_size=vocab), options.batch)
    except ValueError as error:
        name, _, fault = str(error).removeprefix("plan: `").partition("` ")
        raise CommandError(f"{flag_of(name)}: {fault.removesuffix('.')}") from error

    figures = json.dumps(dataclasses.asdict(costs), indent=1)
    if str(options.json) == "-":
        print(figures)
        return 0
    if options.json is not None:
        write_whole(options.json, figures.encode() + b"\n")
    sizes = ",".join(f"{name}={size}" for name, size in costs.mesh.items())
    print(f"{costs.config.num_parameters():,} parameters, {costs.tokens:,} tokens a step, {sizes}, {options.device}")
    for title, numbers, unit, digits in (
        ("GB of a device at the peak of a step", costs.memory | {"sum": costs.bytes}, 1e9, 2),
        ("TFLOP of a device in a step", costs.operations, 1e12, 3),
        ("GB that a device receives in a step", costs.exchange or {"nothing": 0}, 1e9, 4),
    ):
        print(f"\n{title}")
        for name, number in numbers.items():
            print(f"  {name:45}{number / unit:12,.{digits}f}")
    return 0

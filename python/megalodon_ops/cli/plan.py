"""`plan`: what a training step will take on devices that one need not have."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megalodon_ops import MegalodonConfig
from megalodon_ops.cli.arguments import MODEL_FLAGS, MODEL_SWITCHES, SMALL, flag_of
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.models import configured
from megalodon_ops.cli.plan_flags import ALIASES, CPU, FIGURES
from megalodon_ops.distributed.plan import CARDS, Card, Plan, Time, plan
from megalodon_ops.model.checkpoint import CONFIG, read_config
from megalodon_ops.model.files import write_whole

PAPER = {"mesh": {"data": 128, "chunk": 2}, "context": 32768, "batch": 128, "card": "a100-80"}
"""The paper's run, arXiv 2404.08801: 4M tokens a batch on 256 A100, 16K on each; contexts of 32K, so two hold a sequence"""
_GB, _T, _G = 1e9, 1e12, 1e9


def run(options: argparse.Namespace) -> int:
    config, arguments = chosen_config(options), arguments_of(options)
    found = _planned(config, arguments)
    if options.json is not None:
        text = json.dumps(found.to_dict(), indent=1) + "\n"
        if str(options.json) == "-":
            sys.stdout.write(text)
            return 0
        write_whole(options.json, text.encode())
    for line in lines(found, _planned(config, {**arguments, "recompute": not found.recompute}), arguments):
        print(line)
    return 0


def _planned(config: MegalodonConfig, arguments: dict[str, Any]) -> Plan:
    try:
        return plan(config, **arguments)
    except ValueError as error:
        name, _, fault = str(error).removeprefix("plan: `").partition("` ")
        raise CommandError(f"{flag_of(name)}: {fault.removesuffix('.')}") from error


class _Tokenizer(NamedTuple):
    """As much of a tokenizer as decides the sizes of a model."""

    vocab_size: int
    output_size: int


def chosen_config(options: argparse.Namespace) -> MegalodonConfig:
    """The configuration of --config or --preset, with the model's other flags."""
    fields = [*MODEL_FLAGS, *(flag[2:].replace("-", "_") for flag in MODEL_SWITCHES)]
    flags = {name: getattr(options, name) for name in fields if hasattr(options, name)}
    vocab = getattr(options, "vocab", None)
    if hasattr(options, "config"):
        return _stored_config(options.config, flags, vocab)
    preset = getattr(options, "preset", SMALL)
    if vocab is None and preset != SMALL:
        vocab = MegalodonConfig.preset(preset).vocab_size
    return configured(preset, flags, None if vocab is None else _Tokenizer(vocab, vocab))


def _stored_config(path: Path, flags: dict[str, Any], vocab: int | None) -> MegalodonConfig:
    newest = sorted((path / "checkpoints").glob(f"step-*/{CONFIG}"), key=lambda file: (len(file.parent.name), file))
    file = path if path.is_file() else newest[-1] if newest else path / CONFIG
    if vocab is not None:
        flags = {**flags, "vocab_size": vocab, "output_size": -1}
    try:
        return dataclasses.replace(read_config(file)[0], **flags)
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise CommandError(f"--config {error}" if str(file) in str(error) else f"--config {file}: {error}") from error


def arguments_of(options: argparse.Namespace) -> dict[str, Any]:
    """What :func:`plan` takes, beside the configuration."""
    mesh = getattr(options, "mesh", None) or {"data": getattr(options, "devices", 1)}
    devices = math.prod(mesh.values())
    if getattr(options, "devices", devices) != devices:
        text = ",".join(f"{name}={size}" for name, size in mesh.items())
        raise CommandError(f"--mesh {text}: has {devices:,} processes, got --devices {options.devices:,}")
    if len(options.efficiency) not in (1, 3):
        raise CommandError(f"--efficiency: must be one share, or three, got {len(options.efficiency)}")
    config = chosen_config(options)
    autocast = options.dtype == "autocast"
    if options.param_dtype == "bfloat16" and options.dtype != "bfloat16":
        raise CommandError(f"--param-dtype bfloat16: needs --dtype bfloat16, got {options.dtype}")
    return {
        "mesh": mesh,
        "context": getattr(options, "context", 8 * config.chunk_size),
        "batch": getattr(options, "batch", None),
        "card": card_of(options, devices),
        "dtype": torch.bfloat16 if autocast else getattr(torch, options.dtype),
        "autocast": autocast,
        "param_dtype": getattr(torch, options.param_dtype),
        "optimizer_dtype": None if options.optimizer_dtype is None else getattr(torch, options.optimizer_dtype),
        "data": options.data,
        "reshard": options.reshard,
        "recompute": options.recompute,
        "node": options.node,
        "efficiency": options.efficiency if len(options.efficiency) == 3 else options.efficiency[0],
    }


def card_of(options: argparse.Namespace, devices: int) -> Card:
    """The card of --card, with the figures that the flags give instead of its own."""
    given = {name: getattr(options, name) for name in FIGURES if hasattr(options, name)}
    figures = {name: value * (_T if name == "tflops" else _GB) for name, value in given.items()}
    if "tflops" in figures:
        figures |= {"bfloat16": figures["tflops"], "float32": figures["tflops"]}
        if options.card != CPU:  # a GPU's rate of products is one dtype's; the rate of its vector units stays
            del figures["float32" if options.dtype != "float32" else "bfloat16"]
        del figures["tflops"]
    if options.card != CPU:
        return dataclasses.replace(CARDS[ALIASES.get(options.card, options.card)], **figures)
    needed = ("memory", "tflops", "bandwidth", *(("link", "network") if devices > 1 else ()))
    if missing := [f"--{name}" for name in needed if name not in given]:
        raise CommandError(f"--card cpu: has no data sheet; give {', '.join(missing)}")
    return Card(CPU, **{"link": 0.0, "network": 0.0, **figures}, source="the command's flags", kind="cpu")


def lines(found: Plan, otherwise: Plan, arguments: dict[str, Any]) -> Iterable[str]:
    """The table. `otherwise`: the same plan with recomputation if it has none, or without."""
    yield from _heading(found, arguments)
    yield from _memory(found, otherwise)
    yield from _operations(found)
    yield from _exchange(found)
    yield from _time(found, arguments["dtype"])
    if is_the_papers(found.config):
        yield from _paper(found, arguments)


def is_the_papers(config: MegalodonConfig) -> bool:
    """Whether the model is MEGALODON-7B as the paper trains it, over any vocabulary."""
    return config.meaning() == dataclasses.replace(
        MegalodonConfig.preset("paper7B"), vocab_size=config.vocab_size, output_size=config.output_size
    ).meaning()  # fmt: skip


def _heading(found: Plan, arguments: dict[str, Any]) -> Iterable[str]:
    config, per_device = found.config, found.tokens // found.mesh["data"] // found.mesh["chunk"]
    mesh = ",".join(f"{name}={size}" for name, size in found.mesh.items() if size > 1) or "one process"
    kind = "autocast to bfloat16" if arguments["autocast"] else str(arguments["dtype"]).removeprefix("torch.")
    stored = str(arguments["param_dtype"]).removeprefix("torch.")
    yield (
        f"{config.num_parameters():,} parameters: {config.num_layers} layers, {config.model_dim:,} channels, "
        f"chunks of {config.chunk_size:,}, vocabulary {config.vocab_size:,}"
    )
    yield f"{found.devices:,} x {found.card.name}, {mesh}; parameters {'sharded' if arguments['data'] == 'shard' else 'replicated'}"
    yield (
        f"{found.batch:,} sequences of {found.context:,} tokens a step: {found.tokens:,} tokens, {per_device:,} on a device; "
        f"{kind}, stored in {stored}; {'blocks computed again' if found.recompute else 'nothing computed again'}"
    )


def _memory(found: Plan, otherwise: Plan) -> Iterable[str]:
    memory, peak = found.memory, found.memory.peak
    yield from _title("memory of a device", "GB")
    for name, size in (
        ("parameters", memory.parameters), ("Adam's moments", memory.optimizer),
        ("batch, rotary tables, states", memory.batch + memory.rotary + memory.states),
        (f"gradients that exist then, of {memory.gradients / _GB:,.2f} in all", peak.gradients),
        ("kept for the backward", peak.activations), ("gathered parameters, gradients on their way", peak.gathered),
        ("temporary", peak.temporary),
    ):  # fmt: skip
        yield _row(name, f"{size / _GB:,.2f}")
    difference = (found.card.memory - memory.total) / _GB
    verdict = f"{difference:,.2f} left" if found.fits else f"DOES NOT FIT, {-difference:,.2f} too many"
    yield _row(
        f"at the peak: {peak.when}", f"{memory.total / _GB:,.2f}", f"of {found.card.memory / _GB:,.2f}: {verdict}"
    )
    plain, again = (found, otherwise) if otherwise.recompute else (otherwise, found)
    yield from _title("kept for the backward", "GB", "recomputed")
    for kind, size in memory.kept.items():
        yield _row(kind, f"{size / _GB:,.2f}", f"{memory.kept_recomputing.get(kind, 0) / _GB:,.2f}")
    sums = (sum(kept.values()) / _GB for kept in (memory.kept, memory.kept_recomputing))
    yield _row("all of it", *(f"{total:,.2f}" for total in sums))
    yield _row("at the peak, with all else", f"{plain.memory.total / _GB:,.2f}", f"{again.memory.total / _GB:,.2f}")


def _operations(found: Plan) -> Iterable[str]:
    tokens = found.tokens // found.mesh["data"] // found.mesh["chunk"]
    yield from _title("operations, forward and backward", "TFLOP a step", "GFLOP a token")
    tensor = found.mesh["tensor"]
    for part, count in (*found.flops.by_part.items(), ("the model's", found.flops.total)):
        yield _row(part, f"{count / _T:,.2f}", f"{count * tensor / tokens / _G:,.3f}")
    if found.flops.recomputed:
        again = found.flops.recomputed
        yield _row("computed again", f"{again / _T:,.2f}", f"{again * tensor / tokens / _G:,.3f}")


def _exchange(found: Plan) -> Iterable[str]:
    yield from _title("received by a device", "GB a step", "of processes")
    for exchange in found.exchange:
        waits = "" if exchange.hidden else "  computation waits for it"
        yield _row(exchange.name, f"{exchange.received / _GB:,.4f}", f"{exchange.group.size:,}") + waits
    if not found.exchange:
        yield "  nothing"


def _time(found: Plan, dtype: torch.dtype) -> Iterable[str]:
    assumed = "/".join(f"{share:g}" for share in dict.fromkeys(found.efficiency))
    times = (found.at_peak, found.estimate)
    yield from _title("seconds of a step", "at peak rates", f"at {assumed} of them")

    def row(name: str, value: Any, form: str = ",.3f") -> str:
        return _row(name, *(format(value(time), form) for time in times))

    yield row("ops bound by operations", lambda time: time.compute)
    yield row("ops bound by memory", lambda time: time.bandwidth)
    yield row("exchange beside them", lambda time: time.hidden_exchange)
    yield row("exchange that is waited for", lambda time: time.exposed_exchange, ",.4f")
    yield row("optimizer", lambda time: time.optimizer, ",.4f")
    yield row("step", lambda time: time.step)
    yield row("tokens a second", found.tokens_per_second, ",.0f")
    yield row("tokens a second and device", lambda time: found.tokens_per_second(time) / found.devices, ",.0f")
    yield row("model's operations, of the peak rate", lambda time: found.utilization(time, dtype), ".0%")
    yield _row("bound by", *(time.bound for time in times))
    yield f"  Peak rates are the maker's, and no run passes them; {assumed} of them is an assumption (--efficiency), not a measurement."


def _paper(found: Plan, arguments: dict[str, Any]) -> Iterable[str]:
    """The plan beside the paper's arrangement of this model, on the same assumptions."""
    papers = plan(found.config, **{**arguments, **PAPER, "recompute": found.recompute})
    yield from _title("beside the paper's arrangement", "this plan", "the paper's")

    def row(name: str, value: Any) -> str:
        return _row(name, value(found), value(papers))

    def estimate(one: Plan) -> Time:
        return one.estimate

    yield row("devices", lambda one: f"{one.devices:,} x {one.card.name}")
    yield row("mesh", lambda one: ",".join(f"{name}={size}" for name, size in one.mesh.items() if size > 1) or "1")
    yield row("context", lambda one: f"{one.context:,}")
    yield row("tokens a step", lambda one: f"{one.tokens:,}")
    yield row("tokens a step and device", lambda one: f"{one.tokens // one.devices:,}")
    yield row("memory at the peak, GB", lambda one: f"{one.memory.total / _GB:,.2f}")
    yield row("seconds of a step, estimated", lambda one: f"{estimate(one).step:,.3f}")
    yield row("tokens a second and device", lambda one: f"{one.tokens_per_second(one.estimate) / one.devices:,.0f}")
    yield "  The paper (arXiv 2404.08801): batches of 4M tokens on 256 A100, 16K tokens on each. The other figures are computed here."


def _title(name: str, *columns: str) -> Iterable[str]:
    yield ""
    yield _row(name, *columns, indent="")


def _row(name: str, *columns: str, indent: str = "  ") -> str:
    first = f"{indent}{name}".ljust(46)
    return (first + "".join(f"{column:>18}" if len(column) <= 18 else f"  {column}" for column in columns)).rstrip()

"""The flags of `plan`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalodon_ops import MegalodonConfig
from megalodon_ops.cli import kinds
from megalodon_ops.cli.arguments import MODEL_FLAGS, MODEL_SWITCHES, SMALL
from megalodon_ops.distributed.plan import CARDS

ALIASES = {"a100": "a100-80"}
CPU = "cpu"
FIGURES = {
    "memory": ("GB", "memory of a device"),
    "tflops": ("TFLOP/s", "its peak rate of matrix products"),
    "bandwidth": ("GB/s", "of its memory"),
    "link": ("GB/s", "what it receives inside its node"),
    "network": ("GB/s", "what it receives from other nodes"),
}
"""Flags that replace a card's figures: unit, meaning"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("devices")
    where.add_argument("--devices", type=kinds.natural, metavar="N", help="how many (those of --mesh, or 1)")
    mesh = "how they share a batch: rows over data, length over chunk, matrices over tensor (data=<--devices>)"
    where.add_argument("--mesh", type=kinds.mesh_sizes, metavar="data=N,chunk=M", help=mesh)
    cards = [*ALIASES, *CARDS, CPU]
    where.add_argument(
        "--card", choices=cards, default="a100", help="a100 is of 80 GB; cpu needs the figures below (a100)"
    )
    for name, (unit, meaning) in FIGURES.items():
        where.add_argument(f"--{name}", type=kinds.positive, metavar=unit, help=f"{meaning} (the card's)")
    where.add_argument("--node", type=kinds.natural, default=8, metavar="N", help="devices that fast links join (8)")
    shares = "share of the peak rates that is assumed to be reached: one, or of operations, memory and links (0.5)"
    where.add_argument("--efficiency", type=kinds.fraction, nargs="+", default=[0.5], metavar="E", help=shares)

    work = parser.add_argument_group("work")
    work.add_argument("--context", type=kinds.natural, metavar="N", help="tokens of a sequence (8 chunks)")
    work.add_argument(
        "--batch", type=kinds.natural, metavar="N", help="sequences of a step, of all devices (one for each of data)"
    )
    dtypes = "of products and activations; autocast: bfloat16 products of float32 parameters (bfloat16)"
    work.add_argument("--dtype", choices=["float32", "bfloat16", "autocast"], default="bfloat16", help=dtypes)
    stored = "in which matrices and their gradients are stored (float32)"
    work.add_argument("--param-dtype", choices=["float32", "bfloat16"], default="float32", help=stored)
    moments = "of Adam's moments (as the parameters)"
    work.add_argument("--optimizer-dtype", choices=["float32", "bfloat16"], default=None, help=moments)
    kept = work.add_mutually_exclusive_group()
    kept.add_argument(
        "--shard", dest="data", action="store_const", const="shard", default="shard",
        help="a device keeps a part of the parameters (the default)",
    )  # fmt: skip
    kept.add_argument(
        "--replicate", dest="data", action="store_const", const="replicate", help="a device keeps all of them"
    )
    work.add_argument(
        "--reshard", action=argparse.BooleanOptionalAction, default=True,
        help="free gathered parameters after the forward (--reshard)",
    )  # fmt: skip
    again = "compute each block again in the backward (as the model's configuration says)"
    work.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=None, help=again)
    work.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write all figures; - prints them instead"
    )

    model = parser.add_argument_group("model", "widths that are not given keep the preset's proportion to --dim")
    choice = model.add_mutually_exclusive_group()
    choice.add_argument("--preset", choices=[SMALL, *MegalodonConfig.presets()], help=f"where to start ({SMALL})")
    choice.add_argument("--config", type=Path, metavar="PATH", help="a folder with a model, a run's, or a config.json")
    model.add_argument("--vocab", type=kinds.natural, metavar="N", help="ids of the tokenizer (the preset's, or bytes)")
    for field, (flag, kind, meaning) in MODEL_FLAGS.items():
        model.add_argument(flag, dest=field, type=kind, help=meaning)
    for flag, meaning in MODEL_SWITCHES.items():
        if flag != "--layerwise-ckpt":  # --recompute
            model.add_argument(flag, action=argparse.BooleanOptionalAction, help=meaning)

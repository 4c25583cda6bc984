"""The flags of every command. A flag not given to `train` is absent, so that a resumed run keeps its own value."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from megalodon_ops import MegalodonConfig, __version__
from megalodon_ops.cli import kinds
from megalodon_ops.cli.examples import EXAMPLES, SEVERAL

SMALL = "small"
"""The preset of the default run"""
SMALL_CONFIG = {
    "num_layers": 3,
    "model_dim": 128,
    "z_dim": 64,
    "value_dim": 256,
    "num_heads": 1,
    "ffn_hidden_dim": 192,
    "cema_ndim": 8,
    "chunk_size": 256,
    "norm_num_groups": 8,
    "swiglu": True,
}
"""Sized for a run of minutes on a few cores: docs/training.md"""

DEFAULTS = {
    "preset": SMALL,
    "context": "streamed",  # after as many bytes the loss is lower than with packed rows: the past is not cut off
    "batch": 64,  # many documents at once: a batch teaches as much as its rows differ
    "length": 64,
    "optimizer": "muon",
    "warmup": 100,
    "weight_decay": 0.1,
    "clip": 1.0,
    "seed": 0,
    "device": "cpu",
    "dtype": "float32",
    "eval_every": 500,
    "checkpoint_every": 200,
}
ROWS_OF_CONTEXT = 8
"""The default context length in rows' lengths: docs/training.md"""
RATE_TIMES_WIDTH = 1.28
"""The default peak of the learning rate, times the model's width: docs/training.md"""
MINUTES = 5.0
"""How long a run takes that names neither --steps nor --minutes"""


def flag_of(name: str) -> str:
    return MODEL_FLAGS[name][0] if name in MODEL_FLAGS else f"--{name.replace('_', '-')}"


def in_flags(message: str, given: Container[str]) -> str:
    """An error of MegalodonConfig, with the flags' names in the place of its fields'."""
    message = message.removeprefix("MegalodonConfig: ")
    refused = re.match(r"`(\w+)`", message)
    for field, (flag, *_) in MODEL_FLAGS.items():
        message = re.sub(rf"^`{field}`", f"{flag}:", message)
        message = re.sub(rf"(?<![\w-]){field}(?!\w)", flag, message)
    if refused and refused[1] in MODEL_FLAGS and refused[1] not in given:
        message = f"{message.removesuffix('.')}, that of the preset; give {flag_of(refused[1])}, too"
    return message


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun, which all have the same arguments
        name = self.prog.removeprefix("python -m ")
        self.exit(2, f"{name}: error: {message}\n" if first else None)

    def parse_known_args(self, args=None, namespace=None):
        """Refuses what this parser does not know here, where a command knows its flags, and not in the parser of commands."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1, cutoff=0.7)
            fix = f"did you mean {near[0]}?" if near else f"{self.prog} --help says what there is"
            self.error(f"unrecognized arguments: {' '.join(unknown)}; {fix}")
        return options, unknown


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    style = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    description, examples = "MEGALODON: train, evaluate, sample.", _examples(lines[0] for lines in EXAMPLES.values())
    parser = Parser(prog="python -m megalodon_ops", description=description, epilog=examples, **style)
    parser.add_argument("--version", action="version", version=f"megalodon_ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(EXAMPLES)}}}")
    for name, add_flags, summary in (
        ("info", lambda _: None, "what was built, and what it runs on"),
        (
            "train",
            _train_flags,
            "train a model of bytes, or of tokens, on text; without --data, on Python's standard library",
        ),
        (
            "eval",
            _eval_flags,
            "perplexity and bits per byte of a model by context, on held-out or given text of any length",
        ),
        ("generate", _generate_flags, "print a sampled continuation"),
        ("tokenizer", _tokenizer_flags, "train a byte-level BPE on text, or see what a tokenizer makes of text"),
        ("tokenize", _tokenize_flags, "encode text into a folder of tokens, which `train --data` maps into memory"),
        ("convert", _convert_flags, "write a checkpoint in another format"),
        ("plan", _plan_flags, "what a training step will take on given devices: memory, operations, exchange, time"),
    ):
        command = commands.add_parser(
            name, help=summary, description=summary, epilog=_examples(EXAMPLES[name]),
            argument_default=argparse.SUPPRESS, **style,
        )  # fmt: skip
        add_flags(command)
    return parser.parse_args(arguments)


def _examples(lines: Iterable[str]) -> str:
    return "\n".join(["examples:", *(f"  {command(line)}" for line in lines)])


def command(example: str) -> str:
    """What to type for an example."""
    if example.startswith(SEVERAL):
        return f"{SEVERAL}-m megalodon_ops {example.removeprefix(SEVERAL)}"
    return f"python -m megalodon_ops {example}"


def _train_flags(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    _data_flags(run, "files and folders of text, or a folder that `tokenize` made (Python's standard library)")
    file = "a JSON file of the `tokenizers` package or a sentencepiece model, or a folder with one (none: bytes)"
    run.add_argument("--tokenizer", dest="tokenizer_file", type=Path, metavar="FILE", help=file)
    run.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (runs/<time>)")
    run.add_argument("--resume", action="store_true", help="continue the run in --out; other flags come from it")
    run.add_argument(
        "--steps", type=kinds.natural, metavar="N", help="stop after N steps; nothing then depends on the clock"
    )
    run.add_argument(
        "--minutes",
        type=kinds.positive,
        metavar="M",
        help=f"stop after M minutes ({MINUTES:g}, unless --steps is given)",
    )
    run.add_argument(
        "--eval-every",
        type=kinds.natural,
        metavar="N",
        help=_default("steps between looks at held-out text", "eval_every"),
    )
    run.add_argument(
        "--checkpoint-every",
        type=kinds.natural,
        metavar="N",
        help=_default("steps between checkpoints", "checkpoint_every"),
    )
    run.add_argument(
        "--seed", type=kinds.seed, metavar="N", help=_default("of weights, order of documents, dropout", "seed")
    )
    _device_flags(run, argparse.SUPPRESS, argparse.SUPPRESS)

    several = parser.add_argument_group("several processes", "started by torchrun, on one machine or many")
    mesh = "how they share a batch, its rows over data and its length over chunk, and layers over tensor (data=<their number>)"
    several.add_argument("--mesh", type=kinds.mesh_sizes, metavar="data=N,chunk=M", help=mesh)
    several.add_argument(
        "--timeout",
        type=kinds.positive,
        metavar="SECONDS",
        help="how long they wait for each other before they give up (600)",
    )

    sizes = ", ".join(f"{MODEL_FLAGS[field][0]} {size}" for field, size in SMALL_CONFIG.items() if field in MODEL_FLAGS)
    proportion = "widths that are not given keep the preset's proportion to --dim"
    model = parser.add_argument_group("model", f"{proportion}; small is\n{sizes}, --swiglu")
    model.add_argument(
        "--preset", choices=[SMALL, *MegalodonConfig.presets()], help=_default("where to start", "preset")
    )
    for field, (flag, kind, meaning) in MODEL_FLAGS.items():
        model.add_argument(flag, dest=field, type=kind, metavar="N" if kind is kinds.natural else "X", help=meaning)
    for flag, meaning in MODEL_SWITCHES.items():
        model.add_argument(flag, action=argparse.BooleanOptionalAction, help=meaning)

    batch = parser.add_argument_group("batches and optimizer")
    batch.add_argument("--batch", type=kinds.natural, metavar="N", help=_default("rows in a batch", "batch"))
    batch.add_argument(
        "--length", type=kinds.natural, metavar="N", help=_default("bytes, or tokens, in a row", "length")
    )
    batch.add_argument(
        "--context",
        choices=["streamed", "packed"],
        help=_default("carry each row's state on to the next batch, or start every row afresh", "context"),
    )
    context_length = (
        f"cut documents of more tokens into parts that are read as documents ({ROWS_OF_CONTEXT} times --length)"
    )
    batch.add_argument("--context-length", type=kinds.natural, metavar="N", help=context_length)
    muon = "muon for the matrices of the blocks and adamw for all else, or adamw for all"
    batch.add_argument("--optimizer", choices=["muon", "adamw"], help=_default(muon, "optimizer"))
    batch.add_argument(
        "--lr", type=kinds.positive, metavar="X", help=f"peak learning rate ({RATE_TIMES_WIDTH} / width)"
    )
    batch.add_argument(
        "--warmup", type=kinds.natural, metavar="N", help=_default("steps of warmup, then a line to zero", "warmup")
    )
    batch.add_argument(
        "--weight-decay", type=kinds.not_negative, metavar="X", help=_default("of weight matrices", "weight_decay")
    )
    batch.add_argument(
        "--clip", type=kinds.positive, metavar="X", help=_default("largest norm of the gradient", "clip")
    )


def _eval_flags(parser: argparse.ArgumentParser) -> None:
    _checkpoint_flag(parser)
    _data_flags(parser, "files and folders of text (the held-out text of the run)")
    context = (
        "predict from at most N tokens, in windows that each start afresh, or from all before ('all', the default)"
    )
    parser.add_argument("--context", nargs="+", type=kinds.context_length, default=["all"], metavar="N", help=context)
    protocol = "'released' follows the released code beyond 8 chunks: norms know the last 6 chunks alone (streamed)"
    parser.add_argument("--protocol", choices=["streamed", "released"], default="streamed", help=protocol)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write all figures")
    picture = "draw the loss by how many tokens a prediction is made from"
    parser.add_argument("--by-position", type=Path, default=None, metavar="FILE", help=picture)
    parser.add_argument(
        "--batch", type=kinds.small_natural, default=8, metavar="N", help="documents read side by side (8)"
    )
    piece = "tokens of a document in memory at once, which changes time and memory but not the result (2048)"
    parser.add_argument("--piece", type=kinds.small_natural, default=2048, metavar="N", help=piece)
    _tokenizer_flag(parser)
    _device_flags(parser, "cpu", None)


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    _checkpoint_flag(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text to continue (none: a new document)")
    prompt.add_argument("--prompt-file", type=Path, metavar="PATH", help="file to continue; - is standard input")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--bytes", type=kinds.natural, default=1000, metavar="N", help="how many to write (1000)")
    length.add_argument(
        "--tokens", type=kinds.natural, default=None, metavar="N", help="how many to write, instead of bytes"
    )
    parser.add_argument(
        "--stop", action="append", type=kinds.some_text, default=[], metavar="TEXT", help="end before it; repeatable"
    )
    parser.add_argument(
        "--samples", type=kinds.small_natural, default=1, metavar="N", help="continuations of the prompt (1)"
    )
    parser.add_argument(
        "--temperature", type=kinds.not_negative, metavar="T", default=0.8, help="0 takes the likeliest token (0.8)"
    )
    parser.add_argument(
        "--top-k", type=kinds.small_natural, metavar="K", default=None, help="sample among the K likeliest tokens"
    )
    parser.add_argument(
        "--top-p", type=kinds.fraction, metavar="P", default=None, help="sample among the likeliest tokens of mass P"
    )
    min_p = "sample among tokens at least P times as likely as the likeliest"
    parser.add_argument("--min-p", type=kinds.fraction, default=None, metavar="P", help=min_p)
    penalty = "above 1, makes tokens that were read or written before less likely"
    parser.add_argument("--repetition-penalty", type=kinds.positive, default=None, metavar="R", help=penalty)
    parser.add_argument("--seed", type=kinds.seed, metavar="N", default=0, help="of the samples (0)")
    _tokenizer_flag(parser)
    _device_flags(parser, "cpu", None)


def _tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", default=[], type=Path, metavar="FILE", help="text, or folders of it")
    glob = "of folders, take the files that match; repeatable (those of text)"
    parser.add_argument("--glob", action="append", type=kinds.glob_pattern, metavar="PATTERN", help=glob)
    train = "learn from the FILEs (Python's standard library) what `train` learns from, without what it holds out"
    parser.add_argument("--train", action="store_true", default=False, help=train)
    size = "most ids: 256 bytes, merges, and one that opens a document"
    parser.add_argument("--vocab-size", type=kinds.vocabulary, default=None, metavar="N", help=size)
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="the file to write")
    see = "a tokenizer's file, or a folder with one, to see what it makes of the FILEs"
    parser.add_argument("--tokenizer", type=Path, default=None, metavar="FILE", help=see)


def _tokenize_flags(parser: argparse.ArgumentParser) -> None:
    files = "text, each file a document; .jsonl, each line an object with a document; or folders (Python's standard library)"
    parser.add_argument("files", nargs="*", default=[], type=Path, metavar="FILE", help=files)
    glob = "of folders, take the files that match; repeatable (those of text)"
    parser.add_argument("--glob", action="append", type=kinds.glob_pattern, metavar="PATTERN", help=glob)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make, or to go on with")
    file = "a JSON file of the `tokenizers` package or a sentencepiece model, or a folder with one (none: bytes)"
    parser.add_argument("--tokenizer", type=Path, default=None, metavar="FILE", help=file)
    parser.add_argument(
        "--field", type=kinds.some_text, default="text", help="of lines of JSON, what holds the document (text)"
    )
    workers = "processes, which change the time but not the result (one a core)"
    parser.add_argument("--workers", type=kinds.natural, default=None, metavar="N", help=workers)
    size = "MiB of text in a shard, what is made anew after a kill; a longer file of text stays whole (64)"
    parser.add_argument("--shard-size", type=kinds.shard_size, default=64, metavar="N", help=size)
    check = "compare the folder --out with its checksums instead, all tokens among it"
    parser.add_argument("--check", action="store_true", default=False, help=check)


def _tokenizer_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", type=Path, default=None, metavar="FILE", help="of a checkpoint whose folder has none"
    )


def _convert_flags(parser: argparse.ArgumentParser) -> None:
    formats = (
        "own and hf are one: a folder that Megalodon.save, train or transformers wrote; official: the released code's"
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="folder to read")
    parser.add_argument("target", type=Path, metavar="DST", help="new folder to write")
    parser.add_argument(
        "--from", dest="origin", choices=["own", "hf", "official", "port"], required=True,
        help=f"{formats}; port: megalodon-hf 0.1.5, whose timestep norm differs: by how much is measured and printed",
    )  # fmt: skip
    parser.add_argument("--to", choices=["own", "hf", "official"], required=True, help=formats)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16", "float64"], default=None,
        help="of the linear layers and the embedding (that of SRC, or float32)",
    )  # fmt: skip
    parser.add_argument(
        "--shards", type=kinds.natural, default=1, metavar="N", help="files of N ranks, for official (1)"
    )
    parser.add_argument(
        "--tokens", type=Path, default=None, metavar="FILE",
        help="ids to measure a port's difference on, with spaces between them; the first 4,096 count (random words)",
    )  # fmt: skip


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    from megalodon_ops.cli.plan_flags import add_flags  # here: the module takes this one's

    add_flags(parser)


def _checkpoint_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run's folder, one checkpoint's, or any that holds a model",
    )


def _data_flags(parser: argparse._ActionsContainer, meaning: str) -> None:
    parser.add_argument("--data", nargs="+", type=Path, metavar="PATH", help=meaning)
    glob = "of folders, take the files that match, such as '*.py' or 'src/*.c', text or not; repeatable (those of text)"
    parser.add_argument("--glob", action="append", type=kinds.glob_pattern, metavar="PATTERN", help=glob)


def _device_flags(parser: argparse._ActionsContainer, device: str, dtype: str | None) -> None:
    parser.add_argument("--device", default=device, help="where to compute (cpu)")
    choices = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=choices, default=dtype, help="bfloat16 is autocast (float32, or the run's)")


def _default(text: str, name: str) -> str:
    return f"{text} ({DEFAULTS[name]})"


MODEL_FLAGS = {
    "model_dim": ("--dim", kinds.natural, "width of the model"),
    "num_layers": ("--layers", kinds.natural, "blocks"),
    "num_heads": ("--heads", kinds.natural, "of the attention"),
    "chunk_size": ("--chunk", kinds.natural, "steps that attend to each other"),
    "z_dim": ("--z-dim", kinds.natural, "width of queries and keys, all heads"),
    "value_dim": ("--value-dim", kinds.natural, "width of values, all heads"),
    "ffn_hidden_dim": ("--ffn-dim", kinds.natural, "hidden units of the feed-forward half"),
    "cema_ndim": ("--cema-ndim", kinds.natural, "complex states a channel"),
    "norm_num_groups": ("--norm-groups", kinds.natural, "groups of the timestep norms"),
    "rope_base": ("--rope-base", kinds.positive, "of rotary frequencies, 10000 unless given"),
    "dropout": ("--dropout", kinds.probability, "of what each half of a block adds"),
    "hidden_dropout": ("--hidden-dropout", kinds.probability, "inside the halves"),
    "attention_dropout": ("--attention-dropout", kinds.probability, "probability of DropKey"),
}
"""Fields of the configuration: flag, what the flag accepts, what the field is"""
MODEL_SWITCHES = {
    "--swiglu": "gate the feed-forward half by a third matrix",
    "--rescale-nffn": "a learned gain on the feed-forward half's output",
    "--scale-emb": "multiply embeddings by the square root of the width",
    "--share-emb": "take the embedding for the output matrix",
    "--layerwise-ckpt": "recompute each layer in the backward, for less memory",
}

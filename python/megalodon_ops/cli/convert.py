"""`convert`: a checkpoint in another format."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from megalodon_ops import Megalodon, save_official
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.errors import FileError
from megalodon_ops.model.checkpoint import read_config
from megalodon_ops.model.official import is_official, read_official
from megalodon_ops.model.port import difference, load_port, looks_beyond_its_chunk, pseudo_text
from megalodon_ops.training.checkpoint import find_tokenizer, load_any

_MOST_TOKENS = 1 << 12


def run(options: argparse.Namespace) -> int:
    source, target = options.source, options.target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CommandError(f"{target}: exists; name a new folder")
    if options.shards != 1 and options.to != "official":
        raise CommandError("--shards: only the released format is split by ranks; leave it out, or --to official")
    if options.tokens is not None and options.origin != "port":
        raise CommandError("--tokens: only what --from port converts is measured; leave it out")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        model, tokenizer = _read(source, options.origin, dtype)
        if options.to == "official":
            save_official(model, target, shards=options.shards, tokenizer=tokenizer)
        else:
            model.save(target, tokenizer=tokenizer)
    except (TypeError, ValueError) as error:  # those of an argument that the checkpoint does not allow
        raise CommandError(str(error)) from error
    kind = str(model.embed.weight.dtype).removeprefix("torch.")
    print(f"{target}: {model.num_parameters():,} parameters, {kind}, read by {_READER[options.to]}")
    if options.origin == "port":
        tokens = _tokens(options.tokens, model.config.vocab_size)
        beyond = (
            " The port's `max_cache_len` or `cache_unbounded` also lets its decoding with a cache attend to earlier chunks, "
            "which its training does not, nor this model."
        )
        print(f"\n{difference(model, tokens).paragraph()}{beyond * looks_beyond_its_chunk(source)}")
    return 0


_READER = {
    "own": "megalodon_ops.Megalodon.load and transformers' from_pretrained",
    "hf": "megalodon_ops.Megalodon.load and transformers' from_pretrained",
    "official": "megalodon_ops.load_official, the released code and megalodon-jax",
}


def _read(source: Path, origin: str, dtype: torch.dtype | None) -> tuple[Megalodon, object]:
    if origin in ("official", "port"):
        try:
            if origin == "port":
                return load_port(source, dtype=dtype or torch.float32), find_tokenizer(source)
            return read_official(source, dtype or torch.float32, torch.device("cpu")), find_tokenizer(source)
        except ValueError as error:
            raise FileError(f"{error}{_whose(source)}") from error
    if source.is_dir() and is_official(source):
        raise FileError(f"{source}: a folder in the format of the released code; --from official reads it")
    model, tokenizer, _ = load_any(source, dtype=dtype)
    return model, tokenizer


def _whose(source: Path) -> str:
    """What an error adds where the folder's configuration is one of this package."""
    try:
        read_config(source / "config.json")
    except (FileNotFoundError, ValueError):
        return ""
    return "; Megalodon.save, train or transformers wrote this folder, and --from own reads it"


def _tokens(path: Path | None, vocab_size: int) -> Tensor:
    """The ids in a file, (1, L), or a text of random words."""
    if path is None:
        return pseudo_text(vocab_size)
    try:
        ids = [int(word) for word in path.read_text().split()[:_MOST_TOKENS]]
    except ValueError as error:
        raise CommandError(
            f"--tokens {path}: must hold token ids, numbers with spaces or line ends between them"
        ) from error
    if len(ids) < 2 or min(ids) < 0 or max(ids) >= vocab_size:
        raise CommandError(f"--tokens {path}: must hold two ids or more, each from 0 to {vocab_size - 1}")
    return torch.tensor([ids])

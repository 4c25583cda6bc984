"""`convert`: a checkpoint in another format."""

from __future__ import annotations

from pathlib import Path

import torch

from megalodon_ops import Megalodon, save_official
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.options import Convert
from megalodon_ops.errors import FileError
from megalodon_ops.model.official import is_official, read_official
from megalodon_ops.tokenizers import Tokenizer
from megalodon_ops.training.checkpoint import find_tokenizer, load_any


def run(options: Convert) -> int:
    source, target = options.source, options.target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CommandError(f"{target}: exists; name a new folder")
    if options.shards != 1 and options.to != "official":
        raise CommandError("--shards: only the released format is split by ranks; leave it out, or --to official")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        model, tokenizer = _read(source, options.from_, dtype)
        if options.to == "official":
            save_official(model, target, shards=options.shards, tokenizer=tokenizer)
        else:
            model.save(target, tokenizer=tokenizer)
    except (TypeError, ValueError) as error:  # those of an argument that the checkpoint does not allow
        raise CommandError(str(error)) from error
    kind = str(model.embed.weight.dtype).removeprefix("torch.")
    reader = "megalodon_ops.Megalodon.load and transformers' from_pretrained"
    if options.to == "official":
        reader = "megalodon_ops.load_official, the released code and megalodon-jax"
    print(f"{target}: {model.num_parameters():,} parameters, {kind}, read by {reader}")
    return 0


def _read(source: Path, origin: str, dtype: torch.dtype | None) -> tuple[Megalodon, Tokenizer | None]:
    released = source.is_dir() and is_official(source)
    if origin == "official":
        if source.is_dir() and not released:
            raise FileError(
                f"{source}: holds no consolidated.pth, so the released code did not write it; try --from own"
            )
        return read_official(source, dtype or torch.float32, torch.device("cpu")), find_tokenizer(source)
    if released:
        raise FileError(f"{source}: a folder in the format of the released code; --from official reads it")
    model, tokenizer, _ = load_any(source, dtype=dtype)
    return model, tokenizer

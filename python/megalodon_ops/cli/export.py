"""`export`: write a model as ONNX files, and with --web a page that runs it in a browser."""

from pathlib import Path

import torch

from megalodon_ops import MegalodonEncoder, MegalodonEncoderConfig
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.models import read, read_tokenizer
from megalodon_ops.cli.options import Export
from megalodon_ops.storage.files import FileError
from megalodon_ops.storage.folder import holds_model
from megalodon_ops.storage.onnx_export import RUNTIME, export_onnx
from megalodon_ops.tokenizers import Tokenizer
from megalodon_ops.training.run_checkpoint import find_tokenizer, load_any


def run(options: Export) -> int:
    folder = options.web or options.out
    if folder is None or (options.web and options.out):
        raise CommandError("--out, --web: one of them must name the folder to write")
    if options.onnxruntime_web and not options.web:
        raise CommandError("--onnxruntime-web: needs --web, whose page reads these files")
    model, tokenizer = read("--checkpoint", _load, options.checkpoint)
    tokenizer = tokenizer if options.tokenizer is None else read_tokenizer(options.tokenizer)
    page = dict(web=options.web is not None, onnxruntime_web=options.onnxruntime_web)
    try:
        export_onnx(model, folder, dtype=getattr(torch, options.dtype), tokenizer=tokenizer, **page)
    except FileError:  # a ValueError that names its file
        raise
    except ValueError as error:
        raise CommandError(f"--checkpoint {options.checkpoint}: {error}") from error
    if options.web:
        if absent := [name for name in RUNTIME if not (folder / name).exists()]:
            print(f"copy into {folder}, from `dist` of the npm package onnxruntime-web: {', '.join(absent)}")
        print(f"then serve the page: python -m http.server --directory {folder}")
    print(f"written: {folder}")
    return 0


def _load(folder: Path) -> tuple[torch.nn.Module, Tokenizer | None]:
    """Return the model and its tokenizer, or None for a folder without one."""
    if holds_model(folder, MegalodonEncoderConfig.model_type):
        return MegalodonEncoder.load(folder), find_tokenizer(folder)
    return load_any(folder)[:2]

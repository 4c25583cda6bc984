"""Models as ONNX files, which run without this package and without PyTorch."""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from .. import extras
from .files import FileError, as_path, write_atomically
from ..inference.parameters import plain_tensors
from ..model.encoder import MegalodonEncoderBase
from ..model.layers import wide_parameters
from ..model.megalodon import MegalodonBase
from ..ops.common.checks import describe, short_text
from ..reference.encoder_reference import LONGEST, MegalodonEncoder
from ..reference.megalodon_reference import Megalodon
from ..reference.numbers_reference import MegalodonOfNumbers
from .folder import check_tokenizer, kept_files

CONFIG = "config.json"
RUNTIME = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""Files of the npm package onnxruntime-web, from its folder `dist`, that the page needs"""
_FILES = Path(__file__).with_name("exported")
_PAGE = ("index.html", "write.js")
_SHORTEST = 3
"""Tokens of a chunk: a program of variable length reads at least two lengths, from 2 on"""


def export_onnx(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    web: bool = False,
    onnxruntime_web: str | os.PathLike | None = None,
) -> None:
    """Write a model as ONNX files that `onnxruntime` runs without this package and without PyTorch.

    The folder gets `config.json`, a README with a program, the tokenizer's files, and:

    - for a language model or a model of numbers: `step.onnx`, one position a call, and `prompt.onnx`, 2 to C positions;
      `config.json` has names, dtypes and shapes of the state's tensors.
    - for an encoder: `encoder.onnx`, rows (B, L) or (B, L, F) and `lengths` (B,), L from 2 on.

    Args:
        model: a :class:`Megalodon` or a :class:`MegalodonEncoder`.
        folder: a new or empty folder, or one that this function has written, which is replaced.
        dtype: of the linear layers and the embedding: torch.float32, torch.float16, or torch.int8, where onnxruntime's
            quantiser rounds weights, and inputs at run time, to 8 bits. Other parameters and states stay wide.
        tokenizer: saved with the model; has a method `save(folder)`.
        web: also write `index.html` and `write.js`, which run a language model in a browser. Serve the folder, for
            instance by `python -m http.server`.
        onnxruntime_web: folder `dist` of the npm package onnxruntime-web, from which the page's `RUNTIME` is copied.
            None: files that were in `folder` stay.

    Raises:
        ValueError: the model is quantised, has adapters, hooks or other parameters than those of its configuration, or
        has parts of the successor; the page cannot read the tokenizer. ModuleNotFoundError: the extra `onnx` is not
        installed. OSError: the folder cannot be written; then no part of it is left.
    """
    path = as_path("export_onnx", "folder", folder)
    _check(model, dtype, path)
    check_tokenizer("export_onnx", tokenizer)
    if web:
        _check_page(model, tokenizer)
    runtime = path if onnxruntime_web is None else as_path("export_onnx", "onnxruntime_web", onnxruntime_web)
    if onnxruntime_web is not None and (absent := [name for name in RUNTIME if not (runtime / name).is_file()]):
        raise FileError(f"{runtime}: must be the folder `dist` of the npm package onnxruntime-web, got no {absent[0]}")
    reference = _reference(model, torch.float32 if dtype == torch.int8 else dtype)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        extras.load(package, "onnx")
    with write_atomically(path, folder=True) as draft:
        fields, names, state = {"model": model.config.to_dict()}, [], ()
        if model.config.causal:
            state = reference.fresh(1)
            names = state_names(model.config.num_layers)
            names += ["inputs.count", "inputs.mean", "inputs.var"][: len(state) - len(names)]
            fields["state"] = [
                {"name": name, "dtype": str(x.dtype).removeprefix("torch."), "shape": ["B", *x.shape[1:]]}
                for name, x in zip(names, state, strict=True)
            ]
        for file, inputs, input_names, result, sizes in _programs(reference, names):
            _export(draft / file, reference, inputs, input_names, [result, *(f"new.{name}" for name in names)], sizes)
        if dtype == torch.int8:
            _quantize(draft)
        if tokenizer is not None:
            tokenizer.save(draft)
            fields["tokenizer"] = {name: getattr(tokenizer, name, None) for name in ("start", "end")}
        (draft / CONFIG).write_text(json.dumps(fields, indent=1) + "\n")
        (draft / "README.md").write_text(_readme(model.config, tokenizer))
        if web:
            for source in [*(_FILES / name for name in _PAGE), *(runtime / name for name in RUNTIME)]:
                if source.is_file():
                    shutil.copyfile(source, draft / source.name)


def state_names(num_layers: int) -> list[str]:
    """Names of the state's tensors in the files, in order; a result has `new.` before its name."""
    parts = "norm.mean", "norm.var", "cema.real", "cema.imag", "attention.k", "attention.v"
    layers = (f"layers.{layer}.{part}" for layer in range(num_layers) for part in parts)
    return ["count", *layers, "norm.mean", "norm.var"]


def _check(model: nn.Module, dtype: torch.dtype, path: Path) -> None:
    if not isinstance(model, (MegalodonBase, MegalodonEncoderBase)):
        raise TypeError(f"export_onnx: `model` must be a Megalodon or a MegalodonEncoder, got {describe(model)}.")
    if dtype not in (torch.float32, torch.float16, torch.int8):
        raise ValueError(
            f"export_onnx: `dtype` must be torch.float32, torch.float16 or torch.int8, got {short_text(dtype)}."
        )
    if kind := getattr(model, "quantization", None):
        fix = "export the model that it was made from; `dtype=torch.int8` has onnxruntime quantise it"
        raise ValueError(f"export_onnx: `model` must have floating-point weights, got {kind} weights; {fix}.")
    for name, part in model.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            raise ValueError(f"export_onnx: `model` must have no hooks, got one on `{name}`; remove it.")
    config = model.config
    for field, value in dict(working_memory=False, visible_chunks=1).items():
        if (got := getattr(config, field)) != value:
            fix = "parts of the successor are not written in ONNX; torch.export, where this package is installed"
            raise ValueError(f"export_onnx: `{field}` of the model must be {value}, got {got}; {fix}.")
    if 0 < config.norm_eps <= 1e-8:
        fix = "torch's exporter takes smaller ones for 0"
        raise ValueError(f"export_onnx: `norm_eps` of the model must be 0 or above 1e-8, got {config.norm_eps}; {fix}.")
    if config.causal and config.chunk_size < _SHORTEST:
        raise ValueError(
            f"export_onnx: `chunk_size` of the model must be at least {_SHORTEST}, got {config.chunk_size}."
        )
    kept_files("export_onnx", path, any((path / name).exists() for name in ("step.onnx", "encoder.onnx")), ())


def _check_page(model: nn.Module, tokenizer: Any) -> None:
    """Raise unless the page can run the model and read the tokenizer."""
    if not model.config.causal or model.config.num_features is not None:
        raise ValueError("export_onnx: `web` must be False for an encoder or a model of numbers; the page writes text.")
    try:
        content = json.loads(tokenizer.content)
        known = content["model"]["type"] == "BPE" and content["pre_tokenizer"]["type"] == "ByteLevel"
        known = known and not content["pre_tokenizer"]["add_prefix_space"] and content["normalizer"] is None
    except (AttributeError, KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(
            "export_onnx: `tokenizer` must be of bytes or byte-level BPE for the page, as `megalodon-ops tokenizer "
            f"--train` writes it, got {describe(tokenizer)}; leave `web` out."
        )


def _reference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the model in plain torch, with copies of its parameters."""
    wide, config = wide_parameters(model), model.config
    tensors = {
        name: tensor.detach().to("cpu", torch.float32 if name in wide else dtype, copy=True)
        for name, tensor in plain_tensors(model, config.parameter_shapes(), caller="export_onnx").items()
    }
    if not config.causal:
        reference = MegalodonEncoder(config)
    else:
        reference = Megalodon(config) if config.num_features is None else MegalodonOfNumbers(config)
    if config.share_emb:
        tensors["output.output.weight"] = tensors["embed.weight"]
    reference.load_state_dict(tensors, assign=True)
    return reference.eval().requires_grad_(False)


def _programs(reference: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, tuple, Sequence[str], str, tuple]]:
    """Yield for each file its name, example inputs, their names, the result's name and dynamic sizes. names: the state's."""
    config = getattr(reference, "inputs", reference.config)
    B, lengths = Dim("B"), Dim("L", min=2, max=config.chunk_size if config.causal else LONGEST)
    name = "tokens" if config.num_features is None else "numbers"
    rows = torch.zeros(2, 3, dtype=torch.int64)
    if config.num_features is not None:
        rows = torch.zeros(2, 3, config.num_features, dtype=torch.float64)
    if not config.causal:
        inputs, sizes = (rows, torch.tensor([3, 2])), ({0: B, 1: lengths}, {0: B})
        yield "encoder.onnx", inputs, [name, "lengths"], "logits" if config.num_classes else "features", sizes
        return
    state = tuple(tensor.clone() for tensor in reference.fresh(2))  # torch.export takes one tensor for one input
    result = "logits" if config.num_features is None else "outputs"
    for file, length, sizes in (("step.onnx", 1, {0: B}), ("prompt.onnx", 3, {0: B, 1: lengths})):
        yield file, (rows[:, :length], state), [name, *names], result, (sizes, tuple({0: B} for _ in state))


def _export(path: Path, module: nn.Module, inputs: tuple, names: Sequence[str], results: Sequence[str], sizes: tuple):
    options = dict(input_names=names, output_names=results, dynamic_shapes=sizes)
    with _quiet():
        torch.onnx.export(module, inputs, dynamo=True, verbose=False, opset_version=23, **options).save(path)


def _quantize(draft: Path) -> None:
    """Replace the files by those of onnxruntime's quantiser: weights of 8 bits, inputs rounded at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        for path in sorted(draft.glob("*.onnx")):
            wide = path.rename(path.with_suffix(".wide"))
            quantize_dynamic(wide, path, per_channel=True, weight_type=QuantType.QInt8)
            wide.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of torch, onnxscript and onnxruntime about their own code, such as an absent torchvision."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _readme(config: Any, tokenizer: Any) -> str:
    F = config.num_features
    kind = "tokens" if F is None else "numbers"
    values = dict(chunk=config.chunk_size, features=F, outputs=config.num_outputs, name=kind, prompt=[0, 0, 0])
    if not config.causal:
        values["outputs"] = "logits (B, classes)" if config.num_classes else "features (B, L, D)"
        values |= dict(inputs="(B, L)", shape=(2, 20), dtype="int64")
        if F is not None:
            values |= dict(inputs=f"(B, L, {F})", shape=(2, 20, F), dtype="float64")
    elif tokenizer is not None:
        values["prompt"] = [tokenizer.start, *tokenizer.encode("The ").tolist()]
    page = kind if config.causal else "encoder"
    return Template((_FILES / f"{page}.md").read_text()).substitute(values)

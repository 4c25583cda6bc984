"""A language model as ONNX files, which run without this package and without PyTorch."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras
from .files import as_path, write_atomically
from ..inference.parameters import plain_tensors
from ..model.layers import wide_parameters
from ..model.megalodon import MegalodonBase
from ..ops.common.checks import describe, short_text
from ..reference.megalodon_reference import Megalodon as Reference
from .folder import check_tokenizer, kept_files

CONFIG, STEP, PROMPT = "config.json", "step.onnx", "prompt.onnx"
_README = """# A MEGALODON language model in ONNX

`step.onnx` reads one token of each sequence, tokens (B, 1); `prompt.onnx` reads 2 to {chunk} tokens, (B, L). Both take the
state and return logits (B, L, {outputs}) and the new state, as `config.json` lists. A new sequence has a state of zeros.
This program needs `onnxruntime` and `numpy` alone:

```python
import json
import numpy as np, onnxruntime

model = onnxruntime.InferenceSession("step.onnx")
inputs = json.load(open("config.json"))["state"]
state = [np.zeros([1, *entry["shape"][1:]], entry["dtype"]) for entry in inputs]
names = ["tokens", *(entry["name"] for entry in inputs)]

def step(token):
    global state
    logits, *state = model.run(None, dict(zip(names, [np.array([[token]]), *state])))
    return logits[0, -1]

tokens = {prompt}
for token in tokens:
    logits = step(token)
for _ in range(20):
    tokens.append(int(logits.argmax()))
    logits = step(tokens[-1])
print(tokens)
```
"""


def export_onnx(
    model: MegalodonBase, folder: str | os.PathLike, *, dtype: torch.dtype = torch.float32, tokenizer: Any = None
) -> None:
    """Write a language model as ONNX files that `onnxruntime` runs without this package and without PyTorch.

    The folder gets `step.onnx`, one token a call; `prompt.onnx`, 2 to C tokens; `config.json` with the names, dtypes and
    shapes of the state's tensors; a README with a program; and the tokenizer's files.

    Args:
        model: a model of tokens.
        folder: a new or empty folder, or one that this function has written, which is replaced.
        dtype: torch.float32 or torch.float16, of the linear layers and the embedding; the others stay float32.
        tokenizer: saved with the model; has a method `save(folder)`.

    Raises:
        ValueError: the model is quantised, has adapters or other parameters than those of its configuration, reads
        numbers, or has parts of the successor. ModuleNotFoundError: the extra `onnx` is not installed. OSError: the
        folder cannot be written; then no part of it is left.
    """
    if not isinstance(model, MegalodonBase):
        raise TypeError(f"export_onnx: `model` must be a Megalodon, got {describe(model)}.")
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"export_onnx: `dtype` must be torch.float32 or torch.float16, got {short_text(dtype)}.")
    if getattr(model, "quantization", None):
        raise ValueError(f"export_onnx: `model` must not be quantised, got {model.quantization} weights.")
    if hooked := next(
        (name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks), None
    ):
        raise ValueError(f"export_onnx: `model` must have no hooks, got one on `{hooked}`; remove it.")
    check_tokenizer("export_onnx", tokenizer)
    reference = _reference(model, dtype)
    for package in ("onnx", "onnxscript"):
        extras.load(package, "onnx")
    path = as_path("export_onnx", "folder", folder)
    kept_files("export_onnx", path, (path / STEP).exists(), ())
    with write_atomically(path, folder=True) as draft:
        names = state_names(model.config.num_layers)
        _export(reference, 1, draft / STEP, names)
        if model.config.chunk_size > 2:
            _export(reference, 3, draft / PROMPT, names)
        state = [
            {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": ["B", *tensor.shape[1:]]}
            for name, tensor in zip(names, reference.fresh(1), strict=True)
        ]
        (draft / CONFIG).write_text(json.dumps({"model": model.config.to_dict(), "state": state}, indent=1) + "\n")
        readme = _README.format(chunk=model.config.chunk_size, outputs=model.config.num_outputs, prompt=[1, 2, 3])
        (draft / "README.md").write_text(readme)
        if tokenizer is not None:
            tokenizer.save(draft)


def state_names(num_layers: int) -> list[str]:
    """Names of the state's tensors in the files, in order; a result has `new.` before its name."""
    parts = "norm.mean", "norm.var", "cema.real", "cema.imag", "attention.k", "attention.v"
    layers = (f"layers.{layer}.{part}" for layer in range(num_layers) for part in parts)
    return ["count", *layers, "norm.mean", "norm.var"]


def _reference(model: MegalodonBase, dtype: torch.dtype) -> nn.Module:
    """Return the model in plain torch, with copies of its parameters."""
    wide = wide_parameters(model)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32 if name in wide else dtype, copy=True)
        for name, tensor in plain_tensors(model, model.config.parameter_shapes(), caller="export_onnx").items()
    }
    reference = Reference(model.config)
    if model.config.share_emb:
        tensors["output.output.weight"] = tensors["embed.weight"]
    reference.load_state_dict(tensors, assign=True)
    return reference.eval().requires_grad_(False)


def _export(reference: nn.Module, length: int, path: os.PathLike, names: list[str]) -> None:
    """Export a call of one token or, for a longer `length`, of any number up to a chunk."""
    tokens: Tensor = torch.zeros(2, length, dtype=torch.int64)
    state = tuple(tensor.clone() for tensor in reference.fresh(2))  # torch.export takes one tensor for one input
    rows, sizes = torch.export.Dim("B"), {}
    if length > 1:
        sizes[1] = torch.export.Dim("L", min=2, max=reference.config.chunk_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and onnxscript about their own code
        program = torch.onnx.export(
            reference,
            (tokens, state),
            dynamo=True,
            verbose=False,
            input_names=["tokens", *names],
            output_names=["logits", *(f"new.{name}" for name in names)],
            dynamic_shapes=({0: rows, **sizes}, tuple({0: rows} for _ in state)),
        )
    program.save(path)

"""`generate`: text sampled byte by byte, printed as it comes."""

from __future__ import annotations

import argparse
import codecs
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from megalodon_ops import Megalodon
from megalodon_ops.cli.batches import START
from megalodon_ops.cli.models import precision, trained_model, usable_device

PROMPT, SAMPLE = 300, 600
"""Bytes of the held-out beginning shown at the end of a training run, and of its continuation"""


def run(options: argparse.Namespace) -> int:
    device = usable_device(options.device)
    prompt = _prompt(options)
    model, record = trained_model(options.checkpoint, device)
    sampling = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(decoder.decode(prompt), end="", flush=True)
    with precision(device, options.dtype or record["options"]["dtype"]):
        for byte in sample(model, prompt, options.bytes, seed=options.seed, **sampling):
            print(decoder.decode(byte), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return 0


def sample(model: Megalodon, prompt: bytes, count: int, *, seed: int, **sampling: Any) -> Iterator[bytes]:
    """`count` bytes, one by one, that continue a document which starts with `prompt`."""
    device = next(model.parameters()).device
    tokens = torch.tensor([[START, *prompt]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for token in itertools.islice(model.stream(tokens, generator=generator, **sampling), count):
        byte = int(token)
        if byte == START:  # a model with tied embeddings can predict START: the document's end
            return
        yield bytes([byte])


def show_sample(model: Megalodon, documents: Sequence[bytes], seed: int, autocast: AbstractContextManager) -> None:
    """Print the beginning of a held-out document and what the model makes of the rest."""
    prompt = max(documents, key=lambda document: min(len(document), 2 * PROMPT))[:PROMPT]
    model.eval()
    with autocast:
        text = b"".join(sample(model, prompt, SAMPLE, seed=seed, temperature=0.8))
    print(f"\n--- the first {len(prompt)} bytes of a held-out document\n{prompt.decode(errors='replace')}")
    print(f"--- continued by the model\n{text.decode(errors='replace')}\n---")


def _prompt(options: argparse.Namespace) -> bytes:
    if hasattr(options, "prompt_file"):
        return sys.stdin.buffer.read() if str(options.prompt_file) == "-" else options.prompt_file.read_bytes()
    return os.fsencode(getattr(options, "prompt", ""))

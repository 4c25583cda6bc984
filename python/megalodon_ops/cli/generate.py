"""`generate`: text sampled token by token, printed as it comes."""

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

from megalodon_ops import Megalodon, MegalodonState, StopStrings, use_huge_pages
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.models import precision, trained_model, usable_device
from megalodon_ops.ops.memory import check_fits
from megalodon_ops.tokenizers import Tokenizer

PROMPT, SAMPLE = 300, 600
"""Bytes of the held-out beginning shown at the end of a training run, and of its continuation"""
UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()
"""Text of an id that the model knows and the tokenizer does not"""
CONTEXT = 16
"""Tokens of the prompt that may change how the first new token is written"""


def run(options: argparse.Namespace) -> int:
    if options.samples > 1 and options.temperature == 0:
        raise CommandError("--samples: must be 1 with --temperature 0, which draws nothing")
    device = usable_device(options.device)
    prompt = _prompt(options)
    trained = trained_model(options.checkpoint, device, options.tokenizer, options.dtype)
    check_memory(trained.model, options.samples)
    use_huge_pages(trained.model)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = {name: getattr(options, name) for name in names}
    limits = {"num_bytes": None if options.tokens else options.bytes, "num_tokens": options.tokens}
    with precision(device, options.dtype or trained.dtype):
        texts = continued(
            trained.model, trained.tokenizer, prompt, stops=options.stop, samples=options.samples, **limits, **sampling
        )
        if options.samples == 1:
            _print_as_it_comes(prompt, (text for _, text in texts))
        else:
            _print_samples(prompt, texts, options.samples)
    return 0


def check_memory(model: Megalodon, samples: int) -> None:
    """Refuses, before the prompt is read, more samples than there is memory for their states and logits."""
    state = MegalodonState.fresh(model.config, 1, dtype=model.embed.weight.dtype, device="meta").nbytes
    logits = 2 * model.config.num_outputs * torch.float32.itemsize  # of the decoder, and as the sampler orders them
    try:
        check_fits(samples * (state + logits), f"the state of {samples:,} samples")
    except ValueError as error:
        raise CommandError(f"--samples: {error}; ask for fewer") from error


def _print_as_it_comes(prompt: bytes, texts: Iterator[bytes]) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back a letter of which a part has come
    print(decoder.decode(prompt), end="", flush=True)
    for text in texts:
        print(decoder.decode(text), end="", flush=True)
    print(decoder.decode(b"", final=True))


def _print_samples(prompt: bytes, texts: Iterator[tuple[int, bytes]], samples: int) -> None:
    """Prints every sample when all are done, as their tokens come side by side."""
    whole = [prompt] * samples
    for sample, text in texts:
        whole[sample] += text
    for number, text in enumerate(whole, 1):
        print(f"--- sample {number}\n{text.decode(errors='replace')}")


def continued(
    model: Megalodon,
    tokenizer: Tokenizer,
    prompt: bytes,
    *,
    num_bytes: int | None,
    num_tokens: int | None = None,
    stops: Sequence[str] = (),
    samples: int = 1,
    **sampling: Any,
) -> Iterator[tuple[int, bytes]]:
    """Text that continues a document which starts with `prompt`, piece by piece: (the sample, its next bytes).

    A sample ends where one of `stops` begins, at the document's end, once it has as many bytes, or as many tokens.
    """
    device = next(model.parameters()).device
    ids = [tokenizer.start, *tokenizer.encode(prompt).tolist()]
    if tokenizer.start < model.config.num_outputs:  # where a model can predict `start`, this is the document's end
        sampling["stop_tokens"] = tokenizer.start
    stream = model.stream(torch.tensor([ids], device=device), num_samples=samples, **sampling)

    def decode(new: list[int]) -> bytes:
        parts: list[bytes] = []
        for known, group in itertools.groupby(new, lambda token: token < tokenizer.vocab_size):
            parts += tokenizer.text_of(group, after=ids[-CONTEXT:]) if known else [UNKNOWN for _ in group]
        return b"".join(parts)

    texts = [StopStrings(decode, stops) for _ in range(samples)]
    written, going_on = [0] * samples, list(range(samples))
    for count, tokens in enumerate(stream, 1):
        for sample, token in enumerate(tokens.tolist()):
            if sample not in going_on:
                continue
            ends = token in (-1, tokenizer.start)
            text = b"" if ends else texts[sample].add(token)
            if ends or count == num_tokens:
                text += texts[sample].rest()
            if text:
                yield sample, text
            written[sample] += len(text)
            full = count == num_tokens or (num_bytes is not None and written[sample] >= num_bytes)
            if ends or full or texts[sample].stopped:
                going_on.remove(sample)
        if not going_on:
            return


def show_sample(
    model: Megalodon, tokenizer: Tokenizer, documents: Sequence[bytes], seed: int, autocast: AbstractContextManager
) -> None:
    """Print the beginning of a held-out document and what the model makes of the rest."""
    prompt = max(documents, key=lambda document: min(len(document), 2 * PROMPT))[:PROMPT]
    model.eval()
    with autocast:
        pieces = continued(model, tokenizer, prompt, num_bytes=SAMPLE, seed=seed, temperature=0.8)
        text = b"".join(text for _, text in pieces)
    print(f"\n--- the first {len(prompt)} bytes of a held-out document\n{prompt.decode(errors='replace')}")
    print(f"--- continued by the model\n{text.decode(errors='replace')}\n---")


def _prompt(options: argparse.Namespace) -> bytes:
    if hasattr(options, "prompt_file"):
        if str(options.prompt_file) == "-":
            return sys.stdin.buffer.read()
        try:
            return options.prompt_file.read_bytes()
        except IsADirectoryError as error:
            raise CommandError(f"--prompt-file {options.prompt_file}: a folder, name a file") from error
        except OSError as error:
            raise CommandError(f"--prompt-file {options.prompt_file}: {error.strerror}") from error
    return os.fsencode(getattr(options, "prompt", ""))

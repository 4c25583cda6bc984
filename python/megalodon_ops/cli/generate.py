"""`generate`: sample text and print it token by token."""

import codecs
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from megalodon_ops import Megalodon, StopStrings, use_huge_pages
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.models import precision, trained_model, usable_device
from megalodon_ops.cli.options import Generate
from megalodon_ops.inference.generation import check_samples
from megalodon_ops.inference.quantized_layers import computing_dtype
from megalodon_ops.tokenizers import Tokenizer

NUM_SAMPLES = 3
"""Number of continuations shown at the end of a training run"""
SAMPLE_TOKENS = 300  # of each
PROMPT_BYTES = 2048
"""Bytes of a held-out document in the prompt of these continuations"""
SHOWN_BYTES = 300
"""Last bytes of the prompt that are shown"""
MAX_PROMPT_BYTES = 100_000_000
"""Longest prompt; reading stops there, as a file such as /dev/zero never ends"""
UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()
"""Text of an id that the tokenizer does not have"""
CONTEXT = 16
"""Tokens of the prompt that may affect the text of the first new token"""


def run(options: Generate) -> int:
    if options.samples > 1 and options.temperature == 0:
        raise CommandError("--samples: must be 1 with --temperature 0, which draws nothing")
    device = usable_device(options.device)
    prompts = _prompts(options)
    trained = trained_model(options.checkpoint, device, options.tokenizer, options.dtype)
    cache_dtype = {"int8": torch.int8, "model": computing_dtype(trained.model), None: None}[options.cache_dtype]
    try:
        check_samples(trained.model, options.samples, cache_dtype)  # before the model runs
    except ValueError as error:
        raise CommandError(f"--samples: {error}; ask for fewer") from error
    use_huge_pages(trained.model)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "samples")
    sampling = {name: getattr(options, name) for name in names}
    sampling |= dict(num_tokens=options.tokens, stops=options.stop, cache_dtype=cache_dtype)
    with precision(device, options.dtype or trained.dtype):
        for count, prompt in enumerate(prompts, 1):
            title = f"prompt {count}" if len(prompts) > 1 else ""
            texts = continue_prompt(trained.model, trained.tokenizer, prompt, **sampling)
            if options.samples == 1:
                if title:
                    print(f"--- {title}")
                _print_as_it_comes(prompt, (text for _, text in texts))
                continue
            for number, text in enumerate(_collect(texts, options.samples), 1):
                sample = f"{title}, sample {number}" if title else f"sample {number}"
                print(f"--- {sample}\n{(prompt + text).decode(errors='replace')}")
    return 0


def _collect(texts: Iterable[tuple[int, bytes]], samples: int) -> list[bytes]:
    """Collect the text of each sample until all are complete."""
    collected = [b""] * samples
    for sample, text in texts:
        collected[sample] += text
    return collected


def _print_as_it_comes(prompt: bytes, texts: Iterator[bytes]) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back incomplete characters
    print(decoder.decode(prompt), end="", flush=True)
    for text in texts:
        print(decoder.decode(text), end="", flush=True)
    print(decoder.decode(b"", final=True))


def continue_prompt(
    model: Megalodon,
    tokenizer: Tokenizer,
    prompt: bytes,
    *,
    num_tokens: int,
    stops: Sequence[str] = (),
    samples: int = 1,
    **sampling: Any,
) -> Iterator[tuple[int, bytes]]:
    """Continue a document that begins with `prompt`; yield (sample, its next bytes).

    A sample ends before one of `stops`, at the document's end, or after `num_tokens`.
    """
    device = next(model.parameters()).device
    ids = [tokenizer.start, *tokenizer.encode(prompt).tolist()]
    ends = (tokenizer.end, tokenizer.start)
    stream = model.stream(torch.tensor([ids], device=device), num_samples=samples, stop_tokens=ends, **sampling)

    def decode(new: list[int]) -> bytes:
        parts: list[bytes] = []
        for is_known, group in itertools.groupby(new, lambda token: token < tokenizer.vocab_size):
            parts += tokenizer.text_of(group, after=ids[-CONTEXT:]) if is_known else [UNKNOWN for _ in group]
        return b"".join(parts)

    texts = [StopStrings(decode, stops) for _ in range(samples)]
    unfinished = list(range(samples))
    for count, tokens in enumerate(stream, 1):
        for sample, token in enumerate(tokens.tolist()):
            if sample not in unfinished:
                continue
            is_over = token in (-1, *ends)  # -1: the row had stopped before
            text = b"" if is_over else texts[sample].add(token)
            if is_over or count == num_tokens:
                text += texts[sample].rest()
            if text:
                yield sample, text
            if is_over or count == num_tokens or texts[sample].stopped:
                unfinished.remove(sample)
        if not unfinished:
            return


def show_sample(
    model: Megalodon, tokenizer: Tokenizer, documents: Sequence[bytes], seed: int, autocast: AbstractContextManager
) -> None:
    """Print an excerpt from the middle of a held-out document, and continuations by the model."""
    document = max(documents, key=len)
    middle = document.find(b" ", len(document) // 2) + 1 or len(document) // 2  # at the start of a word
    prompt = document[max(0, middle - PROMPT_BYTES) : middle]
    sampling = dict(samples=NUM_SAMPLES, seed=seed, temperature=0.8, top_p=0.9)
    model.eval()
    with autocast:
        texts = _collect(continue_prompt(model, tokenizer, prompt, num_tokens=SAMPLE_TOKENS, **sampling), NUM_SAMPLES)
    print(f"\n--- from the middle of a held-out document\n{prompt[-SHOWN_BYTES:].decode(errors='replace')}")
    for number, text in enumerate(texts, 1):
        print(f"--- continued by the model, {number} of {NUM_SAMPLES}\n{text.decode(errors='replace')}")


def _prompts(options: Generate) -> list[bytes]:
    if options.prompt_file is None:
        return [os.fsencode(prompt) for prompt in options.prompt or ("",)]
    path, is_stdin = options.prompt_file, str(options.prompt_file) == "-"
    if options.prompt:
        raise CommandError("--prompt-file: cannot be combined with --prompt")
    try:
        with open(0 if is_stdin else path, "rb", closefd=not is_stdin) as file:
            prompt = file.read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise CommandError(f"--prompt-file {path}: {error.strerror}") from error
    if len(prompt) > MAX_PROMPT_BYTES:
        raise CommandError(f"--prompt-file {path}: must have at most {MAX_PROMPT_BYTES:,} bytes, got more")
    return [prompt]

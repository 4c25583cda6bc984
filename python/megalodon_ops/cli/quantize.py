"""`quantize`: write a model with weights of 8 or 4 bits, and print its size, errors and speed beside the old ones."""

import statistics
import time

import torch

from megalodon_ops import Decoder, Megalodon, quantize
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.evaluate import as_documents, read_documents
from megalodon_ops.cli.models import trained_model
from megalodon_ops.cli.options import Quantize
from megalodon_ops.evaluation import evaluate

_PROMPT = 64
"""Tokens read before the timing"""
_TIMED = 48
"""Tokens timed, one by one"""
_ROWS = 8
"""Documents evaluated in parallel"""


def run(options: Quantize) -> int:
    try:
        trained = trained_model(options.checkpoint, torch.device("cpu"), options.tokenizer)
    except CommandError as error:
        raise CommandError(str(error).removeprefix("--checkpoint ")) from error
    model = trained.model if options.dtype is None else trained.model.to(getattr(torch, options.dtype))
    try:
        quantized = quantize(model, options.to, None if options.activations == "none" else options.activations)
        quantized.save(options.out, tokenizer=trained.tokenizer)
    except ValueError as error:
        raise CommandError(f"{options.checkpoint}: {error}") from error
    wide = str(model.embed.weight.dtype).removeprefix("torch.")
    print(f"{'':>16} {wide:>12} {options.to:>12}")
    print(f"{'megabytes':>16} {_megabytes(model):>12,.2f} {_megabytes(quantized):>12,.2f}")
    if options.data or options.glob or trained.record is not None:
        documents, text = read_documents(options, trained.record)
        texts = as_documents(documents, trained.tokenizer)
        before = evaluate(model, texts, rows=_ROWS)[0].bits_per_byte
        after = evaluate(quantized, texts, rows=_ROWS)[0].bits_per_byte
        print(f"{'bits per byte':>16} {before:>12.4f} {after:>12.4f}  {100 * (after / before - 1):+.2f} %, {text}")
    print(f"{'tokens a second':>16} {_tokens_a_second(model):>12,.1f} {_tokens_a_second(quantized):>12,.1f}")
    print(f"written: {options.out}")
    return 0


def _megabytes(model: Megalodon) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / 1e6


@torch.no_grad()
def _tokens_a_second(model: Megalodon) -> float:
    """Return tokens per second of one sequence, from the median time of a token."""
    token = torch.zeros(1, 1, dtype=torch.long)
    decoder = Decoder(model, model(token.expand(1, _PROMPT), return_state=True)[1])
    times = []
    for _ in range(_TIMED):
        start = time.perf_counter()
        decoder(token)
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times)

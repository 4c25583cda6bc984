"""`python -m bench.drafts MODEL DRAFT TEXT...`: tokens a second with and without a draft.

MODEL and DRAFT are folders that `Megalodon.load` reads, best of runs on the same text, such as RUN/best of `train`. Each
prompt is 256 bytes of one of the files, which the models should not have read. For each way, tokens a second of one
sequence, calls of the decoder for each token, and the share of the guesses that were kept. All ways take their turn at
each prompt, so that a busy machine slows them alike; rates are of the prompts' median.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import megalodon_ops as mo

PROMPT, NEW = 256, 128
TEMPERATURES = (0.0, 0.8)
WAYS = {
    "none": {},
    "the draft's, 2 at once": dict(draft_tokens=2),
    "the draft's, 4": dict(draft_tokens=4),
    "the draft's, 8": dict(draft_tokens=8),
    "copied from the text, 4": dict(draft="prompt", draft_tokens=4),
    "copied from the text, 8": dict(draft="prompt", draft_tokens=8),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.drafts", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("draft")
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    mo.keep_freed_memory()
    model, draft = (
        mo.Megalodon.load(p, dtype=getattr(torch, options.dtype)).eval() for p in (options.model, options.draft)
    )
    prompts = prompts_of_files(options.text, options.prompts)
    print(f"{model.num_parameters():,} and {draft.num_parameters():,} parameters, {options.dtype}")
    print("|temperature|guesses|tokens/s|calls a token|guesses kept|equal tokens|", "|---" * 6 + "|", sep="\n")
    for temperature in TEMPERATURES:
        for row in measure(model, draft, prompts, temperature):
            print(row, flush=True)
    return 0


def prompts_of_files(files: list[Path], count: int) -> list[Tensor]:
    """Return `count` prompts (1, PROMPT), evenly from all files, of bytes."""
    text = b"".join(path.read_bytes() for path in files)
    begins = torch.linspace(0, len(text) - PROMPT, count).long().tolist()
    return [torch.tensor([list(text[begin : begin + PROMPT])]) for begin in begins]


def measure(model: mo.Megalodon, draft: mo.Megalodon, prompts: list[Tensor], temperature: float) -> list[str]:
    """Return a row of the table for each way."""
    rates, calls, guesses, equal = ({way: [] for way in WAYS} for _ in range(4))
    for i, (prompt, way) in enumerate(itertools.product([prompts[0], *prompts], WAYS)):
        options = dict(max_new_tokens=NEW, temperature=temperature, seed=i // len(WAYS), stop_tokens=[])
        if WAYS[way]:
            options |= dict(draft=draft) | WAYS[way]
        read, call = [], mo.Decoder.__call__

        def counted(decoder: mo.Decoder, tokens: Tensor) -> Tensor:
            if decoder._model is model:
                read.append(tokens.shape[1])  # noqa: B023
            return call(decoder, tokens)  # noqa: B023

        with mock.patch.object(mo.Decoder, "__call__", counted):
            stream = model.stream(prompt, **options)
            begin = time.perf_counter()
            found = torch.cat(list(stream))
            seconds = time.perf_counter() - begin
        plain = plain if WAYS[way] else found
        if i < len(WAYS):
            continue  # to warm up
        rates[way].append(NEW / seconds)
        calls[way].append(len(read) / NEW)
        guesses[way].append((NEW - len(read), sum(read) - len(read)))
        equal[way].append(bool((found == plain).all()))
    rows = []
    for way in WAYS:
        kept, all_guesses = map(sum, zip(*guesses[way], strict=True))
        share = f"{kept / all_guesses:.0%}" if all_guesses else ""
        rate, mean_calls = statistics.median(rates[way]), statistics.mean(calls[way])
        rows.append(f"|{temperature}|{way}|{rate:,.0f}|{mean_calls:.2f}|{share}|{sum(equal[way])} of {len(prompts)}|")
    return rows


if __name__ == "__main__":
    raise SystemExit(main())

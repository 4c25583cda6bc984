"""`python -m bench.drafts MODEL DRAFT TEXT...`: tokens a second with and without a draft.

MODEL and DRAFT are folders that `Megalodon.load` reads, such as RUN/best of two training runs on the same text. Each
prompt is 256 bytes of one of the files TEXT, which the models should not have been trained on. For each way to guess
tokens, the table shows the tokens a second of one sequence (median over prompts), calls of the decoder for each token,
and the share of the guesses that were kept. All ways take turns at each prompt, so a busy machine slows them alike.
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

PROMPT, NEW = 256, 128  # tokens read, tokens generated
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
    dtype = getattr(torch, options.dtype)
    model = mo.Megalodon.load(options.model, dtype=dtype).eval()
    draft = mo.Megalodon.load(options.draft, dtype=dtype).eval()
    prompts = prompts_of_files(options.text, options.prompts)
    print(f"{model.num_parameters():,} and {draft.num_parameters():,} parameters, {options.dtype}")
    print("|temperature|guesses|tokens/s|calls a token|guesses kept|equal tokens|", "|---" * 6 + "|", sep="\n")
    for temperature in TEMPERATURES:
        for row in measure(model, draft, prompts, temperature):
            print(row, flush=True)
    return 0


def prompts_of_files(files: list[Path], count: int) -> list[Tensor]:
    """Return `count` prompts of bytes (1, PROMPT), evenly spaced over all files."""
    text = b"".join(path.read_bytes() for path in files)
    begins = torch.linspace(0, len(text) - PROMPT, count).long().tolist()
    return [torch.tensor([list(text[begin : begin + PROMPT])]) for begin in begins]


def measure(model: mo.Megalodon, draft: mo.Megalodon, prompts: list[Tensor], temperature: float) -> list[str]:
    """Return a row of the table for each way."""
    rates, calls, equal = ({way: [] for way in WAYS} for _ in range(3))
    kept, guesses = (dict.fromkeys(WAYS, 0) for _ in range(2))
    call = mo.Decoder.__call__
    for i, (prompt, way) in enumerate(itertools.product([prompts[0], *prompts], WAYS)):
        options = dict(max_new_tokens=NEW, temperature=temperature, seed=i // len(WAYS), stop_tokens=[])
        if WAYS[way]:
            options |= dict(draft=draft) | WAYS[way]
        read = []  # tokens of each call of the model: one, and the guesses after it

        def counted(decoder: mo.Decoder, tokens: Tensor) -> Tensor:
            if decoder._model is model:
                read.append(tokens.shape[1])  # noqa: B023
            return call(decoder, tokens)

        with mock.patch.object(mo.Decoder, "__call__", counted):
            stream = model.stream(prompt, **options)
            begin = time.perf_counter()
            found = torch.cat(list(stream))
            seconds = time.perf_counter() - begin
        if not WAYS[way]:
            plain = found
        if i < len(WAYS):
            continue  # the first prompt comes twice: once to warm up
        rates[way].append(NEW / seconds)
        calls[way].append(len(read) / NEW)
        kept[way] += NEW - len(read)
        guesses[way] += sum(read) - len(read)
        equal[way].append(bool((found == plain).all()))
    rows = []
    for way in WAYS:
        share = f"{kept[way] / guesses[way]:.0%}" if guesses[way] else ""
        rate, mean_calls = statistics.median(rates[way]), statistics.mean(calls[way])
        rows.append(f"|{temperature}|{way}|{rate:,.0f}|{mean_calls:.2f}|{share}|{sum(equal[way])} of {len(prompts)}|")
    return rows


if __name__ == "__main__":
    raise SystemExit(main())

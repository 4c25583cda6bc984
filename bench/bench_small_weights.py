"""Decoding of one sequence by weights of 32, 16, 8 and 4 bits, after few and many tokens of a chunk.

Bytes: for each decoded token the weights of ours, int8, without the embedding, and the chunk's keys and values so far.
The others do other work, with their own rounding, and are shown for comparison. int8 and int4 compute in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import megalodon_ops as mo

from .bench_model import DECODED, FORWARD_TOLERANCE, QUICK
from .harness import OURS, Case, Outputs, Path

_CONTEXTS = (8, 512, 1536)


@torch.no_grad()
def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    if gpu:
        return
    torch.manual_seed(0)
    config = mo.MegalodonConfig(**QUICK) if quick else mo.MegalodonConfig.preset("mega200M")
    wide = mo.Megalodon(config).eval()
    half = mo.Megalodon(config).eval()
    half.load_state_dict(wide.state_dict())
    half.to(torch.bfloat16)
    int8 = mo.quantize(half, "int8")
    models = {f"{OURS}, int8": int8, "int4": mo.quantize(half, "int4"), "bfloat16": half, "float32": wide}
    for model in models.values():
        mo.use_huge_pages(model)
    read = sum(p.nbytes for p in int8.parameters()) - sum(p.nbytes for p in int8.embed.parameters())
    for context in (_CONTEXTS[0], config.chunk_size // 2) if quick else _CONTEXTS:
        tokens = torch.randint(config.vocab_size, (1, context + DECODED))
        decoding = [_Decoding(model, tokens, context) for model in models.values()]
        paths = [
            Path(OURS if name.startswith(OURS) else name, each.decode, each.restore, rival=False, checked=i == 0)
            for i, (name, each) in enumerate(zip(models, decoding, strict=True))
        ]
        past = config.num_layers * context * (config.z_dim + config.value_dim) * half.embed.weight.element_size()
        work = f"decode after {context} tokens, int8", "2M" if quick else "200M", "bf16"
        cost = dict(units=DECODED, unit="token", bytes=DECODED * (read + past))
        tolerance = FORWARD_TOLERANCE[torch.bfloat16]
        yield Case(*work, paths, expected=decoding[0].by_layers, tolerance=tolerance, **cost, cold=False)


class _Decoding:
    """Decode the tokens after `context`, one a call, from one state."""

    def __init__(self, model: mo.Megalodon, tokens: Tensor, context: int) -> None:
        self.model, self.new = model, tokens[:, context:].split(1, 1)
        _, self.start = model(tokens[:, :context], return_state=True)
        self.decoder: Callable[[Tensor], Tensor] | None = None

    def restore(self) -> None:
        self.decoder = mo.Decoder(self.model, self.start)

    def decode(self) -> Outputs:
        return [self.decoder(token) for token in self.new]

    @torch.no_grad()
    def by_layers(self) -> Outputs:
        logits, state = [], self.start
        for token in self.new:
            result, state = self.model(token, state=state, return_state=True)
            logits.append(result)
        return logits

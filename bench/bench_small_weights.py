"""Decode tokens of one sequence, after few and many tokens of a chunk, and read a prompt: weights of 32 to 4 bits.

Bytes: for each decoded token the weights of ours, int8, without the embedding, and the chunk's keys and values so far.
int8 and int4 compute in bfloat16, with keys and values of 8 bits, as in `generate`. They read prompts by products of
integers for the instruction set in use (`MEGALODON_OPS_ISA` forces one), or, as "kept", with activations in bfloat16.

The others do other work, with their own rounding, and are shown for comparison: this package's models in bfloat16 and
float32, and a Llama in llama.cpp that reads as many weights for a token, if its packages are installed.
The plain Llama checks llama.cpp's F32. The first token of each decoder is not timed.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops.inference.quantized_layers import new_state

from .bench_model import DECODED, FORWARD_TOLERANCE, QUICK
from .harness import OURS, Case, Disagreement, Outputs, Path, relative_error
from .llama_cpp_model import INSTALLED, TYPES, LlamaCpp
from .plain_models import Llama

_CONTEXTS = (8, 512, 1536)
_PROMPT = 512


@torch.no_grad()
def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    if gpu:
        return
    torch.manual_seed(0)
    config = mo.MegalodonConfig(**QUICK) if quick else mo.MegalodonConfig.preset("mega200M")
    contexts, prompt = ((_CONTEXTS[0], config.chunk_size // 2), 64) if quick else (_CONTEXTS, _PROMPT)
    wide = mo.Megalodon(config).eval()
    half = mo.Megalodon(config).eval()
    half.load_state_dict(wide.state_dict())
    half.to(torch.bfloat16)
    int8 = mo.quantize(half, "int8")
    models = {OURS: int8, "int4": mo.quantize(half, "int4"), "bfloat16": half, "float32": wide}
    for model in models.values():
        mo.use_huge_pages(model)
    llamas = _llamas(wide, contexts[-1] + DECODED + 1)
    shape = "2M" if quick else "200M"
    template = Case(
        name="",
        shape=shape,
        dtype="bf16",
        paths=[],
        expected=None,
        tolerance=FORWARD_TOLERANCE[torch.bfloat16],
        units=DECODED,
        unit="token",
        cold=False,
    )
    read = sum(p.nbytes for p in int8.parameters()) - sum(p.nbytes for p in int8.embed.parameters())
    for context in contexts:
        tokens = torch.randint(config.vocab_size, (1, context + DECODED + 1))
        ours = {name: _Decoding(model, tokens, context) for name, model in models.items()}
        others = {name: _LlamaDecoding(llama, tokens, context) for name, llama in llamas.items()}
        scales = 2 * config.num_heads * torch.float32.itemsize
        past = config.num_layers * context * (config.z_dim + config.value_dim + scales)
        yield dataclasses.replace(
            template,
            name=f"decode after {context} tokens, int8",
            bytes=DECODED * (read + past),
            paths=[_path(name, each.decode, each.restore) for name, each in {**ours, **others}.items()],
            expected=ours[OURS].decode_by_model,
        )
    tokens = torch.randint(config.vocab_size, (1, prompt))
    models |= {f"{kind}, kept": mo.quantize(half, kind, activations=None) for kind in ("int8", "int4")}
    calls = {name: partial(_read_prompt, model, tokens) for name, model in models.items()}
    calls |= {name: partial(_read, llama, tokens) for name, llama in llamas.items()}
    yield dataclasses.replace(
        template,
        name=f"read a prompt of {prompt} tokens, int8",
        units=prompt,
        paths=[_path(name, call) for name, call in calls.items()],
        expected=lambda: (int8(tokens)[:, -1:],),
    )


def _llamas(model: mo.Megalodon, context: int) -> dict[str, LlamaCpp]:
    """The Llama of the size of `model` in llama.cpp, by path."""
    if not INSTALLED:
        print("small_weights: pip install llama-cpp-python gguf to compare with llama.cpp", file=sys.stderr)
        return {}
    plain, tokens = Llama.sized_like(model), torch.randint(model.config.vocab_size, (1, 32))
    llamas = {f"llama.cpp {kind}": LlamaCpp(plain, kind, context) for kind in TYPES}
    error = relative_error([llamas["llama.cpp F32"].read(tokens, 0)], [plain(tokens)[:, -1:]])
    if error > FORWARD_TOLERANCE[torch.float32]:
        raise Disagreement(f"llama.cpp, F32: error {error:.1e}, more than {FORWARD_TOLERANCE[torch.float32]:.0e}")
    return llamas


def _path(name: str, call: Callable[[], Outputs], before: Callable[[], None] | None = None) -> Path:
    return Path(name, call, before, rival=False, checked=name == OURS)


def _read_prompt(model: mo.Megalodon, tokens: Tensor) -> Outputs:
    """Logits of the last token of a prompt; the state is made, too."""
    with torch.no_grad():
        features, _ = model.features(tokens, return_state=True)
        return (model.output.output(features[:, -1:]).float(),)


def _read(llama: LlamaCpp, tokens: Tensor) -> Outputs:
    return (llama.read(tokens, 0),)


class _Decoding:
    """Decode DECODED tokens, one a call, always from the state after the first `context` + 1 tokens."""

    @torch.no_grad()
    def __init__(self, model: mo.Megalodon, tokens: Tensor, context: int) -> None:
        self.model = model
        self.first, *self.new = tokens[:, context:].split(1, dim=1)
        start = new_state(model, 1, tokens.device)
        _, self.start = model(tokens[:, :context], state=start, return_state=True)

    def restore(self) -> None:
        self.decoder = mo.Decoder(self.model, self.start)
        self.decoder(self.first)  # records the step

    def decode(self) -> Outputs:
        return [self.decoder(token) for token in self.new]

    @torch.no_grad()
    def decode_by_model(self) -> Outputs:
        """Decode without a decoder: the model's layers compute each token."""
        _, state = self.model(self.first, state=self.start, return_state=True)
        logits = []
        for token in self.new:
            result, state = self.model(token, state=state, return_state=True)
            logits.append(result)
        return logits


class _LlamaDecoding:
    """The same by llama.cpp; `restore` removes what llama.cpp has read after the first `context` tokens."""

    def __init__(self, llama: LlamaCpp, tokens: Tensor, context: int) -> None:
        self.llama, self.context = llama, context
        self.first, *self.new = tokens[:, context:].split(1, dim=1)
        llama.read(tokens[:, :context], 0)

    def restore(self) -> None:
        self.llama.read(self.first, self.context)

    def decode(self) -> Outputs:
        return [self.llama.read(token, self.context + i) for i, token in enumerate(self.new, 1)]

"""The model: training step (forward, loss, backward), forward of a long prompt, decoding.

Flops: 2 per token and weight of every linear layer, times 3 for a training step, plus attention and cema as in their
benches. Bytes: the weights, once for a forward, three times for a training step (forward, backward, gradient), and for
each decoded token the weights and the chunk's keys and values. Other work on activations is not counted.

Our training step uses `Megalodon.loss`, rivals use torch's cross-entropy of their logits.

The rival is MEGALODON in plain torch with the same weights. Where plain torch would take minutes, only its loss is
compared, not the gradients. Shown beside it:

- a Llama with as many parameters, which attends to the whole past: other work, for comparison;
- "linear layers alone", of the 200M model, and "weights read once": lower bounds of our time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import megalodon_ops as mo

from . import plain_models
from .harness import DTYPES, OURS, Case, Outputs, Path, forward

_25M = dict(num_layers=6, model_dim=512, num_heads=4, z_dim=256, value_dim=1024, ffn_hidden_dim=2048)
_25M |= dict(chunk_size=1024, vocab_size=256)
QUICK = dict(num_layers=2, model_dim=128, num_heads=2, z_dim=64, value_dim=128, ffn_hidden_dim=256)
QUICK |= dict(chunk_size=128, vocab_size=256)
# Gradients of the deepest parameters collect the rounding errors of every layer; 16-bit ones keep two digits.
TRAINING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
FORWARD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
DECODED = 16


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    if gpu:
        yield from _gpu_cases(quick)
        return
    small = _Model("2M" if quick else "25M", mo.MegalodonConfig(**(QUICK if quick else _25M)))
    C = small.config.chunk_size
    yield _training(small, 2 * C, plain=True)
    yield _training(small.to(torch.bfloat16), 2 * C, plain=True)
    yield _training(small, 8 * C)
    yield _packed(small, 2 * C, documents=4)
    yield _forward(small, 8 * C)
    yield _forward(small, 32 * C, llama=False)  # the Llama would take a minute
    yield _decode(small, C - 24)
    for chunks in (32, 256):  # a Llama's keys and values of 256 chunks would take 6 GiB
        yield dataclasses.replace(_decode(small, chunks * C - 24, llama=chunks < 256), fewer_threads=False)
    if not quick:
        yield _training(_Model("200M", mo.MegalodonConfig.preset("mega200M")), 2048, linears_alone=True)


def _gpu_cases(quick: bool) -> Iterator[Case]:
    presets = {size: mo.MegalodonConfig.preset(f"mega{size}") for size in ("200M", "1.3B")}
    presets = {"2M": mo.MegalodonConfig(**QUICK)} if quick else presets
    for name, config in presets.items():
        model = _Model(name, config, torch.bfloat16)
        C = config.chunk_size
        yield _training(model, 4 * C)
        yield _forward(model, 16 * C)
        yield _decode(model, C - 24)
        yield _decode(model, 16 * C - 24)


@dataclass
class _Model:
    name: str
    config: mo.MegalodonConfig
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.ours = mo.Megalodon(self.config).to(self.dtype)
        self.llama = plain_models.Llama.sized_like(self.ours).to(self.dtype)
        self.linears = [m for m in self.ours.modules() if isinstance(m, nn.Linear)]
        self.weights = sum(m.weight.numel() for m in self.linears)
        self.size = self.ours.embed.weight.element_size()

    def to(self, dtype: torch.dtype) -> _Model:
        return _Model(self.name, self.config, dtype)

    def tokens(self, length: int) -> Tensor:
        return torch.randint(
            self.config.vocab_size, (1, length), generator=torch.Generator(torch.get_default_device()).manual_seed(1)
        )

    def flops(self, length: int, training: bool) -> int:
        config = self.config
        N, K, V = config.cema_ndim, config.z_dim, config.value_dim  # K and V of all heads together
        C = min(config.chunk_size, length)
        attention = length * (C + 1) // 2 * ((8 * K + 6 * V) if training else (2 * K + 2 * V))
        cema = length * config.model_dim * ((48 * N + 6) if training else (12 * N + 2))
        return length * self.weights * (6 if training else 2) + config.num_layers * (attention + cema)

    def case(
        self, name: str, length: int, paths: list[Path], expected: Callable[[], Outputs] | None, *, training: bool
    ) -> Case:
        return Case(
            name=name,
            shape=f"{self.name} L {length}",
            dtype=DTYPES[self.dtype],
            paths=paths,
            expected=expected,
            tolerance=(TRAINING_TOLERANCE if training else FORWARD_TOLERANCE)[self.dtype],
            units=length,
            unit="token",
            flops=self.flops(length, training),
            bytes=self.weights * self.size * (3 if training else 1),
            cold=False,
            fewer_threads=False,
        )


def _step(loss: Callable[[Tensor, Tensor], Tensor], model: nn.Module, tokens: Tensor, *, with_grads: bool) -> Outputs:
    """Loss of next-token prediction, and its gradients."""
    total = loss(tokens, _next(tokens))
    grads = torch.autograd.grad(total, list(model.parameters()))
    return (total.detach(), *grads) if with_grads else (total.detach(),)


def _next(tokens: Tensor) -> Tensor:
    """Next token of each token; -100 after the last."""
    return F.pad(tokens[:, 1:], (0, 1), value=-100)


def _plain(ours: mo.Megalodon) -> Callable[[Tensor], Tensor]:
    reference = plain_models.megalodon(ours)
    return lambda tokens: reference(tokens)[0]


def _cross_entropy(logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda tokens, targets: F.cross_entropy(logits(tokens)[0], targets[0])


def _other(name: str, call: Callable[[], Outputs]) -> Path:
    """A path that does other work than the case's."""
    return Path(name, call, rival=False, checked=False)


def _training(model: _Model, length: int, *, plain: bool = False, linears_alone: bool = False) -> Case:
    tokens = model.tokens(length)

    def plain_step(ours: mo.Megalodon) -> Callable[[], Outputs]:
        return partial(_step, _cross_entropy(_plain(ours)), ours, tokens, with_grads=True)

    def plain_loss() -> Outputs:
        with torch.no_grad():
            return (_cross_entropy(_plain(model.ours))(tokens, _next(tokens)),)

    paths = [
        Path(OURS, partial(_step, model.ours.loss, model.ours, tokens, with_grads=plain)),
        _other("Llama", partial(_step, _cross_entropy(model.llama), model.llama, tokens, with_grads=False)),
    ]
    if linears_alone:
        paths.append(_other("linear layers alone", _linears_alone(model, length)))
    expected = plain_loss
    if plain:
        rival = expected = plain_step(model.ours)
        paths.insert(1, Path("plain torch", rival))
        if model.dtype != torch.float32:
            exact = _Model(model.name, model.config).ours
            exact.load_state_dict(model.ours.state_dict())  # the same 16-bit weights, in float32
            expected = plain_step(exact)
    return model.case("training step", length, paths, expected, training=True)


def _linears_alone(model: _Model, length: int) -> Callable[[], Outputs]:
    """Forward and backward of the model's own linear layers on inputs of their shapes."""
    inputs = {m.in_features: torch.randn(1, length, m.in_features, dtype=model.dtype) for m in model.linears}
    douts = {m.out_features: torch.randn(1, length, m.out_features, dtype=model.dtype) for m in model.linears}
    inputs = {size: x.requires_grad_() for size, x in inputs.items()}

    def run() -> Outputs:
        for m in model.linears:
            x = inputs[m.in_features]
            torch.autograd.grad(m(x), (x, *m.parameters()), douts[m.out_features])
        return ()

    return run


def _packed(model: _Model, length: int, documents: int) -> Case:
    tokens = model.tokens(length)
    offsets = torch.arange(0, length + 1, length // documents)

    plain = _plain(model.ours)

    def unpacked(tokens: Tensor) -> Tensor:
        parts = tokens.split(length // documents, 1)
        return torch.cat([plain(part) for part in parts], 1)

    step = partial(_step, model=model.ours, tokens=tokens, with_grads=True)
    paths = [
        Path(OURS, partial(step, partial(model.ours.loss, cu_seqlens=offsets))),
        _other("megalodon_ops, one document", partial(step, model.ours.loss)),
    ]
    name = f"training step, {documents} packed documents"
    expected = partial(step, _cross_entropy(unpacked))
    case = model.case(name, length, paths, expected, training=True)
    case.flops = documents * model.flops(length // documents, training=True)
    return case


def _forward(model: _Model, length: int, llama: bool = True) -> Case:
    tokens = model.tokens(length)
    plain = forward(_plain(model.ours), tokens)
    paths = [Path(OURS, forward(model.ours, tokens)), Path("plain torch", plain)]
    if llama:
        paths.append(_other("Llama", forward(model.llama, tokens)))
    return model.case("forward", length, paths, plain, training=False)


def _decode(model: _Model, context: int, llama: bool = True) -> Case:
    """Decode `DECODED` tokens, one call each, after `context` tokens that nearly fill a chunk."""
    C = model.config.chunk_size
    tokens = model.tokens(context + DECODED)
    new = tokens[:, context:].split(1, 1)
    start = None  # state after the context
    decoder = None
    caches = model.llama.caches(context + DECODED) if llama else []

    @torch.no_grad()
    def read_context() -> None:
        nonlocal start
        for piece in tokens[:, :context].split(C, 1):
            _, start = model.ours(piece, state=start, return_state=True, inplace_state=start is not None)

    def restore() -> None:
        nonlocal decoder
        if start is None:
            read_context()
        if decoder is None or start.norm.count.is_cpu:
            decoder = mo.Decoder(model.ours, start)
        else:  # keeps its CUDA graph
            decoder.replace(torch.tensor([0]), start)

    def decode() -> Outputs:
        return (torch.cat([decoder(token) for token in new], 1),)

    @torch.no_grad()
    def decode_llama() -> Outputs:
        return (torch.cat([model.llama(token, caches, context + i) for i, token in enumerate(new)], 1),)

    @torch.no_grad()
    def read_weights() -> Outputs:
        for _ in new:
            for layer in model.linears:
                layer.weight.sum()
        return ()

    @torch.no_grad()
    def expected() -> Outputs:
        """Logits of the decoded tokens in one call."""
        read_context()
        return (model.ours(tokens[:, context:], state=start),)

    paths = [Path(OURS, decode, before=restore), _other("weights read once", read_weights)]
    if llama:
        paths.insert(1, _other("Llama", decode_llama))
    name = f"decode {DECODED} tokens after {context}"
    case = model.case(name, DECODED, paths, expected, training=False)
    case.fewer_threads = True
    config = model.config
    # Numbers in the cached keys and values.
    cached = context % C * config.num_layers * (config.z_dim + config.value_dim)
    case.shape = model.name
    case.flops = DECODED * (model.flops(1, training=False) + 2 * cached)
    case.bytes = DECODED * (model.weights + cached) * model.size
    return case

"""Plausible mistakes of callers: the error names the wrong argument, not a later consequence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TINY, tiny_model, tokens_of
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops.tokenizers import ByteTokenizer
from megalodon_ops.training import adamw

B, L, D, N, G = 2, 5, 8, 3, 2
x, poles = torch.randn(B, L, D), torch.polar(torch.rand(D, N), torch.rand(D, N))
model, tokens = tiny_model(torch.float32).eval(), tokens_of(2, 5)
model_state = model(tokens, return_state=True)[1]
encoder = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**TINY))


def with_state(call: Callable[..., Any], **arguments: Any) -> Callable[[], Any]:
    return lambda: call(tokens_of(3, 5), state=model_state, **arguments)


turned = x.transpose(1, 2)  # (B, D, L)
BLAMED = {
    "an option of transformers": (
        lambda: model.generate(tokens, max_new_tokens=1, do_sample=True),
        "generate: `do_sample` must be left out, as there is no such option; temperature=0 takes the likeliest",
    ),
    "a slip": (lambda: model.generate(tokens, max_new_tokens=1, best=3), "generate: `best` must be left out, .* option\\."),
    "a misspelt option": (
        lambda: model.generate(tokens, max_new_token=2), "generate: `max_new_token` must be .*; did you mean max_new_tokens\\?"
    ),
    "a misspelt field": (lambda: mo.MegalodonConfig(num_layer=2), "`num_layer` must be .*; did you mean num_layers\\?"),
    "an encoder's misspelt field": (
        lambda: mo.MegalodonEncoderConfig(num_class=2), "MegalodonEncoderConfig: `num_class` .*; did you mean num_classes\\?"
    ),
    "a dtype as text": (
        lambda: mo.Megalodon.load("model", dtype="bfloat16"), "load: `dtype` must be .*, got 'bfloat16'; use torch.bfloat16"
    ),
    "a device that torch lacks": (
        lambda: mo.Megalodon.load("model", device="xpu:7"), 'load: `device` xpu:7 cannot be used: .*; device="cpu" needs no'
    ),
    "lengths beyond the rows": (
        lambda: model(tokens, lengths=torch.tensor([5, 6])), "Megalodon: `lengths` must be in \\[0, 5\\], got 6 at 1"
    ),
    "an encoder's lengths": (
        lambda: encoder(tokens, lengths=torch.tensor([5, 6])), "MegalodonEncoder: `lengths` must be in \\[0, 5\\]"
    ),
    "offsets that end early": (
        lambda: model(tokens[:1], cu_seqlens=torch.tensor([0, 2, 4])),
        "Megalodon: `cu_seqlens` must end where the row does, got 4 for a row of 5; `spans` may leave positions out",
    ),
    "gradients of states that are overwritten": (
        lambda: model.loss(tokens, tokens, state=model_state, inplace_state=True),
        "Megalodon.loss: `inplace_state` must be False with gradients, got True",
    ),
    "a state of two rows": (with_state(model), "Megalodon: `state` must have 3 sequences, .* got 2; select or repeat"),
    "in features": (with_state(model.features), "Megalodon: `state` must have 3 sequences, as many as `tokens`, got 2"),
    "in generate": (with_state(model.generate, max_new_tokens=1), "generate: .* 3 sequences, as many as `prompt`"),
    "a packed state": (
        lambda: model(tokens[:1], state=model_state, cu_seqlens=torch.tensor([0, 2, 4, 5])),
        "Megalodon: `state` must have 3 sequences, as many as `cu_seqlens`, got 2",
    ),
    "a state of another model": (
        lambda: tiny_model(torch.float32, cema_ndim=3)(tokens, state=model_state),
        "Megalodon: `state` must be of this model, 2 layers of \\(32, 3\\) channels and modes, got one of 2 layers of \\(32, 4\\)",
    ),
    "(B, D, L) in cema": (
        lambda: mo.cema(turned, torch.rand(D, N), poles, poles, torch.ones(D)),
        "cema: `x` must be \\(B, L, D\\) with D = 8 as `p` and `q`, got \\(2, 8, 5\\); x.transpose\\(1, 2\\)",
    ),
    "(B, D, L) in cema_end_state": (
        lambda: mo.cema_end_state(turned, torch.rand(D, N), poles), "cema_end_state: `x` must be \\(B, L, D\\) with D = 8",
    ),
    "(B, D, L) in timestep_norm": (
        lambda: mo.timestep_norm(turned, torch.zeros(D), torch.zeros(D), num_groups=G),
        "timestep_norm: `x` must be \\(B, L, D\\) with D = 8 as `weight` and `bias`, got \\(2, 8, 5\\)",
    ),
    "p alone": (
        lambda: mo.cema(x, torch.rand(D + 1, N), poles, poles, torch.ones(D)), "cema: `p` must have shape \\(D, N\\) = \\(8, 3\\)",
    ),
    "another capital": (
        lambda: mo.MegalodonConfig.preset("mega1.3b"), "`name` must be one of small, .*, got 'mega1.3b'; did you mean mega1.3B\\?",
    ),
    "parameters for a model": (
        lambda: adamw(model.parameters(), lr=1e-3), "parameter_groups: `model` must be a module, got generator; give the model",
    ),
    "ids of two rows": (
        lambda: ByteTokenizer().decode(torch.tensor([[1, 2]])), "decode: `ids` must be a row of integers, got torch.Tensor",
    ),
    "texts for a text": (lambda: ByteTokenizer().encode(["a"]), "encode: `text` must hold bytes or str, got list"),
    "a tokenizer for its decode": (
        lambda: mo.StopStrings(ByteTokenizer(), ["a"]), "StopStrings: `decode` must be a function of .* method `decode`",
    ),
    "a decode to str": (
        lambda: mo.StopStrings(lambda ids: "a", ["a"]).add(3), "StopStrings: `decode` must return bytes, got 'a'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BLAMED)
def test_an_error_blames_what_is_wrong(name):
    call, message = BLAMED[name]
    with pytest.raises((TypeError, ValueError), match=f"^(MegalodonConfig: )?{message}"):
        call()


def test_tokens_on_another_device_than_the_model():
    """torch's own error names the embedding's index and weight. A weight on `meta` stands for another device."""

    class Elsewhere(torch.nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")

    moved = tiny_model(torch.float32)
    moved.embed = Elsewhere(31, 32, device="meta")
    with pytest.raises(ValueError, match="Megalodon: `tokens` must be on meta as the model, got cpu; move one of them"):
        moved(tokens)

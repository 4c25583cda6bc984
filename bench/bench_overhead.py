"""Overhead of a call that computes almost nothing: Python, dispatch, checks, threads.

Sizes are those of a tiny model. `torch.add`, one of the cheapest calls of torch, is shown for comparison.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import megalodon_ops as mo

from . import baselines
from .harness import OURS, Case, Path, forward, forward_backward

L, D, N, G, H, C = 2, 64, 16, 4, 2, 16  # positions, channels, states of cema, groups, heads, chunk size
TOLERANCE = 1e-4


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    x, ones = torch.randn(1, L, D), torch.randn(D)
    coefficients = [t.detach() for t in mo.ComplexEMA(D, N).coefficients()]
    affine = torch.randn(2, D)
    qkv = [torch.randn(1, L, H, D // H) for _ in range(3)]
    yield from _both("cema", mo.cema, baselines.cema_loop, (x, *coefficients))
    yield from _both(
        "timestep_norm",
        partial(mo.timestep_norm, num_groups=G),
        partial(baselines.timestep_norm, num_groups=G),
        (x, ones, ones),
    )
    yield from _both(
        "normalized_qk",
        partial(mo.normalized_qk, num_heads=H, chunk_size=C),
        partial(baselines.normalized_qk, num_heads=H, rotary=baselines.rotary(L, C, D // H, x.device)),
        (x, affine, affine),
    )
    sdpa = partial(baselines.attention_sdpa, chunk_size=L)
    yield from _both("chunked_attention", partial(mo.chunked_attention, chunk_size=C), sdpa, qkv)
    yield _appending([t[:, :1] for t in qkv])
    if not gpu:
        yield from _both("layer_norm", mo.layer_norm, baselines.layer_norm, (x, ones, ones))
        yield from _both("rms_norm", mo.rms_norm, baselines.rms_norm, (x, ones))
        yield from _both("gated_silu", mo.gated_silu, baselines.gated_silu, (x, x.flip(-1)))
        yield _recorded()


def _both(name: str, ours: Callable, plain: Callable, inputs: tuple[Tensor, ...]) -> Iterator[Case]:
    """Forward, and forward with backward."""
    with torch.no_grad():
        outputs = ours(*inputs)
    douts = [torch.randn_like(o) for o in ((outputs,) if isinstance(outputs, Tensor) else outputs)]
    yield _case(name + " forward", inputs, forward(ours, *inputs), forward(plain, *inputs))
    backward = partial(forward_backward, inputs=inputs, douts=douts)
    yield _case(name + " forward + backward", inputs, backward(ours), backward(plain))


def _appending(qkv: list[Tensor]) -> Case:
    """One token a call, appended to a chunk's keys and values; a new chunk starts every C tokens."""
    q, k, v = qkv
    keys, values, our_keys, our_values = (torch.zeros(1, C, H, D // H) for _ in range(4))
    state = mo.AttentionState(our_keys, our_values, torch.zeros(1, dtype=torch.int64))
    position = 0

    def plain() -> Tensor:
        nonlocal position
        keys[:, position] = k[:, 0]
        values[:, position] = v[:, 0]
        visible = [t[:, : position + 1].transpose(1, 2) for t in (keys, values)]
        position = (position + 1) % C
        return F.scaled_dot_product_attention(q.transpose(1, 2), *visible, scale=1.0).transpose(1, 2)

    ours = partial(mo.chunked_attention, q, k, v, chunk_size=C, state=state, inplace_state=True)
    # All keys and values are equal, so every position has the same output.
    return _case("chunked_attention, appending in place", qkv, forward(ours), forward(plain))


def _recorded() -> Case:
    """A new decoder's first token, for which it records a step, as each call of `generate` does; eager: the layers."""
    config = mo.MegalodonConfig(
        num_layers=2, model_dim=D, z_dim=D, value_dim=D, ffn_hidden_dim=D, chunk_size=C, vocab_size=D, norm_num_groups=G
    )
    model, token = mo.Megalodon(config).eval(), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        _, state = model(token, return_state=True)
    ours = forward(lambda token: mo.Decoder(model, state)(token), token)
    return _case("decoder, first token", (token,), ours, forward(partial(model, state=state), token))


def _case(name: str, inputs: tuple[Tensor, ...], ours: Callable, plain: Callable) -> Case:
    one = torch.ones(1)
    return Case(
        name=name,
        shape=f"L {inputs[0].shape[1]} D {D}",
        dtype="fp32",
        paths=[
            Path(OURS, ours),
            Path("eager", plain),
            Path("torch.add of one number", lambda: (torch.add(one, one),), rival=False, checked=False),
        ],
        expected=plain,
        tolerance=TOLERANCE,
        units=1,
        unit="call",
        cold=False,
    )

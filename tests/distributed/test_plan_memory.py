"""The memory and the operations that a plan foresees, against what torch really keeps, allocates and counts."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from profiling import allocated
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import megalodon_ops as mo
from megalodon_ops.distributed.measure import AGAIN, measure
from megalodon_ops.distributed.plan import Card, plan
from megalodon_ops.model import layers
from megalodon_ops.ops.linear import linear
from megalodon_ops.ops.linear_cross_entropy import linear_cross_entropy as loss
from megalodon_ops.training import adamw

SMALL = dict(
    num_layers=2, model_dim=64, z_dim=32, value_dim=96, num_heads=2, ffn_hidden_dim=80, cema_ndim=4, chunk_size=16,
    vocab_size=300, norm_num_groups=8,
)  # fmt: skip
MODELS = {
    "plain": {},
    "swiglu": dict(swiglu=True),
    "gain": dict(swiglu=True, rescale_nffn=True),
    "no affine, tied": dict(norm_affine=False, share_emb=True),
    "dropout": dict(dropout=0.1, hidden_dropout=0.1, attention_dropout=0.1),
    "several blocks of logits": dict(vocab_size=2500),
}
DTYPES = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "autocast": (torch.bfloat16, True)}
CPU = Card("cpu", 1e12, 1e12, 1e12, 1e11, 1e9, 1e9)


def kept(config: mo.MegalodonConfig, rows: int, length: int, dtype: str, *, on_cpu: bool = True) -> int:
    kind, is_autocast = DTYPES[dtype]
    block, end = measure(config, rows, length, dtype=kind, autocast=is_autocast, on_cpu=on_cpu)
    return config.num_layers * sum(block.kept) + sum(end.kept)


def model_and_tokens(config: mo.MegalodonConfig, rows: int, length: int, dtype: str) -> tuple[mo.Megalodon, Tensor]:
    model = mo.Megalodon(config).train()
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    return model.to(torch.bfloat16) if dtype == "bfloat16" else model, tokens


def autocast(dtype: str) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext()


def saved(model: mo.Megalodon, tokens: Tensor, dtype: str = "float32") -> int:
    """Bytes of the memory that autograd saves for the backward of the loss, parameters and tokens apart."""
    given = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), tokens)}
    found = {}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that no other memory gets its name
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor), autocast(dtype):
        model.loss(tokens, tokens)
    return sum(tensor.untyped_storage().nbytes() for name, tensor in found.items() if name not in given)


SCALARS = 64  # bytes: the loss, counts, a seed of dropout


QUICK = {
    ("gain", "autocast"), ("no affine, tied", "float32"), ("dropout", "autocast"), ("several blocks of logits", "bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in QUICK else pytest.mark.slow)
        for name in MODELS
        for dtype in DTYPES
        if name != "swiglu"  # part of "gain"
    ],
)
def test_what_is_kept_is_what_autograd_saves(name, dtype, monkeypatch):
    """To the byte, but for scalars: no bound of per cent is needed."""
    if name == "several blocks of logits":
        monkeypatch.setattr(loss, "_CPU_BLOCK", 1 << 17)
    config = mo.MegalodonConfig(**{**SMALL, **MODELS[name]})
    for rows, length in ((2, 100), (1, 37)):
        model, tokens = model_and_tokens(config, rows, length, dtype)
        is_one_block = rows * length * config.vocab_size <= loss._CPU_BLOCK
        assert is_one_block == (name != "several blocks of logits" or length < 50)
        found = kept(config, rows, length, dtype)
        assert abs(saved(model, tokens, dtype) - found) <= SCALARS * config.num_layers


def test_a_block_of_mega200M():
    """By hand, from the sizes of what autograd keeps of every op."""
    block, _ = measure(mo.MegalodonConfig.preset("mega200M"), 1, 8192, on_cpu=True)
    assert sum(block.kept) == 733_315_072


class FusedRMSNorm(torch.autograd.Function):
    """Keeps what torch's kernel for GPUs keeps since torch 2.9: the properties of FusedRmsNormBackward0."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1), weight)
        return torch.empty_like(x)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("plain", "bfloat16"), ("swiglu", "float32"), ("gain", "bfloat16"), ("no affine, tied", "float32"),
        ("paper7B", "bfloat16"),
    ],
)  # fmt: skip
def test_what_is_kept_where_torch_computes_norms_and_gates(name, dtype, monkeypatch):
    """Tensors on `meta` take the way of GPUs, and a model of any size fits."""
    rows, length = (1, 16384) if name == "paper7B" else (2, 100)
    config = mo.MegalodonConfig(**{**SMALL, **MODELS.get(name, {})})
    if name == "paper7B":
        config = replace(mo.MegalodonConfig.preset(name), num_layers=2)
    found = kept(config, rows, length, dtype, on_cpu=False)
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight))
    with torch.device("meta"):
        model, tokens = model_and_tokens(config, rows, length, dtype)
    means = config.num_layers * 4 * rows * length  # of layer norms, which are measured in the place of RMS norms
    assert abs(saved(model, tokens) + means - found) <= SCALARS * config.num_layers


def test_what_autocast_keeps_on_a_gpu(monkeypatch):
    """torch has no autocast on `meta`: here each linear layer casts what it reads."""
    config, rows, length = mo.MegalodonConfig(**SMALL, swiglu=True), 2, 100
    block, _ = measure(config, rows, length, dtype=torch.bfloat16, autocast=True)
    found = sum(block.kept)
    of_linear = layers.linear
    monkeypatch.setattr(
        layers, "linear", lambda *tensors: of_linear(*(None if t is None else t.bfloat16() for t in tensors))
    )
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight))
    with torch.device("meta"):
        block, x = mo.MegalodonBlock(config), torch.empty(rows, length, config.model_dim)
    own = {t.untyped_storage()._cdata for t in (*block.parameters(), *block.buffers())}
    tensors = {}
    with saved_tensors_hooks(lambda t: tensors.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        block(x.requires_grad_())
    expected = sum(t.untyped_storage().nbytes() for name, t in tensors.items() if name not in own)
    assert abs(found - expected - 4 * rows * length) <= SCALARS


@pytest.mark.parametrize(
    ("name", "dtype", "recompute"),
    [
        ("swiglu", "float32", False),
        ("several blocks of logits", "bfloat16", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("swiglu", "bfloat16", True),
                ("swiglu", "autocast", False),
                ("wide", "float32", True),
                ("wide", "bfloat16", False),
                ("wide", "autocast", True),
                ("several blocks of logits", "float32", False),
                ("several blocks of logits", "autocast", True),
            )
        ),
    ],
)
def test_peak_of_a_step(name, dtype, recompute, monkeypatch):
    """Within 10 % of what a step allocates at its peak, where torch makes all products."""
    monkeypatch.setattr(linear, "CHOICES", {})  # the CPU's kernels copy transposed matrices, each processor's others
    monkeypatch.setattr(loss, "_CPU_BLOCK", 1 << 18)
    fields = {
        "wide": dict(ffn_hidden_dim=256, vocab_size=64, num_layers=4),
        "several blocks of logits": dict(vocab_size=600),
        "swiglu": dict(swiglu=True, vocab_size=150),
    }[name]
    config = mo.MegalodonConfig(**{**SMALL, **fields}, layerwise_ckpt=recompute)
    model, tokens = model_and_tokens(config, 2, 800, dtype)
    optimizer = adamw(model, lr=1e-3)

    def step() -> None:
        with autocast(dtype):
            value = model.loss(tokens, tokens)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimizer's state is made
    half = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    found = plan(
        config, {"data": 1}, context=800, batch=2, card=CPU, dtype=DTYPES[dtype][0], autocast=DTYPES[dtype][1],
        param_dtype=half,
    )  # fmt: skip
    memory = dict(found.memory)
    assert memory.pop("parameters") == sum(p.nbytes for p in model.parameters())
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert memory.pop("Adam's moments") == sum(t.nbytes for t in moments)
    _, most = allocated(step)
    assert sum(memory.values()) == pytest.approx(most, rel=0.1)


def test_shards_are_those_of_the_parameters():
    config = mo.MegalodonConfig(**SMALL)
    whole = sum(p.numel() for p in mo.Megalodon(config).parameters())
    one, four = (plan(config, {"data": n}, context=16, dtype=torch.float32).memory for n in (1, 4))
    assert one["parameters"] == 4 * whole and one["Adam's moments"] == 8 * whole
    padded = sum(-(-shape[0] // 4) * torch.Size(shape[1:]).numel() for _, shape in config.parameter_shapes())
    assert four["parameters"] == 4 * padded
    half = plan(config, {}, context=16, param_dtype=torch.bfloat16).memory["parameters"]
    wide = sum(p.numel() for p in mo.wide_parameters(mo.Megalodon(config)).values())
    assert half == 2 * whole + 2 * wide


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("plain", False), ("gain", True), ("no affine, tied", False), ("dropout", True), ("several blocks of logits", False),
    ],
)  # fmt: skip
def test_operations_are_those_that_torch_counts(name, recompute):
    config = mo.MegalodonConfig(**{**SMALL, **MODELS[name]}, layerwise_ckpt=recompute)
    for rows, length in ((2, 100), (1, 32)) if name == "plain" else ((2, 100),):
        model, tokens = model_and_tokens(config, rows, length, "float32")
        with FlopCounterMode(display=False) as counter:
            model.loss(tokens, tokens).backward()
        found = plan(config, {}, context=length, batch=rows, card=CPU, dtype=torch.float32)
        assert sum(found.operations.values()) == counter.get_total_flops()
        assert bool(found.operations[AGAIN]) == recompute


def test_gradients_count_where_activations_do_not():
    deep = mo.MegalodonConfig(**{**SMALL, "num_layers": 20, "vocab_size": 20, "ffn_hidden_dim": 256})
    short, long = (plan(deep, {}, context=context, card=CPU, dtype=torch.float32).memory for context in (1, 800))
    assert short["gradients"] == short["parameters"] and long["gradients"] < long["parameters"] / 10

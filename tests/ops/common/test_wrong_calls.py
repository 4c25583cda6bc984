"""Wrong arguments of public functions: each gets an error of the form "function: `argument` must be ..., got ...".

The error is neither torch's nor that of a Python attribute or comparison. NumPy numbers are accepted like Python's.
"""

import copy
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from assertions import every_case
from case import Op, call_with_state
from cases import OPS
from models import TINY, tiny_model, tokens_of
from torch import Tensor
from torch.utils._pytree import tree_leaves
from wrong_values import COMPLEX_TENSOR, NEGATIVE, NO_DEVICE, NO_FLAG, NO_NUMBER, NO_PATH, NO_SIZE, NO_STATE, NO_TENSOR
from wrong_values import INTEGERS, NO_WEIGHTS, ONE, OPTIONAL_INTEGERS, OPTIONAL_TENSOR, REAL, SHAPES, TENSOR, ZERO

import megalodon_ops as mo
from megalodon_ops.evaluation import evaluate
from megalodon_ops.training.run_checkpoint import load_any, load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class Call:
    """A valid call, and for each argument wrong values, or functions that spoil the right value."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    wrong: dict[str, dict[str, Any]]
    name: str = ""  # of the function in its errors, if another than `__name__`
    inner_names: tuple[str, ...] = ()  # ops called by the function, whose name an error may give
    numbers: dict[str, Any] = field(default_factory=dict)  # arguments as NumPy numbers

    @property
    def op(self) -> str:
        return self.name or self.function.__name__


# Right arguments
B, L, D, N, G, H, K, V, C = 2, 5, 8, 3, 2, 2, 4, 3, 4
x, z, v = torch.randn(B, L, D), torch.randn(B, L, H * K), torch.randn(B, L, H * V)
q, values, affine = torch.randn(B, L, H, K), torch.randn(B, L, H, V), torch.zeros(2, H * K)
poles = torch.polar(torch.rand(D, N), torch.rand(D, N))
lengths = torch.tensor([5, 2])
packed = dict(cu_seqlens=torch.tensor([0, 2, 5]))
norm_state = mo.timestep_norm(x, torch.zeros(D), torch.zeros(D), num_groups=G, return_state=True)[1]
attention_state = mo.chunked_attention(q, q, values, chunk_size=C, return_state=True)[1]
memory_state = mo.adaptive_working_memory(q, q, values, chunk_size=C, return_state=True)[1]
seed = torch.tensor([5])
sizes = dict(num_heads=H, chunk_size=C)
model = tiny_model(torch.float32).eval()
model_state = model(tokens_of(2, 5), return_state=True)[1]
decoder = mo.Decoder(model, model_state)
encoder = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**TINY, num_classes=3))
encoder_of_numbers = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**TINY, num_features=D))
tokens = tokens_of(2, 5)


def without(wrong: dict[str, Any], *kinds: str) -> dict[str, Any]:
    """The wrong values except those of these kinds."""
    return {kind: value for kind, value in wrong.items() if kind not in kinds}


# Wrong arguments are in capitals: values, and functions that spoil the right value, by kind (see wrong_values.py).
LAST_AXIS = without(TENSOR, "one axis more", "one axis less")  # of a tensor (..., D)
NO_EPS = {**NO_NUMBER, **NEGATIVE}
NOT_POSITIVE = {**NO_NUMBER, **NEGATIVE, **ZERO}
NO_GROUPS = {**NO_SIZE, "no divisor": 3}
NO_OFFSETS = {**OPTIONAL_INTEGERS, "descending": lambda t: t.flip(0), "empty": lambda t: t[:0]}
NO_SEED = {**NO_TENSOR, "two": torch.tensor([1, 2]), "float tensor": torch.tensor([1.0])}
NO_ATTENTION = dict(causal=NO_FLAG, state=NO_STATE, return_state=NO_FLAG, inplace_state=NO_FLAG, chunk_size=NO_SIZE)
NO_ATTENTION |= dict(dropkey={**NO_NUMBER, **NEGATIVE, **ONE}, dropkey_seed=NO_SEED, lengths=OPTIONAL_INTEGERS)
TOKENS = {"none": None, **NO_TENSOR, **INTEGERS, **{kind: SHAPES[kind] for kind in ("one axis more", "no axes")}}
NO_MODEL_STATE = {
    **NO_TENSOR,
    "empty": (),
    "as tuple": lambda s: (*vars(s).values(),),
    "of another model": lambda s: replace(s, layers=s.layers[:1]),
    # A few tokens more would overflow int64.
    "endless": lambda s: replace(s, norm=s.norm._replace(count=torch.full_like(s.norm.count, 2**63 - 3))),
}
# Of an argument that takes a token or several
NO_TOKENS = {"bool": True, "string": "12", "float": 2.0, "negative": -1, "beyond": 31, "dictionary": {1: 2}}
NO_TOKENS |= {"of floats": [1.0], "of strings": ["1"], "of bools": [True], "with one beyond": [1, 31]}
NO_TOKENS["tensor"] = torch.tensor([1, 2])


def usual_call(op: Op) -> Call:
    """A call of an op that takes and returns a state."""
    case = op.case(lengths=[5, 2], **op.with_state)
    wrong = {name: COMPLEX_TENSOR if t.is_complex() else TENSOR for name, t in case.tensors.items()}
    wrong["state"] = without(wrong["state"], "none")
    wrong |= {"return_state": NO_FLAG, "lengths": OPTIONAL_INTEGERS}
    return Call(getattr(mo, op.name), {**case.tensors, **case.options, "return_state": True}, wrong)


CALLS = {
    **{name: usual_call(op) for name, op in OPS.items() if op.call is call_with_state},
    "cema of packed sequences": Call(
        mo.cema, dict(x=x[:1], p=torch.rand(D, N), q=poles, gamma=poles, omega=torch.ones(D), **packed),
        dict(cu_seqlens=NO_OFFSETS),
    ),
    "timestep_norm": Call(
        mo.timestep_norm,
        dict(x=x, weight=torch.zeros(D), bias=torch.zeros(D), num_groups=G, eps=1e-5, state=norm_state, lengths=lengths,
             return_state=True),
        dict(x=TENSOR, weight=TENSOR, bias=TENSOR, num_groups=NO_GROUPS, eps=NO_EPS, state=NO_STATE,
             return_state=NO_FLAG, lengths=OPTIONAL_INTEGERS),
        numbers=dict(num_groups=np.int64(G), eps=np.float64(1e-5)),
    ),
    "cema_end_state": Call(
        mo.cema_end_state, dict(x=x, p=torch.rand(D, N), q=poles, lengths=lengths),
        dict(x=TENSOR, p=TENSOR, q=COMPLEX_TENSOR, lengths=OPTIONAL_INTEGERS),
    ),
    "cema_end_state of packed sequences": Call(
        mo.cema_end_state, dict(x=x[:1], p=torch.rand(D, N), q=poles, **packed), dict(cu_seqlens=NO_OFFSETS),
    ),
    "timestep_norm_end_state": Call(
        mo.timestep_norm_end_state, dict(x=x, num_groups=G, lengths=lengths),
        dict(x=without(TENSOR, "longer", "shorter", "meta"), num_groups=NO_GROUPS, lengths=OPTIONAL_INTEGERS),
        numbers=dict(num_groups=np.int64(G)),
    ),
    "sequence_norm": Call(
        mo.sequence_norm,
        dict(x=x, weight=torch.zeros(D), bias=torch.zeros(D), num_groups=G, eps=1e-5, lengths=lengths),
        dict(x=TENSOR, weight=TENSOR, bias=TENSOR, num_groups=NO_GROUPS, eps=NO_EPS, lengths=OPTIONAL_INTEGERS),
        numbers=dict(num_groups=np.int64(G), eps=np.float64(1e-5)),
    ),
    "bidirectional_cema": Call(
        mo.bidirectional_cema,
        dict(x=x, p=torch.rand(2 * D, N), q=poles.repeat(2, 1), gamma=poles.repeat(2, 1), omega=torch.ones(D),
             lengths=lengths),
        dict(x=TENSOR, p=TENSOR, q=COMPLEX_TENSOR, gamma=COMPLEX_TENSOR, omega=TENSOR, lengths=OPTIONAL_INTEGERS),
    ),
    "normalized_qk": Call(
        mo.normalized_qk, dict(z=z, gamma=affine, beta=affine, **sizes, position=torch.tensor([0, 3]), lengths=lengths),
        dict(z=TENSOR, gamma=TENSOR, beta=TENSOR, num_heads=NO_GROUPS, chunk_size=NO_SIZE,
             rope_base=NOT_POSITIVE, eps=NO_EPS, position=OPTIONAL_INTEGERS, lengths=OPTIONAL_INTEGERS),
        numbers=dict(num_heads=np.int32(H), chunk_size=np.uint8(C), rope_base=np.int64(10000), eps=np.float64(1e-5)),
    ),
    "chunked_attention": Call(
        mo.chunked_attention,
        dict(q=q, k=q, v=values, chunk_size=C, state=attention_state, lengths=lengths, dropkey=0.5, dropkey_seed=seed,
             return_state=True),
        dict(q=TENSOR, k=TENSOR, v=without(TENSOR, "longer", "shorter"), scale=NO_NUMBER,
             visible_chunks={**NO_SIZE, "two, with dropkey": 2, "three": 3}, **NO_ATTENTION),
        numbers=dict(chunk_size=np.int64(C), visible_chunks=np.int8(1), scale=np.int16(1), dropkey=np.float32(0.5)),
    ),
    "adaptive_working_memory": Call(
        mo.adaptive_working_memory,
        dict(q=q, k=q, v=values, chunk_size=C, state=memory_state, lengths=lengths, return_state=True),
        dict(q=TENSOR, k=TENSOR, v=without(TENSOR, "longer", "shorter"), chunk_size=NO_SIZE,
             visible_chunks={**NO_SIZE, "three": 3}, state=NO_STATE, return_state=NO_FLAG, lengths=OPTIONAL_INTEGERS),
        numbers=dict(chunk_size=np.int64(C), visible_chunks=np.int8(1)),
    ),
    "adaptive_working_memory of packed sequences": Call(
        mo.adaptive_working_memory, dict(q=q[:1], k=q[:1], v=values[:1], chunk_size=C, **packed),
        dict(cu_seqlens=NO_OFFSETS),
    ),
    "normalized_attention": Call(
        mo.normalized_attention,
        dict(z=z, v=v, gamma=affine, beta=affine, **sizes, state=attention_state, lengths=lengths, dropkey=0.5,
             dropkey_seed=seed),
        dict(z=TENSOR, v=TENSOR, gamma=TENSOR, beta=TENSOR, num_heads=NO_GROUPS,
             rope_base=NOT_POSITIVE, eps=NO_EPS, **NO_ATTENTION),
        numbers=dict(num_heads=np.int32(H), chunk_size=np.uint8(C), rope_base=np.int64(10000), dropkey=np.float32(0.5)),
    ),
    "gated_silu": Call(
        mo.gated_silu, dict(x=x, value=x),
        dict(x={"none": None, **NO_TENSOR, **SHAPES}, value={**NO_TENSOR, **SHAPES, "meta": REAL["meta"]}),
    ),
    "layer_norm": Call(
        mo.layer_norm, dict(x=x, weight=torch.zeros(D), bias=torch.zeros(D)),
        dict(x=LAST_AXIS, weight=OPTIONAL_TENSOR, bias=OPTIONAL_TENSOR, eps=NO_EPS), numbers=dict(eps=np.float64(1e-5)),
    ),
    "rms_norm": Call(
        mo.rms_norm, dict(x=x, weight=torch.zeros(D)),
        dict(x=LAST_AXIS, weight=without(OPTIONAL_TENSOR, "meta"), eps=NO_EPS), numbers=dict(eps=np.float64(1e-5)),
    ),
    "rms_norm on two devices": Call(
        mo.rms_norm, dict(x=x, weight=torch.zeros(D)), dict(weight={"meta": REAL["meta"]}), inner_names=("layer_norm",)
    ),
    "cema_coefficients": Call(
        mo.cema_coefficients,
        dict(alpha=torch.zeros(D, N, 1), delta=torch.zeros(D, N, 1), theta=torch.zeros(D, 1, 1), gamma=torch.zeros(D, N, 2)),
        dict.fromkeys(("alpha", "delta", "theta", "gamma"), TENSOR),
    ),
    "linear_cross_entropy": Call(
        mo.linear_cross_entropy, dict(hidden=x, weight=torch.randn(9, D), targets=torch.zeros(B, L, dtype=torch.long)),
        dict(hidden=TENSOR, weight=TENSOR, targets={**TOKENS, "longer": SHAPES["longer"]},
             reduction={"none": None, "other": "median", "list": [], "bool": True}, ignore_index={**NO_NUMBER, "float": 1.0}),
        numbers=dict(ignore_index=np.int64(-100)),
    ),
    "linear": Call(
        mo.linear, dict(x=x, weight=torch.randn(9, D), bias=torch.randn(9)),
        dict(x={"none": None, **NO_TENSOR, "no axes": SHAPES["no axes"], "longer": SHAPES["longer"]},
             weight={"none": None, **NO_TENSOR, **SHAPES}, bias=NO_TENSOR),
    ),
    "quantized_linear": Call(
        mo.quantized_linear, dict(x=x, **mo.quantize_weight(torch.randn(9, D), "int8")._asdict(), bias=torch.randn(9)),
        dict(x=LAST_AXIS, weight={"none": None, **NO_TENSOR, **SHAPES, "real": Tensor.float, "meta": REAL["meta"]},
             scale=TENSOR, bias=without(OPTIONAL_TENSOR, "one axis less")),
    ),
    "quantize_weight": Call(
        mo.quantize_weight, dict(weight=torch.randn(9, D), kind="int8"),
        dict(weight={"none": None, **NO_TENSOR, "one axis less": SHAPES["one axis less"], "integers": Tensor.long,
                     "wide": Tensor.double, "infinite": lambda t: t / 0}, kind={"none": None, "other": "int3", "list": []}),
    ),
    "quantize": Call(
        mo.quantize, dict(model=model, kind="int4"),
        dict(model={"none": None, **NO_TENSOR, "encoder": encoder, "wide": lambda m: copy.deepcopy(m).double()},
             kind={"none": None, "other": "fp8", "list": []}),
    ),
    "Megalodon": Call(
        mo.Megalodon, dict(config=model.config), dict(config={"none": None, **NO_TENSOR, "fields": TINY})
    ),
    "MegalodonBlock": Call(mo.MegalodonBlock, dict(config=model.config), dict(config={"none": None, "fields": TINY})),
    "MegalodonConfig": Call(
        mo.MegalodonConfig,
        TINY,
        dict(
            **dict.fromkeys(("num_layers", "model_dim", "z_dim", "value_dim", "num_heads", "ffn_hidden_dim", "cema_ndim",
                             "chunk_size", "vocab_size", "norm_num_groups"), NO_SIZE),
            **dict.fromkeys(("dropout", "hidden_dropout", "attention_dropout"), {**NO_NUMBER, **NEGATIVE, **ONE}),
            **dict.fromkeys(("norm_affine", "swiglu", "rescale_nffn", "scale_emb", "share_emb", "layerwise_ckpt"), NO_FLAG),
            norm_eps=NO_EPS,
            rope_base=without(NOT_POSITIVE, "none"),
            output_size=without(NO_SIZE, "negative") | {"less than -1": -2},
            init_mode={"none": None, "other": "bert", "bool": True, "list": []},
        ),
        numbers=dict(num_layers=np.int64(2), norm_eps=np.float32(1e-5), rope_base=np.int64(10000), dropout=np.float16(0.0),
                     output_size=np.int32(-1)),
    ),
    "forward": Call(
        model.forward, dict(tokens=tokens, state=model_state, lengths=lengths),
        dict(tokens=TOKENS, state=NO_MODEL_STATE, return_state=NO_FLAG, inplace_state=NO_FLAG, features=NO_FLAG,
             lengths=OPTIONAL_INTEGERS), name="Megalodon", inner_names=("timestep_norm",),
    ),
    "forward of packed sequences": Call(
        model.forward, dict(tokens=tokens[:1], **packed), dict(cu_seqlens=OPTIONAL_INTEGERS), name="Megalodon",
        inner_names=("timestep_norm",),
    ),
    "loss": Call(
        model.loss, dict(tokens=tokens, targets=tokens, state=model_state, lengths=lengths),
        dict(tokens=TOKENS, targets={**TOKENS, "shorter": SHAPES["shorter"]}, state=NO_MODEL_STATE, return_state=NO_FLAG,
             reduction={"none": None, "other": "median", "list": []}, ignore_index={**NO_NUMBER, "float": 1.0},
             lengths=OPTIONAL_INTEGERS),
        name="Megalodon", inner_names=("timestep_norm", "linear_cross_entropy"), numbers=dict(ignore_index=np.int64(-100)),
    ),
    "MegalodonEncoder": Call(
        mo.MegalodonEncoder, dict(config=encoder.config),
        dict(config={"none": None, **NO_TENSOR, "of the causal model": model.config}),
    ),
    "MegalodonEncoderConfig": Call(
        mo.MegalodonEncoderConfig, dict(**TINY, num_features=2, num_classes=3),
        dict(num_features=without(NO_SIZE, "none"), scale_emb=NO_FLAG,
             num_classes=without(NO_SIZE, "none"), output_size={"other": 3},
             share_emb={"true": True}, eos_token_id={"zero": 0}),
        numbers=dict(num_features=np.int64(2), num_classes=np.int32(3)),
    ),
    "encoder of tokens": Call(
        encoder.forward, dict(inputs=tokens, lengths=lengths),
        dict(inputs=TOKENS, features=NO_FLAG, state={"a model's": model_state, **NO_TENSOR}, return_state=NO_FLAG,
             lengths=OPTIONAL_INTEGERS), name="MegalodonEncoder", inner_names=("sequence_norm",),
    ),
    "encoder of numbers": Call(
        partial(encoder_of_numbers.forward, lengths=lengths), dict(inputs=x), dict(inputs=TENSOR), name="MegalodonEncoder",
        inner_names=("sequence_norm",),
    ),
    "pool": Call(
        mo.MegalodonEncoder.pool, dict(x=x, lengths=lengths),
        dict(x=without(TENSOR, "longer", "shorter", "meta"), lengths=OPTIONAL_INTEGERS),
        name="MegalodonEncoder.pool", inner_names=("timestep_norm_end_state",),
    ),
    "generate": Call(
        model.generate,
        dict(prompt=tokens, max_new_tokens=2, lengths=lengths, temperature=0.0, state=model_state, seed=[1, 2]),
        dict(prompt=TOKENS, max_new_tokens=without(NO_SIZE, "zero"), lengths=OPTIONAL_INTEGERS,
             temperature={**NO_NUMBER, **NEGATIVE}, top_k=without(NO_SIZE, "none"),
             top_p=without(NO_NUMBER, "none") | {**NEGATIVE, **ZERO, "two": 2},
             min_p=without(NO_NUMBER, "none") | {**NEGATIVE, "two": 2},
             repetition_penalty=without(NO_NUMBER, "none") | {**NEGATIVE, **ZERO},
             stop_tokens=NO_TOKENS, stop_sequences={**NO_TOKENS, "flat": [1], "with an empty one": [[1], []]},
             num_samples={**NO_SIZE, "two at temperature 0": 2}, state=NO_MODEL_STATE | {"of one row": lambda s: s[[0]]},
             seed={"float": 1.0, "bool": True, "string": "1", "negative": -1, "2^63": 2**63, "short": [1], "long": [1, 2, 3],
                   "of floats": [1.0, 2.0], "tensor": torch.tensor([1, 2]), "nan": math.nan},
             padding={"none": None, "bool": True, "other": "both", "list": []},
             return_state=NO_FLAG, return_lengths=NO_FLAG), inner_names=("Megalodon", "timestep_norm"),
        numbers=dict(max_new_tokens=np.int64(2), temperature=np.float32(0), top_k=np.int64(3), top_p=np.float32(0.5),
                     min_p=np.float32(0.5), repetition_penalty=np.float64(1.5), stop_tokens=np.int64(3),
                     num_samples=np.int64(1)),
    ),
    "stream": Call(
        lambda **arguments: next(model.stream(**arguments)), dict(prompt=tokens, lengths=lengths, max_new_tokens=2),
        dict(prompt=TOKENS, max_new_tokens=without(NO_SIZE, "none", "zero"), lengths=OPTIONAL_INTEGERS,
             temperature=NO_NUMBER, top_k={"zero": 0, "float": 2.0}, stop_tokens=NO_TOKENS),
        name="generate", inner_names=("Megalodon",), numbers=dict(temperature=np.float32(0.5), seed=np.int64(3)),
    ),
    "MegalodonState.fresh": Call(
        mo.MegalodonState.fresh,
        dict(config=model.config, num_sequences=2, dtype=torch.float32, device="cpu", cache_dtype=torch.int8),
        dict(config={"none": None, **NO_TENSOR}, num_sequences=NO_SIZE, dtype=NO_WEIGHTS, device=NO_DEVICE,
             cache_dtype=dict(string="int8", wide=torch.float16)), name="MegalodonState.fresh",
    ),
    "MegalodonState.to": Call(
        model_state.to, dict(device="cpu"), dict(device=without(NO_DEVICE, "none")), name="MegalodonState.to"
    ),
    "StopStrings": Call(
        mo.StopStrings, dict(decode=bytes, strings=["a"]),
        dict(strings={"of integers": [3], "of an empty one": ["a", ""], "empty": "", "tensor": x}),
    ),
    "Decoder": Call(
        mo.Decoder, dict(model=model, state=model_state),
        dict(model={"none": None, **NO_TENSOR, "layer": torch.nn.Linear(2, 2)}, state={"none": None, **NO_MODEL_STATE}),
    ),
    "decoder": Call(
        decoder.__call__, dict(tokens=tokens[:, :1]), dict(tokens=TOKENS), name="Decoder", inner_names=("Megalodon",),
    ),
    "record": Call(
        lambda module, example, state: mo.record(module, example, state=state),
        dict(module=partial(mo.TimestepNorm(D, G), return_state=True), example=x, state=norm_state),
        dict(module={"none": None, "integer": 3}, example={"none": None, **NO_TENSOR}, state={"integer": 3, "empty": ()}),
        name="record",
    ),
    "wide_parameters": Call(mo.wide_parameters, dict(model=model), dict(model={"none": None, **NO_TENSOR})),
    "load_official": Call(
        partial(mo.load_official, "nowhere"), {}, dict(dtype=NO_WEIGHTS, device=NO_DEVICE), name="load_official"
    ),
    "load_official of a folder": Call(mo.load_official, {}, dict(directory=NO_PATH)),
    "save": Call(
        partial(model.save, "nowhere"), {},
        dict(max_shard_bytes={"none": None, "zero": 0, "float": 1e9, "bool": True}, tokenizer={"string": "x", "integer": 3}),
        name="save",
    ),
    "save to a folder": Call(model.save, {}, dict(directory=NO_PATH)),
    "load": Call(partial(mo.Megalodon.load, "nowhere"), {}, dict(dtype=NO_WEIGHTS, device=NO_DEVICE), name="load"),
    "load of a folder": Call(mo.Megalodon.load, {}, dict(directory=NO_PATH), name="load"),
    "save_official to a folder": Call(partial(mo.save_official, model), {}, dict(directory=NO_PATH), name="save_official"),
    "save_checkpoint": Call(
        partial(save_checkpoint, "nowhere", model=model), {},
        dict(step={"none": None, "negative": -1, "float": 1.0, "2^63": 2**63}), name="save_checkpoint",
    ),
    "save_checkpoint of a step": Call(
        partial(save_checkpoint, "nowhere", 1, model), {},
        dict(keep={"none": None, "zero": 0, "float": 2.0, "bool": True}, record={"own": {"step": 2}},
             tokenizer={"string": "x"}), name="save_checkpoint",
    ),
    "load_checkpoint": Call(load_checkpoint, {}, dict(path=NO_PATH)),
    "load_any": Call(partial(load_any, "nowhere"), {}, dict(dtype=NO_WEIGHTS, device=NO_DEVICE), name="load_any"),
    "load_any of a folder": Call(load_any, {}, dict(path=NO_PATH)),
    "evaluate": Call(
        evaluate, dict(model=model, documents=[[1, 2, 3]], contexts=[2, "all"]),
        dict(model={"none": None, **NO_TENSOR, "layer": torch.nn.Linear(2, 2)},
             documents={"none": None, "tokens": tokens[0], "string": "text", "integer": 3, "empty": [], "one shot": iter([])},
             contexts={"none": None, "integer": 3, "string": "all", "empty": [], "zero": [0], "other": ["most"],
                       "float": [2.0], "bool": [True], "endless": [2**62]}, rows=NO_SIZE, piece=NO_SIZE),
        numbers=dict(rows=np.int64(2), piece=np.int32(2)),
    ),
    "TimestepNorm": Call(
        mo.TimestepNorm, dict(dim=8, num_groups=2), dict(dim=NO_SIZE, num_groups=NO_GROUPS, eps=NO_EPS),
    ),
    "SequenceNorm of x": Call(
        mo.SequenceNorm(D, num_groups=G).forward, dict(x=x), dict(x={**TENSOR, "wide": Tensor.double}), name="SequenceNorm",
        inner_names=("sequence_norm",),
    ),
    "TimestepNorm of x": Call(
        mo.TimestepNorm(D, num_groups=G).forward, dict(x=x), dict(x={**TENSOR, "wide": Tensor.double}), name="TimestepNorm",
        inner_names=("timestep_norm",),
    ),
    "ComplexEMA of x": Call(
        mo.ComplexEMA(D, ndim=N).forward, dict(x=x), dict(x={**TENSOR, "wide": Tensor.double}), name="ComplexEMA",
        inner_names=("cema",),
    ),
    "MegalodonBlock of x": Call(
        model.layers[0].forward, dict(x=torch.randn(2, 5, TINY["model_dim"])), dict(x={**TENSOR, "wide": Tensor.double}),
        name="MegalodonBlock", inner_names=("TimestepNorm", "timestep_norm"),
    ),
    "MegalodonBlock of an encoder": Call(
        encoder.layers[0].forward, dict(x=torch.randn(2, 5, TINY["model_dim"])),
        dict(state={"a block's": model_state.layers[0], **NO_TENSOR}, return_state={"true": True, **NO_FLAG}), name="MegalodonBlock",
    ),
    "ComplexEMA": Call(mo.ComplexEMA, dict(dim=8, ndim=2), dict(dim=NO_SIZE, ndim=NO_SIZE, bidirectional=NO_FLAG)),
}  # fmt: skip


def with_wrong_argument(call: Call, argument: str, wrong: Any) -> dict[str, Any]:
    """The call's arguments with one wrong value."""
    if inspect.isroutine(wrong):
        wrong = wrong(call.arguments[argument])
    return {**call.arguments, argument: wrong}


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.arguments])
def test_valid_calls_work(name):
    CALLS[name].function(**CALLS[name].arguments)


@pytest.mark.parametrize("name", CALLS)
def test_an_error_names_function_argument_expected_and_got(name):
    call = CALLS[name]
    assert call.wrong
    with every_case() as case:
        for argument, kinds in call.wrong.items():
            for kind, wrong in kinds.items():
                for gradients in (True, False):
                    with case(argument, kind, f"gradients {gradients}"):
                        assert_refused(call, argument, wrong, gradients)


def assert_refused(call: Call, argument: str, wrong: Any, gradients: bool) -> None:
    arguments = with_wrong_argument(call, argument, wrong)
    with torch.set_grad_enabled(gradients), pytest.raises((TypeError, ValueError, IndexError)) as caught:
        call.function(**arguments)
    assert_error_form(str(caught.value), call, argument, wrong)


def assert_error_form(message: str, call: Call, argument: str, wrong: Any) -> None:
    names = "|".join((call.op, *call.inner_names))
    named = r"[\w.]+" if inspect.isroutine(wrong) else argument + r"(\.\w+)?"
    assert re.fullmatch(rf"({names}): `{named}`.* (must|needs) .*, got .*\.", message, re.DOTALL), message
    of_torch_or_python = r"NoneType|attribute|torch\.ops|megalodon_ops::|Expected|not supported between"
    assert not re.search(of_torch_or_python, message), message
    assert len(message) < 400, message


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.numbers])
def test_numpy_numbers_are_accepted_like_pythons(name):
    call = CALLS[name]
    python = {argument: number.item() for argument, number in call.numbers.items()}
    expected = call.function(**{**call.arguments, **python})
    for arguments in (call.numbers, *({argument: number} for argument, number in call.numbers.items())):
        found = call.function(**{**call.arguments, **python, **arguments})
        for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b

"""Arrays of other libraries as arguments of the ops: what is refused, and in which words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from array_kinds import Bare, function, on_arrays, read_only
from calls import OPS, forward
from cases import SMALL
from torch import Tensor
from torch.utils._pytree import tree_map_only

import megalodon_ops as mo

all_ops = pytest.mark.parametrize("op", OPS)


def test_inplace_state_refuses_what_cannot_be_written():
    case = on_arrays(SMALL["chunked_attention"])
    arguments = case.tensors | case.options | {"inplace_state": True}
    state = case.options["state"]
    match = r"chunked_attention: `state.v` must be writable for `inplace_state`, got a numpy.ndarray that is not \("
    with pytest.raises(ValueError, match=match):
        mo.chunked_attention(**arguments | {"state": state._replace(v=read_only(state.v))})
    with pytest.raises(ValueError, match="`state.position` must be writable .* not subscriptable.*; pass a copy"):
        mo.chunked_attention(**arguments | {"state": state._replace(position=Bare(state.position))})


def wrong_byte_order(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder(">"))


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        ("x", lambda x: x[:, ::-1], ValueError, r"must not have negative strides, got \(180, -20, 4\); pass a contig"),
        ("x", wrong_byte_order, TypeError, r".* got numpy.ndarray of >f4 \(.*byte order.*\); pass a contiguous copy"),
        (
            "x",
            lambda x: x.astype(object),
            TypeError,
            "must be an array that DLPack can pass on to torch, got numpy.nda",
        ),
        ("x", lambda x: x.astype(int), TypeError, "must be float32, float64, bfloat16 or float16, got int64"),
        ("x", lambda x: x.tolist(), TypeError, "must be a torch tensor or an array with __dlpack__, got list; make it"),
        ("p", lambda p: np.float32(1), TypeError, ".* got numpy.float32; make it an array, as with numpy.asarray"),
        ("p", lambda p: None, TypeError, "must be a torch tensor or an array with __dlpack__, got None; make it"),
        ("p", torch.from_numpy, TypeError, r"must be an array, as `x` is \(numpy.ndarray\), got a torch tensor; pass "),
        ("p", lambda p: p[:4], ValueError, "must have shape"),
        (
            "state",
            torch.from_numpy,
            TypeError,
            "must be an array, as `x` is .*; pass torch.from_dlpack.x. to work on t",
        ),
    ],
    ids=["flipped", "byte-order", "objects", "integers", "list", "scalar", "none", "tensor", "shape", "state"],
)
def test_errors_name_the_argument_and_the_fix(argument, change, error, message):
    tensors = on_arrays(SMALL["cema"]).tensors
    with pytest.raises(error, match=f"^cema: `{argument}` {message}"):
        mo.cema(**tensors | {argument: change(tensors[argument])})


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("change", [Tensor.numpy, Tensor.tolist], ids=["array", "list"])
@all_ops
def test_a_call_on_tensors_takes_no_arrays(op, change, gradients):
    """Each argument in turn is no tensor, states and offsets included."""
    case = SMALL[op].with_options(lengths=torch.tensor([3, 9]))
    inputs = OPS[op].tokens + OPS[op].parameters
    with torch.set_grad_enabled(gradients):
        for name, value in (case.tensors | case.options).items():
            if name == inputs[0] or not isinstance(value, (Tensor, tuple)):
                continue
            changed = tree_map_only(Tensor, change, value)
            mixed = (case.with_tensors if name in case.tensors else case.with_options)(**{name: changed})
            named = "state.k" if isinstance(value, tuple) else rf"(state\.)?{name}"
            match = rf"^{op}: `{named}` must be a torch tensor, got .*; make it one"
            with pytest.raises(TypeError, match=match):
                forward(function(op), mixed)


def test_other_errors_of_tensors_stay_as_they_are():
    with pytest.raises(NotImplementedError, match="Could not run 'megalodon_ops::cema_fwd'.*Sparse"):
        mo.cema(**SMALL["cema"].tensors | {"x": torch.zeros(2, 9, 5).to_sparse()})


def test_errors_speak_of_arrays():
    x, zeros = np.ones((1, 3, 4), np.float32), np.zeros(4)
    with pytest.raises(
        TypeError, match=r"`weight` must be float32 .* got float64; convert it with \.astype\(\"float32\"\)"
    ):
        mo.timestep_norm(x, zeros, zeros, num_groups=2)


def test_queries_without_heads_are_told_so():
    q = torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match=r"add the batch dimension, or one of a single head"):
        mo.chunked_attention(q, q, q, chunk_size=2)

"""Wrong values for kinds of arguments, by name; functions turn the right value into a wrong one."""

import math

import numpy as np
import torch
from torch import Tensor

NO_TENSOR = {"list": [1.0], "string": "x", "integer": 3, "float": 2.5, "bool": True, "object": object()}
NO_TENSOR |= {"dictionary": {}, "class": Tensor}
SHAPES = {
    "one axis more": lambda t: t[None],
    "one axis less": lambda t: t[0],
    "no axes": lambda t: t.flatten()[0],
    "longer": lambda t: torch.cat([t, t[..., :1]], -1),
    "shorter": lambda t: t[..., :-1],
}
META = {"meta": lambda t: t.to("meta")}
REAL = {"integers": Tensor.long, "complex": lambda t: t.to(torch.complex64), "bools": Tensor.bool, **META}
COMPLEX = {"real": lambda t: t.real.clone(), "integers": lambda t: t.real.long(), **META}
INTEGERS = {
    "float tensor": Tensor.float,
    "bools": Tensor.bool,
    "negative": lambda t: t - 50,
    "beyond": lambda t: t + 50,
}
NO_SCALAR = {"none": None, "bool": True, "nan": math.nan}
NO_SIZE = {**NO_SCALAR, "string": "4", "list": [4], "tensor": torch.tensor(4), "array": np.array([4])}
NO_SIZE |= {"float": 4.0, "fraction": 2.5, "NumPy's float": np.float64(4), "zero": 0, "negative": -1}
NO_SIZE |= {"2^31": 2**31, "2^63": 2**63, "2^70": 2**70, "huge": 10**5000}
NO_NUMBER = {**NO_SCALAR, "string": "0.1", "list": [0.1], "tensor": torch.tensor(0.5), "array": np.array([0.5])}
NO_NUMBER |= {"complex": 0.5 + 0j, "inf": math.inf, "huge": 10**400}
NO_FLAG = {"none": None, "one": 1, "zero": 0, "string": "no", "list": [], "float": 1.0}
NO_PATH = {"none": None, "integer": 3, "list": [], "bool": True}
NO_WEIGHTS = {"string": "float32", "integers": torch.int64, "complex": torch.complex64, "float8": torch.float8_e4m3fn}
NO_DEVICE = {"none": None, "other": "nonsense", "float": 1.5, "list": []}
NEGATIVE, ZERO, ONE = {"negative": -1.0}, {"zero": 0.0}, {"one": 1}

TENSOR = {"none": None, **NO_TENSOR, **SHAPES, **REAL}
COMPLEX_TENSOR = {"none": None, **NO_TENSOR, **SHAPES, **COMPLEX}
OPTIONAL_TENSOR = {name: wrong for name, wrong in TENSOR.items() if name != "none"}
OPTIONAL_INTEGERS = {**NO_TENSOR, "no axes": SHAPES["no axes"], "longer": SHAPES["longer"], **INTEGERS}


def each(change):
    """Change every tensor of a state."""
    return lambda state: type(state)(*map(change, state))


NO_STATE = {
    **NO_TENSOR,
    "tensor": torch.zeros(2),
    "empty": (),
    "short": lambda s: tuple(s)[:1],
    "long": lambda s: (*s, *s),
    "as list": lambda s: list(s),
    "of None": each(lambda t: None),
    "of lists": each(lambda t: []),
    "of floats": each(lambda t: 1.0),
    "of shorter": each(lambda t: t[:1]),
    # A few tokens more would overflow int64.
    "endless": each(lambda t: torch.full_like(t, 2**63 - 3) if t.dtype == torch.int64 else t),
    "of bools": each(Tensor.bool),
    "of meta": each(META["meta"]),
}

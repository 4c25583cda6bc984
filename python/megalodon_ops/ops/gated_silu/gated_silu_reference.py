"""SiLU gates: y = silu(x) value with silu(x) = x s, s = sigmoid(x) = 1 / (1 + exp(-x)).

The op is elementwise. dtypes: all tensors float32, float64, bfloat16 or float16, computed in float32, or float64 for
float64 x.
"""

import torch
from torch import Tensor

from megalodon_ops.ops.common.states import accumulation_dtype


def gated_silu(x: Tensor, value: Tensor | None = None) -> Tensor:
    """Return silu(x) value.

    >>> gated_silu(torch.tensor([0.0, 100.0, -100.0]), torch.tensor([1.0, 2.0, 0.0])).tolist()
    [0.0, 200.0, -0.0]
    """
    real = accumulation_dtype(x.dtype)
    y = x.to(real) * torch.sigmoid(x.to(real))
    return (y if value is None else y * value.to(real)).to(x.dtype)


def gated_silu_bwd(dy: Tensor, x: Tensor, value: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return dx and dvalue.

        y = x s value   ->   dvalue = dy x s
                             dx = dy value (s + x s (1 - s))

    The last factor is the derivative of x s, as ds/dx = s (1 - s).
    """
    real = accumulation_dtype(x.dtype)
    wide, dsilu = x.to(real), dy.to(real)
    s = torch.sigmoid(wide)
    dvalue = None
    if value is not None:
        dvalue = (dsilu * wide * s).to(value.dtype)
        dsilu = dsilu * value.to(real)
    return (dsilu * s * (1 + wide * (1 - s))).to(x.dtype), dvalue

"""Floating-point operations of each op for `torch.utils.flop_counter`, forward and backward.

Matrix products and attention count as torch counts its own ops: two for each multiply-add, none for a bias or softmax.
Attention counts the pairs of a query and a key that its chunks allow. Every other op counts one for each sum, product,
quotient, root, exponential, sine or cosine of an element in its definition in :mod:`megalodon_ops.reference`. Work per
channel or head, but not per token, does not count. Tokens in no sequence do not count; if the sequences' ends cannot be
read, as with fake tensors, all tokens count.

Example:
    >>> import torch, megalodon_ops as mo
    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> q = k = v = torch.zeros(1, 4, 1, 8)
    >>> with FlopCounterMode(display=False) as counter:
    ...     o = mo.chunked_attention(q, k, v, chunk_size=2)
    >>> counter.get_total_flops()  # 6 pairs, each 8 multiply-adds for its score and 8 for its value
    192
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .spans import num_positions

_COUNTER = "torch.utils.flop_counter"


def register_formula(op: Callable, formula: Callable[..., int]) -> None:
    """Register an op's formula with torch. The formula's parameters have the names of arguments of the op."""
    name = op._schema.name.split("::")[1]
    arguments = [argument.name for argument in op._schema.arguments]
    needed = [*inspect.signature(formula).parameters]
    if unknown := [argument for argument in needed if argument not in arguments]:
        raise TypeError(
            f"define_op: `flops` of {name} must name arguments of {name}, got {unknown}; it has {arguments}."
        )

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = dict(zip(arguments, args)) | kwargs
        return formula(*(given[argument] for argument in needed))

    _formulas[op._overloadpacket] = count
    if _COUNTER in sys.modules:
        sys.modules[_COUNTER].register_flop_formula(op._overloadpacket, get_raw=True)(count)


_formulas: dict[Any, Callable] = {}


class _Registration:
    """Import hook that registers the formulas when torch's counter is imported; an import here would load Triton."""

    @classmethod
    def find_spec(cls, name: str, *_: Any) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            for op, count in _formulas.items():
                module.register_flop_formula(op, get_raw=True)(count)

        spec.loader.exec_module = load_and_register
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Registration)


def readable_values(tensor: Tensor | None, otherwise: list[int]) -> list[int]:
    """Return the integers in a tensor, or `otherwise` if the tensor is None or has no values, as a fake tensor."""
    readable = tensor is not None and type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta
    return tensor.tolist() if readable else otherwise


def lengths_of(x: Tensor, spans: Tensor | None) -> list[int]:
    """Return the lengths of the sequences of x (B, L, ...)."""
    batch, length = x.shape[:2]
    return readable_values(None if spans is None else num_positions(x, spans), [length] * batch)


def num_tokens(x: Tensor, spans: Tensor | None) -> int:
    """Return the number of tokens of x (B, L, ...) that are in a sequence."""
    return sum(lengths_of(x, spans))

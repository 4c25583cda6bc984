"""Checks of values from a caller or a file, and texts of values for errors."""

import difflib
import math
import re
import reprlib
import sys
import warnings
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

MAX_FLOAT = sys.float_info.max
MIN_POSITIVE = math.ulp(0.0)
LARGEST_BELOW_1 = math.nextafter(1.0, 0.0)
_LARGEST_SIZE = 2**31 - 1


def is_number(value: object) -> bool:
    """Return True for a real number, also one of NumPy, but not for a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_float(value: object) -> float:
    """Return the value as a float: NaN if it is not a number, infinity if it is an integer too large for a float."""
    try:
        return float(value) if is_number(value) else math.nan
    except OverflowError:
        return math.inf


def is_integer_between(value: object, least: int, most: int = 2**63 - 1) -> bool:
    """Return True for an integer from `least` to `most`, also one of NumPy, but not for a bool or 4.0."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most


def check_size(op: str, argument: str, value: object) -> int:
    """Return the value as an int; raise unless it is in [1, 2^31). A torch.SymInt of tracing is returned unchanged."""
    if type(value) is int and 1 <= value <= _LARGEST_SIZE:
        return value
    return check_integer(op, argument, value, "a positive integer below 2^31", 1, _LARGEST_SIZE)


def check_integer(op: str, argument: str, value: object, expected: str, least: int, most: int = 2**63 - 1) -> int:
    """Return the value as an int; raise an error with the text `expected` unless it is from `least` to `most`."""
    if isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: `{argument}` must be {expected}, got {describe(value)}.")
    if not least <= value <= most:
        raise ValueError(f"{op}: `{argument}` must be {expected}, got {short_text(value)}.")
    return int(value)


def check_number(
    op: str, argument: str, value: object, expected: str, least: float = -MAX_FLOAT, most: float = MAX_FLOAT
) -> float:
    """Return the value as a float; raise an error with the text `expected` unless it is from `least` to `most`."""
    if type(value) is float and least <= value <= most:
        return value
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    if not is_number(value):
        raise TypeError(f"{op}: `{argument}` must be {expected}, got {describe(value)}.")
    number = as_float(value)
    if not least <= number <= most:
        raise ValueError(f"{op}: `{argument}` must be {expected}, got {short_text(value)}.")
    return number


def check_flag(op: str, argument: str, value: object) -> None:
    """Raise a TypeError unless the value is True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{op}: `{argument}` must be True or False, got {describe(value)}.")


def check_tensor(op: str, argument: str, value: object) -> None:
    """Raise a TypeError unless the value is a torch tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{op}: `{argument}` must be a torch tensor, got {describe(value)}; make it one, as torch.as_tensor does "
            "(numpy.asarray in a call on arrays)."
        )


def check_optional_tensor(op: str, argument: str, value: object) -> None:
    """Raise a TypeError unless the value is a torch tensor or None."""
    if value is not None:
        check_tensor(op, argument, value)


def refuse_arguments(op: Any, args: tuple[Any, ...]) -> None:
    """Raise a TypeError that names the first argument of the registered `op` that should be a tensor and is not."""
    public = op._schema.name.split("::")[1].removesuffix("_fwd")
    checks = {"Tensor": check_tensor, "Optional[Tensor]": check_optional_tensor}
    for argument, value in zip(op._schema.arguments, args):
        if check := checks.get(str(argument.type)):
            check(public, argument.name, value)


def check_rank(op: str, argument: str, tensor: Tensor, letters: str, rank: int) -> None:
    """Raise unless the value is a tensor with `rank` dimensions. `letters` names them, as in "(B, L, D)"."""
    check_tensor(op, argument, tensor)
    if tensor.dim() != rank:
        fix = "; add a batch dimension" if tensor.dim() == rank - 1 else ""
        raise ValueError(f"{op}: `{argument}` must have shape {letters}, got {tuple(tensor.shape)}{fix}.")


def check_width(op: str, x: Tensor, **parameters: Tensor) -> None:
    """Raise if two parameters agree on D, their first dimension, and x (B, L, D) has another D, as a transposed one."""
    sizes = [tensor.shape[0] for tensor in parameters.values() if isinstance(tensor, Tensor) and tensor.dim()]
    if len(sizes) == 2 and sizes[0] == sizes[1] != x.shape[2]:
        fix = "; x.transpose(1, 2) has the channels last" if x.shape[1] == sizes[0] else ""
        names = " and ".join(f"`{name}`" for name in parameters)
        raise ValueError(f"{op}: `x` must be (B, L, D) with D = {sizes[0]} as {names}, got {tuple(x.shape)}{fix}.")


def check_channels(layer: str, x: object, dim: int, parameter: Tensor) -> None:
    """Raise unless x is a tensor (B, L, `dim`) and, if it is float64, the layer's parameters are float64, too."""
    check_tensor(layer, "x", x)
    if x.dim() != 3 or x.shape[-1] != dim:
        fix = "; add a batch dimension" if x.dim() == 2 and x.shape[-1] == dim else ""
        raise ValueError(f"{layer}: `x` must have shape (B, L, {dim}), got {tuple(x.shape)}{fix}.")
    if x.dtype == torch.float64 and parameter.dtype != torch.float64:
        raise TypeError(
            f"{layer}: `x` must be float32 or narrower for parameters of {parameter.dtype}, got {x.dtype}; call "
            ".double() on the layer, too."
        )


def check_device(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    """Raise a ValueError unless the tensor is on the device of `like`, the op's first argument."""
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: `{argument}` must be on {like.device} as the others, got {tensor.device}; move it there."
        )


def renamed(error: Exception, op: str) -> Exception:
    """Return the error of an op that `op` has called, with `op` as the name at the beginning of the message."""
    return type(error)(re.sub(r"^\w+: ", f"{op}: ", str(error)))


def as_device(caller: str, value: object) -> torch.device:
    """Return the value as a torch.device, or raise a ValueError, also if this machine lacks the device."""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"{caller}: `device` must be one of torch's, such as cpu, got {short_text(value)}.") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        fault = str(error).splitlines()[0]
        raise ValueError(f'{caller}: `device` {device} cannot be used: {fault}; device="cpu" needs no GPU.') from error
    return device


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Return "; did you mean X?" for the nearest of the names, or "" if none is near."""
    lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.7)
    return f"; did you mean {lower[near[0]]}?" if near else ""


def describe(value: object) -> str:
    """Return the text of a value of a wrong type: a number or a string itself, or else the name of its type."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return short_text(value)
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def short_text(value: object) -> str:
    """Return a short text of the value, on one line."""
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = reprlib.repr(value)
    return text if text.isprintable() else ascii(text)


def warn_caller(message: str) -> None:
    """Warn at the line that called this package, outside of torch's decorators, whose number of frames varies."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("megalodon_ops", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)

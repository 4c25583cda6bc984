"""Layers of MEGALODON's blocks. Parameter names are those of the released checkpoints."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.cema.bidirectional_cema import bidirectional_cema
from ..ops.cema.cema import cema
from ..ops.cema.cema_coefficients import cema_coefficients
from ..ops.gated_silu.gated_silu import gated_silu
from ..ops.layer_norm.layer_norm import layer_norm, rms_norm
from ..ops.linear.linear import CUDA_FEW_ROWS, KERNEL_TYPES, linear, linear_few_rows
from ..ops.sequence_norm.sequence_norm import sequence_norm
from ..ops.common.definition import call
from ..ops.common.states import TimestepNormState
from ..ops.timestep_norm.timestep_norm import timestep_norm
from ..ops.common.checks import check_channels, check_flag, check_number, check_size, describe

NO_STATE = "an encoder has no state: it reads the whole row"


def check_no_state(op: str, state: object, return_state: object) -> None:
    """Raise a ValueError if an encoder, or a part of one, is given a state or asked for one."""
    for name, value, expected in (("state", state, None), ("return_state", return_state, False)):
        if value is not expected:
            raise ValueError(f"{op}: `{name}` must be {expected}, got {describe(value)}; {NO_STATE}.")


class StateSlot:
    """Place for the new state of a layer. A layer with a slot returns a tensor alone, as hooks on layers expect."""

    def __init__(self) -> None:
        self.state: Any = None


_HALF_DTYPES = (torch.bfloat16, torch.float16)


class WideParameters(nn.Module):
    """A module whose own parameters stay float32 (or float64): see :func:`wide_parameters`."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Widen a 16-bit parameter from any source: a constructor, an assignment, a checkpoint."""
        if param is not None and param.dtype in _HALF_DTYPES:
            param = nn.Parameter(param.detach().float(), requires_grad=param.requires_grad)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device, torch.float32) if result.dtype in _HALF_DTYPES else result

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_wide, recurse=False)


def wide_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that stay float32 in a 16-bit model: CEMA's, the norms' and the attention's affine map.

    Their modules keep these parameters wide under `model.to(torch.bfloat16)`, a 16-bit default dtype,
    `load_state_dict(assign=True)` and wherever a parameter is set as an attribute. A tool that writes to
    `module._parameters` directly, as FSDP2's MixedPrecisionPolicy does, causes a TypeError in the op;
    :func:`megalodon_ops.distributed.parallelize` applies the policy to the other parameters only.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> model = mo.Megalodon(config).to(torch.bfloat16)
        >>> {parameter.dtype for parameter in mo.wide_parameters(model).values()}
        {torch.float32}
        >>> "layers.0.mega.cema.alpha" in mo.wide_parameters(model)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"wide_parameters: `model` must be a torch.nn.Module, got {describe(model)}.")
    wide = {}
    for name, module in model.named_modules():
        if isinstance(module, WideParameters):
            for own_name, parameter in module.named_parameters(recurse=False):
                wide[f"{name}.{own_name}".removeprefix(".")] = parameter
    return wide


def _with_state_options(op: Callable[..., Tensor]) -> Callable[..., Any]:
    """Give an op without a state the options `state` and `return_state=True`, which returns (y, None)."""

    def wrapper(*tensors: Tensor, state: None = None, return_state: bool = False, **options) -> Any:
        check_no_state(op.__name__, state, False)
        y = op(*tensors, **options)
        return (y, None) if return_state else y

    return wrapper


_sequence_norm = _with_state_options(sequence_norm)
_bidirectional_cema = _with_state_options(bidirectional_cema)


def _with_slot(op: Callable[..., Any], new_state: StateSlot, *tensors: Tensor, **options: Any) -> Tensor:
    """Return the op's result without its new state, which is put into the slot."""
    y, new_state.state = op(*tensors, return_state=True, **options)
    return y


class TimestepNorm(WideParameters):
    """:func:`timestep_norm` with its parameters: weight and bias (D,), initially zero; the gain is 1 + weight.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> mo.TimestepNorm(64, num_groups=4)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    _op = staticmethod(timestep_norm)

    def __init__(self, dim: int, num_groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        name = type(self).__name__
        dim = check_size(name, "dim", dim)
        self.num_groups = check_size(name, "num_groups", num_groups)
        if dim % self.num_groups:
            raise ValueError(f"{name}: `num_groups` must divide dim = {dim}, got {self.num_groups}.")
        self.eps = check_number(name, "eps", eps, "a finite number of at least 0", 0.0)
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, *, new_state: StateSlot | None = None, **options
    ) -> Tensor | tuple[Tensor, TimestepNormState]:
        """Normalize x (B, L, D); options as in the layer's op. A model passes `new_state`, a place for the new state."""
        check_channels(type(self).__name__, x, self.weight.shape[0], self.weight)
        op = self._op if new_state is None else partial(_with_slot, self._op, new_state)
        return op(x, self.weight, self.bias, num_groups=self.num_groups, eps=self.eps, **options)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, num_groups={self.num_groups}, eps={self.eps}"


class SequenceNorm(TimestepNorm):
    """:func:`sequence_norm` with its parameters, which are those of a :class:`TimestepNorm`; for encoders.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> mo.SequenceNorm(64, num_groups=4)(torch.randn(2, 10, 64), lengths=torch.tensor([10, 7])).shape
        torch.Size([2, 10, 64])
    """

    _op = staticmethod(_sequence_norm)


class ComplexEMA(WideParameters):
    """:func:`cema` with its parameters, D channels of N states; with `bidirectional`, :func:`bidirectional_cema`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> mo.ComplexEMA(64, ndim=16)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, dim: int, ndim: int = 16, *, bidirectional: bool = False) -> None:
        super().__init__()
        dim, ndim = check_size("ComplexEMA", "dim", dim), check_size("ComplexEMA", "ndim", ndim)
        check_flag("ComplexEMA", "bidirectional", bidirectional)
        self.bidirectional = bidirectional
        rows = 2 * dim if bidirectional else dim
        self.alpha = nn.Parameter(torch.empty(rows, ndim, 1))
        self.delta = nn.Parameter(torch.empty(rows, ndim, 1))
        self.theta = nn.Parameter(torch.empty(rows, 1, 1))
        self.gamma = nn.Parameter(torch.empty(rows, ndim, 2))
        self.omega = nn.Parameter(torch.empty(dim, 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.alpha.is_meta:  # no values to set; torch's functions would import its compiler, which takes 1.6 s
            return
        dim = self.omega.shape[0]
        directions = self.alpha.shape[0] // dim
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.delta, std=0.2)
        # Base angles fall geometrically from D^(-1/D) to 1 / D; the clamp keeps the logit finite for D = 1.
        angles = torch.exp(-torch.arange(1, dim + 1, dtype=torch.float64) * (math.log(dim) / dim)).clamp(max=1 - 1e-6)
        self.theta.copy_(torch.logit(angles)[torch.randperm(dim)].repeat(directions).view_as(self.theta))
        nn.init.normal_(self.gamma[..., 0])
        nn.init.zeros_(self.gamma[..., 1])
        nn.init.trunc_normal_(self.omega, std=0.25, a=-1.0, b=1.0)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the coefficients of the op.

        p (D, N), or (2 D, N) if bidirectional
        q, gamma: of p's shape, complex
        omega (D,)
        """
        return *cema_coefficients(self.alpha, self.delta, self.theta, self.gamma), self.omega.squeeze(-1)

    def forward(self, x: Tensor, *, new_state: StateSlot | None = None, **options) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the op to x (B, L, D); options as in its function, `new_state` as in :meth:`TimestepNorm.forward`."""
        check_channels("ComplexEMA", x, self.omega.shape[0], self.alpha)
        op = _bidirectional_cema if self.bidirectional else cema
        op = op if new_state is None else partial(_with_slot, op, new_state)
        return op(x, *self.coefficients(), **options)

    def extra_repr(self) -> str:
        return f"{self.omega.shape[0]}, ndim={self.alpha.shape[1]}, bidirectional={self.bidirectional}"


class _Norm(WideParameters):
    """Base of RMSNorm and LayerNorm, with their parameters, initially zero."""

    def __init__(self, dim: int, eps: float, affine: bool, bias: bool) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.register_parameter("weight", nn.Parameter(torch.empty(dim)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(dim)) if affine and bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, affine={self.weight is not None}"


class RMSNorm(_Norm):
    """x / sqrt(mean(x^2) + eps) * (1 + weight): :func:`megalodon_ops.rms_norm`."""

    def __init__(self, dim: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(dim, eps, affine, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class LayerNorm(_Norm):
    """(x - mean(x)) / sqrt(var(x) + eps) * (1 + weight) + bias: :func:`megalodon_ops.layer_norm`."""

    def __init__(self, dim: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(dim, eps, affine, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class _StoredMethod(partial):
    """A method of one class, stored in an object of another class. Unlike a bound method, it can be pickled there."""

    @property
    def __func__(self) -> Callable:
        return self.func

    @property
    def __self__(self) -> nn.Module:
        return self.args[0]


class Linear(nn.Linear):
    """A linear layer initialised "he": weights normal with std 1 / sqrt(3 fan_in), bias zero.

    With `token_rows`, each row of the weight belongs to a token and is initialised as in an :class:`Embedding`. The
    layer calls :func:`megalodon_ops.linear`, which chooses the fastest kernel on the CPU.

    `Linear(...)` returns a `torch.nn.Linear` that has this class's methods as attributes: bitsandbytes in transformers and
    GLoRA in PEFT ask for `type(module) is torch.nn.Linear`, and skip or refuse subclasses.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, token_rows: bool = False) -> None:
        self.token_rows = token_rows
        super().__init__(in_features, out_features, bias)
        self.give_methods(self, token_rows)

    @staticmethod
    def give_methods(layer: nn.Linear, token_rows: bool) -> None:
        """Make `layer` a `torch.nn.Linear` with the methods of this class, unless it is one already."""
        if not has_own_forward(layer):
            layer.__class__ = nn.Linear
            layer.token_rows = token_rows
            for name in _METHODS:
                setattr(layer, name, _StoredMethod(getattr(Linear, name), layer))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        if self.token_rows:
            _init_token_rows(self.weight)
        elif not self.weight.is_meta:  # no values to set on the meta device
            nn.init.normal_(self.weight, std=(3 * self.in_features) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


_LINEAR_FORWARD = Linear.forward
_METHODS = ("forward", "reset_parameters")


def has_own_forward(module: nn.Module) -> bool:
    """Return True if the module's attribute `forward` is the one that :class:`Linear` gives."""
    forward = vars(module).get("forward")
    return isinstance(forward, _StoredMethod) and forward.func is _LINEAR_FORWARD and forward.args == (module,)


class FusedLinear(nn.Module):
    """A :class:`Linear` and what follows it: silu(x W^T + bias) value + add, all but the product optional.

    On CUDA, for few rows and without gradients, one kernel computes it, and rounds once. A decoder makes this layer
    in place of a :class:`Linear` of its model; they share the parameters.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(
        self, x: Tensor, *, silu: bool = False, value: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        """Map x (..., I) to (..., O); `value` and `add` (..., O)."""
        if 0 < x.numel() <= CUDA_FEW_ROWS * x.shape[-1]:
            return call(linear_few_rows, x, self.weight, self.bias, silu, value, add)
        y = linear(x, self.weight, self.bias)
        if silu:
            y = gated_silu(y, value)
        return y if add is None else add + y


def gated_product(layer: nn.Module, x: Tensor, value: Tensor | None = None) -> Tensor:
    """Return silu(layer(x)) value."""
    return layer(x, silu=True, value=value) if isinstance(layer, FusedLinear) else gated_silu(layer(x), value)


class Embedding(nn.Embedding):
    """A row of D numbers for each token, initially normal with std 1 / sqrt(D), truncated at 3 std."""

    def reset_parameters(self) -> None:
        _init_token_rows(self.weight)


def _init_token_rows(weight: Tensor) -> None:
    std = weight.shape[-1] ** -0.5
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def reset_all_parameters(module: nn.Module) -> None:
    """Initialise every parameter inside the module, by the `reset_parameters` of the module that owns it."""
    for part in module.modules():
        if list(part.parameters(recurse=False)):
            part.reset_parameters()


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_plain_linear(module: nn.Module) -> bool:
    """Return True if calling the module only computes :func:`megalodon_ops.linear` of its weight and bias.

    A call may compute something else, and the result is False, if the module has

    - another class, as adapters, parametrizations and sharded modules have, or another forward
    - a hook of its own; hooks on all modules, such as those of torch's FlopCounterMode, only observe
    - parameters of a tensor subclass
    """
    if type(module) is not nn.Linear or not has_own_forward(module):
        return False
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return False
    return all(tensor is None or type(tensor) in KERNEL_TYPES for tensor in (module.weight, module.bias))

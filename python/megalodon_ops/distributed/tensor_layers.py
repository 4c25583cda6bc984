"""Layers of a model under tensor parallel, each with its rank's own part; see tensor.py."""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..model.blocks import NormalizedAttention, NormalizedFFN
from ..model.config import MegalodonConfig
from ..model.layers import ComplexEMA, Embedding, LayerNorm, Linear, RMSNorm, TimestepNorm
from ..ops.linear.linear import linear
from ..ops.linear_cross_entropy.linear_cross_entropy import linear_cross_entropy

Placement = Shard | Replicate | Partial
CHANNELS = Shard(-1)


def redistribute(
    x: Tensor, mesh: DeviceMesh, source: Placement, target: Placement, gradient: Placement | None = None
) -> Tensor:
    """Change the placement of a plain tensor over the ranks.

    Args:
        x: this rank's part of the tensor.
        source, target: placement of x and of the result.
        gradient: placement of the gradient of the result; None: as the result. `Partial()`: each rank uses a whole
            result in its own way, and the gradients are summed.
    """
    placed = DTensor.from_local(x, mesh, [source], run_check=False).redistribute(placements=[target])
    return placed.to_local(grad_placements=None if gradient is None else [gradient])


def take_over(module: nn.Module, old: nn.Module) -> None:
    """Give a new module the submodules of `old`, its mode and its hooks, whose handles then remove them here."""
    module.training = old.training
    for name in vars(nn.Module()):
        if "_hooks" in name:
            setattr(module, name, getattr(old, name))
    for name, part in old._modules.items():
        module.add_module(name, part)


class SplitLayer:
    """Base in front of a layer's class: a layer that computes with its rank's part of the parameters."""

    settings: ClassVar[tuple[str, ...]] = ()
    """attributes that the layer's class reads"""

    def __init__(
        self, layer: nn.Module, mesh: DeviceMesh, dim: int | None, *, gather_input: bool = False,
        sum_output: bool = False, part: tuple[int, int, int] | None = None,
    ) -> None:  # fmt: skip
        """Take over a whole layer, with its modules, mode and hooks.

        Args:
            mesh: the ranks that share the layer.
            dim: dimension along which parameters are split into DTensors; None: they are replicated.
            gather_input: gather the channels of the input.
            sum_output: sum outputs over ranks; each rank keeps its own channels of the sum.
            part: dimension, begin and length of the rank's part of replicated parameters; None: all of it.
        """
        nn.Module.__init__(self)
        take_over(self, layer)
        for name in self.settings:
            setattr(self, name, getattr(layer, name))
        self.mesh, self.gather_input, self.sum_output, self.part = mesh, gather_input, sum_output, part
        placement = Replicate() if dim is None else Shard(dim)
        for name, parameter in layer._parameters.items():
            if parameter is None:
                self.register_parameter(name, None)
                continue
            own = parameter.detach()
            if dim is not None:
                own = own.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
            placed = DTensor.from_local(own, mesh, [placement], run_check=False)
            self.register_parameter(name, nn.Parameter(placed, requires_grad=parameter.requires_grad))

    def forward(self, x: Tensor, **options: Any) -> Any:
        x = redistribute(x, self.mesh, CHANNELS, Replicate(), Partial()) if self.gather_input else x
        with self._own_parameters():
            y = super().forward(x, **options)
        return redistribute(y, self.mesh, Partial(), CHANNELS).clone() if self.sum_output else y  # FSDP2 warns of views

    @contextlib.contextmanager
    def _own_parameters(self) -> Iterator[None]:
        """Replace the parameters by plain tensors; gradients of replicated parameters are partial sums."""
        parameters = dict(self._parameters)
        try:
            for name, parameter in parameters.items():
                if isinstance(parameter, DTensor):
                    is_whole = parameter.placements[-1].is_replicate()
                    own = parameter.to_local(grad_placements=[Partial()] if is_whole else None)
                    self._parameters[name] = own if self.part is None else own.narrow(*self.part)
            yield
        finally:
            self._parameters.update(parameters)


class SplitAttention(SplitLayer, NormalizedAttention):
    """First half of a block, with a rank's own heads, or its part of a head that ranks share."""

    def __init__(self, layer: NormalizedAttention, *args: Any, config: MegalodonConfig, **fields: Any) -> None:
        """config: the configuration with the sizes of the rank's part."""
        super().__init__(layer, *args, **fields)
        self.config, self._rotary_made_for = config, None
        self.register_buffer("rotary", None, persistent=False)


class SplitFFN(SplitLayer, NormalizedFFN):
    settings = ("config", "layer", "fc3")  # fc3 may be None, which is no module


class SplitTimestepNorm(SplitLayer, TimestepNorm):
    settings = ("eps",)

    def __init__(self, layer: TimestepNorm, mesh: DeviceMesh, *args: Any, **fields: Any) -> None:
        super().__init__(layer, mesh, *args, **fields)
        self.num_groups = layer.num_groups // mesh.size()


class SplitRMSNorm(SplitLayer, RMSNorm):
    settings = ("dim", "eps")


class SplitLayerNorm(SplitLayer, LayerNorm):
    settings = ("dim", "eps")


class SplitLinear(SplitLayer, Linear):
    settings = ("in_features", "out_features", "token_rows")


class SplitEmbedding(SplitLayer, Embedding):
    settings = tuple(Embedding.__constants__)


class SplitComplexEMA(SplitLayer, ComplexEMA):
    """CEMA of a rank's own channels; its coefficients are also used outside its forward."""

    settings = ("bidirectional",)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with self._own_parameters():
            return super().coefficients()


class SplitInputMap(SplitLinear):
    """Map of numbers to a rank's own channels. The numbers are whole on every rank; their gradients are summed."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(redistribute(x, self.mesh, Replicate(), Replicate(), Partial()))


class SplitOutput(SplitLinear):
    """The output matrix, split by columns; each rank computes the product for its share of the tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return all logits (B, L, num_outputs) on every one of n ranks, from its channels (B, L, D / n)."""
        logits = linear(self._own_tokens(hidden), self._whole_weight())
        return self._all_tokens(logits, hidden.shape[:2])

    def cross_entropy(self, hidden: Tensor, targets: Tensor, reduction: str, ignore_index: int) -> Tensor:
        """Return the loss on every one of n ranks, from its channels (B, L, D / n). reduction: "sum" or "none"."""
        own = (self._own_tokens(hidden), self._whole_weight(), self._share(targets.flatten(), ignore_index))
        loss = linear_cross_entropy(*own, reduction=reduction, ignore_index=ignore_index)
        if reduction == "none":
            return self._all_tokens(loss, targets.shape)
        return redistribute(loss, self.mesh, Partial(), Replicate()).clone()

    def _whole_weight(self) -> Tensor:
        """Gather the whole matrix (num_outputs, D); the gradient of each rank is a partial sum."""
        return self.weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def _own_tokens(self, hidden: Tensor) -> Tensor:
        """Return this rank's share of T tokens with all channels (T / n, D); zeros follow the last token."""
        return self._share(redistribute(hidden, self.mesh, CHANNELS, Replicate(), Partial()).flatten(0, 1), 0)

    def _share(self, values: Tensor, padding_value: float) -> Tensor:
        """Return this rank's equal share (T / n, ...) of values (T, ...) of all tokens."""
        ranks, rank = self.mesh.size(), self.mesh.get_local_rank()
        size = -(-len(values) // ranks)
        padding = [0, 0] * (values.dim() - 1) + [0, ranks * size - len(values)]
        return F.pad(values, padding, value=padding_value).narrow(0, rank * size, size)

    def _all_tokens(self, own: Tensor, shape: torch.Size) -> Tensor:
        """Return the values of all tokens (B, L, ...) on every rank; all ranks must use them in the same way."""
        whole = redistribute(own, self.mesh, Shard(0), Replicate())
        return whole[: shape.numel()].unflatten(0, shape).clone()

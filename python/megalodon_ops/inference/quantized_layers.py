"""Layers with weights of 8 or 4 bits, and the replacement of a model's layers by these."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.quantized_linear.quantized_linear import check_activations, check_kind, dequantize, empty_weight
from ..ops.quantized_linear.quantized_linear import quantized_linear
from ..model.config import MegalodonConfig
from ..model.layers import Embedding
from ..model.model_state import MegalodonStateBase

METHOD = "megalodon_ops"
"""`quant_method` in the `quantization_config` of a config.json"""


class _QuantizedModule(nn.Module):
    """A module whose weight and scale keep their dtypes when the module is cast."""

    def __init__(self, outputs: int, inputs: int, kind: str) -> None:
        check_kind(type(self).__name__, kind)
        super().__init__()
        self.kind, self._dtype = kind, torch.get_default_dtype()
        self.weight, self.scale = (nn.Parameter(t, requires_grad=False) for t in empty_weight(outputs, inputs, kind))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype to which the module was last cast."""
        return self._dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        scale = self.scale

        def keep_scale(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if tensor is scale and result.dtype != tensor.dtype else result

        super()._apply(keep_scale, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=scale.device)).dtype
        return self


class QuantizedLinear(_QuantizedModule):
    """A linear layer with a weight of 8 or 4 bits, for inference: :func:`megalodon_ops.quantized_linear`.

    Args:
        in_features, out_features: sizes of the input and the output.
        bias: add a bias, in the dtype of the activations.
        kind: "int8" or "int4".
        activations: "int8" rounds many rows of x to 8 bits where that is faster; None does not.

    Attributes:
        weight, scale: as :func:`megalodon_ops.quantize_weight` returns them, without gradients. Casts skip them.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> layer = mo.QuantizedLinear(64, 5, kind="int8")
        >>> values = mo.quantize_weight(torch.randn(5, 64), "int8")._asdict() | {"bias": torch.zeros(5)}
        >>> layer.load_state_dict(values)
        <All keys matched successfully>
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, kind: str, activations: str | None = None
    ) -> None:
        super().__init__(out_features, in_features, kind)
        check_activations("QuantizedLinear", activations)
        self.activations = activations
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight, self.scale, self.bias, activations=self.activations)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kind={self.kind}, activations={self.activations}"


class QuantizedEmbedding(_QuantizedModule):
    """A row of D numbers for each token, stored in 8 or 4 bits; tokens of arbitrary shape become (..., D)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, kind: str) -> None:
        super().__init__(num_embeddings, embedding_dim, kind)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.flatten().long()
        y = dequantize(self.weight, self.scale, self.embedding_dim, self._dtype, rows)
        return y.view(*tokens.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, kind={self.kind}"


def kind_of(name: str, kind: str, config: MegalodonConfig) -> str | None:
    """Return the kind of the weight `name` in a model quantised to `kind`; None: floating point.

    The embedding is int8: with 4 bits it would cause most of a small model's error, and a token reads only one of its
    rows. The input layer of numbers keeps its dtype: it has few weights, and every output depends on all of them.
    """
    if config.num_features is not None and name.startswith("embed."):
        return None
    is_embedding = name.startswith("embed.") or (config.share_emb and name.startswith("output."))
    return "int8" if is_embedding else kind


def stored_shapes(
    config: MegalodonConfig, kind: str | None
) -> tuple[list[tuple[str, tuple[int, ...]]], dict[str, torch.dtype]]:
    """Return names and shapes of a model's parameters, and the dtypes of those that are quantised to `kind`."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    dtypes: dict[str, torch.dtype] = {}
    for name, shape in config.parameter_shapes():
        module, _, own_name = name.rpartition(".")
        is_matrix = own_name == "weight" and len(shape) > 1
        own_kind = kind_of(name, kind, config) if kind is not None and is_matrix else None
        if own_kind is None:
            shapes.append((name, shape))
            continue
        with torch.device("meta"):
            quantised = empty_weight(*shape, own_kind)
        for own_name, tensor in quantised._asdict().items():
            shapes.append((f"{module}.{own_name}", tuple(tensor.shape)))
            dtypes[f"{module}.{own_name}"] = tensor.dtype
    return shapes, dtypes


def replace_layers(model: nn.Module, kind: str, activations: str | None = None) -> None:
    """Replace a model's embedding and linear layers by layers quantised to `kind`, without values."""
    for parent_name, parent in [*model.named_modules()]:
        for name, module in parent.named_children():
            own_kind = kind_of(f"{parent_name}.{name}.weight".removeprefix("."), kind, model.config)
            if own_kind is None:
                continue
            if isinstance(module, nn.Linear):
                options = dict(bias=module.bias is not None, kind=own_kind, activations=activations)
                quantised = QuantizedLinear(module.in_features, module.out_features, **options)
            elif isinstance(module, Embedding):
                quantised = QuantizedEmbedding(module.num_embeddings, module.embedding_dim, kind=own_kind)
            else:
                continue
            parent.add_module(name, quantised.to(module.weight.dtype))


def new_state(
    model: nn.Module, rows: int, device: torch.device, cache_dtype: torch.dtype | None = None
) -> MegalodonStateBase | None:
    """Return the state of new sequences; None, which is as good, if keys and values have the activations' dtype.

    cache_dtype: dtype of keys and values. None: int8 for a quantised model without working memory, else as activations.
    """
    dtype = computing_dtype(model)
    if cache_dtype is None:
        cache_dtype = torch.int8 if getattr(model, "quantization", None) and not model.config.working_memory else dtype
    if cache_dtype == dtype:
        return None
    return model.state_type.fresh(model.config, rows, dtype=dtype, device=device, cache_dtype=cache_dtype)


def computing_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of a model's activations: the dtype that its embedding returns."""
    return getattr(model.embed, "dtype", None) or model.embed.weight.dtype

"""States that a call of a model passes to the next: of a block and of a model; their tensors by name."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node, tree_leaves, tree_map_only
from typing_extensions import Self

from .config import MegalodonConfig, check_config
from .sequences import Sequences
from ..ops.common.quantized_rows import SCALE_BYTES, pack_rows
from ..ops.common.states import AttentionState, TimestepNormState, WorkingMemoryState
from ..ops.common.states import accumulation_dtype, named_in_programs
from ..ops.common.checks import as_device, check_size, describe, is_integer_between, short_text

ACTIVATIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes that a model's activations can have"""
Layout = Iterator[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of each tensor; complex tensors as pairs of reals"""


def check_cache_dtype(function: str, cache_dtype: object, activations: torch.dtype, has_memory: bool) -> None:
    """Raise a ValueError unless `cache_dtype` is the activations' dtype, or int8 where activations and model allow it."""
    if cache_dtype == activations:
        return
    if cache_dtype != torch.int8:
        got = short_text(cache_dtype)
        raise ValueError(f"{function}: `cache_dtype` must be torch.int8, {activations} or None, got {got}.")
    if activations == torch.float64 or has_memory:
        what = "a working memory, which reads exact values" if has_memory else "float64 activations"
        raise ValueError(f"{function}: keys and values must not have 8 bits beside {what}, got torch.int8.")


def layout(config: MegalodonConfig, rows: int, cache_dtype: torch.dtype) -> Layout:
    """Yield name, dtype and shape of the tensors of a state of `rows` sequences."""
    real, heads = accumulation_dtype(cache_dtype), config.num_heads
    scale_bytes = SCALE_BYTES if cache_dtype == torch.int8 else 0

    def norm(prefix: str, groups: int, real: torch.dtype) -> Layout:
        has_group_counts = prefix == "inputs." and config.missing_values
        yield f"{prefix}count", torch.int64, (rows, groups) if has_group_counts else (rows,)
        yield f"{prefix}mean", real, (rows, groups)
        yield f"{prefix}var", real, (rows, groups)
        yield f"{prefix}residual", real, (rows, 2, groups)

    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        yield from norm(f"{prefix}norm.", config.norm_num_groups, real)
        yield f"{prefix}cema", real, (rows, config.model_dim, config.cema_ndim, 2)
        for name, dim in (("k", config.z_dim), ("v", config.value_dim)):
            shape = (rows, config.num_cached_positions, heads, dim // heads + scale_bytes)
            yield f"{prefix}attention.{name}", cache_dtype, shape
        yield f"{prefix}attention.position", torch.int64, (rows,)
        if block_state_type(config) is MemoryBlockState:
            K, V = config.z_dim // heads, config.value_dim // heads
            yield f"{prefix}memory", real, (rows, heads, K, V)
            yield f"{prefix}memory_mass", real, (rows, heads, K)
            yield f"{prefix}memory_k", cache_dtype, (rows, config.num_cached_positions, heads, K)
    yield from norm("norm.", config.norm_num_groups, real)
    if scales_inputs(config):
        yield from norm("inputs.", config.num_features, torch.float64)


def scales_inputs(config: MegalodonConfig) -> bool:
    """Return True if a state has the running statistics of the inputs."""
    return config.num_features is not None and config.scale_inputs


_ROWS = "an integer, a slice, a list of integers or a 1-D tensor of integers or bools"


class CallOptions(NamedTuple):
    """Options of a model's call, as one value below the public methods. A block gets them with its own state."""

    state: Any = None
    """a :class:`MegalodonState` or, in a block, a :class:`BlockState`; None: the tokens begin their sequences"""
    return_state: bool = False
    inplace_state: bool = False
    """overwrite parts of `state`"""
    sequences: Sequences = Sequences()


Rows = int | slice | Sequence[int] | Tensor
State = TypeVar("State", bound="MegalodonStateBase")


def as_pytree(kind: type[State]) -> type[State]:
    """Register a class of states as a pytree, by name, so that torch.export.save can write programs with them."""
    names = [field.name for field in dataclasses.fields(kind)]

    def flatten(state: State) -> tuple[list[Any], None]:
        return [getattr(state, name) for name in names], None

    register_pytree_node(
        kind,
        flatten,
        lambda values, _: kind(*values),
        serialized_type_name=f"megalodon_ops.{kind.__name__}",
        flatten_with_keys_fn=lambda state: ([(GetAttrKey(name), getattr(state, name)) for name in names], None),
    )
    return kind


@named_in_programs
class BlockState(NamedTuple):
    """State of one block, passed from one call to the next.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=96, cema_ndim=4)
        >>> _, state = mo.MegalodonBlock(config)(torch.randn(1, 10, 64), return_state=True)
        >>> state.cema.shape
        torch.Size([1, 64, 4])
    """

    norm: TimestepNormState
    cema: Tensor
    """(S, D, N) complex"""
    attention: AttentionState


@named_in_programs
class MemoryBlockState(NamedTuple):
    """State of a block with a working memory: the fields of a :class:`BlockState` and those of the memory.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=96, working_memory=True)
        >>> _, state = mo.MegalodonBlock(config)(torch.randn(1, 10, 64), return_state=True)
        >>> state.memory.shape
        torch.Size([1, 1, 32, 64])
    """

    norm: TimestepNormState
    cema: Tensor
    attention: AttentionState
    memory: Tensor
    """(S, H, K, V)"""
    memory_mass: Tensor
    """(S, H, K)"""
    memory_k: Tensor
    """(S, C, H, K)"""

    def working_memory(self) -> WorkingMemoryState:
        """State of :func:`adaptive_working_memory`: the memory, the attention's values, the norm's position count."""
        return WorkingMemoryState(self.memory, self.memory_mass, self.memory_k, self.norm.count, self.attention.v)


def block_state_type(config: MegalodonConfig) -> type[BlockState] | type[MemoryBlockState]:
    """Return the type of the state of a block with this configuration."""
    return MemoryBlockState if config.working_memory else BlockState


@as_pytree
@dataclass(frozen=True, eq=False, repr=False)
class MegalodonStateBase:
    """State that a call of a model passes on to the next. :class:`megalodon_ops.MegalodonState` adds files."""

    layers: tuple[BlockState, ...] | tuple[MemoryBlockState, ...]
    norm: TimestepNormState
    """the final norm's"""
    inputs: TimestepNormState | tuple[()] = ()
    """running statistics of the inputs, float64, one group for each of F features; () if the model does not scale its
    inputs. With `missing_values`, count is (S, F)"""

    @classmethod
    def fresh(
        cls,
        config: MegalodonConfig,
        num_sequences: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cache_dtype: torch.dtype | None = None,
    ) -> Self:
        """Return the state of sequences that have not begun, equivalent to state=None.

        Args:
            num_sequences: S.
            dtype: dtype of the model's activations.
            cache_dtype: torch.int8: keys and values have 8 bits, as in :meth:`quantize_cache`; None: `dtype`.
        """
        check_config("MegalodonState.fresh", config)
        rows = check_size("MegalodonState.fresh", "num_sequences", num_sequences)
        _check_activations("MegalodonState.fresh", dtype)
        if cache_dtype is not None:
            check_cache_dtype("MegalodonState.fresh", cache_dtype, dtype, config.working_memory)
        wanted, device = layout(config, rows, cache_dtype or dtype), as_device("MegalodonState.fresh", device)
        return from_named(cls, {name: torch.zeros(shape, dtype=kind, device=device) for name, kind, shape in wanted})

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.norm.count.shape[0]

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return self.layers[0].attention.k.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in tree_leaves(self) if tensor is not None)

    def __repr__(self) -> str:
        attention, name = self.layers[0].attention, type(self).__name__
        kind = f"{attention.k.dtype} keys and values on {attention.k.device}"
        return f"{name}({self.num_sequences} sequences, {len(self.layers)} layers, {kind}, {self.nbytes:,} bytes)"

    __iter__ = None  # else Python would iterate by __getitem__

    def __getitem__(self, rows: Rows) -> Self:
        """Return the state of the sequences `rows`, of one sequence for an integer; gradients flow through."""
        index = self._index(rows)
        return _map(lambda tensor: tensor.index_select(0, index), self)

    def reset(self, rows: Rows) -> Self:
        """Return the state with the sequences `rows` reset to their beginning, for new documents in a batch."""
        index = self._index(rows)
        return _map(lambda tensor: tensor.index_fill(0, index, 0), self)

    @classmethod
    def cat(cls, states: Iterable[Self]) -> Self:
        """Concatenate the sequences of states of one model, in order."""
        states = list(states)
        if not states or not all(isinstance(state, MegalodonStateBase) for state in states):
            raise TypeError("MegalodonState.cat: `states` must be MegalodonStates, one or more.")
        parts = [named_tensors(complete(state)) for state in states]
        kinds = [{name: (tensor.dtype, *tensor.shape[1:]) for name, tensor in part.items()} for part in parts]
        for kind in kinds:
            if different := sorted(name for name, _ in kinds[0].items() ^ kind.items()):
                got = f"{kinds[0].get(different[0])} and {kind.get(different[0])} as {different[0]}"
                raise ValueError(f"MegalodonState.cat: `states` must be of one model, got {got}.")
        return from_named(cls, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the state to another device, or convert it for activations of another dtype: `state.to(torch.bfloat16)`.

        Keys and values get the dtype, except that those of 8 bits are unchanged. The recurrent parts become float32, or
        float64 for float64 activations.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        device = device if device is None else as_device("MegalodonState.to", device)
        if dtype is None:
            return _map(lambda tensor: tensor.to(device), self)
        _check_activations("MegalodonState.to", dtype)
        real = accumulation_dtype(dtype)

        def convert(name: str, tensor: Tensor) -> Tensor:
            if tensor.dtype in (torch.int64, torch.int8) or name.startswith("inputs."):
                return tensor.to(device)
            if name.endswith((".attention.k", ".attention.v", ".memory_k")):
                return tensor.to(device, dtype)
            return tensor.to(device, real.to_complex() if tensor.is_complex() else real)

        return from_named(type(self), {name: convert(name, tensor) for name, tensor in named_tensors(self).items()})

    def quantize_cache(self) -> Self:
        """Return the state with keys and values rounded to 8 bits; the other tensors share memory. For the CPU.

        Each key and value of a head has a scale, its largest absolute value / 127. Later calls keep 8 bits: a call
        attends to the exact keys and values of its own positions, and rounds them when they enter the state. So the
        results of a sequence depend on how it is split into calls, by the error of this rounding.

        Raises:
            ValueError: the activations are float64, or the model has a working memory.

        Example:
            >>> import torch, megalodon_ops as mo
            >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
            >>> model, tokens = mo.Megalodon(config).eval(), torch.randint(9, (1, 12))
            >>> _, state = model(tokens[:, :10], return_state=True)
            >>> small = state.quantize_cache()
            >>> state.layers[0].attention.v.nbytes, small.layers[0].attention.v.nbytes
            (262144, 73728)
            >>> torch.allclose(model(tokens[:, 10:], state=small), model(tokens)[:, 10:], atol=0.1)
            True
        """
        if self.cache_dtype == torch.int8:
            return self
        has_memory = isinstance(self.layers[0], MemoryBlockState)
        check_cache_dtype("MegalodonState.quantize_cache", torch.int8, self.cache_dtype, has_memory)
        layers = []
        for layer in self.layers:
            k, v, position = layer.attention
            layers.append(layer._replace(attention=AttentionState(pack_rows(k), pack_rows(v), position)))
        return dataclasses.replace(self, layers=tuple(layers))

    def clone(self) -> Self:
        """Copy the state; gradients flow through."""
        return _map(Tensor.clone, self)

    def detach(self) -> Self:
        """Detach the state from the autograd graph, for truncated backpropagation through time. Memory is shared."""
        return _map(Tensor.detach, self)

    def to_reference(self) -> tuple[Tensor, ...]:
        """Return the state as :class:`megalodon_ops.reference.Megalodon` takes it: a flat tuple of real tensors."""

        def norm(state: TimestepNormState) -> tuple[Tensor, ...]:
            values = torch.stack((state.mean, state.var), 1).double()
            return (values if state.residual is None else values + state.residual).unbind(1)

        tensors = [self.norm.count]
        for layer in self.layers:
            k, v, _ = layer.attention
            tensors += [*norm(layer.norm), layer.cema.real, layer.cema.imag, k.transpose(1, 2), v.transpose(1, 2)]
        return (*tensors, *norm(self.norm))

    @classmethod
    def from_reference(cls, tensors: tuple[Tensor, ...]) -> Self:
        """Return the state of a :class:`megalodon_ops.reference.Megalodon` as one of a model."""
        count, *parts, mean, var = tensors  # `parts`: six tensors of each layer, the arguments of `block`
        real = parts[2].dtype

        def norm(mean: Tensor, var: Tensor) -> TimestepNormState:
            residual = torch.stack([wide - wide.to(real) for wide in (mean, var)], 1).to(real)
            return TimestepNormState(count, mean.to(real), var.to(real), residual)

        def block(mean: Tensor, var: Tensor, re: Tensor, im: Tensor, k: Tensor, v: Tensor) -> BlockState:
            cache = AttentionState(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), count % k.shape[2])
            return BlockState(norm(mean, var), torch.complex(re, im), cache)

        layers = tuple(block(*parts[first : first + 6]) for first in range(0, len(parts), 6))
        return cls(layers, norm(mean, var))

    def _index(self, rows: Rows) -> Tensor:
        """Return the sequences `rows` as (n,) int64 on the state's device."""
        count, device = self.num_sequences, self.norm.count.device
        if isinstance(rows, slice):
            rows = range(count)[rows]
        elif is_integer_between(rows, -(2**63)):
            rows = [rows]
        if isinstance(rows, (list, tuple, range)) and all(is_integer_between(row, -(2**63)) for row in rows):
            rows = torch.tensor([int(row) for row in rows], dtype=torch.int64)
        if not isinstance(rows, Tensor) or rows.is_floating_point() or rows.is_complex():
            raise TypeError(f"MegalodonState: `rows` must be {_ROWS}, got {describe(rows)}.")
        if rows.dim() != 1 or (rows.dtype == torch.bool and len(rows) != count):
            raise ValueError(
                f"MegalodonState: `rows` must be {_ROWS} (of bools: ({count},)), got {rows.dtype} {tuple(rows.shape)}."
            )
        if rows.dtype == torch.bool:
            return rows.nonzero()[:, 0].to(device)
        rows = rows.long()
        if rows.is_cpu and bool(((rows < -count) | (rows >= count)).any()):
            raise IndexError(f"MegalodonState: `rows` must be in [-{count}, {count}), got {rows.tolist()}.")
        return torch.where(rows < 0, rows + count, rows).to(device)


def check_state(op: str, state: object, config: MegalodonConfig, rows: int, argument: str) -> None:
    """Raise an error unless the state fits the configuration and has `rows` sequences, the number in `argument`."""
    if not isinstance(state, MegalodonStateBase):
        raise TypeError(f"{op}: `state` must be a MegalodonState or None, got {describe(state)}.")
    if state.num_sequences != rows:
        raise ValueError(
            f"{op}: `state` must have {rows} sequences, as many as `{argument}`, got {state.num_sequences}; "
            "select or repeat them by state[rows]."
        )
    features = config.num_features if scales_inputs(config) else None
    if (got := state.inputs.mean.shape[1] if state.inputs else None) != features:
        raise ValueError(f"{op}: `state` must be of this model, with {features} scaled features, got one with {got}.")
    if any(isinstance(layer, MemoryBlockState) != config.working_memory for layer in state.layers):
        wanted = "with" if config.working_memory else "without"
        raise ValueError(f"{op}: `state` must be of this model, {wanted} a working memory.")
    shapes = [(config.model_dim, config.cema_ndim)] * config.num_layers
    if (got := [tuple(layer.cema.shape[1:]) for layer in state.layers]) != shapes:
        found = f"{len(got)} layers of {got[0] if got else 'no'} channels and modes"
        wanted = f"{len(shapes)} layers of {shapes[0]} channels and modes"
        raise ValueError(f"{op}: `state` must be of this model, {wanted}, got one of {found}.")


def _map(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    return tree_map_only(Tensor, function, state)


def complete(state: State) -> State:
    """Return the state with zeros for missing residuals."""

    def norm(norm_state: TimestepNormState) -> TimestepNormState:
        if norm_state.residual is not None:
            return norm_state
        return norm_state._replace(residual=torch.stack([torch.zeros_like(norm_state.mean)] * 2, dim=1))

    layers = tuple(layer._replace(norm=norm(layer.norm)) for layer in state.layers)
    inputs = norm(state.inputs) if state.inputs else ()
    return dataclasses.replace(state, layers=layers, norm=norm(state.norm), inputs=inputs)


def named_tensors(state: MegalodonStateBase | tuple, prefix: str = "") -> dict[str, Tensor]:
    """Return the state's tensors, not copied, under names such as `layers.0.norm.mean`."""
    tensors = {}
    if isinstance(state, tuple):  # of named fields, or of layers by number
        fields = dict(zip(getattr(state, "_fields", range(len(state))), state))
    else:
        fields = vars(state)
    for field, part in fields.items():
        if isinstance(part, Tensor):
            tensors[f"{prefix}{field}"] = part
        elif part is not None:
            tensors |= named_tensors(part, f"{prefix}{field}.")
    return tensors


def from_named(kind: type[State], tensors: dict[str, Tensor]) -> State:
    """Build a state from tensors by the names of :func:`named_tensors`; a `cema` may be complex or pairs of reals."""

    def norm(prefix: str) -> TimestepNormState:
        return TimestepNormState(*(tensors.get(prefix + field) for field in TimestepNormState._fields))

    def block(prefix: str) -> BlockState | MemoryBlockState:
        cema = tensors[prefix + "cema"]
        state = BlockState(
            norm=norm(prefix + "norm."),
            cema=cema if cema.is_complex() else torch.view_as_complex(cema),
            attention=AttentionState(*(tensors[f"{prefix}attention.{field}"] for field in AttentionState._fields)),
        )
        memory = [tensors.get(prefix + field) for field in MemoryBlockState._fields[3:]]
        return state if memory[0] is None else MemoryBlockState(*state, *memory)

    num_layers = sum(name.endswith(".cema") for name in tensors)
    inputs = norm("inputs.") if "inputs.mean" in tensors else ()
    return kind(tuple(block(f"layers.{i}.") for i in range(num_layers)), norm("norm."), inputs)


def as_real(tensor: Tensor) -> Tensor:
    """View a complex tensor as pairs of reals, as in files."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _check_activations(function: str, dtype: object) -> None:
    if dtype not in ACTIVATIONS:
        raise ValueError(
            f"{function}: `dtype` must be torch.float32, float64, bfloat16 or float16, got {short_text(dtype)}."
        )

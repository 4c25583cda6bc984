"""`MegalodonState`: the state that a call of a model passes to the next, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import _C
from .blocks import BlockState
from .config import MegalodonConfig, check_config
from ..files import file_size, reading, write_atomically, write_safetensors
from .gecko_block import MemoryBlockState, block_state_type
from .state_layout import ACTIVATIONS, batch_of, check_cache_dtype, check_layout, check_values, layout, scales_inputs
from ..ops.common.definition import accumulation_dtype
from ..ops.common.memory import check_fits
from ..ops.common.quantized_rows import pack_rows
from ..ops.common.states import AttentionState, TimestepNormState, named_in_programs
from ..ops.common.checks import as_device, check_size, describe, is_integer_between, short_text

FILE_FORMAT = "megalodon_ops.state"
FILE_VERSION = "1"
"""Version of a state's file; files of another version are not read"""
_ROWS = "a slice, a list of integers or a 1-D tensor of integers or bools"

Rows = slice | Sequence[int] | Tensor


@named_in_programs
class MegalodonState(NamedTuple):
    """State that a call of the model passes on to the next call; its size does not depend on the length of the past.

    A state is a pytree of tensors whose first dimension is S, the number of sequences in a batch. `state[rows]` selects
    sequences by a slice, a list or a 1-D tensor of integers or bools; integers may be in arbitrary order and repeat. No
    method changes the state it is called on, and results of `clone`, `reset`, `cat` and `state[rows]` share no memory
    with it.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(num_layers=2, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> _, state = mo.Megalodon(config)(torch.tensor([[1, 2, 3], [4, 5, 6]]), return_state=True)
        >>> len(state.layers), state.norm.count
        (2, tensor([3, 3]))
        >>> state[[1, 1, 0]].num_sequences, state.reset([0]).norm.count
        (3, tensor([0, 3]))
    """

    layers: tuple[BlockState, ...] | tuple[MemoryBlockState, ...]
    norm: TimestepNormState
    """the final norm's"""
    inputs: TimestepNormState | tuple[()] = ()
    """running statistics of the inputs, float64, one group for each of F features; with `missing_values`, count is
    (S, F). Empty if the model does not scale its inputs"""

    @staticmethod
    def fresh(
        config: MegalodonConfig,
        num_sequences: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cache_dtype: torch.dtype | None = None,
    ) -> MegalodonState:
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
        return from_named({name: torch.zeros(shape, dtype=kind, device=device) for name, kind, shape in wanted})

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

    def __getitem__(self, rows: Rows) -> MegalodonState:
        """Return the state of the sequences `rows`; gradients flow through.

        An integer is the index of a field, as in every tuple: state[0] is state.layers, but state[[0]] is the state of
        one sequence.
        """
        if isinstance(rows, int) and not isinstance(rows, bool):
            return tuple(self)[rows]
        index = self._index(rows)
        return _map(lambda tensor: tensor.index_select(0, index), self)

    def reset(self, rows: Rows) -> MegalodonState:
        """Return the state with the sequences `rows` reset to their beginning, for new documents in a batch."""
        index = self._index(rows)
        return _map(lambda tensor: tensor.index_fill(0, index, 0), self)

    @staticmethod
    def cat(states: Iterable[MegalodonState]) -> MegalodonState:
        """Concatenate the sequences of states of one model, in order."""
        states = list(states)
        if not states or not all(isinstance(state, MegalodonState) for state in states):
            raise TypeError("MegalodonState.cat: `states` must be MegalodonStates, one or more.")
        parts = [named_tensors(complete(state)) for state in states]
        kinds = [{name: (tensor.dtype, *tensor.shape[1:]) for name, tensor in part.items()} for part in parts]
        for kind in kinds:
            if different := sorted(name for name, _ in kinds[0].items() ^ kind.items()):
                got = f"{kinds[0].get(different[0])} and {kind.get(different[0])} as {different[0]}"
                raise ValueError(f"MegalodonState.cat: `states` must be of one model, got {got}.")
        return from_named({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> MegalodonState:
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

        return from_named({name: convert(name, tensor) for name, tensor in named_tensors(self).items()})

    def quantize_cache(self) -> MegalodonState:
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
        layers = (
            layer._replace(attention=AttentionState(*map(pack_rows, layer.attention[:2]), layer.attention.position))
            for layer in self.layers
        )
        return self._replace(layers=tuple(layers))

    def clone(self) -> MegalodonState:
        """Copy the state; gradients flow through."""
        return _map(Tensor.clone, self)

    def detach(self) -> MegalodonState:
        """Detach the state from the autograd graph, for truncated backpropagation through time. Memory is shared."""
        return _map(Tensor.detach, self)

    def save(self, path: str | os.PathLike, config: MegalodonConfig) -> None:
        """Write the state to one safetensors file, atomically.

        Args:
            path: the file; an existing file is replaced.
            config: the configuration of the state's model; :meth:`load` requires the same one.

        Raises:
            ValueError: the state is of another configuration or has invalid values, such as NaN. OSError: the file
            cannot be written. After an error, an existing file is unchanged.

        Example:
            >>> import tempfile, torch, megalodon_ops as mo
            >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
            >>> _, state = mo.Megalodon(config)(torch.tensor([[1, 2, 3]]), return_state=True)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     state.save(f"{folder}/state.safetensors", config)
            ...     mo.MegalodonState.load(f"{folder}/state.safetensors", config).norm.count
            tensor([3])
        """
        check_config("MegalodonState.save", config)
        path = Path(path)
        tensors = {name: as_real(tensor.detach()) for name, tensor in named_tensors(complete(self)).items()}
        try:
            check_layout(tensors, layout(config, self.num_sequences, self.cache_dtype))
            check_values(tensors, config)
        except ValueError as error:
            raise ValueError(f"MegalodonState.save: the state is not one of `config`: {error}.") from error
        metadata = {
            "format": FILE_FORMAT,
            "version": FILE_VERSION,
            "config": json.dumps(config.meaning()),
            "megalodon_ops": _C.build_info()["version"],
        }
        with write_atomically(path) as draft:
            write_safetensors(draft, tensors, metadata)

    @staticmethod
    def load(path: str | os.PathLike, config: MegalodonConfig, *, device: torch.device | str = "cpu") -> MegalodonState:
        """Load a state that :meth:`save` wrote for a model of this configuration.

        Raises:
            FileNotFoundError: there is no such file. ValueError: :meth:`save` did not write the file, or wrote it for
            another configuration; or the file is damaged or has invalid values, such as NaN.
        """
        check_config("MegalodonState.load", config)
        path = Path(path)
        with reading(path):
            check_fits(file_size(path), "the state")
            with safe_open(path, "pt") as file:
                _check_metadata(file.metadata() or {}, config)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            check_layout(tensors, layout(config, *batch_of(tensors)))
            check_values(tensors, config)
        return from_named(tensors).to(device)

    def _index(self, rows: Rows) -> Tensor:
        """Return the sequences `rows` as (n,) int64 on the state's device."""
        count, device = self.num_sequences, self.norm.count.device
        if isinstance(rows, slice):
            rows = range(count)[rows]
        if isinstance(rows, (list, tuple, range)) and all(is_integer_between(row, -(2**63)) for row in rows):
            rows = torch.tensor([int(row) for row in rows], dtype=torch.int64)
        if not isinstance(rows, Tensor) or rows.is_floating_point() or rows.is_complex():
            hint = f"; [{rows}] names one sequence" if isinstance(rows, int) else ""
            raise TypeError(f"MegalodonState: `rows` must be {_ROWS}, got {describe(rows)}{hint}.")
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


def to_reference(state: MegalodonState) -> tuple[Tensor, ...]:
    """Return the state as :class:`megalodon_ops.reference.Megalodon` takes it: a flat tuple of real tensors."""

    def norm(norm_state: TimestepNormState) -> tuple[Tensor, ...]:
        high, low = torch.stack(norm_state[1:3], 1).double(), norm_state.residual
        return (high if low is None else high + low).unbind(1)

    layers = (
        (*norm(s.norm), s.cema.real, s.cema.imag, *(x.transpose(1, 2) for x in s.attention[:2])) for s in state.layers
    )
    return (state.norm.count, *(tensor for layer in layers for tensor in layer), *norm(state.norm))


def from_reference(tensors: tuple[Tensor, ...]) -> MegalodonState:
    """Return the state of a :class:`megalodon_ops.reference.Megalodon` as one of a model; see :func:`to_reference`."""
    count, *parts, mean, var = tensors
    real = parts[2].dtype

    def norm(mean: Tensor, var: Tensor) -> TimestepNormState:
        residual = torch.stack([wide - wide.to(real) for wide in (mean, var)], 1).to(real)
        return TimestepNormState(count, mean.to(real), var.to(real), residual)

    def block(mean: Tensor, var: Tensor, re: Tensor, im: Tensor, k: Tensor, v: Tensor) -> BlockState:
        cache = AttentionState(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), count % k.shape[2])
        return BlockState(norm(mean, var), torch.complex(re, im), cache)

    layers = tuple(block(*parts[first : first + 6]) for first in range(0, len(parts), 6))
    return MegalodonState(layers, norm(mean, var))


def check_state(op: str, state: object, config: MegalodonConfig, rows: int, argument: str) -> None:
    """Raise an error unless the state fits the configuration and has `rows` sequences, the number in `argument`."""
    if not isinstance(state, MegalodonState):
        raise TypeError(f"{op}: `state` must be a MegalodonState or None, got {describe(state)}.")
    if state.num_sequences != rows:
        raise ValueError(
            f"{op}: `state` must have {rows} sequences, as many as `{argument}`, got {state.num_sequences}; "
            "select or repeat them by state[rows]."
        )
    features = config.num_features if scales_inputs(config) else None
    if (got := state.inputs.mean.shape[1] if state.inputs else None) != features:
        raise ValueError(f"{op}: `state` must be of this model, with {features} scaled features, got one with {got}.")
    shapes = [(config.model_dim, config.cema_ndim)] * config.num_layers
    wanted = "with" if block_state_type(config) is MemoryBlockState else "without"
    if any(isinstance(layer, MemoryBlockState) != (wanted == "with") for layer in state.layers):
        raise ValueError(f"{op}: `state` must be of this model, {wanted} a working memory.")
    if (got := [tuple(layer.cema.shape[1:]) for layer in state.layers]) != shapes:
        wanted, found = (
            f"{len(each)} layers of {each[0] if each else 'no'} channels and modes" for each in (shapes, got)
        )
        raise ValueError(f"{op}: `state` must be of this model, {wanted}, got one of {found}.")


def _map(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    return tree_map_only(Tensor, function, state)


def complete(state: MegalodonState) -> MegalodonState:
    """Return the state with zeros for missing residuals."""

    def norm(norm_state: TimestepNormState) -> TimestepNormState:
        if norm_state.residual is not None:
            return norm_state
        return norm_state._replace(residual=torch.stack([torch.zeros_like(norm_state.mean)] * 2, dim=1))

    layers = tuple(layer._replace(norm=norm(layer.norm)) for layer in state.layers)
    return MegalodonState(layers, norm(state.norm), norm(state.inputs) if state.inputs else ())


def named_tensors(state: tuple, prefix: str = "") -> dict[str, Tensor]:
    """Return the state's tensors, not copied, under names such as `layers.0.norm.mean`."""
    tensors = {}
    for field, part in zip(getattr(state, "_fields", range(len(state))), state):
        if isinstance(part, Tensor):
            tensors[f"{prefix}{field}"] = part
        elif part is not None:
            tensors |= named_tensors(part, f"{prefix}{field}.")
    return tensors


def from_named(tensors: dict[str, Tensor]) -> MegalodonState:
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
    return MegalodonState(tuple(block(f"layers.{i}.") for i in range(num_layers)), norm("norm."), inputs)


def as_real(tensor: Tensor) -> Tensor:
    """View a complex tensor as pairs of reals, as in files."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _check_metadata(metadata: dict[str, str], config: MegalodonConfig) -> None:
    if metadata.get("format") != FILE_FORMAT:
        raise ValueError("must be a file of MegalodonState.save")
    if (version := metadata.get("version")) != FILE_VERSION:
        raise ValueError(
            f"its version is {short_text(version)}, and this version of megalodon_ops reads {FILE_VERSION}"
        )
    saved = json.loads(metadata.get("config", "{}"))
    for name, value in config.meaning().items():
        if saved.get(name) != value:
            raise ValueError(
                f"is the state of another configuration: its `{name}` is {short_text(saved.get(name))}, "
                f"the model's {short_text(value)}"
            )


def _check_activations(function: str, dtype: object) -> None:
    if dtype not in ACTIVATIONS:
        raise ValueError(
            f"{function}: `dtype` must be torch.float32, float64, bfloat16 or float16, got {short_text(dtype)}."
        )

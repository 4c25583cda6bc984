"""`Decoder`: computes logits of the next tokens, from a model and an initial state."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import _C
from ..ops.linear import linear
from ..ops.common.definition import OWN_TYPES, accumulation_dtype, check_runs_now, is_autocast_enabled
from ..ops.normalized_qk.normalized_qk import rotary_table, rotary_table_of
from ..ops.common.checks import check_tensor, describe
from .blocks import at_least_float32
from .inputs import check_reads_tokens
from .model_state import MegalodonState, complete, named_tensors

_ALTERNATIVE = "call the model there, with its state: model(tokens, state=state, return_state=True)"


class Decoder:
    """Compute the logits after each next token of B sequences, without gradients.

    On the CPU one call runs all kernels of the model, without Python between them, bitwise equal to the layers. A
    linear layer that was wrapped (for instance by an adapter), hooked, quantised or replaced is called between two
    kernels. If another module was changed, the model runs module by module. It also does so on other devices, under
    torch.autocast, with dropout in training, for more rows than the kernels take (32; AMX: 15 in float32,
    8 in bfloat16), with MEGALODON_OPS_LINEAR=torch, and, if attention sees two chunks, in calls in which a chunk ends.

    The decoder chooses once, when it is made. Its kernels keep the addresses of parameters, so they see values that an
    optimizer step or `load_state_dict` writes there later, with two exceptions: CEMA's parameters, whose coefficients
    are computed when the decoder is made, and parameters that are not contiguous, which are copied then. Make a new
    decoder after these change, after parameters move to other memory, and after modules, hooks or adapters change: the
    decoder does not notice. Threads that call one decoder wait for each other. A decoder cannot be copied or pickled.

    Args:
        model: the :class:`Megalodon` that gives the logits.
        state: the state of B sequences, as a call of the model returned it. The decoder copies the state.

    Attributes:
        fused: True if one call of kernels computes everything and calls no module. If a changed module prevents it, a
            warning has named the first such module.
        num_sequences: B.

    Raises:
        ValueError: the state is not one of this model. TypeError: a dtype is wrong. RuntimeError: an earlier call
        failed between layers, or a module calls the decoder that runs it.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(num_layers=2, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> model = mo.Megalodon(config).eval()
        >>> tokens = torch.randint(9, (1, 12))
        >>> _, state = model(tokens[:, :10], return_state=True)
        >>> decoder = mo.Decoder(model, state)
        >>> logits = torch.cat([decoder(tokens[:, 10:11]), decoder(tokens[:, 11:])], dim=1)
        >>> torch.allclose(logits, model(tokens)[:, 10:], atol=1e-4), decoder.fused
        (True, True)
    """

    def __init__(self, model: nn.Module, state: MegalodonState) -> None:
        check_runs_now("Decoder", _ALTERNATIVE)
        if not hasattr(model, "_reference"):
            raise TypeError(f"Decoder: `model` must be a Megalodon, got {describe(model)}.")
        check_reads_tokens("Decoder", model.config)
        if not isinstance(state, MegalodonState) or len(state.layers) != model.config.num_layers:
            raise ValueError(
                f"Decoder: `state` must be a MegalodonState of {model.config.num_layers} layers, as the model returns it, "
                f"got {f'one of {len(state.layers)}' if isinstance(state, MegalodonState) else describe(state)}."
            )
        self._model, self._state = model, _contiguous_copy(state)
        self._like = self._state.layers[0].attention.v
        self.num_sequences = self._like.shape[0]
        device = self._like.device.type
        enabled, dtype = is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self._autocast = torch.autocast(device, enabled=enabled, dtype=dtype)
        self._lock, self._state_is_whole = threading.RLock(), True
        self._tokens_read = 0
        self._last_equal = torch.full((self.num_sequences, self.num_sequences), -(2**62), device="cpu")
        """(B, B): number of tokens read when two sequences were last equal"""
        self._max_tokens = linear.most_few_rows(self._like.dtype) if self._may_run_kernels(enabled) else 0
        self._kernels, self.fused = None, False
        if self._max_tokens >= self.num_sequences:
            self._kernels, self.fused = self._make_kernels()

    @property
    def state(self) -> MegalodonState:
        """A copy of the state after all tokens so far."""
        with self._lock:
            self._check_state()
            return self._state.clone()

    def state_of(self, rows: Tensor) -> MegalodonState:
        """A copy of the state of the sequences `rows` (n,) after all tokens so far."""
        with self._lock:
            self._check_state()
            return self._state[rows]

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Replace sequence i by sequence rows[i], in place, as beam search does; rows (B,) integers.

        Keys and values are copied from the position at which two sequences diverge: beams share most of their past.
        """
        check_tensor("Decoder", "rows", rows)
        B = self.num_sequences
        if rows.shape != (B,) or rows.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"Decoder: `rows` must be int64 or int32 ({B},), got {rows.dtype} {tuple(rows.shape)}.")
        rows = rows.long().cpu()
        if bool(((rows < 0) | (rows >= B)).any()):
            raise IndexError(f"Decoder: `rows` must be in [0, {B}), got {rows.tolist()}.")
        targets = (rows != torch.arange(B)).nonzero().squeeze(1)
        if len(targets) == 0:
            return
        sources = rows[targets]
        with self._lock:
            self._check_state()
            since_divergence = self._tokens_read - self._last_equal[targets, sources]
            self._last_equal.fill_diagonal_(self._tokens_read)
            self._last_equal = self._last_equal[rows][:, rows]
            targets, sources = targets.to(self._like.device), sources.to(self._like.device)
            for layer in self._state.layers:
                k, v, position, *memory = *layer.attention, *layer[3:]
                ends = position[sources].cpu()
                new = slice(int((ends - since_divergence).clamp(min=0).min()), int(ends.max()))
                for tensor in (*layer.norm, layer.cema, k[:, new], v[:, new], position, *memory):
                    tensor[targets] = tensor[sources]
            for tensor in self._state.norm:
                tensor[targets] = tensor[sources]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, L, num_outputs) after each of the next tokens (B, L), float32 (float64 for a float64 model)."""
        check_tensor("Decoder", "tokens", tokens)
        check_runs_now("Decoder", _ALTERNATIVE)
        B = self.num_sequences
        if tokens.dim() != 2 or tokens.shape[0] != B or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"Decoder: `tokens` must be int64 or int32 ({B}, L), got {tokens.dtype} {tuple(tokens.shape)}."
            )
        tokens = tokens.long().contiguous()
        by_kernels = self._kernels is not None and 0 < tokens.numel() <= self._max_tokens
        with self._lock:
            self._check_state()
            by_kernels = by_kernels and self._has_room(tokens.shape[1])
            self._state_is_whole = False
            try:
                logits = self._run_kernels(tokens) if by_kernels else self._run_model(tokens)
            except BaseException as error:
                outside = (tokens < 0) | (tokens >= self._model.config.vocab_size)  # refused before a layer runs
                self._state_is_whole = isinstance(error, IndexError) and bool(outside.any())
                raise
            self._state_is_whole = True
            self._tokens_read += tokens.shape[1]
        return at_least_float32(logits)

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise TypeError(
            "Decoder: expected no copy, no pickling and no torch.save, as a decoder holds the memory of its kernels; make "
            "another one from the model and `decoder.state`, which can be copied and saved."
        )

    def _check_state(self) -> None:
        if not self._state_is_whole:
            raise RuntimeError(
                "Decoder: the state must be whole, but some layers have read tokens that others have not: a call was "
                "interrupted by an error, or a module calls the decoder that runs it; make a new decoder from a state."
            )

    def _run_kernels(self, tokens: Tensor) -> Tensor:
        logits = self._like.new_empty((*tokens.shape, self._model.config.num_outputs))
        table = self._rotary_table(tokens)
        if self.fused:
            self._kernels.run(tokens, logits, table)
        else:
            with torch.no_grad(), self._autocast:  # for the layers that are called
                self._kernels.run(tokens, logits, table)
        return logits

    def _has_room(self, length: int) -> bool:
        """Return True if no sequence fills its cache within `length` positions; a full one drops a chunk."""
        config, position = self._model.config, self._state.layers[0].attention.position
        return config.visible_chunks == 1 or int(position.max()) + length < config.num_cached_positions

    def _rotary_table(self, tokens: Tensor) -> Tensor | None:
        """Rotary table of these tokens if positions continue from chunk to chunk, else None."""
        config = self._model.config
        if config.visible_chunks == 1:
            return None
        positions = (self._state.norm.count[:, None] + torch.arange(tokens.shape[1])).flatten()
        state_dtype = accumulation_dtype(self._like.dtype)
        return rotary_table_of(positions, config.z_dim // config.num_heads, config.rotary_base, state_dtype)

    @torch.no_grad()
    def _run_model(self, tokens: Tensor) -> Tensor:
        with self._autocast:
            logits, after = self._model(tokens, state=self._state, return_state=True, inplace_state=True)
        for old, new in zip(tree_leaves(self._state), tree_leaves(after), strict=True):
            if old is not new:
                old.copy_(new)
        return logits

    def _may_run_kernels(self, autocast: bool) -> bool:
        config = self._model.config
        has_dropout = self._model.training and (config.dropout or config.hidden_dropout or config.attention_dropout)
        has_hooks = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        return self._like.is_cpu and not autocast and not has_dropout and not has_hooks

    def _make_kernels(self) -> tuple[_C.Decoder | None, bool]:
        """Return the kernels, and True if they call no layer; (None, False) if the model must run module by module."""
        model, config, reference = self._model, self._model.config, self._model._reference()
        changes = list(_changes(model, reference, ""))
        if changes:
            count = f", the first of {len(changes)} such modules," if len(changes) > 1 else ""
            warnings.warn(
                f"Decoder: `{changes[0] or 'model'}`{count} is not as the configuration makes it (wrapped, hooked, "
                "quantised or replaced), so modules run there instead of kernels in one call, which takes longer; merge "
                "or remove what was added.",
                stacklevel=3,
            )
        modules = dict(model.named_modules(remove_duplicate=False))
        if not all(_LINEAR.fullmatch(name) and name in modules for name in changes):
            return None, False
        state_dtype = accumulation_dtype(self._like.dtype)
        tensors = {name: p.detach().contiguous() for name, p in model.named_parameters(remove_duplicate=False)}
        tensors |= {f"state.{name}": tensor for name, tensor in named_tensors(self._state).items()}
        tensors |= {name: self._layer_call(name, modules[name], reference.get_submodule(name)) for name in changes}
        rotary = rotary_table(
            config.chunk_size, config.z_dim // config.num_heads, config.rotary_base, state_dtype, self._like.device
        )
        kernels = _C.Decoder(
            config=config,
            tensors=tensors,
            rotary=rotary,
            like=self._like,
            batch=self.num_sequences,
            max_tokens=self._max_tokens,
        )
        return kernels, not changes

    def _layer_call(self, name: str, layer: nn.Module, plain: nn.Linear) -> Callable[[memoryview, memoryview], None]:
        """Return a function that calls `layer` in place of `plain`, on the memory of the input and of the output.

        The layer gets a copy of the input, which a hook may keep.
        """
        dtype, batch, inputs, outputs = self._like.dtype, self.num_sequences, plain.in_features, plain.out_features

        def call(x: memoryview, y: memoryview) -> None:
            rows = torch.frombuffer(x, dtype=dtype).view(batch, -1, inputs)
            given = rows.clone()
            result = layer(given)
            rows.copy_(given)  # a hook may have changed the input, which other layers read
            check_tensor("Decoder", f"{name}(x)", result)
            if result.shape != (*rows.shape[:2], outputs) or result.dtype != dtype:
                raise ValueError(
                    f"Decoder: `{name}` must return {dtype} {(*rows.shape[:2], outputs)} as the layer in whose place it "
                    f"stands, got {result.dtype} {tuple(result.shape)}."
                )
            torch.frombuffer(y, dtype=dtype).view_as(result).copy_(result)

        return call


_IGNORED_ATTRIBUTES = ("training", "layer", "token_rows")  # for initialisation, or changed by train() and eval()
_LINEAR = re.compile(r"layers\.\d+\.(mega\.(wz|wv|wr|wh1|wh2)|nffn\.(fc1|fc2|fc3))|output\.output")


def _changes(module: nn.Module, reference: nn.Module, name: str) -> Iterator[str]:
    """Yield the names of the outermost modules that differ from their counterparts in `reference`."""
    if not isinstance(module, nn.Module):
        yield name
        return
    attributes = {k: v for k, v in vars(reference).items() if k[0] != "_" and k not in _IGNORED_ATTRIBUTES}
    parameters = module._parameters.values()
    same = (
        type(module) is type(reference)
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and module._modules.keys() == reference._modules.keys()
        and module._parameters.keys() == reference._parameters.keys()
        and module._buffers.keys() == reference._buffers.keys()
        and all(parameter is None or type(parameter) in OWN_TYPES for parameter in parameters)
        and all(getattr(module, key, None) == value for key, value in attributes.items())
    )
    if not same:
        yield name
        return
    for child, part in reference._modules.items():
        yield from _changes(module._modules[child], part, f"{name}.{child}".removeprefix("."))


def _contiguous_copy(state: MegalodonState) -> MegalodonState:
    """Copy the state for writing in place: every tensor is contiguous, and no tensor is missing."""
    with torch.inference_mode(False), torch.no_grad():
        return tree_map_only(
            Tensor, lambda tensor: tensor.clone(memory_format=torch.contiguous_format), complete(state)
        )

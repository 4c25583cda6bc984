"""`Decoder`: the logits of a model's next tokens, made once from a model and a state, for as many tokens as one likes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import _C
from ..ops import linear
from ..ops.library import OWN_TYPES, accumulation_dtype, is_autocast_enabled
from .model import Megalodon, at_least_float32
from .states import MegalodonState, complete, named_tensors
from ..ops.normalized_qk import rotary_table
from ..ops.values import check_tensor, described


class Decoder:
    """The logits after each next token of B sequences, without gradients.

    On the CPU one call computes the logits from the tokens: it runs the kernels of the model's layers, with the same
    bits as the layers, without Python between kernels. Where a module was wrapped, hooked, quantised or replaced, its
    block runs as a module between such calls. Every layer runs as a module on other devices, under torch.autocast, with
    dropout in training, for more rows than the kernels for few rows take (32; AMX: 15 in float32, 8 in bfloat16), and
    with MEGALODON_OPS_LINEAR=torch. The decoder decides once, by the model as it is when the decoder is made: make
    a new decoder after the parameters, their memory or the modules have changed.

    Args:
        model: the model that gives the logits.
        state: the state of B sequences, as a call of the model returned it. The decoder copies the state.

    Attributes:
        fused: whether one call of kernels computes everything. If a module prevents it, a warning has named the module.

    Raises:
        ValueError: the state is not one of this model. TypeError: a dtype is wrong.

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

    def __init__(self, model: Megalodon, state: MegalodonState) -> None:
        if not isinstance(model, Megalodon):
            raise TypeError(f"Decoder: `model` must be a Megalodon, got {described(model)}.")
        if not isinstance(state, MegalodonState) or len(state.layers) != model.config.num_layers:
            raise ValueError(
                f"Decoder: `state` must be a MegalodonState of {model.config.num_layers} layers, as the model returns it, "
                f"got {f'one of {len(state.layers)}' if isinstance(state, MegalodonState) else described(state)}."
            )
        self._model, self._state = model, _own(state)
        self._like = self._state.layers[0].attention.v
        self._batch = self._like.shape[0]
        self._most_tokens = linear.most_few_rows(self._like.dtype) if self._runs_kernels() else 0
        self._autocast = torch.autocast(self._like.device.type, **_autocast_now(self._like.device.type))
        self._parts = self._plan() if self._most_tokens >= self._batch else []
        self.fused = len(self._parts) == 1

    @property
    def state(self) -> MegalodonState:
        """A copy of the state after all tokens so far."""
        return tree_map_only(Tensor, torch.clone, self._state)

    def state_of(self, rows: Tensor) -> MegalodonState:
        """A copy of the state of the sequences `rows` (n,) after all tokens so far."""
        return self._state[rows]

    @property
    def num_sequences(self) -> int:
        """B."""
        return self._batch

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Lets sequence i go on from what sequence rows[i] has been, in place, as beam search does; rows (B,) integers."""
        check_tensor("Decoder", "rows", rows)
        if rows.shape != (self._batch,) or rows.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"Decoder: `rows` must be int64 or int32 ({self._batch},), got {rows.dtype} {tuple(rows.shape)}."
            )
        rows = rows.long().to(self._like.device)
        changed = (rows != torch.arange(self._batch, device=rows.device)).nonzero().squeeze(1)
        if len(changed) == 0:
            return
        sources = rows[changed]
        for layer in self._state.layers:
            used = int(layer.attention.position.max())  # the rest of the chunk's rows are yet to be written
            kept = (layer.attention.k[:, :used], layer.attention.v[:, :used], layer.attention.position)
            for tensor in (*layer.norm, layer.cema, *kept):
                tensor[changed] = tensor[sources]
        for tensor in self._state.norm:
            tensor[changed] = tensor[sources]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, L, num_outputs) after each of the next tokens (B, L), float32 (float64 for a float64 model)."""
        check_tensor("Decoder", "tokens", tokens)
        if tokens.dim() != 2 or tokens.shape[0] != self._batch or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"Decoder: `tokens` must be int64 or int32 ({self._batch}, L), got {tokens.dtype} {tuple(tokens.shape)}."
            )
        x = tokens.long().contiguous()
        if self._parts and 0 < x.numel() <= self._most_tokens:
            for part in self._parts:
                x = part(x)
        else:
            x = self._run_model(x)
        return at_least_float32(x)

    def _runs_kernels(self) -> bool:
        config = self._model.config
        drops = self._model.training and (config.dropout or config.hidden_dropout or config.attention_dropout)
        watched = _global_hooks._global_forward_hooks or _global_hooks._global_forward_pre_hooks
        return self._like.is_cpu and not torch.is_autocast_enabled("cpu") and not drops and not watched

    def _plan(self) -> list[Callable[[Tensor], Tensor]]:
        """The parts to run in order: calls of kernels, and modules that are not as the configuration makes them."""
        model, made = self._model, _as_made(self._model.config)
        whole = _change(model, made, "model", recurse=False) or _change(
            model.layers, made.layers, "layers", recurse=False
        )
        changes = [whole]
        if whole is None:
            layers = [_change(*pair, f"layers.{i}") for i, pair in enumerate(zip(model.layers, made.layers))]
            changes = [_change(model.embed, made.embed, "embed"), *layers, _change(model.output, made.output, "output")]
        if named := next(filter(None, changes), None):
            warnings.warn(
                f"Decoder: `{named}` is not as the configuration makes it (wrapped, hooked, quantised or replaced), so "
                "modules run there instead of kernels in one call, which takes longer; merge or remove what was added.",
                stacklevel=4,
            )
        if whole is not None:
            return []
        parts: list[Callable[[Tensor], Tensor]] = []
        begin = 0
        for unit, change in enumerate([*changes, ""]):
            if change is None:
                continue
            if begin < unit:
                parts.append(self._kernels(begin, unit))
            if unit < len(changes):
                parts.append(self._module(unit))
            begin = unit + 1
        return parts

    def _kernels(self, begin: int, end: int) -> Callable[[Tensor], Tensor]:
        """One call for the units [begin, end): unit 0 is the embedding, unit i + 1 layer i, the last the output."""
        model, config, last = self._model, self._model.config, self._model.config.num_layers + 1
        tensors = {name: p.detach().contiguous() for name, p in model.named_parameters(remove_duplicate=False)}
        tensors |= {f"state.{name}": tensor for name, tensor in named_tensors(self._state).items()}
        real = accumulation_dtype(self._like.dtype)
        rotary = rotary_table(
            config.chunk_size, config.z_dim // config.num_heads, config.rotary_base, real, self._like.device
        )
        embeds, writes_logits = begin == 0, end == last + 1
        layers = dict(first=max(begin - 1, 0), end=min(end - 1, config.num_layers))
        kernels = _C.Decoder(
            config=config, tensors=tensors, rotary=rotary, like=self._like, batch=self._batch,
            max_tokens=self._most_tokens, embeds=embeds, writes_logits=writes_logits, **layers,
        )  # fmt: skip
        columns = config.num_outputs if writes_logits else config.model_dim

        def run(x: Tensor) -> Tensor:
            y = self._like.new_empty((*x.shape[:2], columns))
            kernels.run(x, y)
            return y

        return run

    @torch.no_grad()
    def _run_model(self, tokens: Tensor) -> Tensor:
        with self._autocast:
            logits, after = self._model(tokens, state=self._state, return_state=True, inplace_state=True)
            _write(self._state, after)
        return logits

    def _module(self, unit: int) -> Callable[[Tensor], Tensor]:
        """The embedding (unit 0), layer unit - 1, or the output as the module that it is."""
        model, state = self._model, self._state

        @torch.no_grad()
        def run_layer(x: Tensor) -> Tensor:
            y, after = model.layers[unit - 1](x, state=state.layers[unit - 1], return_state=True, inplace_state=True)
            _write(state.layers[unit - 1], after)
            return y.contiguous()

        @torch.no_grad()
        def run_output(x: Tensor) -> Tensor:
            x, after = model.output.final_norm(x, state=state.norm, return_state=True)
            _write(state.norm, after)
            return model.output.output(x)

        if unit == 0:
            return torch.no_grad()(lambda tokens: model._embed(tokens).contiguous())
        return run_layer if unit <= len(model.layers) else run_output


@functools.lru_cache(maxsize=8)
def _as_made(config) -> Megalodon:
    """A model as the configuration makes it, without memory, to compare other models with."""
    with torch.device("meta"):
        return Megalodon(config)


def _change(module: nn.Module, made: nn.Module, name: str, recurse: bool = True) -> str | None:
    """The name of the first module in `module` that does not compute what its counterpart in `made` does, or None."""
    if not isinstance(module, nn.Module):
        return name
    settings = {key: value for key, value in vars(made).items() if key[0] != "_" and key not in ("training", "layer")}
    parameters = module._parameters.values()
    same = (
        type(module) is type(made)
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and module._modules.keys() == made._modules.keys()
        and module._parameters.keys() == made._parameters.keys()
        and module._buffers.keys() == made._buffers.keys()
        and all(parameter is None or type(parameter) in OWN_TYPES for parameter in parameters)
        and all(getattr(module, key, None) == value for key, value in settings.items())
    )
    if not same:
        return name
    if recurse:
        for child, part in made._modules.items():
            if (change := _change(module._modules[child], part, f"{name}.{child}")) is not None:
                return change
    return None


def _own(state: MegalodonState) -> MegalodonState:
    """A copy of the state to write in place: every tensor is contiguous, and no tensor is missing."""
    with torch.inference_mode(False), torch.no_grad():
        return tree_map_only(
            Tensor, lambda tensor: tensor.clone(memory_format=torch.contiguous_format), complete(state)
        )


def _write(into: object, after: object) -> None:
    """Copies the values of `after` into the tensors of `into`, except where both are one tensor."""
    for old, new in zip(tree_leaves(into), tree_leaves(after), strict=True):
        if old is not new:
            old.copy_(new)


def _autocast_now(device: str) -> dict:
    enabled = is_autocast_enabled(device)
    return dict(enabled=enabled, dtype=torch.get_autocast_dtype(device))

"""`Decoder`: logits after each of the next tokens, from a model and an initial state."""

import threading
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves

from ..ops.chunked_attention.two_chunk_attention import positions_fit
from ..ops.linear import linear
from ..ops.common.definition import check_runs_now, has_cuda_kernels, is_autocast_enabled
from ..ops.common.checks import check_device, check_integer, check_tensor, describe, warn_caller
from ..ops.common.recording import Step, contiguous_copy
from ..model.blocks import at_least_float32
from .captured_step import CapturedStep, hooked_module, may_capture
from .decoding_model import decoding_model
from ..model.inputs import check_inputs
from ..model.model_state import MegalodonStateBase, as_real, check_state, complete, layout, named_tensors
from .quantized_layers import computing_dtype
from ..model.sequences import Sequences
from .undo import History, check_history

_NEVER = -(2**62)
_CAPTURED_LENGTH = 8  # most tokens of a row in a captured step: one, or a draft of several
_ALTERNATIVE = "call the model there, with its state: model(tokens, state=state, return_state=True)"


class Decoder:
    """Compute the logits after each next token of B sequences, without gradients.

    On the CPU a call runs all kernels of the model without Python between them; results are bitwise equal to those of
    the layers. The first call with a new number of tokens per row runs the layers and records a step, as :func:`record`
    does. On a GPU the second call with the same number of tokens per row, up to 8, captures a CUDA graph of the layers,
    which later calls replay; for up to 8 tokens of all rows, products and what follows them are one kernel, and rounded
    once; see docs/cuda.md. With dropout in training, and on other devices, the model runs module by
    module. Exceptions on the CPU:

    - A module that was wrapped (for instance by an adapter), hooked, replaced or quantised by another tool is called
      between two kernels, as are the functions of torch that leave out missing values.
    - The model runs module by module if it was hooked or replaced itself, under torch.autocast, with
      MEGALODON_OPS_LINEAR=torch, or for more tokens than the kernels take (32; AMX: 15 in float32, 8 in bfloat16).
    - If attention sees two chunks, it also does in calls in which a chunk ends.

    On a GPU the model runs module by module with a working memory, or with tensors on several devices. If a module is
    hooked or waits for the GPU, it does so with a warning that names the module.

    The decoder inspects the model once, when it is made. Its steps keep the addresses of parameters, so they see values
    that an optimizer step or `load_state_dict` writes there later. They do not see new values of CEMA's parameters,
    whose coefficients are computed when the decoder is made, or of parameters that are not contiguous, which a recorded
    step copies. Make a new decoder after these change, after parameters move to other memory, and after modules, hooks
    or adapters change. Threads that call one decoder wait for each other. A decoder cannot be copied or pickled.

    Args:
        model: the :class:`Megalodon` that computes the logits.
        state: the state of B sequences, as a call of the model returned it. The decoder copies the state.
        undo: number of tokens that :meth:`undo` can take back. The decoder keeps the states before their calls, mostly
            without keys and values. If a call has more than 2 undo + 1 tokens per row, the last undo + 1 run alone.

    Attributes:
        fused: True if one call of kernels, or a CUDA graph, computes everything and calls no module. If changed modules
            prevent this, a warning names the first of them.
        num_sequences: B.

    Raises:
        ValueError: the state is of another model, or on the meta device. TypeError: a dtype is wrong. RuntimeError, in
        a call: an earlier call failed between layers, or a module calls the decoder that runs it. The first call checks
        parameters, as the model's call does.

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

    def __init__(self, model: nn.Module, state: MegalodonStateBase, *, undo: int = 0) -> None:
        check_runs_now("Decoder", _ALTERNATIVE)
        if not hasattr(model, "_reference"):
            raise TypeError(f"Decoder: `model` must be a Megalodon, got {describe(model)}.")
        if not isinstance(state, MegalodonStateBase) or len(state.layers) != model.config.num_layers:
            got = f"one of {len(state.layers)}" if isinstance(state, MegalodonStateBase) else describe(state)
            expected = f"a MegalodonState of {model.config.num_layers} layers, as the model returns it"
            raise ValueError(f"Decoder: `state` must be {expected}, got {got}.")
        self._model, self._state = model, contiguous_copy(complete(state))
        self._like = self._state.layers[0].attention.v
        self._dtype = computing_dtype(model) if self._like.dtype == torch.int8 else self._like.dtype
        if self._like.is_meta:
            raise ValueError("Decoder: `state` must hold values, got one on meta; compute it on another device.")
        self.num_sequences = self._like.shape[0]
        device = self._like.device.type
        enabled, dtype = is_autocast_enabled(device), torch.get_autocast_dtype(device)
        # No cache of cast weights: a CUDA graph could outlive it. A call casts each weight once anyway.
        self._autocast = torch.autocast(device, enabled=enabled, dtype=dtype, cache_enabled=False)
        self._lock = threading.RLock()
        self._state_is_whole = True  # False while layers have read different tokens
        self._tokens_read = 0
        self._last_equal = torch.full((self.num_sequences, self.num_sequences), _NEVER, device="cpu")
        """(B, B): value of `_tokens_read` when two sequences were last equal"""
        self._longest: int | None = None
        """largest number of cached positions of a sequence; None: unknown"""
        self._captures = may_capture(model, self._state)
        self._max_tokens = 0  # of all rows, in a step
        if self._may_record(enabled):
            most = linear.most_few_rows(self._dtype)
            self._max_tokens = _CAPTURED_LENGTH * self.num_sequences if self._captures else most
        self._steps: dict[int, Step | CapturedStep] = {}
        """recorded and captured steps, by number of tokens per row"""
        self._check_state_tensors(self._state, self.num_sequences)
        changes: list[str] = []
        fused_dtype = self._fused_dtype(enabled)
        self._runner = decoding_model(model, model._reference(), changes, fused_dtype=fused_dtype)
        self.fused = self._max_tokens >= self.num_sequences and not self._warn_of_changes(changes)
        undo = check_integer("Decoder", "undo", undo, "an integer in [0, 2^31)", 0, 2**31 - 1)
        most_tokens = self._max_tokens // max(self.num_sequences, 1)
        self._history = History(model.config, self._state, undo, most_tokens) if undo else None

    @property
    def state(self) -> MegalodonStateBase:
        """Copy of the state after all tokens so far."""
        return self._copied_state(0)

    def state_of(self, rows: Tensor) -> MegalodonStateBase:
        """Return a copy of the state of the sequences `rows` (n,) after all tokens so far."""
        with self._lock:
            self._check_state()
            return (self._state if self._history is None else self.state)[rows]

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Replace sequence i by sequence rows[i], in place, as beam search does; rows (B,) integers.

        Keys and values are copied only from the position at which two sequences diverge, as beams share a long past.
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
            self._read_pending()
            since_divergence = self._tokens_read - self._last_equal[targets, sources]
            self._last_equal.fill_diagonal_(self._tokens_read)
            self._last_equal = self._last_equal[rows][:, rows]
            self._longest = None
            targets, sources = targets.to(self._like.device), sources.to(self._like.device)
            for layer in self._state.layers:
                k, v, position, *memory = *layer.attention, *layer[3:]  # from 3 on: the working memory
                ends = position[sources].cpu()
                new = slice(int((ends - since_divergence).clamp(min=0).min()), int(ends.max()))
                for tensor in (*layer.norm, layer.cema, k[:, new], v[:, new], position, *memory):
                    tensor[targets] = tensor[sources]
            for tensor in (*self._state.norm, *self._state.inputs):
                tensor[targets] = tensor[sources]
            if self._history is not None:
                self._history.forget(self._state)

    @torch.no_grad()
    def replace(self, rows: Tensor, state: MegalodonStateBase) -> None:
        """Replace the sequences `rows`, in place, for instance where they have ended: continuous batching.

        Args:
            rows: (n,) different integers in [0, B).
            state: state of the n new sequences, as a call of the model returned it.

        Raises:
            ValueError, TypeError, IndexError: the state is of another model, or `rows` are wrong.
        """
        check_tensor("Decoder", "rows", rows)
        if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32) or len(rows.unique()) < len(rows):
            raise ValueError(f"Decoder: `rows` must be different integers (n,), got {rows.dtype} {rows.tolist()}.")
        if bool(((rows < 0) | (rows >= self.num_sequences)).any()):
            raise IndexError(f"Decoder: `rows` must be in [0, {self.num_sequences}), got {rows.tolist()}.")
        check_state("Decoder", state, self._model.config, len(rows), "rows")
        state = complete(state)
        self._check_state_tensors(state, len(rows))
        rows, new = rows.long(), named_tensors(state)
        with self._lock:
            self._check_state()
            self._read_pending()
            for name, tensor in named_tensors(self._state).items():
                tensor[rows.to(tensor.device)] = new[name].to(tensor.device)
            rows = rows.cpu()
            self._last_equal[rows] = _NEVER
            self._last_equal[:, rows] = _NEVER
            self._longest = None
            if self._history is not None:
                self._history.forget(self._state, rows)

    @torch.no_grad()
    def undo(self, counts: int | Tensor) -> None:
        """Take back the last tokens, in place: the decoder continues, bit for bit, as if it had not read them.

        The state becomes the one before the oldest call that loses tokens. The next call reads that call's kept tokens
        before its own, and returns the logits of its own. So states and logits have the bits of a decoder that reads
        the kept and the next tokens in one call. A copy of the state includes the kept ones. A separate call reads them

        - at once, with `lengths`, if rows keep different numbers of tokens
        - in :meth:`reorder` and :meth:`replace`
        - if the kept and the next tokens are more than 2 undo + 1, or more than a step takes

        Args:
            counts: number of tokens, for all rows or (B,) integers for each; at most the constructor's `undo`.

        Raises:
            ValueError: a row has read fewer tokens since the decoder was made, :meth:`reorder` or :meth:`replace`.

        Example:
            >>> import torch, megalodon_ops as mo
            >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
            >>> model = mo.Megalodon(config).eval()
            >>> decoder = mo.Decoder(model, mo.MegalodonState.fresh(config, 2), undo=3)
            >>> logits = decoder(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))
            >>> decoder.undo(torch.tensor([1, 3]))
            >>> decoder.state.norm.count
            tensor([3, 1])
        """
        with self._lock:
            self._check_state()
            counts = check_history(self._history).check_counts(counts)
            self._longest, self._state_is_whole = None, False
            self._history.take_back(self._state, counts, self._read)
            self._state_is_whole = True

    def state_before(self, counts: int | Tensor) -> MegalodonStateBase:
        """Return a copy of the state before the last `counts` tokens, which :meth:`undo` would take back."""
        check_history(self._history)
        return self._copied_state(counts)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return logits (B, L, num_outputs) after the next tokens (B, L), float32 (float64 for a float64 model).

        A model with `num_features` reads numbers (B, L, F) of an arbitrary floating-point dtype, and returns numbers.
        """
        check_runs_now("Decoder", _ALTERNATIVE)
        check_inputs("Decoder", "tokens", tokens, self._model, Sequences())
        if len(tokens) != self.num_sequences:
            raise ValueError(f"Decoder: `tokens` must have {self.num_sequences} rows, got {tuple(tokens.shape)}.")
        reads_tokens = self._model.config.num_features is None
        tokens = tokens.long() if reads_tokens else tokens.double()  # so that one step serves all dtypes
        with self._lock:
            self._check_state()
            if self._captures:
                check_device("Decoder", "tokens", tokens, self._like)
            elif reads_tokens:
                self._check_tokens(tokens)
            history, self._state_is_whole = self._history, False
            logits = self._run(tokens) if history is None else history.run(tokens, self._state, self._run)
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

    def _check_tokens(self, tokens: Tensor) -> None:
        for token in tokens.flatten().tolist():
            if not 0 <= token < self._model.config.vocab_size:
                raise IndexError(f"Decoder: `tokens` must be in [0, {self._model.config.vocab_size}), got {token}.")

    @torch.no_grad()
    def _copied_state(self, counts: Tensor | int) -> MegalodonStateBase:
        """Return a copy of the state before the last `counts` tokens, after all others, including the pending ones."""
        with self._lock:
            self._check_state()
            state = self._state.clone()
            if self._history is not None:
                history = self._history.copy()
                history.take_back(state, history.check_counts(counts), self._read)
                history.read_pending(state, self._read)
            return state

    def _read_pending(self) -> None:
        if self._history is not None:
            self._history.read_pending(self._state, self._read)

    def _read(self, tokens: Tensor, state: MegalodonStateBase, **lengths: Tensor) -> MegalodonStateBase:
        """Return the state after tokens (B, L), by the layers."""
        with self._autocast:
            return self._call_model(tokens, state, **lengths)[1]

    def _run(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        is_in_capture = self._captures and torch.cuda.is_current_stream_capturing()  # by the caller
        is_step = 0 < self.num_sequences * length <= self._max_tokens and not is_in_capture and self._has_room(length)
        if not is_step:
            self._longest = None
            return self._run_model(tokens)
        if self._longest is not None:
            self._longest += length
        if self._captures:
            return self._run_captured(tokens)
        if length in self._steps:
            return self._steps[length](tokens)
        # `left_out` is not read: `_has_room` and `__call__` check the values that the model reads in Python.
        step = self._steps[length] = Step("Decoder", self._run_model, (tokens,), self._state)
        return step.results()

    def _run_captured(self, tokens: Tensor) -> Tensor:
        """Run the step for this number of tokens per row; its first call runs the modules, its second captures."""
        length = tokens.shape[1]
        if length not in self._steps:
            self._steps[length] = CapturedStep(self._runner)
        logits = self._steps[length](positions_fit()(self._run_model), tokens)
        if problem := self._steps[length].problem:
            self._max_tokens, self.fused = 0, False
            warn_caller(f"Decoder: {problem}, so modules run one by one, which takes longer.")
        return logits

    def _call_model(
        self, tokens: Tensor, state: MegalodonStateBase, **lengths: Tensor
    ) -> tuple[Tensor, MegalodonStateBase]:
        return self._runner(tokens, state=state, return_state=True, inplace_state=True, **lengths)

    def _has_room(self, length: int) -> bool:
        """Return True if no sequence fills its cache within `length` positions; a full one drops a chunk."""
        config = self._model.config
        if config.visible_chunks == 1:
            return True
        if self._longest is None:
            self._longest = int(self._state.layers[0].attention.position.max())
        return self._longest + length < config.num_cached_positions

    @torch.no_grad()
    def _run_model(self, tokens: Tensor) -> Tensor:
        with self._autocast:
            logits, after = self._call_model(tokens, self._state)
        copies: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for old, new in zip(tree_leaves(self._state), tree_leaves(after), strict=True):
            if old is not new:
                copies.setdefault(as_real(old).dtype, []).append((as_real(old), as_real(new)))
        for pairs in copies.values():  # on CUDA, one launch copies all tensors of a dtype
            torch._foreach_copy_(*zip(*pairs))
        return logits

    def _may_record(self, autocast: bool) -> bool:
        config = self._model.config
        has_dropout = self._model.training and (config.dropout or config.hidden_dropout or config.attention_dropout)
        has_hooks = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        return not (has_dropout or has_hooks) and (self._captures or (self._like.is_cpu and not autocast))

    def _fused_dtype(self, autocast: bool) -> torch.dtype | None:
        """Dtype of weights whose products of few rows take a CUDA kernel that also computes what follows them, or None."""
        return self._dtype if self._captures and self._like.is_cuda and has_cuda_kernels() and not autocast else None

    def _warn_of_changes(self, changes: list[str]) -> bool:
        """Warn of the first module that prevents one call of kernels, or a CUDA graph; return True if there is one."""
        problem = None
        if self._captures:
            if hooked := hooked_module(self._model):
                self._max_tokens = 0
                problem = f"`{hooked}` has hooks, so modules run one by one instead of a CUDA graph"
        elif changes:
            count = f", the first of {len(changes)} such modules," if len(changes) > 1 else ""
            problem = (
                f"`{changes[0] or 'model'}`{count} is not as the configuration makes it (wrapped, hooked, quantised or "
                "replaced), so modules run there instead of kernels in one call"
            )
        if problem:
            warn_caller(f"Decoder: {problem}, which takes longer; merge or remove what was added.")
        return problem is not None

    def _check_state_tensors(self, state: MegalodonStateBase, rows: int) -> None:
        config, tensors = self._model.config, named_tensors(state)
        for name, dtype, shape in layout(config, rows, self._like.dtype):
            tensor, name = tensors.get(name), f"state.{name}"
            if tensor is None or as_real(tensor).shape != shape:
                raise ValueError(
                    f"Decoder: `{name}` must have shape {shape}, got {None if tensor is None else tuple(tensor.shape)}."
                )
            if as_real(tensor).dtype != dtype:
                raise TypeError(
                    f"Decoder: `{name}` must be {dtype} beside the other tensors, got {tensor.dtype}; convert it."
                )
            limit = {"count": 1 << 62, "position": config.num_cached_positions}.get(name.rpartition(".")[2])
            if limit and bool(((tensor < 0) | (tensor >= limit)).any()):
                raise ValueError(f"Decoder: `{name}` must be in [0, {limit}), got {tensor.tolist()}.")

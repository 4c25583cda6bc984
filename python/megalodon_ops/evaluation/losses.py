"""Runs a model over the windows of documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .results import Context, Evaluation, Tally
from .windows import ENDLESS, Lane, Segment, opened
from ..model.model import Megalodon
from ..model.states import MegalodonState
from ..ops.values import check_size, described, is_whole, shown

PROTOCOLS = ("streamed", "released")


@torch.no_grad()
def evaluate(
    model: Megalodon,
    documents: Iterable[Any],
    *,
    contexts: Sequence[Context] = ("all",),
    protocol: str = "streamed",
    rows: int = 8,
    piece: int = 2048,
    progress: Callable[[int], object] | None = None,
) -> list[Evaluation]:
    """The losses of the documents' tokens, each predicted from what its window holds before it.

    Args:
        model: computes in its own dtype, or in that of an autocast around the call, and in evaluation mode. To compare a
            model of another kind by the same windows, give a module whose `loss` takes `cu_seqlens`, `reduction="none"`,
            `state` and `return_state` as Megalodon's does, whose states have `state[rows]` and `state.reset(rows)`, and
            whose `alone()` gives the module itself.
        documents: each a :class:`Document`, or its tokens alone. They are read once for every context, so with more
            than one context they must be iterable again, as lists are. The longest first are read the fastest.
        contexts: lengths N of windows, and "all" for windows without end; see :mod:`megalodon_ops.evaluation`.
        protocol: "streamed" computes each window exactly. "released" follows the released code's evaluation: beyond 8
            chunks of a window, all timestep norms take, every 2 chunks, the statistics of the last 6 chunks alone,
            which the model reads once more for this without any past. Up to 8 chunks nothing differs.
        rows: how many documents are read side by side. piece: tokens of each in one call of the model. Both change
            time and memory, but nothing else up to rounding.
        progress: called with the number of tokens that each call has predicted.

    Returns:
        an :class:`Evaluation` for each context, in their order.

    Raises:
        FloatingPointError: a loss is infinite or NaN. ValueError, TypeError: an argument is wrong. IndexError: a token
        is outside of the vocabulary.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> from megalodon_ops.evaluation import Document, evaluate
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=8)
        >>> model = mo.Megalodon(config)
        >>> _ = torch.nn.init.zeros_(model.output.output.weight)  # all 8 tokens are as likely: 3 bits each
        >>> text = Document(torch.randint(8, (101,)), num_bytes=200)
        >>> for result in evaluate(model, [text], contexts=[16, "all"]):
        ...     print(result.context, result.tokens, f"{result.perplexity:.2f} {result.bits_per_byte:.2f}")
        16 100 8.00 1.50
        all 100 8.00 1.50
    """
    _check(model, documents, contexts, protocol, progress)
    rows, piece = check_size("evaluate", "rows", rows), check_size("evaluate", "piece", piece)
    contexts = [context if context == "all" else int(context) for context in contexts]
    model = model.alone()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    found: dict[Context, Evaluation] = {}
    whole: Evaluation | None = None  # of a context that cut no document: larger contexts give the same
    try:
        for context in sorted(set(contexts), key=_length):
            if whole is None:
                evaluation, cut = _evaluate(model, documents, context, protocol, rows, piece, progress)
                _check_tokens(evaluation, found)
                whole = None if cut else evaluation
            else:
                evaluation = dataclasses.replace(whole, context=context)
            found[context] = evaluation
    finally:
        for module, training in modes:
            module.training = training
    return [found[context] for context in contexts]


def _evaluate(
    model: Megalodon,
    documents: Iterable[Any],
    context: Context,
    protocol: str,
    rows: int,
    piece: int,
    progress: Callable[[int], object] | None,
) -> tuple[Evaluation, bool]:
    """The losses in windows of one context, and whether any document was longer than a window."""
    tally, reader = Tally(), _Reader(model, piece)
    queue = opened(documents, tally.add_bytes)
    chunk_size = model.config.chunk_size if protocol == "released" else None
    lanes: list[Lane] = []
    while True:
        segments = [(number, segment) for number, lane in enumerate(lanes) for segment in lane.take()]
        while len(lanes) < rows:  # a lane more for as many documents as there are
            lane = Lane(queue, _length(context), piece, chunk_size)
            if not (taken := list(lane.take())):
                break
            segments += [(len(lanes), segment) for segment in taken]
            lanes.append(lane)
        if not segments:
            break
        for read, losses in reader.read(segments):
            tally.add(read, losses)
            if progress is not None:
                progress(len(losses))
    return tally.result(context), any(lane.has_cut for lane in lanes)


class _Reader:
    """The model, and its state of the windows that lanes are in the middle of."""

    def __init__(self, model: Megalodon, piece: int):
        self.model, self.piece = model, piece
        self.device = next(model.parameters()).device
        self.state: MegalodonState | None = None
        self.lanes: list[int] = []  # whose windows the state's sequences are

    def read(self, segments: list[tuple[int, Segment]]) -> Iterator[tuple[list[Segment], Tensor]]:
        """The losses (T,) of all segments, those that are whole windows first: these need and leave no state.

        `segments` come with the number of their lane, and hold one of every lane that is in the middle of a window.
        """
        whole = [segment for _, segment in segments if segment.start == 0 and segment.ends]
        if whole:
            yield whole, self.model.loss(**self._batch(whole))[0]
        parts = [(lane, segment) for lane, segment in segments if segment.start or not segment.ends]
        if parts:
            batch = [segment for _, segment in parts]
            losses, state = self.model.loss(**self._batch(batch), state=self._state(parts), return_state=True)
            going_on = [i for i, segment in enumerate(batch) if not segment.ends]
            self.lanes = [parts[i][0] for i in going_on]
            self.state = state if len(going_on) == len(parts) else state[going_on]
            yield batch, losses[0]

    def _batch(self, segments: list[Segment]) -> dict[str, Any]:
        """Arguments of the model's loss of segments in one packed row."""
        bounds = torch.tensor([0, *(len(segment.inputs) for segment in segments)]).cumsum(0)
        packed = dict(
            tokens=torch.cat([segment.inputs for segment in segments])[None],
            targets=torch.cat([segment.targets for segment in segments])[None],
            cu_seqlens=bounds,
        )
        return {name: tensor.to(self.device) for name, tensor in packed.items()} | {"reduction": "none"}

    def _state(self, parts: list[tuple[int, Segment]]) -> MegalodonState | None:
        """The state before each of the segments."""
        begin = [i for i, (_, segment) in enumerate(parts) if segment.start == 0]
        if self.state is None or len(begin) == len(parts):
            return None
        state = self.state
        if begin:  # else every lane goes on, in the state's order
            state = state[[self.lanes.index(lane) if segment.start else 0 for lane, segment in parts]].reset(begin)
        recalling = [i for i, (_, segment) in enumerate(parts) if segment.recall is not None]
        if recalling:
            pasts = torch.stack([parts[i][1].recall for i in recalling]).to(self.device)
            state = _with_norms(state, torch.tensor(recalling, device=self.device), self._state_after(pasts))
        return state

    def _state_after(self, tokens: Tensor) -> MegalodonState:
        """The state after tokens (n, L) without a past."""
        state = None
        for part in tokens.split(self.piece, 1):
            _, state = self.model._hidden(self.model._embed(part), state, True, False)
        return state


def _with_norms(state: MegalodonState, rows: Tensor, other: MegalodonState) -> MegalodonState:
    """The state, whose sequences `rows` have the statistics of all timestep norms from the sequences of another one."""

    def put(norm, others):
        return tree_map(lambda tensor, new: tensor.index_copy(0, rows, new), norm, others)

    layers = zip(state.layers, other.layers, strict=True)
    return MegalodonState(
        tuple(layer._replace(norm=put(layer.norm, new.norm)) for layer, new in layers), put(state.norm, other.norm)
    )


def _length(context: Context) -> int:
    return ENDLESS if context == "all" else context


def _check(model: object, documents: object, contexts: object, protocol: object, progress: object) -> None:
    if not isinstance(model, Megalodon):
        if not (isinstance(model, nn.Module) and callable(getattr(model, "loss", None)) and hasattr(model, "alone")):
            raise TypeError(f"evaluate: `model` must be a Megalodon, got {described(model)}.")
        if protocol == "released":
            raise TypeError(f'evaluate: `model` must be a Megalodon for protocol="released", got {described(model)}.')
    if isinstance(documents, (str, bytes, Tensor)) or not isinstance(documents, Iterable):
        raise TypeError(f"evaluate: `documents` must be a list of documents' tokens, got {described(documents)}.")
    wanted = 'a list of "all" and of positive integers below 2^62'
    if not isinstance(contexts, Sequence) or isinstance(contexts, (str, bytes)):
        raise TypeError(f"evaluate: `contexts` must be {wanted}, got {described(contexts)}.")
    for context in contexts or [None]:
        if not (isinstance(context, str) and context == "all") and not is_whole(context, 1, ENDLESS - 1):
            raise ValueError(f"evaluate: `contexts` must be {wanted}, got {shown(context)} among them.")
    if not isinstance(protocol, str) or protocol not in PROTOCOLS:
        raise ValueError(f'evaluate: `protocol` must be "streamed" or "released", got {shown(protocol)}.')
    if progress is not None and not callable(progress):
        raise TypeError(f"evaluate: `progress` must be a function or None, got {described(progress)}.")
    if len(set(contexts)) > 1 and iter(documents) is documents:
        raise ValueError(
            f"evaluate: `documents` must be iterable again for more than one context, got {described(documents)}; "
            "make a list of it."
        )


def _check_tokens(evaluation: Evaluation, others: dict[Context, Evaluation]) -> None:
    """Raises where a context has other tokens than the others: documents whose pieces can be read once give none."""
    if not evaluation.tokens and not others:
        raise ValueError("evaluate: `documents` must hold a token to predict, beside those that open them, got none.")
    for other in others.values():
        if evaluation.tokens != other.tokens:
            raise ValueError(
                f"evaluate: `documents` must give the same tokens for every context, got {other.tokens} for "
                f"{other.context} and {evaluation.tokens} for {evaluation.context}."
            )

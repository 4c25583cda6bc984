"""Run a model over the windows of documents."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .results import Context, Evaluation, Tally
from .windows import Segment, open_documents, segments_of
from ..public_models import Megalodon, MegalodonState
from ..ops.common.checks import check_size, describe, is_integer_between, short_text

_UNLIMITED = 2**62  # more tokens than any window holds


@torch.no_grad()
def evaluate(
    model: Megalodon,
    documents: Iterable[Any],
    *,
    contexts: Sequence[Context] = ("all",),
    rows: int = 8,
    piece: int = 2048,
) -> list[Evaluation]:
    """Return the losses of the documents' tokens, each predicted from the tokens before it in its window.

    Args:
        model: computes in its own dtype, or in that of an autocast around the call, and in evaluation mode. Any other
            module can be evaluated on the same windows if its `loss` takes `cu_seqlens`, `reduction="none"`, `state`
            and `return_state` as Megalodon's does, its states have `state[rows]` and `state.reset(rows)`, and its
            `alone()` returns the module itself.
        documents: each a :class:`Document`, or its tokens alone. Several contexts read the documents several times, so
            these must be iterable again, as lists are. Documents sorted from longest to shortest are read fastest.
        contexts: lengths N of windows, and "all" for one window per document; see :mod:`megalodon_ops.evaluation`.
        rows: number of documents read in parallel; like `piece`, it changes only time, memory and rounding.
        piece: tokens of each of these documents in one call of the model.

    Returns:
        an :class:`Evaluation` for each context, in order.

    Raises:
        FloatingPointError: an infinite or NaN loss. ValueError, TypeError: a wrong argument. IndexError: unknown token.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> from megalodon_ops.evaluation import Document, evaluate
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=8)
        >>> model = mo.Megalodon(config)
        >>> _ = torch.nn.init.zeros_(model.output.output.weight)  # 8 equally likely tokens: 3 bits each
        >>> text = Document(torch.randint(8, (101,)), num_bytes=200)
        >>> for result in evaluate(model, [text], contexts=[16, "all"]):
        ...     print(result.context, result.tokens, f"{result.perplexity:.2f} {result.bits_per_byte:.2f}")
        16 100 8.00 1.50
        all 100 8.00 1.50
    """
    _check(model, documents, contexts)
    rows, piece = check_size("evaluate", "rows", rows), check_size("evaluate", "piece", piece)
    contexts = [context if context == "all" else int(context) for context in contexts]
    model = model.alone()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    results: dict[Context, Evaluation] = {}
    uncut: Evaluation | None = None  # result of a context that cuts no document, and so of larger contexts
    try:
        for context in sorted({*contexts}, key=_length_of):
            if uncut is None:
                results[context], has_cut = _evaluate(model, documents, context, rows, piece)
                uncut = None if has_cut else results[context]
            else:
                results[context] = dataclasses.replace(uncut, context=context)
            counts = {each.context: each.tokens for each in results.values()}
            # Counts can differ: a document that is an iterator of pieces is empty the second time.
            if not min(counts.values()) or len(set(counts.values())) > 1:
                got = ", ".join(f"{count} with context {context}" for context, count in counts.items())
                raise ValueError(
                    "evaluate: `documents` must have a token to predict after the start tokens, and the same tokens "
                    f"for every context, got {got}."
                )
    finally:
        for module, training in modes:
            module.training = training
    return [results[context] for context in contexts]


def _length_of(context: Context) -> int:
    return _UNLIMITED if context == "all" else context


def _evaluate(
    model: Megalodon, documents: Iterable[Any], context: Context, rows: int, piece: int
) -> tuple[Evaluation, bool]:
    """Return the losses for one context, and True if a document was longer than a window."""
    tally, reader = Tally(), _Reader(model)
    has_cut = False
    queue = open_documents(documents, tally.add_bytes)
    lanes: list[Iterator[list[Segment]]] = []  # a lane reads one document after another from the queue
    while True:
        segments = [(number, segment) for number, lane in enumerate(lanes) for segment in next(lane, [])]
        while len(lanes) < rows:  # add a lane if documents are left
            lane = segments_of(queue, _length_of(context), piece)
            if not (first := next(lane, [])):
                break
            segments += [(len(lanes), segment) for segment in first]
            lanes.append(lane)
        if not segments:
            return tally.result(context), has_cut
        has_cut |= any(segment.ends_window and not segment.ends_document for _, segment in segments)
        for read, losses in reader.read(segments):
            tally.add(read, losses)


class _Reader:
    """Reader of segments, which keeps the model's states for windows that continue in the next call."""

    def __init__(self, model: Megalodon):
        self.model = model
        self.device = next(model.parameters()).device
        self.state: MegalodonState | None = None
        self.lanes: list[int] = []  # lanes of the state's sequences

    def read(self, segments: list[tuple[int, Segment]]) -> Iterator[tuple[list[Segment], Tensor]]:
        """Yield segments and their losses (T,): first whole windows, which need no state, then parts of windows.

        `segments` are pairs (lane, segment). They must continue the unfinished window of every lane that has one.
        """
        whole = [segment for _, segment in segments if segment.start == 0 and segment.ends_window]
        if whole:
            yield whole, self.model.loss(**self._batch(whole))[0]
        if parts := [(lane, segment) for lane, segment in segments if segment.start or not segment.ends_window]:
            batch = [segment for _, segment in parts]
            losses, state = self.model.loss(**self._batch(batch), state=self._state(parts), return_state=True)
            unfinished = [i for i, segment in enumerate(batch) if not segment.ends_window]
            self.lanes = [parts[i][0] for i in unfinished]
            self.state = state if len(unfinished) == len(parts) else state[unfinished]
            yield batch, losses[0]

    def _batch(self, segments: list[Segment]) -> dict[str, Any]:
        """Return the arguments of the model's `loss`: segments as one packed row."""
        tokens = torch.cat([segment.inputs for segment in segments])[None].to(self.device)
        targets = torch.cat([segment.targets for segment in segments])[None].to(self.device)
        bounds = torch.tensor([0, *(len(segment.inputs) for segment in segments)]).cumsum(0).to(self.device)
        return dict(tokens=tokens, targets=targets, cu_seqlens=bounds, reduction="none")

    def _state(self, parts: list[tuple[int, Segment]]) -> MegalodonState | None:
        """Return the initial state of each segment."""
        begin = [i for i, (_, segment) in enumerate(parts) if segment.start == 0]
        if self.state is None or len(begin) == len(parts):
            return None
        if not begin:  # every lane continues, in the state's order
            return self.state
        rows = [self.lanes.index(lane) if segment.start else 0 for lane, segment in parts]  # 0: any row, then reset
        return self.state[rows].reset(begin)


def _check(model: object, documents: object, contexts: object) -> None:
    if not (isinstance(model, nn.Module) and hasattr(model, "loss") and hasattr(model, "alone")):
        raise TypeError(f"evaluate: `model` must be a Megalodon, got {describe(model)}.")
    if isinstance(documents, (str, bytes, Tensor)) or not isinstance(documents, Iterable):
        raise TypeError(f"evaluate: `documents` must be a list of documents' tokens, got {describe(documents)}.")
    expected = 'a list of "all" and of positive integers below 2^62'
    if not isinstance(contexts, Sequence) or isinstance(contexts, (str, bytes)) or not contexts:
        raise TypeError(f"evaluate: `contexts` must be {expected}, got {describe(contexts)}.")
    for context in contexts:
        if not (isinstance(context, str) and context == "all") and not is_integer_between(context, 1, _UNLIMITED - 1):
            raise ValueError(f"evaluate: `contexts` must be {expected}, got {short_text(context)} among them.")
    if len(set(contexts)) > 1 and iter(documents) is documents:
        raise ValueError(f"evaluate: `documents` must be iterable again, for every context, got {describe(documents)}.")

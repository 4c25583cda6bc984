"""Generation: `Megalodon.stream`, token by token, and `Megalodon.generate`, all tokens at once."""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .decoder import Decoder
from .drafts import Choose, ModelDraft, PromptDraft, check_draft
from ..model.inputs import check_reads_tokens
from .sampling import Sampling, check_seeds, numbers_of_seeds
from ..model.model_state import CallOptions, MegalodonStateBase, check_cache_dtype
from .quantized_layers import computing_dtype, new_state
from ..model.sequences import Sequences
from .stops import StopDetector, check_stops
from ..ops.common.definition import check_runs_now
from ..ops.linear_cross_entropy.linear_cross_entropy import has_integers
from ..ops.common.memory import check_fits
from ..ops.common.checks import check_flag, check_integer, check_size, check_tensor, did_you_mean, short_text

_STOPPED_TOKEN = -1


class _Settings(NamedTuple):
    """Checked options of a stream, except the prompts and their state; see :func:`stream`."""

    sampling: Sampling
    stops: list[list[int]]
    seeds: list[int]
    max_new_tokens: int | None
    draft: nn.Module | str | None
    draft_tokens: int


class TokenStream:
    """Iterator over the new tokens of prompts, from :meth:`Megalodon.stream`.

    Yields the next token of each row, (rows,) int64, -1 for a row that has stopped. Ends when all rows have stopped.

    Attributes:
        stopped: (rows,) bools, True for rows that have stopped.

    Example:
        >>> import itertools, torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> stream = mo.Megalodon(config).stream(torch.tensor([[1, 2, 3]]), seed=0)
        >>> tokens = list(itertools.islice(stream, 4))
        >>> tokens[0].shape, stream.state.norm.count          # three tokens of the prompt, and all but the last new one
        (torch.Size([1]), tensor([6]))
    """

    def __init__(
        self, model: nn.Module, prompts: _Prompts, state: MegalodonStateBase | None, settings: _Settings
    ) -> None:
        sampling, draft = settings.sampling, settings.draft
        self._num_guesses = 0 if draft is None else settings.draft_tokens
        state = _prompt_state(model, prompts, state)
        self._prompts, self._decoder = prompts, Decoder(model, state, undo=self._num_guesses)
        self._last = prompts.last[prompts.samples]
        if isinstance(draft, str):
            self._draft = PromptDraft(prompts.texts())
        elif draft is not None:
            self._draft = ModelDraft(draft, _prompt_state(draft, prompts, None), self._last, settings.draft_tokens)
        self._sampling = sampling
        self._numbers = numbers_of_seeds(settings.seeds, state.norm.count + 1, self._last.device)
        self._seen_mask = prompts.seen_mask(model.config.num_outputs)[prompts.samples] if sampling.has_penalty else None
        self._stop_detector = StopDetector(settings.stops, self._last) if settings.stops else None
        self.stopped = self._will_stop = torch.zeros_like(self._last, dtype=torch.bool)
        self._all_stopped = False
        self._remaining = math.inf if settings.max_new_tokens is None else settings.max_new_tokens
        self._states_of_stopped: list[tuple[Tensor, MegalodonStateBase]] = []
        self._ready: deque[tuple[Tensor, Tensor]] = deque()
        """tokens (rows,) to yield, each with the value of `stopped` after it"""
        self._drawn: list[Tensor] = []
        """random numbers of the next tokens"""

    def __iter__(self) -> TokenStream:
        return self

    @torch.no_grad()
    def __next__(self) -> Tensor:
        if not self._ready:
            if self._all_stopped or self._remaining == 0:
                raise StopIteration
            self._advance()
        token, self.stopped = self._ready.popleft()
        return token

    def _advance(self) -> None:
        """Choose the next tokens: those that the draft guessed right, and one more."""
        read, tokens = self._last[:, None], []
        count = min(self._num_guesses, self._remaining - 1)
        if count:
            read = torch.cat([read, self._draft.guess(count, self._choice_of_guesses())], 1)
        logits = self._decoder(read)
        num_guesses = read.shape[1] - 1
        for i in range(num_guesses + 1):
            token = self._last = self._choose(i, logits[:, i], self._seen_mask)
            tokens.append(token)
            self._seen_mask = _add_seen(self._seen_mask, token)
            stopped, ending = self._will_stop, None
            if self._stop_detector is not None:
                token = token.masked_fill(stopped, _STOPPED_TOKEN)
                ending = self._stop_detector.update(self._last) & ~stopped
                self._will_stop = stopped | ending
            self._ready.append((token, self._will_stop))
            if i < num_guesses and not bool(((self._last == read[:, i + 1]) | stopped).all()):
                break
            if ending is not None and bool(ending.any()):
                break
        self._remaining -= len(tokens)
        del self._drawn[: len(tokens)]
        if count:
            self._decoder.undo(num_guesses + 1 - len(tokens))
            self._draft.accept(torch.stack(tokens, 1))
        if ending is not None and bool(ending.any()):
            self._all_stopped = bool(self._will_stop.all())
            if not self._all_stopped:  # the decoder still computes the stopped rows, but their tokens are not used
                rows = ending.nonzero()[:, 0]
                self._states_of_stopped.append((rows, self._decoder.state_of(rows)))

    def _choose(self, i: int, logits: Tensor, seen_mask: Tensor | None) -> Tensor:
        """Choose the token (rows,) i places after the next one."""
        return self._sampling.choose(logits, self._numbers_from(i), seen_mask)

    def _numbers_from(self, i: int) -> Iterator[Tensor]:
        """Yield the random numbers (rows,) of the token i places after the next one, drawn on demand."""
        while len(self._drawn) <= i:
            self._drawn.append(next(self._numbers))
        yield self._drawn[i]

    def _choice_of_guesses(self) -> Choose:
        """Return a function that chooses the tokens of a draft in order; the penalty counts each for the later ones."""
        seen_mask = self._seen_mask

        def choose(i: int, logits: Tensor) -> Tensor:
            nonlocal seen_mask
            token = self._choose(i, logits, seen_mask)
            seen_mask = _add_seen(seen_mask, token)
            return token

        return choose

    @property
    def state(self) -> MegalodonStateBase:
        """Copy of the state after all tokens of a row except its last, with which the prompt of a later call begins."""
        state = self._decoder.state_before(len(self._ready)) if self._ready else self._decoder.state
        if not self._states_of_stopped:
            return state
        rows, states = zip(*self._states_of_stopped, strict=True)
        index = torch.arange(len(self.stopped), device=self.stopped.device)
        stopped = torch.cat(rows)
        last = len(index) + torch.arange(len(stopped), device=index.device)
        # A row that stops at a token in `_ready` has not stopped yet.
        index[stopped] = last.where(self.stopped[stopped], stopped)
        return type(state).cat([state, *states])[index]


def _add_seen(seen_mask: Tensor | None, token: Tensor) -> Tensor | None:
    return None if seen_mask is None else seen_mask.scatter(1, token[:, None], True)


class _Prompts:
    """Prompts of a batch, in the columns from `starts` (B,) to `ends` (B,); padding is zeros."""

    def __init__(self, prompt: Tensor, lengths: Tensor, padding: str, num_samples: int) -> None:
        column = torch.arange(prompt.shape[1], device=prompt.device)
        lengths = lengths.to(prompt.device, torch.int64)
        self.padding = padding
        self.starts = prompt.shape[1] - lengths if padding == "left" else torch.zeros_like(lengths)
        self.ends = self.starts + lengths
        self.inside = (column >= self.starts[:, None]) & (column < self.ends[:, None])
        self.tokens = torch.where(self.inside, prompt, 0)
        self.last = self.tokens.gather(1, self.ends[:, None] - 1)[:, 0].long()
        self.samples = torch.arange(len(prompt), device=prompt.device).repeat_interleave(num_samples)

    def seen_mask(self, num_tokens: int) -> Tensor:
        """Return (rows, num_tokens) bools, True for tokens in each prompt."""
        token = torch.where(self.inside & (self.tokens < num_tokens), self.tokens, num_tokens).long()
        found = torch.zeros((len(token), num_tokens + 1), dtype=torch.bool, device=token.device)
        return found.scatter_(1, token, True)[:, :num_tokens]

    def texts(self) -> list[Tensor]:
        """Return each sample's prompt (n,), without padding."""
        return [self.tokens[row, self.inside[row]].long() for row in self.samples.tolist()]

    def append(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Return prompts and new tokens up to the first -1, padded on the given side, and lengths, of all samples."""
        starts, ends = self.starts[self.samples], self.ends[self.samples]
        result = torch.cat([self.tokens[self.samples], torch.zeros_like(new)], 1)
        columns = ends[:, None] + torch.arange(new.shape[1], device=new.device)
        return result.scatter_(1, columns, new.clamp(min=0)), ends - starts + (new != _STOPPED_TOKEN).sum(1)


@torch.no_grad()
def _prompt_state(model: nn.Module, prompts: _Prompts, state: MegalodonStateBase | None) -> MegalodonStateBase:
    """Return the state of all samples after their prompts except the last token, which are read chunk by chunk."""
    start, stop = int(prompts.starts.min()), int(prompts.ends.max()) - 1
    size, tokens = model.config.chunk_size, prompts.tokens
    for begin in range(start, max(stop, start + 1), size):
        piece = tokens[:, begin : min(begin + size, stop)]
        first = (prompts.starts - begin).clamp(0, piece.shape[1])
        last = (prompts.ends - 1 - begin).clamp(0, piece.shape[1])
        where = {"lengths": last - first} | ({"starts": first} if prompts.padding == "left" else {})
        sequences = Sequences.of("generate", piece, **where)
        options = CallOptions(state, return_state=True, inplace_state=begin > start, sequences=sequences)
        _, state = model._hidden(model._embed(piece), options)
    return state[prompts.samples] if len(prompts.samples) > len(tokens) else state


def stream(
    self: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int | None = None,
    lengths: Tensor | None = None,
    padding: str = "right",
    temperature: float | Sequence[float] = 1.0,
    top_k: int | None = None,
    top_p: float | Sequence[float] | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop_tokens: int | Sequence[int] | None = None,
    stop_sequences: Sequence[Sequence[int]] | None = None,
    num_samples: int = 1,
    state: MegalodonStateBase | None = None,
    seed: int | Sequence[int] | None = None,
    draft: nn.Module | str | None = None,
    draft_tokens: int = 4,
    cache_dtype: torch.dtype | None = None,
) -> TokenStream:
    """Continue prompts token by token.

    A row does not depend on the other rows of its batch, up to rounding. Prompts are read one chunk at a time, so
    memory does not grow with their length.

    Args:
        prompt: (B, L >= 1) integers.
        max_new_tokens: number of tokens after which the stream ends; None: no limit.
        lengths: (B,) integers >= 1, the prompts' lengths; padding may have arbitrary values.
        padding: side of the padding, "right" or "left"; "left" needs `lengths`.
        temperature: divides the logits; 0: take the likeliest token. A number, or a list of one for each row.
        top_k: draw only from the top_k likeliest tokens.
        top_p: draw only from the smallest set of these with probability top_p. A number or a list, as `temperature`.
        min_p: draw only from the remaining tokens that are at least min_p times as likely as the likeliest.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that are in the prompt or
            already generated. Tokens in the past of `state` do not count, as a state does not store them.
        stop_tokens: one token or several; a row stops after one of them. None: `config.eos_token_id`, the end of a
            document, if the model has one; an empty list: no token.
        stop_sequences: lists of tokens; a row stops when its new tokens end with one. For strings, see `StopStrings`.
        num_samples: n continuations of each prompt, which is read once; prompt b has the rows b n to b n + n - 1.
        state: the past of the B prompts, as `stream.state`, `generate` or a call of the model returned it.
        seed: a row's draws depend on its seed and on positions alone, so they are the same in every batch, on every
            device and over several calls. A list of one integer for each of the B * num_samples rows; an integer s
            stands for s, s + 1, s + 2 and so on. None: an integer from torch's own generator.
        draft: speculative decoding. The draft guesses the next tokens, the model reads the guesses in one call, and the
            stream keeps those before the first that the model would not choose itself. So the tokens are those without
            a draft, up to rounding, even if they are drawn. All rows keep as many guesses as the row with the fewest.
            A smaller :class:`Megalodon` of the same tokens; or "prompt": what followed the last tokens earlier.
        draft_tokens: number of tokens that the draft guesses at once.
        cache_dtype: dtype of keys and values in the model's state: torch.int8, on the CPU, as after
            :meth:`MegalodonState.quantize_cache`, or that of the activations. None: as in `state`; without one, int8
            for a quantised model, which decodes faster so, and the activations' dtype for all others.

    Returns:
        a :class:`TokenStream`, which yields (B * num_samples,) int64 until `max_new_tokens` or until all rows have
        stopped; -1 for a row that has stopped. To continue, pass its `state` to a later call.

    Raises:
        ValueError, TypeError: an argument is wrong, or two exclude each other: `num_samples` and temperature 0; padding
        "left" and no `lengths`. FloatingPointError, on the CPU: logits are NaN or infinite, as when weights overflow.
    """
    if max_new_tokens is not None:
        check_integer("generate", "max_new_tokens", max_new_tokens, "an integer in [0, 2^31)", 0, 2**31 - 1)
    check_reads_tokens("generate", self.config)
    check_runs_now("generate", "call the model there for each token, and sample outside")
    self._check("generate", "prompt", prompt, state)
    if not prompt.numel():
        raise ValueError(f"generate: `prompt` must be (B, L) with B, L >= 1, got {tuple(prompt.shape)}.")
    if cache_dtype is not None:
        check_cache_dtype("generate", cache_dtype, computing_dtype(self), self.config.working_memory)
    if state is None:
        state = new_state(self, len(prompt), prompt.device, cache_dtype)
    elif cache_dtype == torch.int8:
        state = state.quantize_cache()
    elif cache_dtype is not None and state.cache_dtype == torch.int8:
        raise ValueError(
            f"generate: `cache_dtype` must be torch.int8 or None, as `state` has 8 bits, got {cache_dtype}."
        )
    rows = len(prompt) * check_size("generate", "num_samples", num_samples)
    draft_tokens = check_size("generate", "draft_tokens", draft_tokens)
    if prompt.is_cpu:
        fewer = f"`num_samples` must be less, got {num_samples:,}"
        if num_samples == 1:
            fewer = f"`prompt` must have fewer rows, got {len(prompt):,}"
        try:
            cache_dtype = None if state is None else state.cache_dtype
            check_samples(self, rows, cache_dtype, 0 if draft is None else draft_tokens)
        except ValueError as error:
            raise ValueError(f"generate: {fewer}: {error}.") from None
    prompts = _Prompts(prompt, _check_lengths(prompt, lengths, padding), padding, num_samples)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    sampling.check_rows(rows)
    if num_samples > 1 and not sampling.draws:
        raise ValueError(f"generate: `num_samples` must be 1 with temperature 0, got {num_samples}; all are equal.")
    if seed is None:
        seed = int(torch.randint(2**62, ())) if sampling.draws else 0  # temperature 0 draws nothing
    seeds = check_seeds(seed, rows)
    stop_tokens = self.config.eos_token_id if stop_tokens is None else stop_tokens
    stops = check_stops(stop_tokens, stop_sequences, self.config.vocab_size)
    check_draft(self, draft)
    settings = _Settings(sampling, stops, seeds, max_new_tokens, draft, draft_tokens)
    return TokenStream(self, prompts, state, settings)


def generate(
    self: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int | None = None,
    lengths: Tensor | None = None,
    padding: str = "right",
    num_samples: int = 1,
    return_lengths: bool = False,
    return_state: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor | MegalodonStateBase, ...]:
    """Continue prompts by up to `max_new_tokens`; all other options are those of :meth:`stream`.

    Args:
        prompt: (B, L >= 1) integers.
        max_new_tokens: largest number of new tokens of a row, which may stop earlier, as at the end of a document.
        return_lengths: also return (B * num_samples,) int64, the number of tokens of each row, prompt and new ones.
        return_state: also return the state after all tokens of a row except its last. To continue, pass this state, and
            begin the prompt with the last token: the tokens are those of one call, up to rounding.

    Returns:
        tokens (B * num_samples, L + n), where n is the largest number of new tokens of a row. A row's new tokens, with
        the one that stops it, follow its prompt; the padding is zeros. With padding "left", all new tokens begin at
        column L. Then, if requested, the lengths and the state.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> model = mo.Megalodon(config).eval()
        >>> tokens, state = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, seed=0, return_state=True)
        >>> more = model.generate(tokens[:, -1:], max_new_tokens=5, seed=0, state=state)
        >>> whole = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=10, seed=0)
        >>> torch.equal(torch.cat([tokens, more[:, 1:]], dim=1), whole)
        True
    """
    for name in options:
        if name not in _OPTIONS:
            fix = f"; {_EQUIVALENTS[name]}." if name in _EQUIVALENTS else did_you_mean(name, _OPTIONS) or "."
            raise TypeError(f"generate: `{name}` must be left out, as there is no such option{fix}")
    if max_new_tokens is None:
        raise TypeError("generate: `max_new_tokens` must be an integer, got None; a stream needs no end.")
    check_flag("generate", "return_lengths", return_lengths)
    check_flag("generate", "return_state", return_state)
    sizes = dict(max_new_tokens=max_new_tokens, num_samples=num_samples)
    tokens = self.stream(prompt, lengths=lengths, padding=padding, **sizes, **options)
    found = [token.to(prompt.dtype) for token in tokens]
    new = torch.stack(found, 1) if found else prompt.new_empty((len(tokens.stopped), 0))
    result, ends = tokens._prompts.append(new)
    others = ((ends,) if return_lengths else ()) + ((tokens.state,) if return_state else ())
    return (result, *others) if others else result


_OPTIONS = inspect.signature(stream).parameters.keys() - {"self", "prompt"}
_EQUIVALENTS = {
    "do_sample": "temperature=0 takes the likeliest token, and any other draws",
    "max_length": "max_new_tokens does not count the prompt",
    "num_return_sequences": "num_samples is its name here",
    "eos_token_id": "stop_tokens is its name here",
    "stop_strings": "StopStrings finds them in a stream's tokens",
    "assistant_model": "draft is its name here",
    "prompt_lookup_num_tokens": 'draft="prompt" with draft_tokens is its name here',
    "attention_mask": "lengths says how long the prompts are",
    "past_key_values": "state is the past",
}
"""Equivalents of options of transformers' `generate`"""


def check_samples(model: nn.Module, rows: int, cache_dtype: torch.dtype | None = None, draft_tokens: int = 0) -> None:
    """Raise a ValueError, before a prompt is read, if the states and logits of all rows do not fit in memory."""
    options = dict(dtype=computing_dtype(model), device="meta", cache_dtype=cache_dtype)
    states = 2 * MegalodonStateBase.fresh(model.config, 1, **options).nbytes  # of all samples, and the decoder's copy
    numbers = draft_tokens + 12  # for each output: logits, probabilities sorted and not, and float64 sums of both
    logits = numbers * model.config.num_outputs * torch.float32.itemsize
    check_fits(rows * (states + logits), f"the state of {rows:,} samples")


def _check_lengths(prompt: Tensor, lengths: Tensor | None, padding: str) -> Tensor:
    """Check the lengths of the prompts; return (B,)."""
    B, L = prompt.shape
    if padding not in ("right", "left"):
        raise ValueError(f'generate: `padding` must be "right" or "left", got {short_text(padding)}.')
    if lengths is None and padding == "left":
        raise ValueError('generate: `lengths` must be given with padding "left", got None; else padding would be read.')
    if lengths is None:
        return torch.full((B,), L, device=prompt.device)
    check_tensor("generate", "lengths", lengths)
    if not has_integers(lengths):
        raise TypeError(f"generate: `lengths` must be integers, got {lengths.dtype}.")
    if lengths.shape != (B,) or not bool(((lengths >= 1) & (lengths <= L)).all()):
        raise ValueError(f"generate: `lengths` must have shape ({B},) and be in [1, {L}], got {lengths.tolist()}.")
    return lengths

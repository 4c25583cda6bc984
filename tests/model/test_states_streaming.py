"""A document's logits do not depend on its pieces, on selected, joined and reset rows of the state, or on files of it.

A run feeds a batch piece by piece and changes the state between pieces. For each row it records the document's tokens
and their logits; in the end the model reads every document in one call.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from models import TINY, tiny_model

import megalodon_ops as mo

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
FLAGS = dict(swiglu=True, rescale_nffn=True, scale_emb=True, share_emb=True, norm_affine=False)
SIZES = [("num_heads", 1), ("num_heads", 4), ("cema_ndim", 1), ("cema_ndim", 17), ("chunk_size", 1), ("chunk_size", 3)]
SIZES += [("chunk_size", 64), ("num_layers", 1), ("rope_base", 10.0), ("norm_num_groups", 1)]
VARIANTS = [{}, FLAGS, *({name: value} for name, value in (*FLAGS.items(), *SIZES))]


@dataclass
class Document:
    """Tokens of a row since its beginning, and their logits."""

    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def copy(self) -> Document:
        return Document(list(self.tokens), list(self.logits))


class Run:
    """Batch of documents that a model reads; `act` runs one method, `check` compares with one call per document."""

    def __init__(self, model: mo.Megalodon, dtype: torch.dtype, rows: int, seed: int):
        self.model, self.dtype = model, dtype
        self.random = torch.Generator().manual_seed(seed)
        self.state = None
        self.documents = [Document() for _ in range(rows)]
        self.finished = []

    def number(self, least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (1,), generator=self.random))

    def tokens(self, *shape: int) -> torch.Tensor:
        return torch.randint(TINY["vocab_size"], shape, generator=self.random)

    def current_state(self) -> mo.MegalodonState:
        if self.state is None:
            self.state = mo.MegalodonState.fresh(self.model.config, len(self.documents), dtype=self.dtype)
        return self.state

    def record(self, row: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        self.documents[row].tokens += tokens.tolist()
        self.documents[row].logits += logits.unbind(0)

    def feed(self) -> None:
        """Feed pieces of one length."""
        tokens = self.tokens(len(self.documents), self.number(0, 20))
        inplace = self.state is not None and self.number(0, 1) == 1
        logits, self.state = self.model(tokens, state=self.state, return_state=True, inplace_state=inplace)
        for row in range(len(tokens)):
            self.record(row, tokens[row], logits[row])

    def feed_padded(self) -> None:
        """Feed pieces of several lengths, some of them 0, in rows padded on the right, or on both sides."""
        tokens, is_right = self.tokens(len(self.documents), 17), self.number(0, 1)
        starts = [0 if is_right else self.number(0, 17) for _ in self.documents]
        ends = [self.number(start, 17) for start in starts]
        where = {} if is_right else dict(starts=torch.tensor(starts))
        where["lengths"] = torch.tensor(ends) - torch.tensor(starts)
        logits, self.state = self.model(tokens, state=self.state, return_state=True, **where)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            self.record(row, tokens[row, start:end], logits[row, start:end])

    def feed_packed(self) -> None:
        """Feed pieces of several lengths in one row, or in two."""
        bounds = [0]
        for _ in self.documents:
            bounds.append(bounds[-1] + self.number(0, 11))
        spans = [*itertools.pairwise(bounds)]
        tokens = self.tokens(1, bounds[-1])
        where = dict(cu_seqlens=torch.tensor(bounds))
        if self.number(0, 1):  # the later half of the sequences is in a second row
            L, half = bounds[-1] + 3, len(spans) // 2
            spans = spans[:half] + [(begin + L, end + L) for begin, end in spans[half:]]
            tokens = self.tokens(2, L)
            where = dict(spans=torch.tensor(spans))
        logits, self.state = self.model(tokens, state=self.state, return_state=True, **where)
        for row, (start, end) in enumerate(spans):
            self.record(row, tokens.flatten()[start:end], logits.flatten(0, 1)[start:end])

    def decode(self) -> None:
        """Feed tokens one by one."""
        decoder = mo.Decoder(self.model, self.current_state())
        for _ in range(self.number(1, 4)):
            tokens = self.tokens(len(self.documents), 1)
            logits = decoder(tokens)
            for row in range(len(tokens)):
                self.record(row, tokens[row], logits[row])
        self.state = decoder.state

    def select(self) -> None:
        """Select rows in arbitrary order, with repetitions; the others end."""
        count = len(self.documents)
        rows = [self.number(0, count - 1) for _ in range(self.number(1, 4))]
        self.finished += self.documents
        self.state = self.current_state()[torch.tensor(rows) if self.number(0, 1) else rows]
        self.documents = [self.documents[row].copy() for row in rows]

    def join(self) -> None:
        """Add a fresh row and a copy of a row; keep at most six."""
        state = self.current_state()
        row = self.number(0, len(self.documents) - 1)
        fresh = mo.MegalodonState.fresh(self.model.config, 1, dtype=self.dtype)
        self.state = mo.MegalodonState.cat([fresh, state, state[[row]]])
        self.documents = [Document(), *self.documents, self.documents[row].copy()][:6]
        self.state = self.state[: len(self.documents)]

    def reset(self) -> None:
        """Begin new documents in some of the rows."""
        rows = [row for row in range(len(self.documents)) if self.number(0, 1)]
        self.state = self.current_state().reset(rows)
        self.finished += [self.documents[row] for row in rows]
        self.documents = [Document() if row in rows else old for row, old in enumerate(self.documents)]

    def through_file(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "state.safetensors")
            self.current_state().save(path, self.model.config)
            self.state = mo.MegalodonState.load(path, self.model.config)

    @torch.no_grad()
    def act(self, name: str) -> None:
        getattr(self, name)()

    @torch.no_grad()
    def check(self) -> None:
        for document in filter(lambda document: document.tokens, self.finished + self.documents):
            whole = self.model(torch.tensor([document.tokens]))[0]
            error = (torch.stack(document.logits) - whole).abs().max().item()
            assert error <= TOLERANCE[self.dtype], f"{error:.1e} after {len(document.tokens)} tokens"


FEEDS = ["feed", "feed_padded", "feed_packed", "decode"]
CHANGES = ["select", "join", "reset", "through_file"]


@pytest.mark.parametrize(("variant", "dtype"), [*zip(VARIANTS, itertools.cycle(TOLERANCE))], ids=str)
def test_every_change_between_pieces_in_every_configuration(variant, dtype):
    run = Run(tiny_model(dtype, **variant).eval(), dtype, rows=3, seed=0)
    for change in CHANGES:
        for feed in FEEDS:
            run.act(feed)
        run.act(change)
    run.act("feed")
    run.check()


@st.composite
def configurations(draw: st.DrawFn) -> dict:
    heads = draw(st.sampled_from([1, 2, 4]))
    config = {name: draw(st.booleans()) for name in FLAGS} | dict(num_heads=heads)
    config |= dict(z_dim=2 * heads * draw(st.integers(1, 5)), value_dim=heads * draw(st.integers(1, 9)))
    config |= dict(num_layers=draw(st.integers(1, 3)), ffn_hidden_dim=draw(st.integers(1, 50)))
    choices = dict(cema_ndim=[1, 2, 4, 16, 17, 32], chunk_size=[1, 2, 5, 8, 16, 33], norm_num_groups=[1, 2, 8, 32])
    choices |= dict(rope_base=[None, 50.0], norm_eps=[1e-5, 1e-3])
    return config | {name: draw(st.sampled_from(values)) for name, values in choices.items()}


def check_a_run(config, dtype, rows, actions, seed):
    run = Run(tiny_model(dtype, **config).eval(), dtype, rows, seed)
    for action in actions:
        run.act(action)
    run.check()


ACTIONS = st.lists(st.sampled_from(FEEDS + CHANGES), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**32 - 1)
RANDOM_RUNS = given(configurations(), st.sampled_from(list(TOLERANCE)), st.integers(1, 4), ACTIONS, SEEDS)
test_random_runs = RANDOM_RUNS(check_a_run)
test_many_runs = pytest.mark.slow(settings(max_examples=300)(RANDOM_RUNS(check_a_run)))


def test_a_wrong_run_is_found():
    """Swapped rows of the state, and a piece that is not recorded."""
    model = tiny_model().eval()
    for wrong in (
        lambda run: run.state[[1, 0]],
        lambda run: run.model(run.tokens(2, 1), state=run.state, return_state=True)[1],
    ):
        run = Run(model, torch.float64, rows=2, seed=0)
        run.act("feed")
        with torch.no_grad():
            run.state = wrong(run)
        run.act("feed")
        with pytest.raises(AssertionError, match="after"):
            run.check()

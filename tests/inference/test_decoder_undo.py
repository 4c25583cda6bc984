"""`Decoder(undo=n)` takes tokens back: they leave no trace in states and logits, across the ends of chunks, too."""

import itertools

import pytest
import torch
from assertions import assert_refuses, every_case
from decoding import DTYPES, model_and_state
from models import TINY, tokens_of

import megalodon_ops as mo
from megalodon_ops.model.model_state import named_tensors
from megalodon_ops.ops.linear.linear import most_few_rows

VARIANTS = {
    "plain": {},
    "memory": dict(working_memory=True),
    "two chunks": dict(visible_chunks=2),
    "memory, two chunks": dict(working_memory=True, visible_chunks=2),
}
CHUNK, UNDO = 16, 5
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def draw(rows, length, generator):
    return torch.randint(TINY["vocab_size"], (rows, length), generator=generator)


def valid(state):
    """The tensors of a state, with zeros in the rows of the caches that nothing reads."""
    tensors = {name: tensor.clone() for name, tensor in named_tensors(state).items()}
    for name, tensor in tensors.items():
        if name.endswith((".k", ".v", ".memory_k")):
            for row, position in zip(tensor, state.layers[0].attention.position.tolist(), strict=True):
                row[position:] = 0
    return tensors


def assert_bits(found, expected):
    found, expected = valid(found), valid(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_close(found, expected, bound):
    found, expected = valid(found), valid(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= bound, name


class Kept:
    """A decoder by the model's layers that never reads tokens that are taken back."""

    def __init__(self, model, state):
        self.model = model
        most_tokens = most_few_rows(state.layers[0].attention.v.dtype) // state.norm.count.numel()  # per row, in a step
        self.longest = min(2 * UNDO + 1, most_tokens) if most_tokens > UNDO else 2 * UNDO + 1
        self.calls = []  # state before each call, and its tokens
        self.base = state  # after the calls
        self.pending = None  # tokens that the next call reads before its own

    @torch.no_grad()
    def read(self, tokens, state):
        return self.model(tokens, state=state, return_state=True)

    def __call__(self, tokens):
        read = tokens if self.pending is None else torch.cat([self.pending, tokens], 1)
        logits = []
        if read.shape[1] > self.longest:  # only the last tokens can be taken back
            first, self.base = self.read(read[:, : -UNDO - 1], self.base)
            read = read[:, -UNDO - 1 :]
            self.calls = []
            logits.append(first)
        self.calls.append((self.base, read.clone()))
        last, self.base = self.read(read, self.base)
        self.pending = None
        return torch.cat([*logits, last], 1)[:, -tokens.shape[1] :]

    def undo(self, count):
        pending = 0 if self.pending is None else self.pending.shape[1]
        while count > pending:
            count -= pending
            self.base, self.pending = self.calls.pop()
            pending = self.pending.shape[1]
        if pending:
            self.pending = self.pending[:, : pending - count] if count < pending else None

    @property
    def state(self):
        return self.base if self.pending is None else self.read(self.pending, self.base)[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_are_those_of_a_decoder_that_never_read_what_is_taken_back(variant):
    """Parts of calls and several calls are taken back, in two steps; reading states and changing tokens have no effect."""
    with every_case() as case:
        for seed, dtype in enumerate(DTYPES):
            generator = torch.Generator().manual_seed(seed)
            model, state = model_and_state(dtype, rows=2, seen=3 + 5 * seed, chunk_size=CHUNK, **VARIANTS[variant])
            decoder, kept = mo.Decoder(model, state, undo=UNDO), Kept(model, state)
            most = 0  # tokens that can be taken back
            for turn, length in enumerate([6, 6, 6, 6, 1, 1, 1, 2, 1, 6, 3, 17, 6, 2, 6, 1]):
                tokens = draw(2, length, generator)
                most = min(most + length, UNDO)
                first = int(torch.randint(most + 1, (), generator=generator)) if turn % 3 else 1
                second = int(torch.randint(most - first + 1, (), generator=generator)) if turn % 4 == 0 else 0
                with case(f"{dtype}, turn {turn}"):
                    expected = kept(tokens)
                    assert torch.equal(decoder(tokens), expected)
                    tokens.zero_()
                    kept.undo(first)
                    kept.undo(second)
                    if turn % 2:
                        assert_bits(decoder.state_before(first + second), kept.state)
                    decoder.undo(first)
                    decoder.undo(second)
                    most -= first + second
                    assert_bits(decoder.state, kept.state)
            assert decoder.fused and decoder.state.norm.count.min() > 2 * CHUNK


def test_rows_that_keep_different_numbers_are_read_with_lengths():
    """A row that keeps all of its tokens keeps its bits."""
    for variant in VARIANTS.values():
        model, state = model_and_state(rows=4, seen=CHUNK - 3, chunk_size=CHUNK, **variant)
        decoder, plain = mo.Decoder(model, state, undo=UNDO), mo.Decoder(model, state)
        tokens = tokens_of(4, 5)
        decoder(tokens)
        plain(tokens)
        decoder.undo(torch.tensor([3, 0, 1, 5]))
        with torch.no_grad():
            options = dict(return_state=True, lengths=torch.tensor([2, 4]))
            _, read = model(tokens[[0, 2], :4], state=state[[0, 2]], **options)
        expected = mo.MegalodonState.cat([read[[0]], plain.state[[1]], read[[1]], state[[3]]])
        assert_bits(decoder.state, expected)
        assert torch.equal(decoder(tokens), mo.Decoder(model, expected)(tokens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_take_back_parts_of_a_call(variant):
    """Each row its own number; the bits do not depend on the tokens that are taken back, and the state is that of the others."""
    rows, bound = 3, 1e-11
    generator = torch.Generator().manual_seed(0)
    model, state = model_and_state(torch.float64, rows=rows, seen=4, chunk_size=CHUNK, **VARIANTS[variant])
    decoders = [mo.Decoder(model, state, undo=UNDO) for _ in range(2)]
    single = [mo.Decoder(model, state[[row]]) for row in range(rows)]
    for length in [6, 3, 6, 5, 6, 2, 6, 6, 4, 6] * 2:
        counts = torch.randint(min(length, UNDO) + 1, (rows,), generator=generator)
        read = [draw(rows, length, generator) for _ in decoders]
        is_kept = torch.arange(length) < length - counts[:, None]
        read[1] = read[0].where(is_kept, read[1])
        for decoder, tokens in zip(decoders, read, strict=True):
            decoder(tokens)
            decoder.undo(counts)
        assert_bits(decoders[0].state, decoders[1].state)
        for row, one in enumerate(single):
            one(read[0][row : row + 1, : length - int(counts[row])])
        assert_close(decoders[0].state, mo.MegalodonState.cat([one.state for one in single]), bound)
    token = draw(rows, 1, generator)
    expected = torch.cat([one(token[row : row + 1]) for row, one in enumerate(single)])
    assert (decoders[0](token) - expected).abs().max() <= bound


@pytest.mark.parametrize("missing_values", [False, True])
def test_numbers_are_taken_back(missing_values):
    sizes = {name: size for name, size in TINY.items() if name != "vocab_size"} | dict(chunk_size=CHUNK)
    config = mo.MegalodonConfig(**sizes, num_features=3, missing_values=missing_values)
    torch.manual_seed(0)
    model, x = mo.Megalodon(config).eval(), 5 + torch.randn(2, 40, 3)
    if missing_values:
        x[:, ::4, 1] = torch.nan
    _, state = model(x[:, :7], return_state=True)
    decoder, other = (mo.Decoder(model, state, undo=UNDO) for _ in range(2))
    for begin in range(7, 37, 3):
        assert torch.equal(decoder(x[:, begin : begin + 3]), other(x[:, begin : begin + 3]))
        decoder(9 * x[:, 2:3])
        decoder(-x[:, 3:6])
        decoder.undo(4)
        assert_bits(decoder.state, other.state)
    decoder(torch.cat([x[:, 37:39], x[:, :2]], 1))
    decoder.undo(2)
    assert torch.equal(decoder(x[:, 39:]), other(x[:, 37:])[:, 2:])
    assert_bits(decoder.state, other.state)


def test_rows_that_are_moved_or_replaced_have_no_past():
    """Rows that took back different numbers of tokens are still copied from where they diverge."""
    for variant in ("plain", "memory, two chunks"):
        model, state = model_and_state(rows=3, seen=14, chunk_size=CHUNK, **VARIANTS[variant])
        tokens = tokens_of(3, 9)
        decoder, other = (mo.Decoder(model, state, undo=UNDO) for _ in range(2))
        decoder.reorder(torch.tensor([0, 0, 0]))
        decoder(tokens[:, :4])
        decoder.undo(torch.tensor([3, 1, 0]))
        decoder(tokens[:, 4:7])
        expected = decoder.state[[1, 2, 2]]
        decoder.reorder(torch.tensor([1, 2, 2]))
        assert_bits(decoder.state, expected)
        assert_refuses(ValueError, "Decoder", "counts", lambda: decoder.undo(1))  # noqa: B023
        decoder(tokens[:, :4])
        decoder.undo(1)  # these rows are read before they move or are replaced
        expected = decoder.state
        decoder.reorder(torch.tensor([2, 1, 0]))
        assert_bits(decoder.state, expected[[2, 1, 0]])
        decoder(tokens[:, :4])
        decoder.undo(3)
        expected = decoder.state
        decoder.replace(torch.tensor([1]), state[[0]])
        assert_bits(decoder.state, mo.MegalodonState.cat([expected[[0]], state[[0]], expected[[2]]]))
        decoder, before = mo.Decoder(model, state, undo=UNDO), other.state
        decoder(tokens[:, :4])
        other(tokens[:, :4])
        decoder.replace(torch.tensor([1]), before[[1]])
        assert_refuses(ValueError, "Decoder", "counts", lambda: decoder.undo(1))  # noqa: B023
        decoder(tokens[:, 5:6])
        other(tokens[:, 5:6])
        decoder.undo(torch.tensor([5, 1, 0]))
        assert_bits(decoder.state[:2], before[:2])
        assert_bits(decoder.state[[2]], other.state[[2]])


def test_long_calls_keep_their_last_tokens_and_old_calls_are_dropped():
    model, state = model_and_state(rows=1, chunk_size=CHUNK)
    decoder, other = mo.Decoder(model, state, undo=2), mo.Decoder(model, state)
    tokens = tokens_of(1, 70)
    assert (decoder(tokens[:, :60]) - other(tokens[:, :60])).abs().max() < 1e-4
    assert_refuses(ValueError, "Decoder", "counts", lambda: decoder.undo(3))
    decoder.undo(2)
    assert decoder.state.norm.count.item() == 5 + 58
    for token in tokens[:, 60:].split(1, 1):
        decoder(token)
    assert len(decoder._history._calls) == 2
    for _ in range(10):  # nothing stays of calls that were taken back
        decoder(tokens[:, :2])
        decoder.undo(2)
    assert len(decoder._history._calls) == 0
    assert decoder.state.norm.count.item() == 5 + 68


def test_tokens_of_several_chunks_are_taken_back():
    """Also if a call is longer than a chunk."""
    for chunk_size, variant in itertools.product((CHUNK, 3), VARIANTS.values()):
        model, state = model_and_state(torch.float64, rows=2, seen=11, chunk_size=chunk_size, **variant)
        decoder, other = (mo.Decoder(model, state, undo=60) for _ in range(2))
        for tokens in tokens_of(2, 60).split(7, 1):
            decoder(tokens)
        decoder.undo(torch.tensor([60, 27]))
        assert_bits(decoder.state[[0]], other.state[[0]])
        for tokens in tokens_of(2, 60)[:, :33].split(7, 1):
            other(tokens)
        assert_close(decoder.state[[1]], other.state[[1]], 1e-11)


def test_calls_without_tokens():
    model, state = model_and_state(rows=1)
    decoder, other = (mo.Decoder(model, state, undo=UNDO) for _ in range(2))
    tokens = tokens_of(1, 3)
    assert decoder(tokens[:, :0]).shape[:2] == (1, 0)
    decoder(tokens)
    decoder.undo(2)
    other(tokens[:, :1])
    assert decoder(tokens[:, :0]).shape[:2] == (1, 0)  # reads the kept token
    assert torch.equal(decoder(tokens[:, 1:]), other(tokens[:, 1:]))


def test_kept_tokens_are_read_in_the_next_call():
    """Up to 2 undo + 1 tokens at once; also by modules that were hooked."""
    model, state = model_and_state(chunk_size=64)
    widths, tokens = [], tokens_of(1, 6)
    model.layers[0].mega.cema.register_forward_hook(lambda module, args, y: widths.append(args[0].shape[1]))
    with pytest.warns(UserWarning, match="layers.0.mega.cema"):
        decoder = mo.Decoder(model, state, undo=UNDO)
    for _ in range(8):  # each call keeps one token, which is read again in the next one
        assert decoder(tokens).shape[1] == 6
        decoder.undo(UNDO)
    assert widths == [6, 7, 8, 9, 10, 11, 6, 6, 7]
    decoder(tokens[:, :1])  # nothing is taken back
    assert widths[9:] == [3] and decoder(tokens).shape[1] == 6 and widths[10:] == [6]


def test_errors():
    model, state = model_and_state(rows=2, chunk_size=CHUNK)
    for wrong in (-1, 2**31, 1.0, True, None):
        assert_refuses((ValueError, TypeError), "Decoder", "undo", lambda: mo.Decoder(model, state, undo=wrong))  # noqa: B023
    assert_refuses(ValueError, "Decoder", "undo", lambda: mo.Decoder(model, state).undo(0))
    decoder, tokens = mo.Decoder(model, state, undo=UNDO), tokens_of(2, 3)
    decoder(tokens)
    for wrong in (-1, 4, 1.0, torch.ones(3, dtype=torch.int64), torch.ones(2), torch.tensor([0, 4])):
        assert_refuses((ValueError, TypeError), "Decoder", "counts", lambda: decoder.undo(wrong))  # noqa: B023
    before = decoder.state
    for length in (1, 3):  # refused before anything is read
        with pytest.raises(IndexError, match="got 31"):
            decoder(torch.full((2, length), 31))
    assert_bits(decoder.state, before)
    decoder.undo(torch.tensor([3, 0], dtype=torch.int32))
    assert decoder.state.norm.count.tolist() == [5, 8]

"""Strings that end a text whose tokens come one by one."""

import hypothesis.strategies as st
import pytest
from assertions import assert_refuses
from hypothesis import example, given

import megalodon_ops as mo

TEXT = st.text(alphabet="ab\né€😀", max_size=60)
STRINGS = st.lists(st.text(alphabet="ab\né", min_size=1, max_size=4), max_size=3)


def text_until_stop(decode, strings, tokens):
    """Return the text of the tokens and True if a string was found."""
    stop, parts = mo.StopStrings(decode, strings), []
    for token in tokens:
        parts.append(stop.add(token))
        if stop.stopped:
            break
    stopped = stop.stopped
    return b"".join([*parts, stop.rest()]), stopped


def text_before_strings(parts, strings):
    """Return the text before the string that begins first when a part completes one, and True if there is one."""
    text = b""
    for part in parts:
        text += part
        if starts := [at for s in strings if (at := text.find(s.encode())) >= 0]:
            return text[: min(starts)], True
    return text, False


@given(text=TEXT, strings=STRINGS, cuts=st.lists(st.integers(0, 240), max_size=40))
@example(text="xaab", strings=["b", "ab"], cuts=[])
@example(text="xaab", strings=["b", "ab"], cuts=[1, 3])
def test_the_text_ends_before_the_first_string(text, strings, cuts):
    content, bounds = text.encode(), sorted({0, *cuts})
    vocabulary = [content[a:b] for a, b in zip(bounds, [*bounds[1:], None], strict=True)]
    found = text_until_stop(lambda tokens: b"".join(vocabulary[t] for t in tokens), strings, range(len(vocabulary)))
    assert found == text_before_strings(vocabulary, strings)


@given(text=TEXT, strings=STRINGS)
@example(text="xab", strings=["b", "ab"])
def test_bytes_as_tokens(text, strings):
    content = text.encode()
    assert text_until_stop(bytes, strings, content) == text_before_strings([bytes([byte]) for byte in content], strings)


@given(text=TEXT, strings=STRINGS)
def test_a_decoder_of_text_shows_unfinished_characters_as_replacements(text, strings):
    content = text.encode()
    found = text_until_stop(lambda tokens: bytes(tokens).decode(errors="replace").encode(), strings, content)
    assert found[1] == any(s.encode() in content for s in strings)
    assert content.startswith(found[0]) and (found[1] or found[0] == content)


def test_a_token_may_end_inside_a_character():
    content = "é".encode() * 300
    vocabulary = [content[0:1], content[1:3]]  # the second: the end of one character, the beginning of the next
    decode = lambda tokens: b"".join(vocabulary[t] for t in tokens).decode(errors="replace").encode()  # noqa: E731
    assert text_until_stop(decode, ["x"], [0] + [1] * 299) == ("é".encode() * 299 + "\ufffd".encode(), False)


def test_a_decoder_that_drops_the_first_space_keeps_the_others():
    words = ["▁the", "▁cat", "s", "▁sat"] * 40
    decode = lambda tokens: "".join(words[t] for t in tokens).replace("▁", " ").removeprefix(" ").encode()  # noqa: E731
    found, stopped = text_until_stop(decode, ["dog"], range(len(words)))
    assert found == decode(range(len(words))) and not stopped


def test_text_comes_as_soon_as_it_is_certain():
    stop = mo.StopStrings(bytes, ["<end>"])
    parts = [stop.add(token) for token in b"a<e<end>b"]
    assert parts == [b"a", b"", b"", b"<e", b"", b"", b"", b"", b""] and stop.stopped and stop.rest() == b""
    stop = mo.StopStrings(bytes, "<end>")
    assert [stop.add(token) for token in b"a<e"] == [b"a", b"", b""] and stop.rest() == b"<e" and stop.rest() == b""


def test_decoding_takes_the_last_tokens_alone():
    longest = 0

    def decode(tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return bytes(tokens)

    assert text_until_stop(decode, [], b"x" * 500) == (b"x" * 500, False) and longest < 40


@pytest.mark.parametrize("strings", [[""], [b""], [3], ["a", None]])
def test_wrong_strings_are_refused(strings):
    assert_refuses(ValueError, "StopStrings", "strings", lambda: mo.StopStrings(bytes, strings))

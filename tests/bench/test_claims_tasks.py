"""Generators of the tasks, against answers found by reading the example."""

import itertools
import re
import statistics
from collections import Counter

import numpy
import pytest

pytest.importorskip("transformers")

from bench.claims import tasks  # noqa: E402
from bench.claims.tasks import NONE, TASKS  # noqa: E402

TEXT = bytes(itertools.islice(itertools.cycle(b"to be or not to be, that is the question\n"), 5000))


def examples(name, count, length, seed=0, **settings):
    text = {"text": TEXT} if TASKS[name].needs_text else {}
    tokens, targets = TASKS[name].examples(numpy.random.default_rng(seed), count, length, **text, **settings)
    assert tokens.shape == targets.shape == (count, length) and 0 <= int(tokens.min()) and int(tokens.max()) < 257
    return zip(tokens.tolist(), targets.tolist(), strict=True)


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_determines_the_examples(name):
    first, second, other = ([*examples(name, 3, 128, seed)] for seed in (0, 0, 1))
    assert first == second and first != other


@pytest.mark.parametrize("name", TASKS)
def test_the_likeliest_answer_is_right_as_often_as_a_guess(name):
    counts = Counter(
        target
        for _, targets in examples(name, 400, 128)
        for target in targets[-(TASKS[name].last or 0) :]
        if target != NONE
    )
    total = counts.total()
    share = max(counts.values()) / total
    spread = (TASKS[name].guess * (1 - TASKS[name].guess) / total) ** 0.5
    assert TASKS[name].guess - 3 * spread < share < TASKS[name].guess + 5 * spread


@pytest.mark.parametrize(("length", "pairs"), [(128, 8), (128, 32), (1024, 8), (16, 2)])
def test_mqar(length, pairs):
    for tokens, targets in examples("mqar", 8, length, pairs=pairs):
        queries = [t for t, target in enumerate(targets) if target != NONE]
        assert queries == [*range(length - length // 4, length)]
        for t in queries:
            keys = [i for i in range(0, 2 * pairs, 2) if tokens[i] == tokens[t]]
            assert len(keys) == 1 and tokens[keys[0] + 1] == targets[t]
        others = set(range(2 * pairs, length)) - set(queries)
        assert all(tokens[t] == 0 for t in others)
        assert all(1 <= tokens[i] <= 32 < tokens[i + 1] <= 64 for i in range(0, 2 * pairs, 2))


def test_mqar_needs_room_for_its_pairs():
    with pytest.raises(ValueError, match="`pairs` must be at most 24 in 64 tokens, got 25"):
        tasks.mqar(numpy.random.default_rng(0), 1, 64, pairs=25)


def test_parity():
    for tokens, targets in examples("parity", 8, 50):
        assert targets == [sum(tokens[: i + 1]) % 2 for i in range(50)] and {*tokens} == {0, 1}


def test_s5():
    assert len({*tasks.PERMUTATIONS}) == 120
    for tokens, targets in examples("s5", 4, 40):
        places = [0, 1, 2, 3, 4]  # where five balls lie
        for token, target in zip(tokens, targets, strict=True):
            places = [tasks.PERMUTATIONS[token][place] for place in places]
            assert places == list(tasks.PERMUTATIONS[target])


@pytest.mark.parametrize("length", [16, 128, 1024])
def test_selective_copying(length):
    for tokens, targets in examples("selective copying", 8, length):
        letters = [token for token in tokens[:-8] if token]
        assert len(letters) == 8 and targets == [NONE] * (length - 8) + letters and tokens[-8:] == [17] * 8


@pytest.mark.parametrize("length", [128, 1024])
def test_needle(length):
    depths = []
    for tokens, targets in examples("needle", 16, length):
        row = bytes(tokens)
        name = re.search(rb"\nThe code of ([a-z]{4}) is \d{4}$", row)[1]
        (found,) = re.finditer(rb"\nThe code of %s is (\d{5})\.\n" % name, row)
        assert bytes(targets[-5:]) == found[1] and targets[:-5] == [NONE] * (length - 5)
        assert row[-4:] == found[1][:4]  # the last digit is a target, not a token
        hay = row[: found.start()] + row[found.end() : row.rindex(b"\nThe code of")]
        assert hay in TEXT
        depths.append(found.start())
    assert max(depths) - min(depths) > (length - 60) / 2


FUNCTIONS = {"MIN": min, "MAX": max, "SM": lambda v: sum(v) % 10, "MED": lambda v: int(statistics.median(v))}


def value(words):
    """Value of an expression, read from the left with a stack of open operators."""
    stack = [[]]
    for word in words:
        if word == "]":
            name, *values = stack.pop()
            stack[-1].append(FUNCTIONS[name](values))
        elif word.isdigit():
            stack[-1].append(int(word))
        else:
            stack.append([word])
    ((result,),) = stack
    return result


@pytest.mark.parametrize("length", [32, 256])
def test_listops(length):
    words = {1 + digit: str(digit) for digit in range(10)} | {15: "]"}
    words |= {i: name for name, i in tasks.OPERATORS.items()}
    for tokens, targets in examples("listops", 12, length):
        size = max(i for i, token in enumerate(tokens) if token) + 1
        expression = [words[token] for token in tokens[:size]]
        assert length // 2 < size <= length and not any(tokens[size:])
        assert targets == [NONE] * (size - 1) + [1 + value(expression)] + [NONE] * (length - size)
        depth = deepest = 0
        counts = [0]
        for word in expression:
            if word == "]":
                assert 2 <= counts.pop() <= 10
                depth -= 1
            elif word.isdigit():
                counts[-1] += 1
            else:
                counts[-1] += 1
                counts.append(0)
                depth += 1
                deepest = max(deepest, depth)
        assert deepest < tasks.DEPTH and counts == [1]


def test_values_of_operators():
    assert tasks.value_of("MED", [1, 4]) == 2 and tasks.value_of("MED", [9, 1, 5]) == 5
    assert [tasks.value_of(name, [9, 9, 5]) for name in ("SM", "MIN", "MAX")] == [3, 5, 9]

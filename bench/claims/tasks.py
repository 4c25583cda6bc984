"""Tasks with generated examples, whose targets follow from the tokens before them.

A task returns tokens (B, L) and targets (B, L), int64 below 257; -100 means no target. `random` determines the examples.

    mqar               keys and values, then some of the keys; target of such a key: its value (Zoology, 2312.04927)
    parity             bits; targets: parity of the bits so far
    s5                 permutations of five elements; targets: product of the permutations so far
    selective copying  letters among noise; targets at the end: the letters in order (Mamba, 2312.00752)
    needle             text with a sentence that gives a name a code, and a question at the end; targets: the code's digits
    listops            a nested expression of MIN, MAX, MED and SM (sum modulo 10); target at its end: its value (Long Range Arena)
"""

import itertools
import random as python_random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

NONE = -100
KEYS = 32  # of mqar
LETTERS, QUERY, COPIES = 16, 17, 8  # of selective copying: numbers of letters, the query's id, letters of a row
DIGITS = 5  # of a needle's code
PERMUTATIONS = list(itertools.permutations(range(5)))  # s5
Examples = tuple[numpy.ndarray, numpy.ndarray]


def _blank(count: int, length: int) -> Examples:
    return numpy.zeros((count, length), numpy.int64), numpy.full((count, length), NONE, numpy.int64)


def mqar(random: numpy.random.Generator, count: int, length: int, pairs: int = 8) -> Examples:
    """`pairs` distinct keys 1..32, each followed by its value 33..64, then zeros, then random ones of the keys in the last quarter.

    The zeros make the distance from a key to its query grow with the length.
    """
    begin = length - length // 4
    if not 2 * pairs <= min(begin, 2 * KEYS):
        raise ValueError(f"mqar: `pairs` must be at most {min(begin // 2, KEYS)} in {length} tokens, got {pairs}.")
    tokens, targets = _blank(count, length)
    for row in range(count):
        keys = 1 + random.permutation(KEYS)[:pairs]
        values = 1 + KEYS + random.integers(KEYS, size=pairs)
        tokens[row, 0 : 2 * pairs : 2] = keys
        tokens[row, 1 : 2 * pairs : 2] = values
        queries = random.integers(pairs, size=length - begin)
        tokens[row, begin:] = keys[queries]
        targets[row, begin:] = values[queries]
    return tokens, targets


def parity(random: numpy.random.Generator, count: int, length: int) -> Examples:
    bits = random.integers(2, size=(count, length))
    return bits, numpy.bitwise_xor.accumulate(bits, axis=1)


def _products() -> numpy.ndarray:
    """Table (120, 120): index of the permutation that applies the first, then the second."""
    number = {permutation: i for i, permutation in enumerate(PERMUTATIONS)}
    return numpy.array([[number[tuple(b[i] for i in a)] for b in PERMUTATIONS] for a in PERMUTATIONS])


PRODUCTS = _products()


def s5(random: numpy.random.Generator, count: int, length: int) -> Examples:
    """Indices of PERMUTATIONS, and the index of the product up to each position."""
    tokens = random.integers(len(PERMUTATIONS), size=(count, length))
    targets = numpy.empty((count, length), numpy.int64)
    product = tokens[:, 0]
    targets[:, 0] = product
    for t in range(1, length):
        product = PRODUCTS[product, tokens[:, t]]
        targets[:, t] = product
    return tokens, targets


def selective_copying(random: numpy.random.Generator, count: int, length: int) -> Examples:
    """8 letters 1..16 at random positions among zeros, then 8 tokens 17, whose targets are the letters in order."""
    tokens, targets = _blank(count, length)
    for row in range(count):
        positions = numpy.sort(random.permutation(length - COPIES)[:COPIES])
        letters = 1 + random.integers(LETTERS, size=COPIES)
        tokens[row, positions] = letters
        tokens[row, -COPIES:] = QUERY
        targets[row, -COPIES:] = letters
    return tokens, targets


def needle(random: numpy.random.Generator, count: int, length: int, text: bytes) -> Examples:
    """A piece of `text` with the needle at a random depth; the row ends before the code's last digit, which is a target."""
    tokens, targets = _blank(count, length)
    for row in range(count):
        name = bytes((97 + random.integers(26, size=4)).tolist())
        code = b"%0*d" % (DIGITS, random.integers(10**DIGITS))
        sentence = b"\nThe code of %s is %s.\n" % (name, code)
        question = b"\nThe code of %s is " % name
        hay = length - len(sentence) - len(question) - DIGITS + 1
        begin, depth = random.integers(len(text) - hay), random.integers(hay + 1)
        straw = text[begin : begin + hay]
        whole = straw[:depth] + sentence + straw[depth:] + question + code
        tokens[row] = numpy.frombuffer(whole[:-1], numpy.uint8)
        targets[row, -DIGITS:] = numpy.frombuffer(code, numpy.uint8)
    return tokens, targets


OPERATORS = {"MIN": 11, "MAX": 12, "MED": 13, "SM": 14}
CLOSE = 15
"""Ids; the digit d has 1 + d, and 0 is padding. As in Long Range Arena, an operator includes its opening bracket, and there are
no parentheses"""
VALUES = 10
DEPTH, ARGUMENTS, NESTED = 10, 10, 0.25
"""Maximum depth, maximum arguments of an operator, probability of an operator"""


def listops(random: numpy.random.Generator, count: int, length: int) -> Examples:
    """Expressions of more than half and at most `length` tokens, padded on the right; the target is at the last bracket.

    By the rules of Long Range Arena (lra_benchmarks/data/listops.py of google-research/long-range-arena): at a depth below 10,
    a node is an operator of 2 to 10 arguments with probability 1/4, otherwise a digit; MED is the median rounded down.
    Expressions of other lengths are rejected.
    """
    draw = python_random.Random(int(random.integers(2**62)))
    tokens, targets = _blank(count, length)
    for row in range(count):
        while True:
            ids, value = expression(draw, length)
            if length // 2 < len(ids) <= length:
                break
        tokens[row, : len(ids)] = ids
        targets[row, len(ids) - 1] = 1 + value
    return tokens, targets


class _TooLong(Exception):
    pass


def expression(draw: python_random.Random, limit: int) -> tuple[list[int], int]:
    """Ids of an expression, and its value; no ids if there are more than `limit`."""
    ids: list[int] = []

    def node(depth: int) -> int:
        if len(ids) >= limit:
            raise _TooLong
        if depth >= DEPTH or draw.random() > NESTED:
            value = draw.randrange(VALUES)
            ids.append(1 + value)
            return value
        name = draw.choice([*OPERATORS])
        ids.append(OPERATORS[name])
        values = [node(depth + 1) for _ in range(draw.randint(2, ARGUMENTS))]
        ids.append(CLOSE)
        return value_of(name, values)

    try:
        value = node(1)
    except _TooLong:
        return [], 0
    return ids, value


def value_of(name: str, values: list[int]) -> int:
    ordered = sorted(values)
    middle = len(values) // 2
    median = ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    return {"MIN": ordered[0], "MAX": ordered[-1], "MED": median, "SM": sum(values) % 10}[name]


@dataclass(frozen=True)
class Task:
    """A task and its training length."""

    sample: Callable[..., Examples]
    guess: float
    """share of right targets if every answer is the most frequent one"""
    length: int = 128
    last: int | None = None
    """count only the targets of this many last tokens; None: all targets"""
    harder_settings: tuple[dict[str, Any], ...] = field(default=())
    """also evaluated, at the training length"""
    needs_text: bool = False

    def examples(
        self, random: numpy.random.Generator, count: int, length: int, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        tokens, targets = self.sample(random, count, length, **settings)
        return torch.from_numpy(tokens), torch.from_numpy(targets)


TASKS = {
    "mqar": Task(mqar, 1 / KEYS, harder_settings=({"pairs": 16}, {"pairs": 32})),
    "parity": Task(parity, 1 / 2, last=16),
    "s5": Task(s5, 1 / len(PERMUTATIONS), last=16),
    "selective copying": Task(selective_copying, 1 / LETTERS),
    "needle": Task(needle, 1 / 10, needs_text=True),
    "listops": Task(listops, 0.155),  # from 20,000 expressions of 128 tokens; 0 and 9 are the most frequent
}

"""Generated long rows to classify: an expression, a picture read pixel by pixel, a second of sound.

    listops      a nested expression of MIN, MAX, MED and SM (sum modulo 10), by the rules of Long Range Arena; label: its value
    pathfinder   two dashed curves and two dots in 32 x 32 pixels; label: 1 if the dots are the ends of one curve
    words        a second at 16 kHz of a voice that speaks one of ten words of two vowels; label: the word

A task returns inputs, lengths (B,) and labels (B,) as torch tensors; inputs are tokens (B, L), padded with 0 on the right, or
numbers (B, L, 1). `random` determines the examples.
"""

import itertools
import random as python_random

import numpy
import torch
from numpy.random import Generator
from torch import Tensor

from .tasks import expression

Examples = tuple[Tensor, Tensor, Tensor]


def listops(random: Generator, count: int, longest: int) -> Examples:
    """Expressions of `tasks.expression` with more than a quarter of `longest` tokens, and at most `longest`.

    Expressions of other lengths are rejected. A `longest` of 2,000 gives Long Range Arena's bounds.
    """
    draw = python_random.Random(int(random.integers(2**62)))
    drawn = (expression(draw, longest) for _ in itertools.count())
    fitting = ((ids, value) for ids, value in drawn if longest < 4 * len(ids) <= 4 * longest)
    rows, labels = zip(*itertools.islice(fitting, count))
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True)
    return tokens, torch.tensor([len(ids) for ids in rows]), torch.tensor(labels)


SIDE = 32
CURVE_LENGTH = 24  # moves of one pixel
MIN_DISTANCE = 3  # of a curve from other curves and from its own distant parts
BEND = 0.3  # standard deviation of a move's turn, in radians
Curve = list[tuple[int, int]]


def pathfinder(random: Generator, count: int, longest: int = SIDE**2) -> Examples:
    """Pictures of two separate curves with a dot on an end of the first, and one on its other end (label 1) or the second's."""
    labels = random.integers(2, size=count)
    pictures = []
    for same in labels:
        first, second = curves(random)
        other = first[-1] if same else second[random.integers(2) - 1]
        pictures.append(picture((first, second), (first[0], other)))
    pixels = torch.tensor(numpy.array(pictures), dtype=torch.float32).flatten(1)[..., None]
    return pixels, torch.full((count,), longest), torch.from_numpy(labels)


def curves(random: Generator, count: int = 2) -> list[Curve]:
    """Pixels of curves, in order along each."""
    while True:
        occupied = numpy.zeros((SIDE, SIDE), bool)
        found = [curve for _ in range(count) if (curve := _curve(random, occupied))]
        if len(found) == count:
            return found


def _curve(random: Generator, occupied: numpy.ndarray) -> Curve | None:
    """A curve in free pixels, marked in `occupied` with its margin; None if it meets a border, another curve or itself."""
    headings = random.uniform(0, 2 * numpy.pi) + random.normal(0, BEND, size=CURVE_LENGTH).cumsum()
    path = random.uniform(2, SIDE - 2, size=2) + numpy.stack((numpy.cos(headings), numpy.sin(headings)), 1).cumsum(0)
    different = dict.fromkeys(map(tuple, numpy.rint(path).astype(int).tolist()))  # in the path's order
    pixels = numpy.array([*different])
    if pixels.min() < 1 or pixels.max() > SIDE - 2 or occupied[tuple(pixels.T)].any():
        return None
    index = numpy.arange(len(pixels))
    far = index[:, None] - index > 2 * MIN_DISTANCE  # along the curve
    if (abs(pixels[:, None] - pixels).max(-1) < MIN_DISTANCE)[far].any():
        return None
    for y, x in pixels:
        rows, columns = (slice(max(0, i - MIN_DISTANCE), i + MIN_DISTANCE + 1) for i in (y, x))
        occupied[rows, columns] = True
    return [*map(tuple, pixels.tolist())]


def picture(lines: tuple[Curve, ...], dots: tuple[tuple[int, int], ...], dash: int = 4) -> numpy.ndarray:
    """Pixels of 0 and 1: each curve without every `dash`-th pixel, each dot 3 x 3."""
    pixels = numpy.zeros((SIDE, SIDE))
    for curve in lines:
        drawn = [pixel for i, pixel in enumerate(curve) if i % dash != dash - 1]
        pixels[tuple(zip(*drawn))] = 1
    for y, x in dots:
        pixels[y - 1 : y + 2, x - 1 : x + 2] = 1
    return pixels


RATE = 16_000
VOWELS = {"u": (300, 700), "o": (500, 1000), "a": (800, 1400), "e": (500, 2000), "i": (300, 2800)}
"""Hz of the two formants"""
WORDS = [*itertools.combinations(VOWELS, 2)]


def words(random: Generator, count: int, longest: int = RATE) -> Examples:
    """Words of two successive vowels with random pitch, tempo, loudness and beginning, in noise; `longest` samples each."""
    labels = random.integers(len(WORDS), size=count)
    sounds = numpy.stack([_word(random, WORDS[label], longest) for label in labels])
    return torch.from_numpy(sounds).float()[..., None], torch.full((count,), longest), torch.from_numpy(labels)


def _word(random: Generator, word: tuple[str, ...], samples: int) -> numpy.ndarray:
    sound = random.normal(0, 0.03, size=samples)
    begin = int(samples * random.uniform(0.02, 0.2))
    pitch = random.uniform(90, 250)  # Hz
    loudness = random.uniform(0.4, 1)
    for vowel in word:
        length = int(samples * random.uniform(0.25, 0.38))
        angle = numpy.arange(length) * 2 * numpy.pi / RATE  # of 1 Hz
        low, high = numpy.array(VOWELS[vowel]) * random.uniform(0.95, 1.05)
        tone = numpy.sin(low * angle) + numpy.sin(high * angle)
        voice = (1 + numpy.cos(pitch * angle)) * numpy.sin(numpy.pi * numpy.arange(length) / length) ** 2
        sound[begin : begin + length] += loudness * voice * tone / 2
        begin += length
    return sound

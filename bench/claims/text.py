"""Text for the claims: whole documents of files, or long documents that are made of them."""

from __future__ import annotations

import glob
import gzip
import hashlib
from pathlib import Path
from typing import NamedTuple

from megalodon_ops.cli.data import find_files, load_corpus
from megalodon_ops.evaluation import Document
from megalodon_ops.training import START, Corpus

LONG = {
    "wordnet": ("/usr/share/wordnet/data.*",),
    "dict-gcide": ("/usr/share/dictd/gcide.dict.dz",),
    "perl-doc": ("/usr/share/perl/5*.*/pod/*.pod",),
    "vim-runtime": ("/usr/share/vim/vim*/doc/*.txt",),
}
"""Packages of Debian with long texts, and their files"""


class LongText(NamedTuple):
    train: list[bytes]
    held_out: bytes
    fingerprint: str
    sources: list[str]


def documents(paths: list[str] | None) -> Corpus:
    """The documents of files and folders, or the standard library's sources, as `train` holds a twentieth of them out."""
    return load_corpus(paths)


def long_text(paths: list[str] | None, held_out: int, books: int) -> LongText:
    """Long documents: all files end to end in the order of their names, but for `held_out` bytes cut into `books` of one length.

    The held-out bytes, one document, are the middle of the text, so that what comes before and after them is like them.
    """
    if paths:
        sources, files = paths, find_files(paths)
    else:
        found = {name: sorted(file for pattern in patterns for file in glob.glob(pattern)) for name, patterns in LONG.items()}
        sources = [name for name, of_package in found.items() if of_package]
        files = [Path(file) for of_package in found.values() for file in dict.fromkeys(map(real, of_package))]
    text = b"\n".join(map(content, files))
    if len(text) < 4 * held_out:
        raise SystemExit(
            f"--data: the text has {len(text):,} bytes, and {4 * held_out:,} are needed; "
            f"apt-get install {' '.join(LONG)}, or name other text"
        )
    begin = (len(text) - held_out) // 2
    rest = text[:begin] + text[begin + held_out :]
    size = -(-len(rest) // books)
    return LongText(
        [rest[i : i + size] for i in range(0, len(rest), size)], text[begin : begin + held_out],
        hashlib.sha256(text).hexdigest(), sources,
    )  # fmt: skip


def real(file: str) -> str:
    """The file that a link names: /usr/share/perl/5.40 is one."""
    return str(Path(file).resolve())


def content(file: Path) -> bytes:
    data = file.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def to_evaluate(texts: list[bytes]) -> list[Document]:
    """Documents of bytes, longest first, which is fastest."""
    return [Document([START, *text], len(text)) for text in sorted(texts, key=len, reverse=True)]

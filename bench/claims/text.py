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
    "perl-doc": ("/usr/share/perl/5.*/pod/perlfunc.pod", "/usr/share/perl/5.*/pod/*.pod"),
    "dict-gcide": ("/usr/share/dictd/gcide.dict.dz", "/usr/share/dictd/gcide.dict.dz"),
    "wordnet-base": ("/usr/share/wordnet/data.noun", "/usr/share/wordnet/data.*"),
}
"""Packages of Debian with long texts: a file that is there where the package is, and the files of its text"""


class LongText(NamedTuple):
    train: list[bytes]
    held_out: dict[str, bytes]
    """by source, equally long documents"""
    fingerprint: str


def documents(paths: list[str] | None) -> Corpus:
    """The documents of files and folders, or the standard library's sources, as `train` holds a twentieth of them out."""
    return load_corpus(paths)


def long_text(paths: list[str] | None, held_out: int, books: int) -> LongText:
    """Long documents: the files of each source end to end in the order of their names. A source is a path, or a package of LONG.

    The middle `held_out` bytes of each source are a document to predict, so that what comes before and after is like it. What
    is left of all sources, end to end, becomes `books` documents of one length to learn from.
    """
    sources = (
        {Path(path).name: find_files([path]) for path in paths} if paths else {name: _files(name) for name in LONG}
    )
    rest, held, digest = [], {}, hashlib.sha256()
    for name, files in sources.items():
        text = b"\n".join(map(content, files))
        if len(text) < 4 * held_out:
            raise SystemExit(f"--data: {name} has {len(text):,} bytes, and {4 * held_out:,} are needed")
        begin = (len(text) - held_out) // 2
        held[name] = text[begin : begin + held_out]
        rest += [text[:begin], text[begin + held_out :]]
        digest.update(text)
    joined = b"".join(rest)
    size = -(-len(joined) // books)
    return LongText([joined[i : i + size] for i in range(0, len(joined), size)], held, digest.hexdigest())


def _files(package: str) -> list[Path]:
    there, files = LONG[package]
    if not glob.glob(there):
        raise SystemExit(f"no text of {package}: apt-get install {' '.join(LONG)}, or name text with --data")
    return [Path(file) for file in sorted({real(file) for file in glob.glob(files)})]


def real(file: str) -> str:
    """The file that a link names: /usr/share/perl/5.40 is one."""
    return str(Path(file).resolve())


def content(file: Path) -> bytes:
    data = file.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def to_evaluate(texts: list[bytes]) -> list[Document]:
    """Documents of bytes, longest first, which is fastest."""
    return [Document([START, *text], len(text)) for text in sorted(texts, key=len, reverse=True)]

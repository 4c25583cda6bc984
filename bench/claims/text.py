"""Text for the claims: whole documents of files, long documents that are made of them, and packages' sources as tokens."""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy

from megalodon_ops.cli.data import find_files, load_corpus
from megalodon_ops.evaluation import Document
from megalodon_ops.tokenizers import Tokenizer, load_tokenizer
from megalodon_ops.training import START, Corpus
from megalodon_ops.training.corpus import Parts

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


PYTHON, ENGLISH = "Python", "English"
PACKAGES = {PYTHON: Path(__file__).with_name("packages.txt"), ENGLISH: Path(__file__).with_name("english.txt")}
"""Lists of the packages whose text is read, Python's and Debian's: part, name and version, files, bytes, and sha256 of them"""
ENGLISH_FILES = (".rst.txt", ".pod", ".dict.dz")
MIB = 1 << 20
OF_TOKENIZER = 8
"""The tokenizer learns from every so many documents of the text to learn from"""


class Tokens(NamedTuple):
    """Documents as ids; whole packages are held out."""

    train: Parts
    validation: list[Document]
    test: list[Document]
    tokenizer: Tokenizer
    facts: dict[str, int | str]
    """sha256 of the list and of the tokenizer, bytes and tokens of the text to learn from"""


def tokens(folder: Path, vocabulary: int, paths: list[str] | None, language: str = PYTHON) -> Tokens:
    """The text of PACKAGES, or files, of which the first of eight is validation and the second test; kept in `folder`.

    Of equal documents the first is kept, those to learn from before those held out.
    """
    kept, folder_of_tokenizer = folder / "text.npz", folder / "tokenizer"
    if not kept.exists():
        files = _of_paths(paths) if paths else _of_packages(language)
        folder.mkdir(exist_ok=True)
        tokenizer = Tokenizer.train(files["train"][::OF_TOKENIZER], vocab_size=vocabulary)
        tokenizer.save(folder_of_tokenizer)
        columns = {}
        for part, documents in files.items():
            ids = tokenizer.encode_batch(documents)
            columns[f"{part} ids"] = numpy.concatenate([*ids, []]).astype(numpy.uint16)
            columns[f"{part} lengths"] = numpy.array([*map(len, ids)], numpy.int64)
            columns[f"{part} bytes"] = numpy.array([*map(len, documents)], numpy.int64)
            columns[f"{part} text"] = numpy.frombuffer(hashlib.sha256(b"".join(documents)).digest(), numpy.uint8)
        draft = folder / "draft.npz"
        numpy.savez(draft, **columns)
        draft.replace(kept)
    tokenizer = load_tokenizer(folder_of_tokenizer)
    found = dict(numpy.load(kept))
    held_out = {
        part: [
            Document([tokenizer.start, *ids.tolist()], int(size))
            for ids, size in zip(_documents(found, part), found[f"{part} bytes"], strict=True)
        ]
        for part in ("validation", "test")
    }
    facts = {f"{part} sha256": found[f"{part} text"].tobytes().hex() for part in ("train", *held_out)}
    facts |= {"train bytes": int(found["train bytes"].sum()), "train tokens": len(found["train ids"])}
    return Tokens(_documents(found, "train"), **held_out, tokenizer=tokenizer, facts=facts)


def _documents(found: dict[str, numpy.ndarray], part: str) -> Parts:
    ids, lengths = found[f"{part} ids"], found[f"{part} lengths"]
    starts = lengths.cumsum() - lengths
    return Parts(lambda number: ids[starts[number] :], numpy.arange(len(lengths)), lengths)


def _of_paths(paths: list[str]) -> dict[str, list[bytes]]:
    documents = [file.read_bytes() for file in find_files(paths)]
    rest = [document for i, document in enumerate(documents) if i % 8 > 1]
    return {"train": rest, "validation": documents[::8], "test": documents[1::8]}


def _of_packages(language: str) -> dict[str, list[bytes]]:
    read = {PYTHON: sources, ENGLISH: documentation}[language]
    parts: dict[str, list[bytes]] = {}
    for line in PACKAGES[language].read_text().splitlines():
        part, name, version, *_ = line.split()
        documents = read(name, version)
        if described(part, name, version, documents) != line:
            raise SystemExit(f"{PACKAGES[language].name}: {name} {version} has other files here; reinstall it")
        parts.setdefault(part, []).extend(documents)
    seen: set[bytes] = set()
    return {
        part: [document for document in documents if not (document in seen or seen.add(document))]
        for part, documents in parts.items()
    }


def sources(name: str, version: str) -> list[bytes]:
    """The package's files of Python with content, in the order of their names."""
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        package = None
    if package is None or package.version.partition("+")[0] != version:
        raise SystemExit(
            f"no sources of {name} {version}: pip install --no-deps {name}=={version}, or name text with --data"
        )
    files = sorted(str(file) for file in package.files or () if file.suffix == ".py")
    documents = (Path(os.fspath(package.locate_file(file))).read_bytes() for file in files)
    return [document for document in documents if document]


def documentation(name: str, version: str) -> list[bytes]:
    """The texts of a package of Debian, in the order of their files' names, but for translations; cut at each MiB."""
    try:
        installed, files = (
            subprocess.run(["dpkg-query", *asked, name], capture_output=True, text=True).stdout
            for asked in (["--show", "--showformat", "${Version}"], ["--listfiles"])
        )
    except FileNotFoundError:
        raise SystemExit(f"no text of {name}: it is a package of Debian, and dpkg-query is not here") from None
    if installed != version:
        raise SystemExit(f"no text of {name} {version}: apt-get install {name}={version}, or name text with --data")
    chosen = sorted(
        file for file in files.splitlines() if file.endswith(ENGLISH_FILES) and "/translations/" not in file
    )
    texts = [content(Path(file)) for file in chosen]
    return [text[begin : begin + MIB] for text in texts for begin in range(0, len(text), MIB)]


def described(part: str, name: str, version: str, documents: list[bytes]) -> str:
    """The line of PACKAGES."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(document).digest() for document in documents)).hexdigest()
    return f"{part} {name} {version} {len(documents)} {sum(map(len, documents))} {digest}"

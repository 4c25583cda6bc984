"""Text for the claims: files as documents, files joined to long documents, and packages' sources as tokens."""

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
"""Debian packages with long texts: a file that shows that the package is installed, and the files of its text"""


class LongText(NamedTuple):
    train: list[bytes]
    held_out: dict[str, bytes]
    """by source, documents of equal length"""
    fingerprint: str


def documents(paths: list[str] | None) -> Corpus:
    """Documents of files and folders, or the standard library's sources; a twentieth is held out, as `train` does."""
    return load_corpus(paths)


def long_text(paths: list[str] | None, held_out: int, books: int) -> LongText:
    """Join the files of each source, sorted by name, to long documents. A source is a path or a package of LONG.

    The middle `held_out` bytes of each source become a held-out document, which resembles the text on both sides of it. The
    rest of all sources is joined and cut into `books` training documents of equal length.
    """
    named = {path.name: [path] if path.is_file() else find_files([str(path)]) for path in map(Path, paths or ())}
    sources = named or {name: _files(name) for name in LONG}
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
    marker, files = LONG[package]
    if not glob.glob(marker):
        raise SystemExit(f"no text of {package}: apt-get install {' '.join(LONG)}, or name text with --data")
    return [Path(file) for file in sorted({str(Path(file).resolve()) for file in glob.glob(files)})]  # links: once


def content(file: Path) -> bytes:
    data = file.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def to_evaluate(texts: list[bytes]) -> list[Document]:
    """Documents of bytes, longest first, for speed."""
    return [Document([START, *text], len(text)) for text in sorted(texts, key=len, reverse=True)]


PYTHON, ENGLISH = "Python", "English"
PACKAGES = {PYTHON: Path(__file__).with_name("packages.txt"), ENGLISH: Path(__file__).with_name("english.txt")}
"""Lists of Python's and Debian's packages to read: part, name, version, number of files, bytes, and their sha256"""
ENGLISH_FILES = (".rst.txt", ".pod", ".dict.dz")
MIB = 1 << 20
TOKENIZER_STRIDE = 8
"""The tokenizer is trained on every 8th training document"""


class Tokens(NamedTuple):
    """Documents as token ids; whole packages are held out."""

    train: Parts
    validation: list[Document]
    test: list[Document]
    tokenizer: Tokenizer
    facts: dict[str, int | str]
    """sha256 of each part's text, bytes and tokens of the training text"""


def tokens(folder: Path, vocabulary: int, paths: list[str] | None, language: str = PYTHON) -> Tokens:
    """Tokenize the text of PACKAGES, or of files: of each eight, one for validation and one for testing. Cached in `folder`.

    Of equal documents of packages the first is kept, a training document before a held-out one.
    """
    cache, tokenizer_folder = folder / "text.npz", folder / "tokenizer"
    if not cache.exists():
        files = _read_paths(paths) if paths else _read_packages(language)
        folder.mkdir(exist_ok=True)
        tokenizer = Tokenizer.train(files["train"][::TOKENIZER_STRIDE], vocab_size=vocabulary)
        tokenizer.save(tokenizer_folder)
        columns = {}
        for part, documents in files.items():
            ids = tokenizer.encode_batch(documents)
            columns[f"{part} ids"] = numpy.concatenate([*ids, []]).astype(numpy.uint16)
            columns[f"{part} lengths"] = numpy.array([*map(len, ids)], numpy.int64)
            columns[f"{part} bytes"] = numpy.array([*map(len, documents)], numpy.int64)
            columns[f"{part} text"] = numpy.frombuffer(hashlib.sha256(b"".join(documents)).digest(), numpy.uint8)
        draft = folder / "draft.npz"
        numpy.savez(draft, **columns)
        draft.replace(cache)
    tokenizer = load_tokenizer(tokenizer_folder)
    found = dict(numpy.load(cache))
    held_out = {}
    for part in ("validation", "test"):
        sizes = found[f"{part} bytes"].tolist()
        ids_of_documents = [ids.tolist() for ids in _documents(found, part)]
        held_out[part] = [
            Document([tokenizer.start, *ids], size) for ids, size in zip(ids_of_documents, sizes, strict=True)
        ]
    facts = {f"{part} sha256": found[f"{part} text"].tobytes().hex() for part in ("train", *held_out)}
    facts |= {"train bytes": int(found["train bytes"].sum()), "train tokens": len(found["train ids"])}
    return Tokens(_documents(found, "train"), **held_out, tokenizer=tokenizer, facts=facts)


def _documents(found: dict[str, numpy.ndarray], part: str) -> Parts:
    ids, lengths = found[f"{part} ids"], found[f"{part} lengths"]
    starts = lengths.cumsum() - lengths
    return Parts(lambda number: ids[starts[number] :], numpy.arange(len(lengths)), lengths)


def _read_paths(paths: list[str]) -> dict[str, list[bytes]]:
    documents = [file.read_bytes() for file in find_files(paths)]
    rest = [document for i, document in enumerate(documents) if i % 8 > 1]
    return {"train": rest, "validation": documents[::8], "test": documents[1::8]}


def _read_packages(language: str) -> dict[str, list[bytes]]:
    read = {PYTHON: sources, ENGLISH: documentation}[language]
    parts: dict[str, list[bytes]] = {}
    for line in PACKAGES[language].read_text().splitlines():
        part, name, version, *_ = line.split()
        documents = read(name, version)
        if describe_package(part, name, version, documents) != line:
            raise SystemExit(f"{PACKAGES[language].name}: the files of {name} {version} differ here; reinstall it")
        parts.setdefault(part, []).extend(documents)
    seen: set[bytes] = set()
    for part, documents in parts.items():
        parts[part] = [document for document in dict.fromkeys(documents) if document not in seen]
        seen.update(documents)
    return parts


def sources(name: str, version: str) -> list[bytes]:
    """Non-empty Python files of a package, sorted by name."""
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
    """Texts of a Debian package, without translations, sorted by file name and cut into pieces of a MiB."""

    def query(*options: str) -> str:
        return subprocess.run(["dpkg-query", *options, name], capture_output=True, text=True).stdout

    try:
        installed = query("--show", "--showformat", "${Version}")
        files = query("--listfiles")
    except FileNotFoundError:
        raise SystemExit(f"no text of {name}: it is a package of Debian, and dpkg-query is not here") from None
    if installed != version:
        raise SystemExit(f"no text of {name} {version}: apt-get install {name}={version}, or name text with --data")
    names = sorted(file for file in files.splitlines() if file.endswith(ENGLISH_FILES) and "/translations/" not in file)
    texts = [content(Path(file)) for file in names]
    return [text[begin : begin + MIB] for text in texts for begin in range(0, len(text), MIB)]


def describe_package(part: str, name: str, version: str, documents: list[bytes]) -> str:
    """Line of a package in PACKAGES."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(document).digest() for document in documents)).hexdigest()
    return f"{part} {name} {version} {len(documents)} {sum(map(len, documents))} {digest}"

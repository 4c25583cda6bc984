"""Texts of the claims: Debian's documents and the sources of installed packages, and their held-out parts."""

import gzip
import importlib.metadata
import os

import pytest
from bench.claims import text


def test_long_text_is_cut_from_the_middle(tmp_path):
    parts = [bytes([65 + i]) * 1000 for i in range(6)]
    (tmp_path / "a").mkdir()
    for i, part in enumerate(parts):
        (tmp_path / "a" / f"{i}.txt").write_bytes(part)
    other = bytes(range(250)) * 20
    (tmp_path / "b.gz").write_bytes(gzip.compress(other))
    found = text.long_text([str(tmp_path / "a"), str(tmp_path / "b.gz")], 1000, 3)
    whole = b"\n".join(parts)
    begin = (len(whole) - 1000) // 2
    assert found.held_out == {"a": whole[begin : begin + 1000], "b.gz": other[2000:3000]} and len(found.train) == 3
    assert b"".join(found.train) == whole[:begin] + whole[begin + 1000 :] + other[:2000] + other[3000:]
    with pytest.raises(SystemExit, match="a has 6,005 bytes, and 8,000 are needed"):
        text.long_text([str(tmp_path / "a")], 2000, 3)


def test_packages_are_those_of_the_list_and_held_out_whole(monkeypatch, tmp_path):
    files = text.sources("pluggy", (version := importlib.metadata.version("pluggy")))
    assert len(files) > 3 and all(files)
    lines = [text.describe_package(part, "pluggy", version, files) for part in ("train", "test")]
    other = text.sources("iniconfig", importlib.metadata.version("iniconfig"))
    lines.append(text.describe_package("validation", "iniconfig", importlib.metadata.version("iniconfig"), other))
    monkeypatch.setitem(text.PACKAGES, text.PYTHON, tmp_path / "packages.txt")
    text.PACKAGES[text.PYTHON].write_text("\n".join(lines))
    found = text.tokens(tmp_path, 300, None)
    assert found.tokenizer.vocab_size == 300 and found.facts["train bytes"] == sum(map(len, {*files}))
    assert not found.test  # the training text has the same documents
    assert [found.tokenizer.decode(ids) for ids in found.train] == [*dict.fromkeys(files)]
    validation = [document.tokens for document in found.validation]
    assert all(ids[0] == found.tokenizer.start for ids in validation)
    assert [found.tokenizer.decode(ids[1:]) for ids in validation] == [*dict.fromkeys(other)]
    assert sum(document.num_bytes for document in found.validation) == sum(map(len, dict.fromkeys(other)))
    monkeypatch.setattr(text, "_read_packages", None)  # the text is cached
    assert text.tokens(tmp_path, 300, None).facts == found.facts
    with pytest.raises(SystemExit, match="no sources of pluggy 0: pip install --no-deps pluggy==0"):
        text.sources("pluggy", "0")


def test_english_is_read_from_packages_of_debian(monkeypatch, tmp_path):
    long = tmp_path / "a.dict.dz"
    long.write_bytes(gzip.compress(bytes(range(256)) * 5000))
    (tmp_path / "translations").mkdir()
    for name, content in {"b.rst.txt": b"of b", "c.html": b"of c", "translations/d.rst.txt": b"of d"}.items():
        (tmp_path / name).write_bytes(content)
    program = tmp_path / "dpkg-query"
    program.write_text(f'#!/bin/sh\n[ "$1" = --show ] && printf 1.0 || find {tmp_path}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = text.documentation("of-nobody", "1.0")
    assert [len(document) for document in found] == [text.MIB, 5000 * 256 - text.MIB, 4]
    assert b"".join(found) == bytes(range(256)) * 5000 + b"of b"
    with pytest.raises(SystemExit, match="no text of of-nobody 2.0: apt-get install of-nobody=2.0"):
        text.documentation("of-nobody", "2.0")
    monkeypatch.setenv("PATH", str(tmp_path / "translations"))
    with pytest.raises(SystemExit, match="of-nobody: it is a package of Debian, and dpkg-query is not here"):
        text.documentation("of-nobody", "1.0")


@pytest.mark.parametrize(
    ("language", "train", "validation"), [(text.PYTHON, 150e6, 0.9e6), (text.ENGLISH, 80e6, 0.8e6)]
)
def test_the_list_of_packages_is_complete(language, train, validation):
    lines = [line.split() for line in text.PACKAGES[language].read_text().splitlines()]
    size = {part: sum(int(line[4]) for line in lines if line[0] == part) for part, *_ in lines}
    assert size["train"] > train and size["validation"] > validation and size["test"] > 1.8e6
    assert all(len(line) == 6 and len(line[5]) == 64 for line in lines)
    assert len({line[1] for line in lines}) == len(lines)


def test_missing_packages_are_an_error(monkeypatch):
    monkeypatch.setattr(text, "LONG", {"of-nobody": ("/nowhere/*", "/nowhere/*")})
    with pytest.raises(SystemExit, match="no text of of-nobody: apt-get install of-nobody"):
        text.long_text(None, 10, 2)

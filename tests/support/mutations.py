"""Ways to corrupt a file: disk damage, cut transfers and malicious edits."""

import json
import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOSTILE = [None, True, -1, 0, 2**31, 2**64, 10**6, -1.5, 1e308, [], {}, [[]], [0, 10**9]]
HOSTILE += ["x", "", "8", "../model", "cuda", "a\nb", "\x1b[31m", "/etc/passwd"]
HOSTILE += ["model.safetensors", "(a+)+$", "\ud800"]


def edit(path: Path, old: str, new: str) -> None:
    """Replace the text `old`, which must occur once in the file."""
    content = path.read_bytes()
    assert content.count(old.encode()) == 1
    path.write_bytes(content.replace(old.encode(), new.encode()))


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    """Replace a file by a pipe without a writer, which blocks its reader."""
    path.unlink()
    os.mkfifo(path)


def make_link(path: Path, target: str | Path) -> None:
    path.unlink()
    path.symlink_to(target)


def key_paths(node: Any, parents: tuple = ()) -> Iterator[tuple]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*parents, key)
        yield from key_paths(value, (*parents, key))


def edit_json(path: Path, rng: random.Random) -> str:
    content = json.loads(path.read_text())
    keys = rng.choice(list(key_paths(content)))
    *parents, last = keys
    node = content
    for key in parents:
        node = node[key]
    kind = rng.random()
    if kind < 0.2 and isinstance(node, dict):
        del node[last]
        value = "deleted"
    elif kind < 0.3 and isinstance(node, dict):
        node[str(last) + "x"] = value = rng.choice(HOSTILE)
    else:
        node[last] = value = rng.choice(HOSTILE)
    path.write_text(json.dumps(content))
    return f"{path.name}: {keys} = {value!r}"


def edit_header(path: Path, rng: random.Random) -> str:
    """Edit the JSON at the beginning of a safetensors file."""
    data = path.read_bytes()
    (head_size,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + head_size])
    names = [name for name in head if name != "__metadata__"]
    if not names:
        return flip(path, rng)
    name = rng.choice(names)
    kind = rng.choice(["dtype", "shape", "name", "offsets", "value", "metadata", "size"])
    if kind == "dtype":
        head[name]["dtype"] = rng.choice(["I32", "F16", "U32", "F64", "BOGUS", "BF16", "BOOL"])
    elif kind == "shape":
        head[name]["shape"] = rng.choice([[], head[name]["shape"][::-1] + [1], [2**62, 4], [-1], [2**32, 2**32]])
    elif kind == "name":
        head[name + "x"] = head.pop(name)
    elif kind == "offsets":
        head[name]["data_offsets"] = rng.choice([[0, 4], [0, 2**63], [8, 4], [1, 5]])
    elif kind == "value":
        head[name] = rng.choice(HOSTILE)
    elif kind == "metadata":
        head["__metadata__"] = rng.choice([{"format": rng.choice(["pt", "np", "x", ""])}, *HOSTILE])
    new = json.dumps(head).encode()
    size = rng.choice([0, 1, 2**40, 2**63, len(new) + 8, len(data)]) if kind == "size" else len(new)
    path.write_bytes(struct.pack("<Q", size) + new + data[8 + head_size :])
    return f"{path.name}: header {name} {kind}"


def not_finite(path: Path, rng: random.Random) -> str:
    """Overwrite a number at the end of a safetensors file by NaN or infinity."""
    data = bytearray(path.read_bytes())
    end = len(data) - 4 * rng.randrange(1, 20)
    data[end : end + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf")]))
    path.write_bytes(data)
    return f"{path.name}: no number at {end}"


def flip(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    bits = [rng.randrange(8 * len(data)) for _ in range(rng.choice([1, 1, 3, 50]))]
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"{path.name}: bits {bits[:3]}"


def cut(path: Path, rng: random.Random) -> str:
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name}: cut to {size}"


def splice(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    at = rng.randrange(len(data) + 1)
    size = rng.choice([1, 4, 64, 5000])
    over = rng.choice([0, size])
    path.write_bytes(data[:at] + rng.randbytes(size) + data[at + over :])
    return f"{path.name}: {size} bytes over {over} at {at}"


def swap(path: Path, rng: random.Random) -> str:
    others = [other for other in sorted(path.parent.iterdir()) if other != path and other.is_file()]
    if not others:
        return cut(path, rng)
    other = rng.choice(others)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"{path.name} <-> {other.name}"


def replace(path: Path, rng: random.Random) -> str:
    """Replace the file by something else, or remove it."""
    path.unlink()
    kind = rng.choice(["gone", "pipe", "folder", "zero", "loop"])
    {
        "gone": lambda: None,
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "zero": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
    }[kind]()
    return f"{path.name}: {kind}"


def mutate(path: Path, rng: random.Random) -> str:
    """Corrupt a file in one random way, and return a description."""
    ways = [flip, cut, splice, swap, replace]
    if path.suffix == ".json":
        ways += [edit_json] * 6
    elif path.suffix == ".safetensors":
        ways += [edit_header] * 4 + [not_finite]
    return rng.choice(ways)(path, rng)


def mutants(base: Path, root: Path, count: int, seed: int) -> Iterator[tuple[Path, str]]:
    """Yield `count` copies of the folder `base` in which one file is corrupted, each with a description."""
    rng = random.Random(seed)
    for i in range(count):
        folder = root / f"{base.name}-{i}" / "checkpoints" / base.name
        shutil.copytree(base, folder)
        yield folder, mutate(rng.choice(sorted(folder.iterdir())), rng)

"""Mutated checkpoints and folders of the released format: refused in one line, or loaded with the original weights."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct

import pytest
import torch
from models import tiny_model
from test_official import save_released

import megalodon_ops as mo
from megalodon_ops.cli import checkpoint, main
from megalodon_ops.cli.evaluate import trained_model

SEED = 20260
HOSTILE = [
    None,
    True,
    -1,
    0,
    2**31,
    2**64,
    10**6,
    -1.5,
    1e308,
    "x",
    "",
    [],
    {},
    [[]],
    "8",
    [0, 10**9],
    "../model",
    "cuda",
    "a\nb",
]
TINY = "--dim 16 --layers 1 --chunk 4 --batch 2 --length 8 --norm-groups 4 --warmup 2 --steps 3 --checkpoint-every 1".split()


def leaves(node, at=()):
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from leaves(value, (*at, key))


def edit_json(path, rng):
    content = json.loads(path.read_text())
    at = rng.choice(list(leaves(content)))
    node = content
    for key in at[:-1]:
        node = node[key]
    if rng.random() < 0.2 and isinstance(node, dict):
        del node[at[-1]]
        what = "deleted"
    else:
        node[at[-1]] = what = rng.choice(HOSTILE)
    path.write_text(json.dumps(content))
    return f"{path.name}: {at} = {what!r}"


def edit_header(path, rng):
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + n])
    names = [k for k in head if k != "__metadata__"]
    if not names:
        return flip(path, rng)
    name = rng.choice(names)
    kind = rng.choice(["dtype", "shape", "name", "offsets"])
    if kind == "dtype":
        head[name]["dtype"] = rng.choice(["I32", "F16", "U32", "F64", "BOGUS"])
    elif kind == "shape":
        head[name]["shape"] = rng.choice([[], head[name]["shape"][::-1] + [1], [2**62, 4], [-1]])
    elif kind == "name":
        head[name + "x"] = head.pop(name)
    else:
        head[name]["data_offsets"] = rng.choice([[0, 4], [0, 2**63], [8, 4]])
    new = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + n :])
    return f"{path.name}: header {name} {kind}"


def flip(path, rng):
    data = bytearray(path.read_bytes())
    bits = [rng.randrange(8 * len(data)) for _ in range(rng.choice([1, 1, 3, 50]))]
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"{path.name}: bits {bits[:3]}"


def cut(path, rng):
    n = rng.randrange(path.stat().st_size)
    os.truncate(path, n)
    return f"{path.name}: cut to {n}"


def splice(path, rng):
    data = path.read_bytes()
    at = rng.randrange(len(data) + 1)
    n = rng.choice([1, 4, 64, 5000])
    m = rng.choice([0, n])
    path.write_bytes(data[:at] + rng.randbytes(n) + data[at + m :])
    return f"{path.name}: {n} bytes over {m} at {at}"


def swap(path, rng):
    other = rng.choice([p for p in path.parent.iterdir() if p != path and p.is_file()])
    x = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(x)
    return f"{path.name} <-> {other.name}"


def odd(path, rng):
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


def reseal(folder):
    """Makes checksums right again, as a forger would, so that the checks behind them are reached."""
    record = json.loads((folder / "checkpoint.json").read_text())
    if not isinstance(record.get("files"), dict):
        return
    for part, facts in record["files"].items():
        p = folder / f"{part}.safetensors"
        if isinstance(facts, dict) and p.is_file():
            facts.update(bytes=p.stat().st_size, sha256=checkpoint._sha256(p))
    record.pop("checksum", None)
    record["checksum"] = checkpoint._checksum(record)
    (folder / "checkpoint.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    text = out / "text"
    text.write_bytes(b"to be or not to be, that is the question. " * 30)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.setattr("megalodon_ops.cli.generate.SAMPLE", 3)
        assert main(["train", "--data", str(text), "--out", str(out / "r"), *TINY]) == 0
        yield out / "r", text


def alarm(*_):
    raise AssertionError("hangs")


FEW = 40
MANY = pytest.param(2100, marks=pytest.mark.slow)


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("forged", [False, True], ids=["damaged", "forged"])
def test_a_mutated_checkpoint_is_refused_in_one_line_or_runs(run, tmp_path, capsys, forged, count):
    """Forged folders, of right checksums, may be read with other numbers, and are then not run; damaged ones never."""
    out, text = run
    base = sorted((out / "checkpoints").iterdir())[-1]
    cpu = torch.device("cpu")
    want = trained_model(checkpoint.load(base, "-"), cpu).state_dict()
    rng = random.Random(SEED + forged)
    bad = []
    signal.signal(signal.SIGALRM, alarm)
    for i in range(count):
        r = tmp_path / "r"
        shutil.rmtree(r, ignore_errors=True)
        folder = r / "checkpoints" / base.name
        shutil.copytree(base, folder)
        path = rng.choice(sorted(folder.iterdir()))
        js = path.suffix == ".json"
        how = rng.choice([flip, cut, splice, swap, odd] + ([edit_json] * 6 if js else [edit_header] * 3))
        if forged:
            part = rng.choice(["model", "optimizer", "state", "random"])
            path = folder / ("checkpoint.json" if rng.random() < 0.6 else f"{part}.safetensors")
            how = edit_json if path.suffix == ".json" else rng.choice([edit_header, flip])
        what = how(path, rng)
        if forged:
            reseal(folder)
        signal.alarm(30)
        command = [
            ["eval", "--checkpoint", str(folder), "--data", str(text)],
            ["generate", "--checkpoint", str(r), "--bytes", "3"],
            ["train", "--resume", "--out", str(r), "--steps", "4"],
        ][i % 3]
        capsys.readouterr()
        try:
            try:
                found = checkpoint.load(folder, "-")
                weights = trained_model(found, cpu).state_dict()
            except checkpoint.CommandError:
                weights = None
            capsys.readouterr()
            if forged and weights is not None:
                continue
            code = main(command)
            err = capsys.readouterr().err
        except BaseException as e:
            bad.append((what, command[0], repr(e)[:300]))
            continue
        finally:
            signal.alarm(0)
        if weights is not None and not forged and any(not torch.equal(weights[n], want[n]) for n in want):
            bad.append((what, "other weights"))
        if code not in (0, 2) or (code == 2 and (err.count("\n") != 1 or not err.startswith("megalodon_ops"))):
            bad.append((what, code, err[:300]))
        if weights is None and code == 0:
            bad.append((what, "refused by load, taken by", command[0]))
    assert not bad, bad[:12]


@pytest.mark.parametrize("count", [FEW, pytest.param(300, marks=pytest.mark.slow)])
def test_a_mutated_folder_of_the_released_format_is_refused_or_gives_its_weights(tmp_path, count):
    model = tiny_model(torch.float32)
    rng = random.Random(SEED + 2)
    bad = []
    signal.signal(signal.SIGALRM, alarm)
    for shards in (1, 2):
        base = tmp_path / f"b{shards}"
        base.mkdir()
        save_released(model, base, shards)
        want = model.state_dict()
        for _ in range(count):
            d = tmp_path / "d"
            shutil.rmtree(d, ignore_errors=True)
            shutil.copytree(base, d)
            path = rng.choice(sorted(d.iterdir()))
            js = path.suffix == ".json"
            how = rng.choice([flip, cut, splice, swap, odd] + [edit_json] * 6 * js)
            what = how(path, rng)
            signal.alarm(30)
            try:
                got = mo.load_official(d).state_dict()
                if any(not torch.equal(got[name], want[name]) for name in want):
                    bad.append((what, "other weights"))
            except (ValueError, FileNotFoundError) as error:
                if not (str(error).isprintable() and str(error).startswith("load_official: ")):
                    bad.append((what, str(error)[:200]))
            except BaseException as error:
                bad.append((what, repr(error)[:200]))
            finally:
                signal.alarm(0)
    assert not bad, bad[:12]

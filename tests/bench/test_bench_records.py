"""Files of results: records survive interrupted writes and concurrent appends."""

import resource
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench import records

RECORD = {"run": "a", "loss": 0.1 + 0.2, "curve": [[20, 4.96744]], "data": None, "note": "±\n"}


def test_records_are_read_as_they_were(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    assert records.read(path) == []
    for record in (RECORD, {}):
        records.append(path, record)
    assert records.read(path) == [RECORD, {}] and len(path.read_bytes().splitlines()) == 2


def test_an_interrupted_write_is_skipped_and_replaced_by_the_next(tmp_path):
    path = tmp_path / "x.jsonl"
    records.append(path, RECORD)
    whole = path.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:length])
        with pytest.warns(UserWarning, match="x.jsonl: the last line is incomplete, and left out"):
            assert records.read(path) == [RECORD]
        records.append(path, {"run": "b"})
        assert records.read(path) == [RECORD, {"run": "b"}]


def test_a_full_disk_is_an_error(tmp_path):
    path = tmp_path / "x.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
    try:
        with pytest.raises(OSError, match="x.jsonl: no room for a result"):
            records.append(path, RECORD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 30
    with pytest.warns(UserWarning, match="incomplete"):
        assert records.read(path) == []


def test_appending_at_once_loses_nothing(tmp_path):
    """Each thread opens the file itself, as a process does; the lock belongs to the open file."""
    path, names = tmp_path / "x.jsonl", [f"run {i}" for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: records.append(path, {"run": name, "long": "x" * 10_000}), names))
    assert sorted(record["run"] for record in records.read(path)) == sorted(names)

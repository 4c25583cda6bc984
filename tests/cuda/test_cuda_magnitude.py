"""Largest elements at each access to global memory: tests/cuda/emulator/magnitude.py, and the table that it checks."""

import pytest
import torch
from emulator import magnitude, reached
from emulator.magnitude import Access, Magnitude

import megalodon_ops as mo
from megalodon_ops import _C
from calls import forward
from cases import cema_case

READ = Access("kernel", "a.cuh", "y = x[i];")


@pytest.mark.parametrize(
    ("buffers", "most", "why", "problems"),
    [
        ("x", 2**31, "", 0),
        ("x", 2**31 - 1, "", 1),
        ("x weight", 5, "", 1),
        ("x", 5, "a reason", 0),
        ("weight spans", 5, "", 0),
    ],
)
def test_an_access_below_2_31_needs_a_reason(buffers, most, why, problems):
    table = {READ: Magnitude(buffers, most, why)}
    assert len(list(magnitude.gaps({READ: Magnitude(buffers, most)}, table))) == problems


def test_the_table_knows_lines_of_the_kernels():
    """Its lines exist, and exactly those that pass no element beyond 2^31 of a tensor have reasons."""
    texts = {path.name: path.read_text() for path in magnitude.CUDA.rglob("*.cu*")}
    table = magnitude.read_table(magnitude.TABLE.read_text())
    assert len(table) > 200
    for access, row in table.items():
        assert access.line in texts[access.file], access
        assert bool(row.why) == row.lacks(access.kernel), access


def test_the_emulator_records_elements(emulator, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGALODON_OPS_REACHED", str(tmp_path))
    emulator.module.set_recording(True)
    try:
        with emulator.replacing(_C):
            forward(mo.cema, cema_case(B=1, L=1, D=3, N=2))
        x, y = emulator.sparse(2, 1, 2**25, dtype=torch.bfloat16), emulator.sparse(2, 1, 2**25, dtype=torch.bfloat16)
        p, q = emulator.sparse(2**25, 1), emulator.sparse(2**25, 1, dtype=torch.complex64)
        with emulator.only_bounds(ends=1):
            emulator.launch("cema_fwd", x=x, p=p, q=q, gamma=q, omega=p.view(-1), y=y)
    finally:
        emulator.module.set_recording(False)
    reached.write_record(emulator.module)
    rows = {access: row for access, row in magnitude.merge(tmp_path).items() if access.kernel == "cema_step_kernel"}
    (load,) = (row for access, row in rows.items() if "rows[(t + i) * p.channels]" in access.line)
    assert load.buffers >= {"x"} and load.most >= 2**26 - 1

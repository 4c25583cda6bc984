"""`train` on a folder of tokens, in two processes, has the losses of one process on the text, also after a resume."""

import pytest
from command_line import rows
from launched import copy_without_the_last, flags, run_on_ranks

from megalodon_ops.cli import main

pytestmark = pytest.mark.usefixtures("quick")


def test_two_processes_read_the_tokens_and_one_resumes(ranks, text, tmp_path):
    steps = ("--steps", 3, "--checkpoint-every", 2, "--eval-every", 3)
    assert main(["tokenize", str(text), "--out", str(tmp_path / "tokens")]) == 0
    assert main(flags(text, tmp_path / "one", *steps)) == 0
    wanted = rows(tmp_path / "one")

    def assert_equal(run):
        found = rows(run)
        assert [row["step"] for row in found] == [row["step"] for row in wanted]
        for row, other in zip(found, wanted, strict=True):
            assert row.keys() == other.keys()
            for name in row.keys() & {"loss", "bits_per_byte", "held_out_bits_per_byte"}:
                assert row[name] == pytest.approx(other[name], rel=1e-4), (row["step"], name)

    run_on_ranks(ranks, 2, flags(tmp_path / "tokens", tmp_path / "two", *steps, "--mesh", "data=2"))
    assert_equal(tmp_path / "two")
    again = copy_without_the_last(tmp_path / "two", tmp_path / "again")
    assert main(["train", "--out", str(again), "--resume"]) == 0
    assert_equal(again)

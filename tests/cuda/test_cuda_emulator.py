"""The CUDA emulator finds each planted bug at its line, raises no false alarm, and counts memory traffic."""

import re

import pytest
import torch
from emulated import ORDERS
from emulator.device import FOLDER
from emulator.planted_launchers import run

KINDS = {  # of reports, and the bugs of planted/bugs.cu that must have one
    "race": (
        "missing_syncthreads missing_second_syncthreads half_of_a_word_read half_of_a_word_written "
        "missing_named_barrier missing_syncwarp shuffle_is_no_barrier syncwarp_of_half_a_warp blocks_write_one_element "
        "block_reads_what_another_writes block_writes_what_another_reads missing_copy_barrier "
        "copy_over_what_others_read"
    ),
    "divergent barrier": "barrier_in_branches return_before_barrier",
    "deadlock": "deadlock shuffle_after_return divergent_mma",
    "invalid operation": "shuffle_outside_mask lane_outside_mask divergent_shuffle",
    "out of bounds": "read_past_the_end write_before_the_start shared_out_of_bounds dynamic_shared_out_of_bounds",
    "uninitialised read": "uninitialised_shared uninitialised_global",
    "read-only buffer": "write_to_input",
    "not device memory": "null_pointer host_pointer",
    "wrong memory": "wrong_memory",
    "misaligned": "misaligned_vector misaligned_store misaligned_cast misaligned_copy misaligned_ldmatrix",
    "copy in flight": "missing_copy_wait missing_copy_commit",
    "wrong mma fragment": "wrong_fragment_of_a wrong_fragment_of_b wrong_fragment_of_tf32",
}
BUGS = {name: kind for kind, names in KINDS.items() for name in names.split()}


def marked_lines(mark: str, name: str) -> set[str]:
    lines = (FOLDER / "planted" / "bugs.cu").read_text().split("\n")
    return {f"bugs.cu:{i}" for i, line in enumerate(lines, start=1) if re.search(rf"// {mark} .*\b{name}\b", line)}


def run_bug(emulator, name: str, *, bug: bool) -> None:
    x, y = emulator.tensor(torch.arange(128.0), "in"), emulator.empty(128, name="out")
    emulator.module.planted.run_bug(name, bug, x.data_ptr(), y.data_ptr())


def test_every_planted_bug_is_tested(emulator):
    assert set(emulator.module.planted.bugs) == set(BUGS)


def report_problem(emulator, name: str) -> str | None:
    """Return what is wrong with a bug's report: its kind, its line or its thread."""
    try:
        run_bug(emulator, name, bug=True)
    except emulator.Error as error:
        if f"in {name}:" not in str(error):
            return f"another kernel is named: {error}"
    else:
        return "nothing is reported"
    lines, others = marked_lines("at", name), marked_lines("other", name)
    found = [r for r in emulator.reports() if r["kind"] == BUGS[name]]
    if not found or not lines:
        return f"{emulator.reports()} instead of {BUGS[name]} at {lines}"
    for report in found:
        places = [report[key].split(" < ") for key in ("where", "other")]  # frames, the innermost first
        ends = {frames[end] for frames in places for end in (0, -1)}
        if not ends & lines or (others and not ends & others):
            return f"{report} is not at {lines}, {others}"
        if max(report["block"]) > 1 or report["thread"][0] > 63 or report["thread"][1:] != (0, 0):
            return f"{report} is of no thread of the launch"
    return None


@pytest.mark.parametrize("order", ORDERS)
def test_every_bug_is_reported_at_its_line(emulator, order):
    """In every order of the threads, even if the result happens to be right."""
    emulator.set_order(order)
    problems = {name: report_problem(emulator, name) for name in BUGS}
    assert {name: problem for name, problem in problems.items() if problem} == {}


@pytest.mark.parametrize("order", ORDERS)
def test_no_correct_kernel_raises_an_alarm(emulator, order):
    for name in BUGS:
        for seed in range(3):
            emulator.set_order(order, seed=seed)
            run_bug(emulator, name, bug=False)


def test_a_report_names_buffer_thread_and_line(emulator):
    with pytest.raises(emulator.Error) as raised:
        run_bug(emulator, "read_past_the_end", bug=True)
    (line,) = marked_lines("at", "read_past_the_end")
    text = str(raised.value)
    assert "0 bytes past the end of buffer 'in' (512 bytes)" in text
    assert f"at {line}" in text and "block (1,0,0) thread (63,0,0)" in text


def test_a_wrong_fragment_names_the_element(emulator):
    emulator.set_order("forward")
    with pytest.raises(emulator.Error, match=r"a\[1\] is not the element of row 15, column 6, byte 492 of .*'tile'"):
        run_bug(emulator, "wrong_fragment_of_a", bug=True)
    assert [report["count"] for report in emulator.reports()] == [2 * 64]  # every lane
    with pytest.raises(emulator.Error, match=r"a\[1\] is not the element of row 15, column 3, byte 372 of .*'tile'"):
        run_bug(emulator, "wrong_fragment_of_tf32", bug=True)


def test_the_device_works_again_after_a_bug(emulator):
    for name in ("deadlock", "null_pointer", "missing_copy_wait"):
        with pytest.raises(emulator.Error):
            run_bug(emulator, name, bug=True)
        run_bug(emulator, name, bug=False)


def test_an_invalid_launch_is_refused(emulator):
    x, y = emulator.tensor(torch.zeros(1024)), emulator.empty(1024)
    emulator.set_order("random", shared_limit=4096)
    run(emulator, "shared_columns", x, y, 32)
    with pytest.raises(emulator.Error, match="4224 bytes of shared memory"):
        run(emulator, "shared_columns", x, y, 33)
    with pytest.raises(emulator.Error, match="48 threads is not whole warps"):
        run(emulator, "reduce", x, y, y, y, 1, 48)  # blocks, threads
    with pytest.raises(emulator.Error, match="an empty grid"):
        run(emulator, "reduce", x, y, y, y, 0, 64)


@pytest.mark.parametrize(("as_template", "bound"), [(False, 64), (True, 96)])
def test_launch_bounds_are_checked(emulator, as_template, bound):
    y = emulator.empty(128)
    run(emulator, "bounded", y, bound, as_template)
    assert (y[:bound] == 1).all()
    with pytest.raises(emulator.Error, match=f"a block of {bound + 32} threads, beyond its __launch_bounds__"):
        run(emulator, "bounded", y, bound + 32, as_template)


def test_unwritten_results_are_nan(emulator):
    assert emulator.empty(5, 3, dtype=torch.bfloat16).isnan().all()


@pytest.mark.parametrize(("stride", "width", "load_sectors"), [(1, 1, 128), (2, 1, 256), (8, 1, 1024), (1, 4, 128)])
def test_sectors_of_strided_copies(emulator, stride, width, load_sectors):
    x, y = emulator.tensor(torch.randn(1024 * stride), "x"), emulator.empty(1024, name="y")
    run(emulator, "strided_copy", x, y, stride, width)
    assert torch.equal(y, x[::stride])
    traffic = emulator.traffic("strided_copy_kernel")
    requests = 1024 // (32 * width)
    assert traffic["x"]["load_sectors"] == load_sectors and traffic["x"]["load_footprint"] == load_sectors * 32
    assert traffic["x"]["load_bytes"] == 4096 and traffic["x"]["load_requests"] == requests
    assert traffic["y"]["store_sectors"] == 128 and traffic["y"]["store_footprint"] == 4096
    assert traffic["y"]["store_bytes"] == 4096 and traffic["y"]["load_bytes"] == 0


@pytest.mark.parametrize(("pitch", "conflicts"), [(32, 32), (33, 1), (34, 2)])
def test_bank_conflicts(emulator, pitch, conflicts):
    x, y = emulator.tensor(torch.randn(32, 32)), emulator.empty(32, 32)
    run(emulator, "shared_columns", x, y, pitch)
    assert torch.equal(y, x.T)
    (column,) = [s for s in emulator.sites("shared_columns_kernel") if s["shared"] and not s["store"]]
    assert (column["requests"], column["ideal"], column["transactions"]) == (32, 32, 32 * conflicts)
    assert column["where"].startswith("wrappers.cu:")

"""The first day on a GPU, rehearsed without one: stages go on after a failure, and the report has what they found."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from paths import ROOT
import pytest
from programs import run_python

from bench import gpu_stages, sass
from bench.gpu_stages import Step

NVIDIA_SMI = """#!/bin/sh
case "$1" in
  *power.draw*) echo "301.50 W, 1980 MHz, 2619 MHz, 61" ;;
  *) echo "NVIDIA H100 80GB HBM3, 580.10, 9.0, 81559 MiB, 81000 MiB, 700.00 W, 1980 MHz" ;;
esac
"""
NVCC = '#!/bin/sh\necho "Cuda compilation tools, release 13.0, V13.0.88"\n'
SANITIZER = """#!/bin/sh
echo "$@" "$PYTORCH_NO_CUDA_MEMORY_CACHING"
echo "=========     at _ZN2at6native13reduce_kernelEv+0x70 in Reduce.cuh:9"
[ "$2" != initcheck ] || echo "=========     at _ZN9megalodon4cema11scan_kernelEv+0x70 in cema.cuh:9"
[ "$2" != racecheck ]
"""
SMOKE = [
    dict(case="cema, steps", dtype="torch.float32", kernels=["cema_step_kernel"], error=""),
    dict(case="cema, scans", dtype="torch.bfloat16", kernels=["cema_output_kernel"], error="y: 3 | elements differ"),
    dict(case="attention", dtype="torch.float16", kernels=[], error="out of memory"),
]
TIMES = [["200M", "attention forward", "447.0", "470.1", "251.0", "products 240"]]


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Iterator[Path]:
    """Stand-ins for the programs of a machine with a GPU, first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in ("nvidia-smi", NVIDIA_SMI), ("nvcc", NVCC), ("compute-sanitizer", SANITIZER):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDACXX", raising=False)
    gpu_stages._name_option.cache_clear()
    yield folder
    gpu_stages._name_option.cache_clear()


def shell(name: str, script: str, minutes: float = 1) -> Step:
    return Step(name, ["sh", "-c", script], minutes)


def test_stages_go_on_and_the_report_says_all(tmp_path, tools, capsys):
    out = tmp_path / "gpu"
    out.mkdir()
    record = "\n".join(map(json.dumps, SMOKE))
    steps = {
        "environment": [
            shell("build", "echo no compiler; exit 3"),
            shell("info", "echo CUDA kernels: nvcc 13.0 for 90"),
        ],
        "smoke": [shell("smoke", f"sleep 2.2; cat > {out}/smoke.jsonl <<'X'\n{record}\nX")],
        "sanitizers": gpu_stages.stages("python", out, here=True)["sanitizers"],
        "suite": [
            shell("hangs", "sleep 60", minutes=0.01),
            Step("absent", ["no-such-program"], 1),
            Step("tool", [], 1, tool="x"),
        ],
        "benches": [shell("floors", f"echo '{json.dumps(TIMES)}' > {out}/floors.json")],
    }
    assert gpu_stages.run(out, list(steps), steps) == 1
    report = (out / "report.md").read_text()
    for line in (
        "# NVIDIA H100 80GB HBM3, ",
        "- environment: build failed (exit status 3)",
        "- sanitizers: racecheck failed (exit status 1)",
        "- sanitizers: initcheck failed (1 reports on our kernels)",
        "- suite: hangs stopped after 0.01 minutes",
        "- suite: tool not run: x was not found",
        "- driver: 580.10",
        "- nvcc: Cuda compilation tools, release 13.0, V13.0.88",
        "CUDA kernels: nvcc 13.0 for 90",
        "| cema_step_kernel | pass | 1 of 1 | float32 |  |",
        "| cema_output_kernel | FAIL | 0 of 1 | bfloat16 | cema, scans, torch.bfloat16: y: 3 / elements differ |",
        "| cema_table_kernel | not launched |",
        "| (before a launch) | FAIL |  | torch.float16 | attention: out of memory |",
        "| 200M | attention forward | 447.0 | 470.1 | 251.0 | products 240 |",
        "| smoke | smoke | power.draw | 301.5 to 301.5, median 301.5 |",
        "| sanitizers | memcheck | passed |",
        "`gpu.tar.gz`",
    ):
        assert line in report, line
    assert "no-such-program" in next(line for line in report.splitlines() if line.startswith("- suite: absent"))
    log = (out / "sanitizers-memcheck.log").read_text()
    assert "--kernel-name kns=_ZN9megalodon --kernel-name kns=_ZN3gpu python -m pytest" in log
    assert log.splitlines()[1].endswith(" 1")
    with tarfile.open(f"{out}.tar.gz") as archive:
        assert {"gpu/report.md", "gpu/sanitizers-memcheck.log", "gpu/smoke.jsonl"} <= set(archive.getnames())
    assert "suite: hangs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("listed", "option"), [("--kernel-name arg", "--kernel-name"), ("--kernel-regex arg", "--kernel-regex")]
)
def test_older_sanitizers_filter_by_another_option(tools, listed, option):
    """Before CUDA 12.3."""
    (tools / "compute-sanitizer").write_text(f"#!/bin/sh\necho '{listed}'\n")
    gpu_stages._name_option.cache_clear()
    command = gpu_stages.sanitizer("memcheck", ["python"], {}).command
    assert command[command.index("kns=_ZN3gpu") - 1] == option


def test_the_sanitizers_filter_matches_every_kernel():
    try:
        mangled = sass.mangled_names(sass.installed())
    except sass.MissingTool as missing:
        pytest.skip(str(missing))
    assert len(mangled) > 200
    assert [name for name in mangled if not name.startswith(gpu_stages.OUR_KERNELS)] == []
    assert {kernel.partition("<")[0] for kernel in sass.demangle(mangled)} == set(gpu_stages.kernels_of_the_source())


def test_a_machine_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: None)
    _, problems = gpu_stages.preflight()
    assert [problem.partition(" ")[0] for problem in problems] == ["nvidia-smi", "nvcc", "compute-sanitizer"]


def test_the_stages_name_files_and_modules_that_exist(tmp_path):
    for here in (True, False):
        for steps in gpu_stages.stages(sys.executable, tmp_path, here).values():
            for step in steps:
                for word in step.command:
                    assert not word.startswith("tests/") or (ROOT / word).exists(), word


@pytest.mark.slow
def test_a_rehearsal_on_the_emulator(tmp_path, tools):
    """bench/gpu.sh from end to end; the smoke test's cases run on the emulator, which has no profiler and no card."""
    steps = gpu_stages.stages(sys.executable, tmp_path / "gpu", here=True)
    (smoke,) = steps["smoke"]
    smoke.command[-1] = "launch_every_kernel"
    gpu_stages.run(tmp_path / "gpu", ["smoke"], steps)
    report = (tmp_path / "gpu" / "report.md").read_text()
    assert "| smoke | smoke | passed |" in report, (tmp_path / "gpu" / "smoke-smoke.log").read_text()
    assert report.count("_kernel | pass |") == 39 and "FAIL" not in report and "not launched" not in report


def test_the_script_starts(tmp_path):
    listed = subprocess.run([ROOT / "bench" / "gpu.sh", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--only" in listed and "sanitizers" in listed
    loaded = run_python("import sys, bench.gpu_stages; print('torch' in sys.modules)", PYTHONPATH=str(ROOT)).stdout
    assert loaded == "False\n"

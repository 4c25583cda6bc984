"""`python -m megalodon_ops {info, train, eval, generate}`, on models of a moment."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import megalodon_ops
from megalodon_ops.cli import checkpoint, main, metrics
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.lock import Lock

TINY = "--dim 32 --layers 2 --chunk 16 --batch 3 --length 24 --norm-groups 4 --warmup 5 --lr 0.01".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder of about 20 KB of text."""
    folder = tmp_path_factory.mktemp("text")
    source = Path(argparse.__file__).read_bytes()
    for i in range(40):
        (folder / f"{i}.py").write_bytes(source[500 * i : 500 * (i + 1)])
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread, which is faster on models this small, and short samples at the end of a run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("megalodon_ops.cli.generate.SAMPLE", 20)
        yield
    torch.set_num_threads(threads)


def train(text, out, *flags) -> int:
    return main(["train", "--data", str(text), "--out", str(out), *TINY, *map(str, flags)])


def shell(*arguments) -> list[str]:
    return [sys.executable, "-m", "megalodon_ops", *map(str, arguments)]


def rows(out) -> list[dict]:
    """The run's metrics without what the clock says."""
    return [
        {name: value for name, value in row.items() if "second" not in name}
        for row in metrics.read(out / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    """A run of 60 steps."""
    out = tmp_path_factory.mktemp("finished")
    assert train(text, out, "--steps", 60, "--eval-every", 20, "--checkpoint-every", 25) == 0
    return out


# info


def test_info():
    lines = subprocess.run(shell("info"), capture_output=True, text=True, check=True).stdout.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert facts["megalodon_ops"] == megalodon_ops.__version__
    assert facts["torch"] == torch.__version__
    assert megalodon_ops._C.active_isa() in "\n".join(lines)
    assert any(line.startswith("threads") for line in lines)


@pytest.mark.parametrize("package", ["numpy", "safetensors", "tqdm", "matplotlib"])
def test_without_an_extra(package, tmp_path):
    """`info` needs torch alone; `train` says how to get what is missing."""
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
from megalodon_ops.cli import main
sys.exit(main(["info"]) or main(["train"]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout.startswith("megalodon_ops")
    line = result.stderr.splitlines()[-1]  # torch itself may warn before it
    assert line.startswith("megalodon_ops train: error: ")
    assert package in line and 'pip install "megalodon_ops[train]"' in line


# train


def test_the_loss_falls(finished):
    bits = [row["bits_per_byte"] for row in rows(finished) if "bits_per_byte" in row]
    assert len(bits) == 60
    assert 7 < bits[0] < 10
    assert sum(bits[-10:]) / 10 < bits[0] - 2


def test_what_a_run_leaves(finished):
    looks = [row for row in rows(finished) if "held_out_bits_per_byte" in row]
    assert [(row["step"], row.get("final", False)) for row in looks] == [
        (20, False),
        (40, False),
        (60, False),
        (60, True),
    ]
    assert looks[-1]["compressors"].keys() == {"gzip -9", "xz -9"}
    assert (finished / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    folders = sorted((finished / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000050", "step-00000060"]
    assert {path.suffix for folder in folders for path in folder.iterdir()} == {".safetensors", ".json"}


def test_what_a_run_prints(text, tmp_path, capsys):
    assert train(text, tmp_path, "--steps", 3) == 0
    out, err = capsys.readouterr()
    for words in ("bits per byte", "gzip -9", "xz -9", "peak memory", "continued by the model"):
        assert words in out
    for words in ("loss=", "bits/byte=", "tokens/s=", "3/3"):
        assert words in err


@pytest.mark.parametrize("context", ["streamed", "packed"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_and_resume(text, tmp_path, monkeypatch, capsys, context, number):
    """The losses after a resume are those of a run that was never interrupted, to the last bit; dropout included."""
    flags = ("--steps", 30, "--eval-every", 8, "--context", context, "--dropout", 0.1, "--attention-dropout", 0.1)
    assert train(text, tmp_path / "whole", *flags) == 0

    write = metrics.Diary.write

    def write_and_interrupt(diary, **row):
        write(diary, **row)
        if row["step"] == 13:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Diary, "write", write_and_interrupt)
        assert train(text, tmp_path / "parts", *flags) == 128 + number
    assert f"--out {tmp_path}/parts --resume" in capsys.readouterr().out
    assert rows(tmp_path / "parts")[-1]["step"] == 13
    assert (tmp_path / "parts" / "loss_curve.png").exists()
    assert main(["train", "--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_kill_and_resume(text, tmp_path):
    flags = ("--steps", 150, "--checkpoint-every", 20)
    process = subprocess.Popen(
        shell("train", "--data", text, "--out", tmp_path / "parts", *TINY, *flags),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    diary = tmp_path / "parts" / "metrics.jsonl"
    while process.poll() is None and not (diary.exists() and diary.read_bytes().count(b"\n") > 50):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with open(diary, "a") as file:
        file.write('{"step": 9999, "los')
    assert checkpoint.load(tmp_path / "parts", "--resume").record["step"] >= 40

    assert main(["train", "--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert train(text, tmp_path / "whole", *flags) == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_resuming_a_finished_run_ends_it_again(text, tmp_path):
    assert train(text, tmp_path, "--steps", 5) == 0
    before = rows(tmp_path)
    assert main(["train", "--out", str(tmp_path), "--resume"]) == 0
    assert rows(tmp_path) == before
    assert main(["train", "--out", str(tmp_path), "--resume", "--steps", "8"]) == 0
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, 9))


def test_two_runs_in_one_folder(text, tmp_path, capsys):
    """The second says who the first is, and changes nothing; once the first is killed, another goes on."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        shell("train", "--data", text, "--out", out, *TINY, "--steps", 100_000, "--checkpoint-every", 5),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (out / "checkpoints" / "step-00000005").exists():
        time.sleep(0.005)
    holder = f"process {process.pid} on {socket.gethostname()} since 20"
    for flags in (["--resume"], ["--data", str(text), *TINY]):
        assert main(["train", "--out", str(out), *flags]) == 2
        err = capsys.readouterr().err
        assert f"--out {out}: another run is writing there, {holder}" in err and err.count("\n") == 1
    before = rows(out)
    while process.poll() is None and rows(out)[: len(before) + 1] == before:
        time.sleep(0.005)
    assert process.poll() is None and rows(out)[: len(before)] == before
    process.kill()
    process.wait()
    step = checkpoint.load(out, "--out").record["step"]
    assert main(["train", "--out", str(out), "--resume", "--steps", str(step + 1)]) == 0
    assert not (out / "lock").exists()


def test_one_of_many_gets_the_lock(tmp_path):
    """Threads that take and release it at random never hold it together, although each release removes the file."""
    holders, most = 0, 0

    def take():
        nonlocal holders, most
        taken = 0
        while taken < 20:
            try:
                with Lock(tmp_path / "run"):
                    holders += 1
                    most = max(most, holders)
                    time.sleep(0)
                    holders -= 1
                    taken += 1
            except (CommandError, FileNotFoundError, FileExistsError):  # or its folder was just being removed
                pass

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_run_that_cannot_begin_leaves_no_folder(text, tmp_path, capsys):
    assert main(["train", "--data", str(tmp_path / "missing"), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_full_disk(text, tmp_path, capfd, file_size_limit):
    """One line, the checkpoint before stays and nothing else, and with room again the run goes on."""
    flags = ("--steps", 4, "--checkpoint-every", 2)
    assert train(text, tmp_path, *flags[:1], 2) == 0
    (tensors,) = (tmp_path / "checkpoints").glob("step-*2/model.safetensors")
    capfd.readouterr()
    with file_size_limit(tensors.stat().st_size):  # the optimizer's file is larger
        assert main(["train", "--out", str(tmp_path), "--resume", *map(str, flags)]) == 2
    lines = capfd.readouterr().err.splitlines()
    (line,) = (line for line in lines if "step/s" not in line and line)  # all but the bar's
    assert line.startswith("megalodon_ops train: error: ") and "step-00000004: could not be written" in line
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000000", "step-00000002"]
    assert main(["train", "--out", str(tmp_path), "--resume", *map(str, flags)]) == 0
    assert checkpoint.load(tmp_path, "--out").record["step"] == 4


def test_full_disk_in_the_diary(tmp_path, file_size_limit):
    with metrics.Diary(tmp_path / "metrics.jsonl", 0) as diary:
        diary.write(step=1)
        with file_size_limit(20), pytest.raises(CommandError, match="metrics.jsonl: could not be written"):
            diary.write(step=2)
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_minutes(text, tmp_path):
    begin = time.monotonic()
    assert train(text, tmp_path, "--minutes", 0.05, "--lr", 0.01, "--eval-every", 1000, "--checkpoint-every", 50) == 0
    assert time.monotonic() - begin < 30
    curve = [row for row in metrics.read(tmp_path / "metrics.jsonl") if "loss" in row]
    assert 2 < curve[-1]["seconds"] < 6
    assert max(row["learning_rate"] for row in curve) > 0.009
    assert curve[-1]["learning_rate"] < 0.003, "the cosine ends with the budget"


def test_bfloat16(text, tmp_path):
    assert train(text, tmp_path, "--steps", 30, "--dtype", "bfloat16") == 0
    bits = [row["bits_per_byte"] for row in rows(tmp_path) if "bits_per_byte" in row]
    assert bits[-1] < bits[0] - 1
    assert checkpoint.load(tmp_path, "--out").parts["model"]["embed.weight"].dtype == torch.float32


def test_one_document(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(b"to be or not to be, that is the question. " * 30)
    assert train(path, tmp_path / "out", "--steps", 2) == 0


ERRORS = {
    "missing text": (["train", "--data", "{tmp}/missing"], "missing: no such file or folder"),
    "empty text": (["train", "--data", "{tmp}/empty"], "empty: the file is empty"),
    "steps": (["train", "--steps", "0"], "argument --steps: must be a whole number above 0 and below 2^63, got 0"),
    "minutes": (["train", "--minutes", "nan"], "argument --minutes: must be a number above 0, got nan"),
    "unknown flag": (["train", "--stops", "3"], "unrecognized arguments: --stops 3"),
    "abbreviation": (["train", "--step", "3"], "unrecognized arguments: --step 3"),
    "unknown preset": (["train", "--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
    "config": (["train", "--dim", "33"], "`norm_num_groups` must be a divisor of model_dim = 33"),
    "device": (["train", "--device", "abacus"], "--device abacus"),
    "meta device": (["train", "--device", "meta"], "--device meta: this build of megalodon_ops has no kernels for it"),
    "out is a file": (["train", "--data", "{text}", "--out", "{tmp}/empty"], "empty: File exists"),
    "out holds a run": (["train", "--out", "{run}"], "holds a run already; continue it with --resume"),
    "resume nothing": (["train", "--resume", "--out", "{tmp}/missing"], "--resume {tmp}/missing: no such folder"),
    "resume no checkpoint": (["train", "--resume", "--out", "{tmp}"], "--resume {tmp}: no complete checkpoint"),
    "resume without out": (["train", "--resume"], "--resume: name the folder of the run with --out DIR"),
    "resume another config": (["train", "--resume", "--out", "{run}", "--dim", "64"], "--dim: the run in {run} has 32"),
    "resume another layer": (["train", "--resume", "--out", "{run}", "--swiglu"], "--swiglu: the run in {run} has"),
    "resume another seed": (["train", "--resume", "--out", "{run}", "--seed", "7"], "--seed: the run in {run} has 0"),
    "resume another text": (["train", "--resume", "--out", "{run}", "--data", __file__], "the text is not the one"),
    "eval nothing": (["eval", "--checkpoint", "{tmp}/missing"], "--checkpoint {tmp}/missing: no such folder"),
    "eval no checkpoint": (["eval", "--checkpoint", "{tmp}"], "--checkpoint {tmp}: no complete checkpoint"),
    "eval empty text": (["eval", "--checkpoint", "{run}", "--data", "{tmp}/empty"], "empty: the file is empty"),
    "no checkpoint": (["generate"], "the following arguments are required: --checkpoint"),
    "generate nothing": (["generate", "--checkpoint", "{tmp}/missing"], "no such folder"),
    "missing prompt": (["generate", "--checkpoint", "{run}", "--prompt-file", "{tmp}/none"], "none: No such file"),
    "temperature": (["generate", "--checkpoint", "{run}", "--temperature", "-1"], "--temperature: must be a number"),
    "no command": ([], "required: {info,train,eval,generate}"),
    "unknown command": (["fly"], "invalid choice: 'fly'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_one_line_and_exit_code_2(name, finished, text, tmp_path, capsys):
    def fill(word):
        for key, path in {"tmp": tmp_path, "run": finished, "text": text}.items():
            word = word.replace(f"{{{key}}}", str(path))
        return word

    arguments, message = ERRORS[name]
    (tmp_path / "empty").touch()
    before = rows(finished)
    try:
        code = main([fill(word) for word in arguments])
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert fill(message) in err
    assert err.startswith("megalodon_ops") and err.count("\n") == 1 and out == ""
    assert rows(finished) == before


def test_a_changed_config_in_the_checkpoint_is_noticed(text, tmp_path, capsys):
    assert train(text, tmp_path, "--steps", 1) == 0
    record = next((tmp_path / "checkpoints").glob("step-*1/checkpoint.json"))
    content = json.loads(record.read_text())
    content["config"]["model_dim"] = 64
    record.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(record.parent)]) == 2
    assert "its tensors are not those of its config" in capsys.readouterr().err


# eval and generate


def test_eval_repeats_the_end_of_training(finished, capsys):
    assert main(["eval", "--checkpoint", str(finished), "--piece", "50", "--batch", "2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert float(last[0]) == pytest.approx(rows(finished)[-1]["held_out_bits_per_byte"], abs=2e-4)
    perplexity = float(last[last.index("perplexity") + 1])
    assert perplexity == pytest.approx(2 ** float(last[0]), rel=1e-3)


def test_eval_of_files(finished, text, capsys):
    assert main(["eval", "--checkpoint", str(finished), "--data", str(text / "0.py"), str(text / "1.py")]) == 0
    assert "2 documents, 1,000 bytes" in capsys.readouterr().out


def test_generate(finished, capsys):
    def generate(*flags):
        assert main(["generate", "--checkpoint", str(finished), "--prompt", "import ", "--bytes", "40", *flags]) == 0
        return capsys.readouterr().out

    text = generate()
    assert text.startswith("import ") and len(text) > len("import ")
    assert generate() == text, "a seed repeats itself"
    assert generate("--seed", "1") != text
    assert generate("--temperature", "0") == generate("--top-k", "1", "--seed", "3") != text


def test_generate_prints_as_it_comes(finished):
    command = shell("generate", "--checkpoint", finished, "--bytes", 1_000_000)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(20)
        process.stdout.close()  # as `head` does
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    "flags",
    [
        ["--dim", 10**9],
        ["--batch", 10**12],
        ["--length", 10**20],
        ["--layers", 10**8],
        ["--steps", "1" + "0" * 400],
        ["--vocab", 3],
    ],
    ids=lambda flags: f"{flags[0]} {str(flags[1])[:12]}",
)
def test_what_no_machine_holds_is_refused_in_one_line(flags, text, tmp_path, capsys):
    small = ["--dim", "32", "--norm-groups", "4", "--batch", "3", "--length", "24"]
    try:
        code = main(["train", "--data", str(text), "--out", str(tmp_path / "run"), *small, *map(str, flags)])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and "error" in said and len(said) < 300


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"megalodon_ops {megalodon_ops.__version__}\n"


def test_a_prompt_from_standard_input_on_a_terminal_that_knows_ascii_alone(finished):
    command = shell("generate", "--checkpoint", finished, "--prompt-file", "-", "--bytes", 5)
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(command, input="d\u00e9f ".encode(), capture_output=True, env=environment)
    assert ran.returncode == 0 and ran.stderr == b"" and ran.stdout.startswith(b"d\\xe9f ")


def test_waiting_threads_sleep_unless_the_user_says_otherwise():
    """OpenMP reads the variable when torch loads it, so it must be set before."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = lambda *command, **extra: subprocess.run(  # noqa: E731
        command, capture_output=True, text=True, env=environment | extra, check=True
    ).stdout.strip()
    seen = "import os, megalodon_ops; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert run(sys.executable, "-c", seen) == "None"
    as_module = f"import sys; sys.argv = ['-m', 'info']; sys.orig_argv = [sys.executable, '-m', 'megalodon_ops', 'info']; {seen}"
    assert run(sys.executable, "-c", as_module) == "1000"
    assert run(sys.executable, "-c", as_module, GOMP_SPINCOUNT="5") == "5"
    assert run(sys.executable, "-c", as_module, OMP_WAIT_POLICY="active") == "None"

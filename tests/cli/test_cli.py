"""The command line: behaviour common to all commands, from the first import to errors."""

import os
import re
import shlex
import subprocess
import sys

from paths import ROOT
import pytest
import torch
from command_line import assert_refused, error_of, refusals, rows, shell
from programs import run_python

import megalodon_ops
from megalodon_ops.cli import main
from megalodon_ops.cli.flags import parse
from megalodon_ops.cli.options import COMMANDS
from megalodon_ops_startup import SPIN_COUNT

pytestmark = pytest.mark.usefixtures("quick")


def test_info_needs_no_extra_and_train_names_missing_packages():
    """`python -m megalodon_ops info` without the extra `train`; then `train`, adding one package after the other."""
    program = """
import contextlib, io, re, runpy, sys
absent = {"msgspec", "tqdm", "matplotlib"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
sys.argv[1:] = ["info"]
try:
    runpy.run_module("megalodon_ops", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert end.code == 0
from megalodon_ops.cli import main
while absent:
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert main(["train"]) == 2
    line = r'megalodon_ops train: error: needs (\\w+), which .*: pip install ".*\\[train\\]"\\n'
    absent.remove(re.fullmatch(line, stderr.getvalue())[1])
"""
    ran = run_python(program)
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    facts = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines())
    assert facts["megalodon_ops"] == megalodon_ops.__version__
    assert facts["torch"] == torch.__version__
    assert megalodon_ops._C.active_isa() in ran.stdout and "threads" in facts


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"megalodon_ops {megalodon_ops.__version__}\n"


def test_without_a_command_the_help_is_shown(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    out, err = capsys.readouterr()
    assert stopped.value.code == 0 and err == "" and out.startswith("usage: ")
    one_line = " ".join(out.split())  # similar names refer to each other:
    assert "print the bytes per token of a tokenizer (`tokenize` writes tokens)" in one_line
    assert "`train --data` (`tokenizer` makes the tokenizer)" in one_line


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_are_commands(command, capsys):
    def examples(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--help"])
        assert stopped.value.code == 0
        return re.findall(r"^  (?:megalodon-ops|torchrun .* -m megalodon_ops) (.*)$", capsys.readouterr().out, re.M)

    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"usage: megalodon-ops {command} " in capsys.readouterr().out
    command_examples = examples(command)
    assert command_examples and len(set(command_examples)) == len(command_examples)
    for example in command_examples:
        assert parse(shlex.split(example.partition(" < ")[0]), COMMANDS)[0] == command
    assert command_examples[0] in examples()


# Before torch is loaded: sitecustomize.py runs a line of code when the import of a given module begins

AT_AN_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            exec(os.environ["DO"])
sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def at_an_import(tmp_path):
    """`at_an_import(module, line, *command, **variables)`: run a command, and the line when it imports the module."""
    (tmp_path / "sitecustomize.py").write_text(AT_AN_IMPORT)

    def run(module, line, *command, **variables):
        clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = clean | {"PYTHONPATH": path, "AT": module, "DO": line} | variables
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.fixture
def script(tmp_path):
    """The command `megalodon-ops`, as pip writes it."""
    (target,) = re.findall(r'^megalodon-ops = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    module, _, name = target.partition(":")
    (tmp_path / "megalodon-ops").write_text(f"import sys\nfrom {module} import {name}\nsys.exit({name}())\n")
    return [sys.executable, str(tmp_path / "megalodon-ops")]


@pytest.mark.parametrize("module", ["torch", "matplotlib.figure"])
def test_ctrl_c_during_the_imports_ends_quietly(at_an_import, script, module):
    """In the import of torch, which comes first, and in a late one, after modules that might catch the signal."""
    for command in (
        [script] if module == "torch" else [shell(), script]
    ):  # `python -m` handles SIGINT after torch's import
        ended = at_an_import(module, INTERRUPT, *command, "train", "--data", __file__ + "missing")
        assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_ctrl_c_that_is_ignored_stays_ignored(at_an_import):
    """Under `nohup`, or `&` of a shell, SIGINT is ignored from the start."""
    line = f"{INTERRUPT}; print('goes on', flush=True); os._exit(0)"
    ended = at_an_import("torch", line, "/bin/sh", "-c", f"trap '' INT; exec {shlex.join(shell('info'))}")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "goes on\n", "")


SHOW = "print(*map(os.environ.get, ('GOMP_SPINCOUNT', 'TORCH_CPP_LOG_LEVEL')), flush=True); os._exit(0)"


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({}, f"{SPIN_COUNT} None"),
        ({"GOMP_SPINCOUNT": "5", "RANK": "0"}, "5 FATAL"),  # RANK: under a launcher, torch logs less
        ({"OMP_WAIT_POLICY": "active", "RANK": "0", "TORCH_CPP_LOG_LEVEL": "INFO"}, "None INFO"),
    ],
)
def test_waiting_threads_sleep_unless_the_user_decides_otherwise(at_an_import, script, variables, shown):
    """OpenMP and torch read the variables when torch is loaded. `python -m` loads it twice, if a variable must change."""
    assert at_an_import("torch", SHOW, *script, "info", **variables).stdout == f"{shown}\n"
    # Says each time that torch's import begins; the second time shows the variables and ends
    second_start = "print('start', flush=1); SECOND = 'SECOND' in os.environ; os.environ['SECOND'] = ''\n"
    second_start += f"if SECOND: {SHOW}"
    started = at_an_import("torch", second_start, *shell("info"), **variables).stdout
    if "TORCH_CPP_LOG_LEVEL" in variables:
        assert started.startswith("start\nmegalodon_ops ") and started.count("start\n") == 1
    else:
        assert started == f"start\nstart\n{shown}\n"


def test_importing_the_package_sets_nothing(at_an_import, tmp_path):
    """Not even in a program with the command's name, or in a module run by `python -m`."""
    (tmp_path / "megalodon_ops_user.py").write_text("import megalodon_ops\n")
    (tmp_path / "megalodon-ops").write_text("import megalodon_ops\n")
    for program in ["-c", "import megalodon_ops"], ["-m", "megalodon_ops_user"], [tmp_path / "megalodon-ops"]:
        shown = at_an_import("torch", SHOW, sys.executable, *program, RANK="0")
        assert (shown.returncode, shown.stdout, shown.stderr) == (0, "None None\n", "")
        ended = at_an_import("torch", INTERRUPT, sys.executable, *program)
        assert ended.returncode != 130 and "KeyboardInterrupt" in ended.stderr


ERRORS = """
    train --data {tmp}/missing => missing: no such file or folder
    train --data {tmp}/empty => empty: the file is empty
    train --glob '' => --glob: must be a pattern of file names such as '*.py', got ''
    train --glob *.py => --glob: chooses among the files of folders, and none is named
    train --data {text} --glob *.c => {text}: no file in this folder matches *.c
    eval --checkpoint {run} --glob * => --glob: chooses among the files of folders, and none
    train --config {tmp}/key => --config {tmp}/key: not an option of a run: 'layer'; did you mean layers?
    train --config {tmp}/value => --config {tmp}/value: --steps: must be a whole number, got 'many'
    train --config {tmp}/none => {tmp}/none:
    train --config {tmp}/one => error: --config {tmp}/one:
    train --config {tmp}/x.yaml => ; it must hold a JSON object of options, such as {"dim": 64}
    train --resume --out {run} --accumulate 2 => --accumulate: the run in {run} has 1, got 2
    train --steps 0 => --steps: must be a whole number >= 1, got '0'
    train --steps 3 --minutes 1 => --steps: cannot be combined with --minutes
    train --minutes nan => --minutes: must be a number > 0.0, got 'nan'
    train --resume --out {run} --context-length 9 => --context-length: the run in {run} has 192, got 9
    train --stops 3 => train: error: unrecognized arguments: --stops 3; did you mean --steps?
    train --epochs 3 => --epochs 3; megalodon-ops train --help lists the flags
    eval --checkpoint {run} book.txt => eval: error: unrecognized arguments: book.txt; megalodon-ops
    --steps 3 train => error:
    train --data {tmp}/one => error: {tmp}/one: must have at least 2 bytes, one to learn and
    train --data {text} --out {text}/run => --out {text}/run: lies in {text}, so that what
    train --out '' => --out: must name a file or a folder, got ''
    train --out /proc/none => --out /proc/none: cannot create the folder: No such file
    train --device cuda:99 => --device cuda:99:
    train --device mps => --device mps: must be cpu, cuda or one card, such as cuda:1; there are no kernels
    train --dim 42 => --norm-groups: must be a divisor of --dim = 42, got 8.
    train --z-dim 33 => --z-dim: must be a multiple of 2 * --heads = 2, got 33.
    eval --checkpoint {run} --batch 9999999999 => --batch: must be a whole number <= 2147483647
    generate --checkpoint {run} --samples 999999999 => --samples: the state of 999,999,999 samples takes
    generate --checkpoint {run} --prompt-file {tmp} => --prompt-file {tmp}: Is a directory
    train --step 3 => unrecognized arguments: --step 3
    train --preset huge => argument --preset: invalid choice: 'huge'
    train --data {text} --out {tmp}/empty => --out {tmp}/empty: a file; name a folder
    train --out {run} => holds a run already; continue it with --resume
    train --resume --out {tmp}/missing => --resume {tmp}/missing: no such folder
    train --resume --out {tmp} => --resume {tmp}: no complete checkpoint
    train --resume => --resume: name the run's folder with --out DIR
    train --resume --out {run} --dim 64 => --dim: the run in {run} has 32
    train --resume --out {run} --no-swiglu => --swiglu: the run in {run} has
    train --resume --out {run} --seed 7 => --seed: the run in {run} has 0
    train --resume --out {run} --data {here} => the text is not the one
    eval --checkpoint {tmp}/missing => --checkpoint {tmp}/missing: no such folder
    eval --checkpoint {tmp} => --checkpoint {tmp}: no model in this folder
    generate => the following arguments are required: --checkpoint
    generate --checkpoint {run} --prompt-file /dev/zero => --prompt-file /dev/zero: must have at most 100,000,000 bytes
    generate --checkpoint {run} --prompt-file {tmp}/none => --prompt-file {tmp}/none: No such file
    generate --checkpoint {run} --temperature -1 => --temperature: must be a number >= 0.0
    plan --memory 8 => --memory 8: is in bytes, less than a megabyte; add a unit, such as 8GB
    plan --mesh rows=2 => --mesh: must be sizes of data, chunk and tensor such as data=2,chunk=2, got 'rows=2'
    plan --mesh data=2 --batch 3 => --batch: must be a multiple of the mesh's data = 2, got 3
    plan --param-dtype bfloat16 --dtype float32 => --param-dtype: must be float32, or `dtype` without
    fly => invalid choice: 'fly'
    trian => ); did you mean train?
    train --preset mega1.3b => ); did you mean mega1.3B?
"""


@refusals(ERRORS)
def test_one_line_and_exit_code_2(command, words, finished, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"empty": "", "one": "x", "key": '{"layer": 3}', "value": '{"steps": "many"}', "x.yaml": "dim: 256"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    before = rows(finished)
    assert_refused(capsys, command, words, tmp=tmp_path, run=finished, text=text, here=__file__)
    assert rows(finished) == before


TOO_LARGE = [f"--dim {10**9}", f"--batch {10**12}", f"--length {10**20}", f"--layers {10**8}", "--vocab 3"]
TOO_LARGE += [f"--cema-ndim {10**6} --batch {10**4}", f"--steps 1{'0' * 400}"]


@pytest.mark.parametrize("flags", TOO_LARGE, ids=lambda flags: flags[:22])
def test_models_beyond_any_memory_are_refused_in_one_line(flags, text, tmp_path, capsys):
    small = "--dim 32 --norm-groups 4 --batch 3 --length 24".split()
    line = error_of(capsys, "train", "--data", text, "--out", tmp_path / "run", *small, *flags.split())
    assert "error" in line and len(line) < 300

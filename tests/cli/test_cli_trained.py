"""`eval` and `generate` with a trained model."""

import contextlib
import io
import re
import signal

import pytest
import torch
from command_line import Forked, error_of, evaluated_bits, output, overflow, rows, train
from models import tiny_model

from megalodon_ops.cli import main
from megalodon_ops.tokenizers import ByteTokenizer
from megalodon_ops.training.run_checkpoint import save_checkpoint

pytestmark = pytest.mark.usefixtures("quick")


def test_a_changed_config_in_the_checkpoint_is_noticed(text, tmp_path, capsys):
    assert train(text, tmp_path, "--steps", 1) == 0
    config = next((tmp_path / "checkpoints").glob("step-*1/config.json"))
    config.write_text(config.read_text().replace('"norm_eps": 1e-05', '"norm_eps": 2e-05'))
    words = "config.json: was changed after it was written: its checksum does not match"
    assert words in error_of(capsys, "eval", "--checkpoint", config.parent)


def test_eval_repeats_the_end_of_training(finished, capsys):
    last = rows(finished)[-1]["held_out_bits_per_byte"]
    assert evaluated_bits(capsys, "--checkpoint", finished, "--batch", 2) == pytest.approx(last, abs=2e-4)


def test_generate(finished, capsys):
    def generate(*flags):
        return output(capsys, "generate", "--checkpoint", finished, "--prompt", "import ", "--tokens", 40, *flags)

    text = generate()
    assert text.startswith("import ") and len(text) > len("import ")
    assert generate() == text, "the same seed, the same text"
    assert generate("--seed", "1") != text
    assert generate("--temperature", "0") == generate("--top-k", "1", "--seed", "3") != text


def test_several_prompts_are_continued_one_after_the_other(finished, capsys):
    def generate(*flags):
        return output(capsys, "generate", "--checkpoint", finished, "--tokens", 9, *flags)

    one, other = (generate("--prompt", prompt) for prompt in ("import ", "def "))
    both = ["--prompt", "import ", "--prompt", "def "]
    assert generate(*both) == f"--- prompt 1\n{one}--- prompt 2\n{other}"
    titles = [line for line in generate(*both, "--samples", "2").splitlines() if line.startswith("--- ")]
    assert titles == [f"--- prompt {prompt}, sample {sample}" for prompt in (1, 2) for sample in (1, 2)]


def test_bars_in_a_log_end_before_the_results(finished, text, tmp_path):
    """In a file that takes both streams, as `> log 2>&1` does."""
    for command in (
        ["eval", "--checkpoint", str(finished)],
        ["tokenize", str(text / "1.py"), "--out", str(tmp_path / "tokens")],
    ):
        log = io.StringIO()
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            assert main(command) == 0
        lines = log.getvalue().split("\n")
        (bar,) = (line for line in lines if "%|" in line)
        assert re.search(r"B/s\] *$", bar) and not re.search(r"documents|bits per byte|train with it", bar), lines


def test_generate_prints_token_by_token(finished):
    command = Forked("generate", "--checkpoint", finished, "--tokens", 1_000_000)
    assert command.stdout.read(20)
    command.stdout.close()  # as `head` does
    assert command.wait() == (128 + signal.SIGPIPE, b"")


def test_a_prompt_from_standard_input_on_an_ascii_terminal(finished):
    arguments = ["generate", "--checkpoint", finished, "--prompt-file", "-", "--tokens", 5]
    command = Forked(*arguments, stdin="d\u00e9f ".encode(), encoding="ascii")
    assert command.stdout.readall().startswith(b"d\\xe9f ")
    assert command.wait() == (0, b"")


@pytest.mark.parametrize(
    "flags", [["eval"], ["generate"], ["generate", "--temperature", "0"], ["generate", "--top-p", "0.9"]]
)
def test_weights_with_non_finite_losses_are_an_error(ended, capsys, flags):
    overflow(ended)
    line = error_of(capsys, *flags, "--checkpoint", ended, has_bar=True, prints=True)
    assert line.startswith(f"megalodon_ops {flags[0]}: error: ") and "weights are too large" in line


def test_perplexity_beyond_float64(ended, capsys):
    """Bad weights with finite losses are evaluated."""
    overflow(ended, by=1e4)
    shown = output(capsys, "eval", "--checkpoint", ended)
    assert shown.endswith(" bits per byte, perplexity inf per byte\n")


def test_eval_of_files_and_of_matching_files_in_a_folder(finished, text, capsys):
    command = ["eval", "--checkpoint", finished, "--data"]
    assert "2 documents, 1,000 bytes" in output(capsys, *command, text / "0.py", text / "1.py")
    assert "11 documents, 5,500 bytes" in output(capsys, *command, text, "--glob", "1.py", "--glob", "2?.py")


def test_a_checkpoint_of_another_program_is_evaluated_and_generates(text, tmp_path, capsys):
    """Its record is not that of `train`, so `eval` needs --data."""
    model = tiny_model(torch.float32, vocab_size=257, output_size=256)
    save_checkpoint(tmp_path, 1, model, tokenizer=ByteTokenizer(), record={"position": 3})
    assert "bits per byte" in output(capsys, "eval", "--checkpoint", tmp_path, "--data", text / "0.py")
    output(capsys, "generate", "--checkpoint", tmp_path, "--prompt", "a")
    error_of(capsys, "eval", "--checkpoint", tmp_path)

"""`eval` and `generate` with a trained model."""

import contextlib
import io
import re
import signal

import pytest
import torch
from command_line import Forked, overflow, rows, train
from models import tiny_model

from megalodon_ops.cli import main
from megalodon_ops.tokenizers import ByteTokenizer
from megalodon_ops.training.run_checkpoint import save_checkpoint

pytestmark = pytest.mark.usefixtures("quick")


def test_a_changed_config_in_the_checkpoint_is_noticed(text, tmp_path, capsys):
    assert train(text, tmp_path, "--steps", 1) == 0
    config = next((tmp_path / "checkpoints").glob("step-*1/config.json"))
    config.write_text(config.read_text().replace('"norm_eps": 1e-05', '"norm_eps": 2e-05'))
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(config.parent)]) == 2
    assert "config.json: was changed after it was written: its checksum is another" in capsys.readouterr().err


def test_eval_repeats_the_end_of_training(finished, capsys):
    assert main(["eval", "--checkpoint", str(finished), "--batch", "2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert float(last[0]) == pytest.approx(rows(finished)[-1]["held_out_bits_per_byte"], abs=2e-4)
    perplexity = float(last[last.index("perplexity") + 1])
    assert perplexity == pytest.approx(2 ** float(last[0]), rel=1e-3)


def test_eval_of_files(finished, text, capsys):
    assert main(["eval", "--checkpoint", str(finished), "--data", str(text / "0.py"), str(text / "1.py")]) == 0
    assert "2 documents, 1,000 bytes" in capsys.readouterr().out


def test_generate(finished, capsys):
    def generate(*flags):
        assert main(["generate", "--checkpoint", str(finished), "--prompt", "import ", "--tokens", "40", *flags]) == 0
        return capsys.readouterr().out

    text = generate()
    assert text.startswith("import ") and len(text) > len("import ")
    assert generate() == text, "the same seed, the same text"
    assert generate("--seed", "1") != text
    assert generate("--temperature", "0") == generate("--top-k", "1", "--seed", "3") != text


def test_several_prompts_are_continued_one_after_the_other(finished, capsys):
    def generate(*flags):
        assert main(["generate", "--checkpoint", str(finished), "--tokens", "9", *flags]) == 0
        return capsys.readouterr().out

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
    assert main([*flags, "--checkpoint", str(ended)]) == 2
    *bar, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megalodon_ops {flags[0]}: error: ") and "weights are too large" in line
    assert all("B/s" in part or not part.strip() for part in bar)


def test_perplexity_beyond_float64(ended, capsys):
    """Bad weights with finite losses are evaluated."""
    overflow(ended, by=1e4)
    assert main(["eval", "--checkpoint", str(ended)]) == 0
    assert capsys.readouterr().out.endswith(" bits per byte, perplexity inf per byte\n")


def test_eval_of_a_folder_takes_matching_files(finished, text, capsys):
    command = ["eval", "--checkpoint", str(finished), "--data", str(text)]
    assert main([*command, "--glob", "1.py", "--glob", "2?.py"]) == 0
    assert "11 documents, 5,500 bytes" in capsys.readouterr().out


def test_a_checkpoint_of_another_program_is_evaluated_and_generates(text, tmp_path, capsys):
    """Its record is not that of `train`, so `eval` needs --data."""
    model = tiny_model(torch.float32, vocab_size=257, output_size=256)
    save_checkpoint(tmp_path, 1, model, tokenizer=ByteTokenizer(), record={"position": 3})
    assert main(["eval", "--checkpoint", str(tmp_path), "--data", str(text / "0.py")]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["generate", "--checkpoint", str(tmp_path), "--prompt", "a"]) == 0
    assert main(["eval", "--checkpoint", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1

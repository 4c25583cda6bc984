"""ONNX files: onnxruntime computes the model's results from them, by single positions and by pieces; what is refused."""

import json
import os
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, opened_page
from models import TINY, numbers_of, tiny_model, tokens_of

import megalodon_ops as mo
from megalodon_ops.storage import onnx_export
from megalodon_ops.storage.files import FileError
from megalodon_ops.storage.onnx_export import RUNTIME, export_onnx
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer

NUMBERS = dict(num_features=3, missing_values=True, output_size=5)


def session(folder, name):
    return pytest.importorskip("onnxruntime").InferenceSession(folder / f"{name}.onnx")


def fresh(folder, rows):
    """The state of new sequences, by name."""
    state = json.loads((folder / "config.json").read_text())["state"]
    return {x["name"]: np.zeros([rows, *x["shape"][1:]], x["dtype"]) for x in state}


def run_pieces(folder, name, inputs, sizes):
    """Outputs (B, L, outputs) of inputs that are read in pieces."""
    step, prompt = session(folder, "step"), session(folder, "prompt")
    state, outputs = fresh(folder, len(inputs)), []
    for piece in inputs.split(sizes, 1):
        y, *new = (step if piece.shape[1] == 1 else prompt).run(None, {name: piece.numpy(), **state})
        state = dict(zip(state, new, strict=True))
        outputs.append(torch.from_numpy(y))
    return torch.cat(outputs, 1)


PIECES = [1, 5, 8, 1, 2, 1, 7, 1, 1]


@pytest.mark.slow  # torch's exporter takes half a minute, for each of the tests below
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float16, 2e-2), (torch.int8, 0.3)], ids=str)
def test_files_compute_the_models_logits(dtype, bound, tmp_path, capfd):
    model = tiny_model(torch.float32, num_layers=1, share_emb=True, scale_emb=True).eval()
    tokens = tokens_of(3, 27)
    export_onnx(model, tmp_path / "out", dtype=dtype)
    assert capfd.readouterr().err == ""  # no warnings of other packages about themselves
    logits, expected = run_pieces(tmp_path / "out", "tokens", tokens, PIECES), model(tokens)
    assert (logits - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.slow
def test_a_model_of_numbers(tmp_path):
    model, x = tiny_model(torch.float32, num_layers=1, **NUMBERS).eval(), numbers_of(3, 27, 3, mean=1e6)
    export_onnx(model, tmp_path / "out")
    outputs = run_pieces(tmp_path / "out", "numbers", x, PIECES)
    torch.testing.assert_close(outputs, model(x), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [dict(num_classes=5), dict(num_features=3, missing_values=True)], ids=str)
def test_an_encoder(inputs, tmp_path):
    torch.manual_seed(0)
    encoder = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**{**TINY, **inputs})).eval()
    export_onnx(encoder, tmp_path / "out")
    model = session(tmp_path / "out", "encoder")
    for length in (2, 7, 8, 21, 150):
        rows, lengths = tokens_of(3, length), torch.tensor([length, length // 2, 1])
        rows = rows if "num_classes" in inputs else numbers_of(3, length, 3, mean=1e6)
        name = model.get_inputs()[0].name
        (got,) = model.run(None, {name: rows.numpy(), "lengths": lengths.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), encoder(rows, lengths=lengths), rtol=0, atol=1e-4)


def program_of(readme: Path) -> str:
    return readme.read_text().split("```python\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def english():
    """A model of bytes, of the default run's sizes but narrower, after some seconds of training."""
    torch.manual_seed(0)
    text = torch.tensor(list(Path(json.__file__).with_name("decoder.py").read_bytes()))
    model = mo.Megalodon(mo.MegalodonConfig.preset("small", model_dim=64, value_dim=64, num_layers=2, chunk_size=64))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        starts = torch.randint(len(text) - 129, (8,))
        rows = torch.stack([text[start : start + 129] for start in starts])
        optimizer.zero_grad()
        model.loss(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def exported(english, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_onnx(english, folder, tokenizer=ByteTokenizer(), web=True)
    return folder


@pytest.mark.slow
def test_greedy_bytes_are_those_of_generate(english, exported):
    """Steps read one set of buffers and write the other, in turn; both sets share the keys and values."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = session(exported, "step")
    state = fresh(exported, 1)
    prompt = [256, *b"import json\n"]
    buffers = [{n: onnxruntime.OrtValue.ortvalue_from_numpy(x.copy()) for n, x in state.items()} for _ in range(2)]
    buffers[1] |= {name: value for name, value in buffers[0].items() if ".attention." in name}
    tokens, logits = [], []
    for count in range(10_000 + len(prompt) - 1):
        token = prompt[count] if count < len(prompt) else tokens[-1]
        binding = model.io_binding()
        binding.bind_cpu_input("tokens", np.array([[token]]))
        for name in state:
            binding.bind_ortvalue_input(name, buffers[count % 2][name])
            binding.bind_ortvalue_output(f"new.{name}", buffers[(count + 1) % 2][name])
        binding.bind_output("logits")
        model.run_with_iobinding(binding)
        logits.append(binding.get_outputs()[-1].numpy()[0, 0])
        if count >= len(prompt) - 1:
            tokens.append(int(logits[-1].argmax()))
    expected = english.generate(torch.tensor([prompt]), max_new_tokens=10_000, temperature=0)[0].tolist()
    assert tokens == expected[-10_000:]
    whole = english(torch.tensor([[*prompt, *tokens[:-1]]]))[0]
    torch.testing.assert_close(torch.from_numpy(np.stack(logits)), whole, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_an_environment_with_onnxruntime_and_numpy_alone(exported, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = subprocess.run([python, "-m", "pip", "install", "-q", "onnxruntime", "numpy"], capture_output=True)
    if pip.returncode:
        pytest.skip("needs an index of packages")
    program = program_of(exported / "README.md")
    done = subprocess.run([python, "-I", "-c", program], cwd=exported, capture_output=True, text=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)) == len([256, *b"The "]) + 20, done.stderr
    refused = subprocess.run([python, "-I", "-c", "import torch"], capture_output=True)
    assert refused.returncode != 0


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """The folder `dist` of the npm package onnxruntime-web."""
    folder = tmp_path_factory.mktemp("npm")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    try:
        subprocess.run(["npm", "pack", "onnxruntime-web"], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs npm and its registry")
    (packed,) = folder.glob("*.tgz")
    subprocess.run(["tar", "-xzf", packed], cwd=folder, check=True)
    return folder / "package" / "dist"


@pytest.mark.slow
def test_the_page_writes_what_generate_does(english, exported, runtime, tmp_path):
    for name in RUNTIME:
        (exported / name).write_bytes((runtime / name).read_bytes())
    prompt = "def f(x):\n"
    with opened_page(exported, tmp_path) as page:
        page.wait_until("document.getElementById('write')?.disabled === false", 60)
        for field, text in (("temperature", "0"), ("limit", "200"), ("text", prompt)):
            page.value(f"document.getElementById('{field}').value = ''")
            page.click(field)
            page.type(text)
        for total in (200, 400):  # the second time, it writes on from its state
            page.click("write")
            page.wait_until("document.getElementById('status').textContent.startsWith('Done')", 120)
            assert "200 tokens, " in page.value("document.getElementById('status').textContent")
            tokens = torch.tensor([[256, *prompt.encode()]])
            expected = english.generate(tokens, max_new_tokens=total, temperature=0)[0].tolist()
            assert page.value("document.getElementById('text').value") == bytes(expected[1:]).decode()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "BPE"])
def test_the_page_reads_tokens_as_the_tokenizer_does(kind, tmp_path):
    """The script's class in Node."""
    texts = ["It's 12 o'clock,\n\n  naïve  日本 🙂 don't", " ", "a\tb  c", ""]
    tokenizer = ByteTokenizer() if kind == "bytes" else Tokenizer.train([t.encode() * 9 for t in texts], vocab_size=300)
    tokenizer.save(tmp_path)
    script = (Path(onnx_export.__file__).parent / "exported" / "write.js").read_text().split("class Model")[0]
    script += "const json = JSON.parse(require('fs').readFileSync('tokenizer.json'));"
    script += f"console.log(JSON.stringify({json.dumps(texts)}.map((text) => new Tokenizer(json).encode(text))));"
    try:
        done = subprocess.run(["node", "-e", script], cwd=tmp_path, capture_output=True, text=True)
    except OSError:
        pytest.skip("needs node")
    assert json.loads(done.stdout) == [tokenizer.encode(text).tolist() for text in texts], done.stderr


def test_refused_models(tmp_path):
    model, out = tiny_model(torch.float32), tmp_path / "out"
    for wrong, text in (
        (mo.quantize(model, "int8"), "must have floating-point weights, got int8 weights; export the model"),
        (tiny_model(torch.float32, visible_chunks=2), "`visible_chunks` of the model must be 1, got 2"),
        (tiny_model(torch.float32, norm_eps=1e-9), "`norm_eps` of the model must be 0 or above 1e-8, got 1e-09"),
        (tiny_model(torch.float32, chunk_size=2), "`chunk_size` of the model must be at least 3, got 2"),
    ):
        with pytest.raises(ValueError, match=text):
            export_onnx(wrong, out)
    with pytest.raises(ValueError, match="`dtype` must be torch.float32, torch.float16 or torch.int8"):
        export_onnx(model, out, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="`model` must be a Megalodon or a MegalodonEncoder"):
        export_onnx(torch.nn.Linear(1, 1), out)
    with pytest.raises(ValueError, match="`web` must be False for an encoder or a model of numbers"):
        export_onnx(tiny_model(torch.float32, num_features=3), out, web=True)
    with pytest.raises(ValueError, match="`tokenizer` must be of bytes or byte-level BPE"):
        export_onnx(model, out, web=True)
    with pytest.raises(FileError, match="the folder `dist` of the npm package onnxruntime-web, got no ort.wasm"):
        export_onnx(model, out, web=True, tokenizer=ByteTokenizer(), onnxruntime_web=tmp_path)
    adapted = tiny_model(torch.float32)
    adapted.layers[0].mega.wv = torch.nn.Sequential(adapted.layers[0].mega.wv)
    with pytest.raises(ValueError, match="got no `layers.0.mega.wv.weight`; merge adapters"):
        export_onnx(adapted, out)
    model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="no hooks, got one on `layers.0`"):
        export_onnx(model, out)
    assert not out.exists()


def test_a_failure_leaves_the_old_files(tmp_path, monkeypatch):
    """The disk is full after the first program."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    out = tmp_path / "out"
    out.mkdir()
    (out / "step.onnx").write_bytes(b"old")

    def export(path, *_):
        if path.name == "prompt.onnx":
            raise OSError(28, os.strerror(28))
        path.write_bytes(b"new")

    monkeypatch.setattr(onnx_export, "_export", export)
    with pytest.raises(OSError, match="could not be written: No space left"):
        export_onnx(tiny_model(torch.float32), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [("step.onnx", b"old")]

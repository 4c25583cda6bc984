"""`Megalodon.save` and `Megalodon.load`: one folder, whole or not there, checked before it is used."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import SAVED, TINY, tiny_model, tokens_of
from safetensors.torch import load_file, save_file

import megalodon_ops as mo
from megalodon_ops.storage.files import FileError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def equal_parameters(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("config", SAVED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(tmp_path, config, dtype):
    """Each configuration and each dtype is written in one file, and in shards of 5,000 bytes, in turn."""
    shard = 1 << 30 if ([*SAVED].index(config) + DTYPES.index(dtype)) % 2 == 0 else 5000
    model = tiny_model(torch.float64, **SAVED[config]).to(dtype).eval()
    model.save(tmp_path / "m", max_shard_bytes=shard)
    loaded = mo.Megalodon.load(tmp_path / "m")
    assert loaded.config == model.config and not loaded.training
    assert equal_parameters(loaded, model)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert (loaded.output.output.weight is loaded.embed.weight) == model.config.share_emb
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded(tokens_of(1, 20)), model(tokens_of(1, 20)))
    loaded(tokens_of(1, 5)).sum().backward()
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert ("model.safetensors" in names) == (shard > 5000) == (len(names) == 3)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("asked", DTYPES, ids=str)
def test_another_dtype(tmp_path, stored, asked):
    """Linear layers take the dtype asked for; wide parameters keep the file's digits."""
    model = tiny_model(torch.float64).to(stored)
    model.save(tmp_path / "m")
    loaded = mo.Megalodon.load(tmp_path / "m", dtype=asked)
    assert equal_parameters(loaded, tiny_model(torch.float64).to(stored).to(asked))
    for name, parameter in mo.wide_parameters(loaded).items():
        assert parameter.dtype == (torch.float64 if asked == torch.float64 else torch.float32), name


def test_content_of_the_folder(tmp_path):
    """The layout of Hugging Face's hub: names without prefix, an index of shards no larger than asked for."""
    model = tiny_model(torch.float32, share_emb=True)
    model.save(tmp_path / "m", max_shard_bytes=9000)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config.pop("auto_map")["AutoModelForCausalLM"] == "modeling_megalodon.MegalodonForCausalLM"
    expected = dict(model_type="megalodon", architectures=["MegalodonForCausalLM"], format=1, dtype="float32")
    expected |= dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
    assert config == expected | model.config.to_dict() | {"megalodon_ops_version": mo.__version__}
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * model.num_parameters()}
    names = [name for name, _ in model.named_parameters()]
    assert list(index["weight_map"]) == names and "output.output.weight" not in names
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for shard in shards:
        tensors = load_file(tmp_path / "m" / shard)
        assert set(tensors) == {name for name, file in index["weight_map"].items() if file == shard}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 9000 or len(tensors) == 1


def test_loading_draws_no_random_numbers(tmp_path):
    tiny_model(torch.float32).save(tmp_path / "m")
    before = torch.get_rng_state()
    mo.Megalodon.load(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_trains_and_the_file_stays(tmp_path):
    """Weights are mapped privately: an optimizer step changes the model as in plain memory, but not the file."""
    model = tiny_model(torch.float32).eval()
    model.save(tmp_path / "m")
    content = (tmp_path / "m" / "model.safetensors").read_bytes()
    loaded = mo.Megalodon.load(tmp_path / "m")
    for each in (model, loaded):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1)
        each.loss(tokens_of(2, 9), tokens_of(2, 9)).backward()
        optimizer.step()
    assert equal_parameters(loaded, model)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == content
    loaded.save(tmp_path / "m")  # over the file that the model is mapped from
    assert equal_parameters(mo.Megalodon.load(tmp_path / "m"), model)


class Tokenizer:
    def __init__(self, name):
        self.name = name

    def save(self, folder):
        (folder / self.name).write_text("{}")


def test_files_kept_when_a_checkpoint_is_replaced(tmp_path):
    """Other files stay, old weights do not, and only a tokenizer replaces a tokenizer."""
    model, folder = tiny_model(torch.float32), tmp_path / "m"
    model.save(folder, max_shard_bytes=5000, tokenizer=Tokenizer("tokenizer.model"))
    (folder / "README.md").write_text("a card")
    model.save(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "modeling_megalodon.py", "model.safetensors", "tokenizer.model", "README.md"}
    model.save(folder, tokenizer=Tokenizer("tokenizer.json"))
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "modeling_megalodon.py", "model.safetensors", "tokenizer.json", "README.md"}
    assert (folder / "README.md").read_text() == "a card"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    model = tiny_model(torch.float32)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model.save(tmp_path / "link")
    model.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and equal_parameters(mo.Megalodon.load(tmp_path / "real"), model)


def test_folders_of_others_are_not_changed(tmp_path, monkeypatch):
    model = tiny_model(torch.float32)

    def assert_refused(message, folder):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=f"^save: `directory` must be a new folder or .* got .*{message}"):
            model.save(folder)
        assert sorted(tmp_path.rglob("*")) == before

    (tmp_path / "file").write_text("")
    assert_refused("/file, a file", tmp_path / "file")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("")
    assert_refused("which holds other files", tmp_path / "work")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    assert_refused("which holds other files", tmp_path / "other")
    model.save(tmp_path / "m")
    (tmp_path / "m" / ".git").mkdir()
    assert_refused(r"which holds \.git/", tmp_path / "m")
    (tmp_path / "m" / ".git").rmdir()
    (tmp_path / "m" / "training.json").write_text("{}")
    assert_refused("a training run's", tmp_path / "m")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert_refused("the working directory", ".")


def test_models_that_cannot_be_saved(tmp_path):
    def assert_refused(message, model):
        with pytest.raises(ValueError, match=f"^save: {message}"):
            model.save(tmp_path / "m")
        assert not list(tmp_path.iterdir())

    model = tiny_model(torch.float32)
    with torch.no_grad():
        model.layers[1].mega.wv.weight[3, 4] = float("nan")
    assert_refused("`layers.1.mega.wv.weight` must be finite", model)
    with torch.device("meta"):
        assert_refused("`embed.weight` must be a tensor .* with values, got a meta tensor", mo.Megalodon(model.config))
    model = tiny_model(torch.float32)
    model.layers[0].mega.wv = torch.nn.Sequential(model.layers[0].mega.wv)
    assert_refused("`model` must have the parameters of its conf.*, got no `layers.0.mega.wv.weight`; merge", model)
    model = tiny_model(torch.float32)
    model.embed = torch.nn.Embedding(32, 32)
    assert_refused(r"`embed.weight` must have shape \(31, 32\), got \(32, 32\)", model)


def test_matrices_that_share_memory_without_share_emb(tmp_path):
    model = tiny_model(torch.float32)
    model.output.output.weight = model.embed.weight
    model.save(tmp_path / "m")
    loaded = mo.Megalodon.load(tmp_path / "m")
    assert torch.equal(loaded.output.output.weight, model.embed.weight)
    assert loaded.output.output.weight is not loaded.embed.weight


_LOAD = """
import re, sys, torch, megalodon_ops as mo
def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
kind, small, folder, dtype = sys.argv[1:]
load = mo.Megalodon.load if kind == "own" else mo.load_official
load(small)  # imports what loading needs
before = resident("VmRSS")
model = load(folder, dtype=getattr(torch, dtype))
print((resident("VmHWM") - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("own", "float32"), ("own", "bfloat16"), ("official", "float32")])
def test_loading_takes_the_weights_memory_once(tmp_path, kind, dtype):
    """A new process compares its peak with its memory before loading; the model has 86M parameters."""
    sizes = dict(num_layers=6, model_dim=1024, z_dim=256, value_dim=2048, ffn_hidden_dim=2560)
    config = mo.MegalodonConfig(**sizes, chunk_size=512, vocab_size=4000)
    model = mo.Megalodon(config).to(getattr(torch, dtype))
    save = mo.Megalodon.save if kind == "own" else mo.save_official
    save(tiny_model(torch.float32), tmp_path / "small")
    save(model, tmp_path / "m")
    command = [sys.executable, "-c", _LOAD, kind, tmp_path / "small", tmp_path / "m", dtype]
    ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 1 <= ratio < 1.1


TRANSFORMERS = dict(transformers_version="5.24.0", id2label={"0": "LABEL_0"}, use_cache=True, bos_token_id=256)
TRANSFORMERS |= dict(tie_word_embeddings=False, _name_or_path="x", torch_dtype="float32", chunk_size_feed_forward=0)


def test_fields_and_files_of_transformers_are_accepted(tmp_path):
    model = tiny_model(torch.float32)
    model.save(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **TRANSFORMERS}))
    (tmp_path / "m" / "generation_config.json").write_text("{}")
    assert equal_parameters(mo.Megalodon.load(tmp_path / "m"), model)


def fields(**changes):
    def change(folder):
        path = folder / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))

    return change


def tensors(**changes):
    def change(folder):
        path = folder / "model.safetensors"
        found = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
        save_file({name: t for name, t in found.items() if t is not None}, path)

    return change


def index(**changes):
    def change(folder):
        (folder / "model.safetensors").unlink()
        tiny_model(torch.float32).save(folder, max_shard_bytes=20_000)
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        content["weight_map"] = {n: f for n, f in (content["weight_map"] | changes).items() if f is not None}
        path.write_text(json.dumps(content))

    return change


def weights_file(change):
    return lambda folder: change(folder / "model.safetensors")


ONE = torch.ones(1)
NAN = torch.full((31, 32), float("nan"))
FIRST = "embed.weight"
MUST_HOLD = "model.safetensors: must hold the parameters of config.json;"
SHAPE = r"model.safetensors: `layers.0.nffn.fc1.weight` must be .* of shape \(41, 32\), got torch.float32 \(40, 32\)"
NAMED = "index.json: files must be named as .*, got"
FAULTS = [
    (fields(model_type="llama"), "config.json: `model_type` must be \"megalodon\", got 'llama'"),
    (fields(format=2), "config.json: `format` must be 1, got 2: a newer megalodon_ops wrote it"),
    (fields(format=True), "config.json: `format` must be 1, got True"),
    (fields(dtype="int8"), "config.json: `dtype` must be one of float32, .*, got 'int8'"),
    (fields(dtype=[]), "config.json: `dtype` must be one of"),
    (fields(norm_eps="absent"), "config.json: `norm_eps` is missing"),
    (fields(swiglu="absent", swigloo=True), "config.json: `swiglu` is missing; is `swigloo` misspelt\\?"),
    (fields(num_layers=0), "config.json: MegalodonConfig: `num_layers` must be a positive integer"),
    (fields(swiglu=1), "config.json: MegalodonConfig: `swiglu` must be True or False, got 1"),
    (fields(model={}), "config.json: is that of a folder of the released code; .*load_official reads it"),
    (fields(num_layers=10**9), "config.json: a model of this configuration takes [0-9,.]+ GiB of memory, and"),
    (fields(num_layers=3), f"{MUST_HOLD} 'layers.2.mega.gamma' is missing"),
    (fields(num_layers=1), f"{MUST_HOLD} 'layers.1.mega.beta' is none of them"),
    (fields(ffn_hidden_dim=41), SHAPE),
    (weights_file(Path.unlink), "model.safetensors: no such file"),
    (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "holds both model.safetensors and model.safetensors.i",
    ),
    (weights_file(lambda path: os.truncate(path, 9000)), "model.safetensors: "),
    (weights_file(lambda path: os.truncate(path, 1 << 40)), "model.safetensors: "),
    (weights_file(lambda path: path.write_bytes(b"")), "model.safetensors: "),
    (weights_file(lambda path: path.write_bytes(struct.pack("<Q", 2**62))), "model.safetensors: "),
    (tensors(embed__weight=NAN), "model.safetensors: `embed.weight` must be finite as torch.float32"),
    (tensors(embed__weight=NAN.int()), "`embed.weight` must be floating-point numbers of shape .*, got torch.int32"),
    (tensors(x=ONE), f"{MUST_HOLD} 'x' is none of them"),
    (tensors(**{"x\x1b[1m": ONE}), rf"{MUST_HOLD} 'x\\x1b\[1m' is none"),
    (tensors(embed__weight=None), f"{MUST_HOLD} 'embed.weight' is missing"),
    (index(**{FIRST: "../model-00001-of-00002.safetensors"}), f"{NAMED} '../model-000"),
    (index(**{FIRST: "/etc/passwd"}), f"{NAMED} '/etc/passwd'"),
    (index(**{FIRST: "model-00009-of-00002.safetensors"}), "model-00009-of-00002.safetensors: no such file"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS)
def test_faults_are_one_line(tmp_path, spoil, message):
    folder = tmp_path / "m"
    tiny_model(torch.float32).save(folder)
    spoil(folder)
    with pytest.raises((FileError, FileNotFoundError), match=f"^load: {folder}(/[a-z0-9-]*)?.*{message}") as raised:
        mo.Megalodon.load(folder)
    assert str(raised.value).isprintable()


def test_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^load: {tmp_path}/m: no such folder$"):
        mo.Megalodon.load(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=f"^load: {tmp_path}: no config.json in this folder$"):
        mo.Megalodon.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=f"^load: {tmp_path}/file: must be a folder, got a file$"):
        mo.Megalodon.load(tmp_path / "file")


def test_a_subclass_loads_itself(tmp_path):
    class Subclass(mo.Megalodon):
        pass

    tiny_model(torch.float32).save(tmp_path / "m")
    assert type(Subclass.load(tmp_path / "m")) is Subclass


def test_reset_parameters_after_to_empty():
    """A model from `meta` is initialised as any other, in every parameter of every module."""
    sizes = TINY | {"model_dim": 256, "vocab_size": 300}
    config = mo.MegalodonConfig(**sizes, rescale_nffn=True, swiglu=True, share_emb=True)
    torch.manual_seed(0)
    plain = mo.Megalodon(config)
    with torch.device("meta"):
        model = mo.Megalodon(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.reset_parameters()
    assert model.output.output.weight is model.embed.weight
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert one.mean().item() == pytest.approx(other.mean().item(), abs=0.2), name
        if one.std() > 0 and one.numel() > 500:
            assert one.std().item() == pytest.approx(other.std().item(), rel=0.1), name
    assert torch.isfinite(model(tokens_of(2, 20))).all()
    assert model(tokens_of(2, 20)).std().item() == pytest.approx(plain(tokens_of(2, 20)).std().item(), rel=0.1)


def test_module_by_module_resets_all():
    """Call `reset_parameters` of every module that owns parameters, in arbitrary order, as FSDP does."""
    with torch.device("meta"):
        model = mo.Megalodon(mo.MegalodonConfig(**TINY))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    for module in reversed(list(model.modules())):
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.embed.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert model.output.output.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    for block in (model.layers[0], model.output):
        torch.nn.init.constant_(next(block.parameters()), float("nan"))
        block.reset_parameters()
        assert all(torch.isfinite(parameter).all() for parameter in block.parameters())


def test_a_shared_embedding_stays_shared_when_it_leaves_meta():
    with torch.device("meta"):
        model = mo.Megalodon(mo.MegalodonConfig(**TINY, share_emb=True))
    model = model.to_empty(device="cpu")
    assert model.output.output.weight is model.embed.weight
    assert len(list(model.parameters())) == len(dict(model.named_parameters(remove_duplicate=False))) - 1


def test_a_folder_without_eos_token_id(tmp_path):
    """Older folders and the released format do not have this field."""
    model = tiny_model(torch.float32, eos_token_id=3)
    model.save(tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("eos_token_id") == 3 == mo.Megalodon.load(tmp_path / "own").config.eos_token_id
    path.write_text(json.dumps(fields))
    assert mo.Megalodon.load(tmp_path / "own").config.eos_token_id is None
    mo.save_official(model, tmp_path / "official")
    assert "eos_token_id" not in json.loads((tmp_path / "official" / "config.json").read_text())["model"]

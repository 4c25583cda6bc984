"""Folders in the format of the released code: valid and faulty ones."""

import os
import zipfile

import pytest
import safetensors.torch
import torch

import megalodon_ops as mo
from models import tiny_model, tokens_of
from mutations import make_folder, make_link, make_pipe
from released import save_released


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_load_official(tmp_path, shards):
    model = tiny_model(torch.float32, rescale_nffn=True, swiglu=True)
    save_released(model, tmp_path, shards)
    loaded = mo.load_official(tmp_path)
    assert loaded.config == model.config and not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(tokens_of(1, 20)), model.eval()(tokens_of(1, 20)))


def test_load_official_in_bfloat16_and_shared_embedding(tmp_path):
    save_released(tiny_model(torch.float32, share_emb=True), tmp_path, vocab_size=-1)
    loaded = mo.load_official(tmp_path, dtype=torch.bfloat16)
    assert loaded.output.output.weight is loaded.embed.weight and loaded.embed.weight.dtype == torch.bfloat16
    assert loaded.layers[0].mega.cema.alpha.dtype == torch.float32
    loaded(tokens_of(1, 5)).sum().backward()


def test_load_official_errors(tmp_path):
    """Each line names the file and the fault."""
    model = tiny_model(torch.float32)

    def assert_refused(message, error=ValueError):
        with pytest.raises(error, match=message) as raised:
            mo.load_official(tmp_path / "f")
        text = str(raised.value)
        assert text.startswith(f"load_official: {tmp_path / 'f'}") and text.isprintable() and "Errno" not in text

    assert_refused("f: no such folder", FileNotFoundError)
    folder = tmp_path / "f"
    folder.mkdir()
    assert_refused("f: no config.json in this folder", FileNotFoundError)
    save_released(model, folder)
    (folder / "consolidated.pth").unlink()
    assert_refused("consolidated.pth: no such file", FileNotFoundError)
    save_released(model, folder)
    save_released(model, folder, num_layers=3)
    assert_refused("consolidated.pth: must hold the parameters of config.json; 'layers.2.mega.gamma' is missing")
    save_released(model, folder, num_layers=1)
    assert_refused("must hold the parameters of config.json; 'layers.1.mega.beta' is none of them")
    save_released(model, folder, num_layers=10**9)
    assert_refused("a model of its configuration takes .* GiB of memory")
    save_released(model, folder, ffn_hidden_dim=41)
    assert_refused("consolidated.pth: `layers.0.nffn.fc1.weight` must be floating-point numbers of shape")
    for field, value in (("swiglu", "no"), ("num_layers", True), ("norm_eps", "1"), ("new", 1)):
        save_released(model, folder, **{field: value})
        assert_refused(f"config.json: MegalodonConfig: .*{field}")
    save_released(model, folder, shards=2)
    assert_refused("holds both consolidated.pth and consolidated.00.pth; one of them must go")
    (folder / "consolidated.pth").unlink()
    part = torch.load(folder / "consolidated.01.pth", weights_only=True)
    torch.save({k: v for k, v in part.items() if k != "layers.0.mega.wv.weight"}, folder / "consolidated.01.pth")
    assert_refused("consolidated.01.pth: must hold parts as consolidated.00.pth does, got another 'layers.0.mega.wv.we")
    torch.save({**part, "layers.0.mega.rmsnorm.weight": torch.ones(32)}, folder / "consolidated.01.pth")
    assert_refused("f: `layers.0.mega.rmsnorm.weight` must be equal in every shard")
    (folder / "consolidated.01.pth").unlink()
    assert_refused("consolidated.00.pth: `embed.weight` must be floating-point numbers of shape")
    save_released(model, folder, shards=2)
    (folder / "consolidated.00.pth").rename(folder / "first")
    (folder / "consolidated.01.pth").rename(folder / "consolidated.00.pth")
    (folder / "first").rename(folder / "consolidated.01.pth")
    assert_refused("consolidated.00.pth: was written as consolidated.01.pth, another shard")
    for rank in range(2):
        torch.save({k: v for k, v in part.items() if k != "embed.weight"}, folder / f"consolidated.{rank:02d}.pth")
    assert_refused("'embed.weight' is missing")
    for content in ("{}", '{"model": 3}', '{"model": [1]}'):
        (folder / "config.json").write_text(content)
        assert_refused("config.json: must hold an object `model`, got")


def assert_refused(folder, words):
    with pytest.raises(ValueError, match=f"^load_official: {folder}/{words}") as raised:
        mo.load_official(folder)
    assert str(raised.value).isprintable()


ZEROS = torch.zeros(31, 32)
DENSE, FINITE = "'embed.weight' must be a dense tensor, got", "`embed.weight` must be finite as torch.float32"
PARAMETERS = [
    (torch.eye(31, 32).to_sparse(), DENSE),
    (ZEROS.to("meta"), DENSE),
    (3.0, f"{DENSE} 3.0"),
    (ZEROS.tolist(), f"{DENSE} list"),
    (None, f"{DENSE} None"),
    *((ZEROS.to(t), f"`embed.weight` must be floating.* got {t}") for t in (torch.complex64, torch.int32, torch.bool)),
    (ZEROS.to(torch.float8_e4m3fn), "`embed.weight` must be .* got torch.float8_e4m3fn"),
    (ZEROS.clone().fill_diagonal_(float("nan")), f"{FINITE}, got NaN"),
    (ZEROS.clone().fill_diagonal_(float("-inf")), FINITE),
    (torch.full((31, 32), 1e300, dtype=torch.float64), FINITE),
    (ZEROS.T, r"`embed.weight` must be .* of shape \(31, 32\), got .* \(32, 31\)"),
]


@pytest.mark.parametrize(("value", "words"), PARAMETERS, ids=lambda value: value if isinstance(value, str) else "")
def test_parameters_that_are_not_weights(tmp_path, value, words):
    model = tiny_model(torch.float32)
    save_released(model, tmp_path)
    torch.save({**model.state_dict(), "embed.weight": value}, tmp_path / "consolidated.pth")
    assert_refused(tmp_path, f"consolidated.pth: {words}")


@pytest.mark.filterwarnings("ignore")
def test_quantized_parameters_are_refused(tmp_path):
    test_parameters_that_are_not_weights(tmp_path, torch.quantize_per_tensor(ZEROS, 0.1, 0, torch.qint8), DENSE)


def test_a_changed_byte_of_a_parameter_is_noticed(tmp_path):
    model = tiny_model(torch.float32)
    save_released(model, tmp_path)
    path = tmp_path / "consolidated.pth"
    content = bytearray(path.read_bytes())
    offset = content.find(model.layers[0].mega.wz.weight.detach().numpy().tobytes())
    assert offset > 0
    content[offset + 101] ^= 1
    path.write_bytes(content)
    assert_refused(tmp_path, "consolidated.pth: is damaged: the checksum of 'consolidated/data/")


def rezip(path):
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)


NO_ARCHIVE = "is no archive of torch.save, or is cut short"
ARCHIVES = [
    (lambda path, weights: torch.save(weights, path, _use_new_zipfile_serialization=False), NO_ARCHIVE),
    (lambda path, weights: path.write_bytes(b""), NO_ARCHIVE),
    (lambda path, weights: path.write_bytes(safetensors.torch.save(weights)), NO_ARCHIVE),
    (lambda path, weights: os.truncate(path, path.stat().st_size - 9), NO_ARCHIVE),
    (
        lambda path, weights: path.write_bytes(b"PK\3\4" + path.read_bytes()),
        "holds something else than tensors, or is da",
    ),
    (lambda path, weights: torch.save(list(weights.values()), path), "must hold a dictionary of tensors"),
    (lambda path, weights: torch.save({3: torch.ones(2)}, path), "must hold a dictionary of tensors by name"),
    (lambda path, weights: make_folder(path), "must be a file, got a folder"),
    (lambda path, weights: make_pipe(path), "must be a file, got a pipe"),
    (lambda path, weights: make_link(path, "/dev/zero"), "must be a file, got a device"),
    (lambda path, weights: make_link(path, path), "Too many levels of symbolic links"),
]


@pytest.mark.parametrize(("spoil", "words"), ARCHIVES)
def test_files_that_are_no_archives(tmp_path, spoil, words):
    model = tiny_model(torch.float32)
    save_released(model, tmp_path)
    spoil(tmp_path / "consolidated.pth", model.state_dict())
    assert_refused(tmp_path, f"consolidated.pth: {words}")


def test_an_archive_by_another_name_is_read(tmp_path):
    """Only the content counts: the file here is a link, with other padding, to another name."""
    model = tiny_model(torch.float32)
    save_released(model, tmp_path)
    rezip(tmp_path / "consolidated.pth")
    (tmp_path / "consolidated.pth").rename(tmp_path / "elsewhere")
    (tmp_path / "consolidated.pth").symlink_to(tmp_path / "elsewhere")
    loaded = mo.load_official(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("same", [True, False])
def test_a_shared_embedding_that_is_stored_twice(tmp_path, same):
    model = tiny_model(torch.float32, share_emb=True)
    save_released(model, tmp_path)
    second = model.embed.weight.detach() + (0 if same else 1)
    torch.save({**model.state_dict(), "output.output.weight": second}, tmp_path / "consolidated.pth")
    if same:
        assert torch.equal(mo.load_official(tmp_path).output.output.weight, model.embed.weight)
    else:
        with pytest.raises(ValueError, match="`output.output.weight` must be the embedding"):
            mo.load_official(tmp_path)


EPS = "`norm_eps` must be at least 0 and finite in float32, got"
JSONS = [
    ('{"model": ' + "[" * 10**5 + "]" * 10**5 + "}", "recursion"),
    ("[" * 10**6, "recursion"),
    ('{"model": {"norm_eps": NaN}}', f"{EPS} nan"),
    ('{"model": {"norm_eps": -Infinity}}', f"{EPS} -inf"),
    ('{"model": {"norm_eps": 1e999}}', f"{EPS} inf"),
    ('{"model": {"num_layers": ' + "9" * 10**5 + "}}", "Exceeds the limit"),
    ("\xff\xfe{}", "codec can't decode|Expecting value|BOM"),
    ("[]", "must hold a JSON object, got a list of 0"),
    ("", "Expecting value"),
    ('{"model": {', "Expecting property name"),
]


@pytest.mark.parametrize(("content", "words"), JSONS, ids=lambda text: text[:40])
def test_invalid_json(tmp_path, content, words):
    save_released(tiny_model(torch.float32), tmp_path)
    (tmp_path / "config.json").write_text(content, encoding="latin1")
    assert_refused(tmp_path, f"config.json: .*({words})")


def test_a_large_json_is_not_read(tmp_path):
    save_released(tiny_model(torch.float32), tmp_path)
    os.truncate(tmp_path / "config.json", 2**40)  # a file without blocks
    assert_refused(tmp_path, "config.json: must have at most 16777216 bytes, got 1099511627776")


def test_load_official_never_unpickles_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    save_released(tiny_model(torch.float32), tmp_path)
    torch.save({"embed.weight": Evil()}, tmp_path / "consolidated.pth")
    with pytest.raises(ValueError, match="weights_only=True refuses it$"):
        mo.load_official(tmp_path)

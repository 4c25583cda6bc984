"""transformers: names and parts by which other programs find their way in a configuration, a model and a folder."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hf_models import QUIET, SIZES, build_model, close, hf, transformers
from programs import run_python

import megalodon_ops as mo
from megalodon_ops.storage.folder import AUTO_CLASSES

pytestmark = QUIET

SIZES_OF_CLIENTS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


@pytest.mark.parametrize("kind", [hf.MegalodonHFConfig, hf.MegalodonEncoderHFConfig])
def test_sizes_have_the_names_that_clients_read(kind: type, tmp_path: Path) -> None:
    config = kind(**SIZES)
    config.save_pretrained(tmp_path)
    for fields in (config.to_dict(), json.loads((tmp_path / "config.json").read_text())):
        assert SIZES_OF_CLIENTS.items() <= fields.items() and SIZES.items() <= fields.items()
        assert "max_position_embeddings" not in fields
    assert transformers.AutoConfig.from_pretrained(tmp_path).to_megalodon() == config.to_megalodon()
    assert kind.from_pretrained(tmp_path, num_hidden_layers=5).to_megalodon().num_layers == 5
    others = {name: size for name, size in SIZES.items() if name not in ("model_dim", "num_heads")}
    assert kind(**others, hidden_size=64, num_attention_heads=4).to_megalodon().model_dim == 64
    with pytest.raises(ValueError, match=r"`hidden_size` must be `model_dim` = 32, got 64; give one of them\.$"):
        kind(**SIZES, hidden_size=64)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_layers": 3}))
    with pytest.raises(ValueError, match="`num_hidden_layers` must be `num_layers` = 3, got 2"):
        transformers.AutoConfig.from_pretrained(tmp_path)


@torch.no_grad()
def test_the_base_model_is_the_model_without_its_head() -> None:
    model, ids = build_model(), torch.randint(50, (2, 21))
    seen = []
    model.base_model.register_forward_hook(lambda module, arguments, output: seen.append(output.last_hidden_state))
    logits = model(ids).logits
    hidden = model.base_model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert type(model.base_model) is hf.MegalodonModel and len(seen) == 2
    assert torch.equal(model.lm_head(hidden), logits) and torch.equal(hidden, seen[0])
    encoder = hf.MegalodonEncoderForSequenceClassification(hf.MegalodonEncoderHFConfig(**SIZES)).eval()
    close(encoder.base_model(ids).last_hidden_state, encoder.megalodon.features(ids))
    for parameter in encoder.base_model.parameters():
        parameter.requires_grad_(False)
    learned = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert learned == [name for name, _ in encoder.named_parameters() if name.startswith("classifier.")] != []


def test_tensors_are_loaded_by_their_names_here_and_in_files() -> None:
    model = build_model()
    for tensors in (model.state_dict(), model.megalodon.state_dict()):
        new = hf.MegalodonForCausalLM(model.config)
        new.load_state_dict(tensors)
        assert all(torch.equal(a, b) for a, b in zip(new.parameters(), model.parameters(), strict=True))


def test_peft_finds_layers_by_their_number(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, ids = build_model(), torch.randint(50, (1, 9))
    model.save_pretrained(tmp_path / "base")
    second_layer = dict(target_modules=["wz"], layers_to_transform=[1])
    config = peft.LoraConfig(task_type="CAUSAL_LM", **second_layer, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    names = [name for name, _ in adapted.named_modules() if name.endswith("wz.lora_A")]
    assert names == ["base_model.model.model.layers.1.mega.wz.lora_A"]
    adapted.save_pretrained(tmp_path / "adapter")
    base = hf.MegalodonForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        close(peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits, adapted(ids).logits)


def test_virtual_tokens_take_their_width_from_the_configuration() -> None:
    peft = pytest.importorskip("peft")
    ids = torch.randint(50, (2, 9))
    sizes = dict(task_type="CAUSAL_LM", num_virtual_tokens=4)
    cpt = dict(task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3, 4], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4])
    for config in (peft.PromptTuningConfig(**sizes), peft.PromptEncoderConfig(**sizes), peft.CPTConfig(**cpt)):
        model = peft.get_peft_model(build_model(), config)
        model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model = peft.get_peft_model(build_model(), peft.PrefixTuningConfig(**sizes))
    for call, options in ((model, {}), (model.generate, dict(max_new_tokens=2))):
        with pytest.raises(TypeError, match="keys and values of prefix tuning are no recurrent state"):
            call(input_ids=ids, **options)


def test_folders_name_the_classes_that_are_registered(tmp_path: Path) -> None:
    encoder = hf.MegalodonEncoderModel(hf.MegalodonEncoderHFConfig(**SIZES))
    models = {"megalodon": build_model(), "megalodon_encoder": encoder}
    for model_type, model in models.items():
        model.save_pretrained(tmp_path / model_type / "theirs")
        model.megalodon.save(tmp_path / model_type / "ours")
        for folder in (tmp_path / model_type).iterdir():
            auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
            assert auto_map.keys() == AUTO_CLASSES[model_type].keys()
            namespace: dict = {}
            exec((folder / "modeling_megalodon.py").read_text(), namespace)
            for auto, reference in auto_map.items():
                module, name = reference.split(".")
                with torch.device("meta"):
                    is_config = auto == "AutoConfig"
                    expected = model.config if is_config else getattr(transformers, auto).from_config(model.config)
                assert module == "modeling_megalodon" and namespace[name] is type(expected), auto


def test_a_folder_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_model().megalodon.save(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "megalodon_ops.hf", None)
    with pytest.raises(ImportError, match=re.escape('pip install "megalodon_ops[hf]"')):
        exec((tmp_path / "model" / "modeling_megalodon.py").read_text(), {})


def test_the_server_of_transformers_finds_the_class(tmp_path: Path) -> None:
    serving = pytest.importorskip("transformers.cli.serving.model_manager")
    build_model().megalodon.save(tmp_path)
    manager = serving.ModelManager(device="cpu")
    assert type(manager._load_model(str(tmp_path))) is hf.MegalodonForCausalLM


PROGRAM = """
import sys, torch, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained("model")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise SystemExit("loaded code that nobody trusted")
assert "megalodon_ops" not in sys.modules
model = transformers.AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(9)[None]).logits, "logits.pt")
model.save_pretrained("again")
"""


@pytest.mark.slow  # it starts Python, as no other process has transformers without this package
def test_a_new_process_loads_a_folder_that_it_trusts(tmp_path: Path) -> None:
    model = build_model()
    model.megalodon.save(tmp_path / "model")
    offline = dict(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "modules"))
    run = run_python(PROGRAM, folder=tmp_path, **offline, PYTHONPATH=os.pathsep.join(sys.path))
    assert run.returncode == 0, run.stderr[-3000:]
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.arange(9)[None]).logits)
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == ["modeling_megalodon.py"]
    assert mo.Megalodon.load(tmp_path / "again").config == model.megalodon.config

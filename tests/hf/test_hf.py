"""transformers: weights and folders; results of calls; packed documents."""

import copy
import importlib
import json
import math
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from assertions import every_case
from hf_models import QUIET, LENGTHS, SIZES, VARIANTS, close, hf, build_model, padded, prompts, transformers

import megalodon_ops as mo
from megalodon_ops.hf.cache import CACHE

pytestmark = QUIET


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_saved_models_load(tmp_path: Path, fields: dict) -> None:
    model, ids = build_model(**fields), torch.randint(50, (2, 21))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is hf.MegalodonForCausalLM and not again.training
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        base = transformers.AutoModel.from_pretrained(tmp_path)
        close(base(ids).last_hidden_state @ model.lm_head.weight.T, model.megalodon(ids))
    assert transformers.AutoConfig.from_pretrained(tmp_path).to_megalodon() == model.megalodon.config
    tied = again.lm_head.weight is again.model.embed.weight
    assert tied == bool(fields.get("share_emb"))
    assert again.model.layers[0].mega._rotary_made_for == model.model.layers[0].mega._rotary_made_for


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_loads_dtypes_without_rounding_wide_parameters(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    model = build_model(stored)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == stored
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    cast = copy.deepcopy(model).to(dtype)
    for (name, weight), other in zip(again.named_parameters(), cast.parameters(), strict=True):
        assert weight.dtype == other.dtype and torch.equal(weight, other), name


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_our_folders_and_transformers_are_the_same(tmp_path: Path, fields: dict) -> None:
    pytest.importorskip("safetensors")
    model, ids = build_model(**fields), torch.randint(50, (1, 21))
    with torch.no_grad():
        expected = model.megalodon(ids)
        model.save_pretrained(tmp_path / "theirs")
        assert torch.equal(mo.Megalodon.load(tmp_path / "theirs")(ids), expected)
        mo.Megalodon.load(tmp_path / "theirs").save(tmp_path / "ours", max_shard_bytes=20_000)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert torch.equal(again.megalodon(ids), expected)
        again.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
        assert torch.equal(mo.Megalodon.load(tmp_path / "sharded")(ids), expected)
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()


def test_tokenizer_of_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from megalodon_ops.tokenizers import ByteTokenizer

    model = build_model(vocab_size=257, output_size=256)
    model.megalodon.save(tmp_path / "ours", tokenizer=ByteTokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    batch = tokenizer(["to be", "or"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[256, *b"to be"], [256, 256, 256, 256, *b"or"]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [0, 0, 0, 1, 1, 1]]
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "to be"
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "ours"))
    texts = ["to be", "or"]
    for prompt, (output,) in zip(texts, pipe(texts, max_new_tokens=5, do_sample=False, batch_size=2)):
        ids = torch.tensor([[256, *prompt.encode()]])
        expected = model.megalodon.generate(ids, max_new_tokens=5, temperature=0.0)
        assert output["generated_text"] == bytes(expected[0, 1:].tolist()).decode(errors="replace")
    tokenizer.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "theirs")
    from megalodon_ops.tokenizers import load_tokenizer

    assert load_tokenizer(tmp_path / "theirs").fingerprint == ByteTokenizer.fingerprint


def test_shares_the_modules_of_a_megalodon() -> None:
    core = mo.Megalodon(mo.MegalodonConfig(**SIZES))
    model = hf.MegalodonForCausalLM.from_megalodon(core)
    assert [id(p) for p in model.parameters()] == [id(p) for p in core.parameters()]
    assert model.model.layers is model.megalodon.layers and model.model.layers[1].mega is core.layers[1].mega
    assert list(model.megalodon.state_dict()) == list(core.state_dict())
    assert model.training and model.megalodon.training and not model.eval().megalodon.training


def test_copies_are_independent() -> None:
    model, ids = build_model(), torch.randint(50, (1, 9))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            again.model.layers[0].mega.wv.weight.add_(1.0)
            assert not torch.equal(again(ids).logits, model(ids).logits)
            close(again(ids).logits, again.megalodon(ids))
            again.model.embed = torch.nn.Embedding(50, 32)
            again.lm_head = torch.nn.Linear(32, 50)
            close(again(ids).logits, again.megalodon(ids))
            close(again(ids).logits, again.lm_head(again.model(ids).last_hidden_state))


def masked_token_model() -> mo.MegalodonEncoder:
    encoder = encoder_of_sizes()
    encoder.init_tied_head()
    return encoder


def encoder_of_sizes(**fields) -> mo.MegalodonEncoder:
    return mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**SIZES, **fields))


NEW_MODELS = {
    "AutoModelForCausalLM": lambda: mo.Megalodon(mo.MegalodonConfig(**SIZES)),
    "AutoModel": encoder_of_sizes,
    "AutoModelForMaskedLM": masked_token_model,
    "AutoModelForSequenceClassification": lambda: encoder_of_sizes(num_classes=3),
}


@pytest.mark.parametrize("auto", NEW_MODELS)
def test_new_models_are_initialized_as_ours(auto: str) -> None:
    kind = hf.MegalodonHFConfig if "CausalLM" in auto else hf.MegalodonEncoderHFConfig
    torch.manual_seed(3)
    ours = NEW_MODELS[auto]()
    torch.manual_seed(3)
    theirs = getattr(transformers, auto).from_config(kind(**SIZES, num_labels=3))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert theirs.get_input_embeddings().weight.requires_grad


def test_parameters_that_a_checkpoint_lacks_are_initialized(tmp_path: Path) -> None:
    model = build_model()
    model.save_pretrained(tmp_path)
    tensors = model.megalodon.state_dict()
    absent = ["embed.weight", "layers.0.mega.cema.theta", "layers.1.mega.wv.weight", "output.output.weight"]
    kept = {name: tensor for name, tensor in tensors.items() if name not in absent}
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in again.megalodon.state_dict().items():
        assert tensor.isfinite().all() and torch.equal(tensor, tensors[name]) == (name not in absent), name
    assert 0.5 < again.model.embed.weight.std() * SIZES["model_dim"] ** 0.5 < 1.5
    assert 0.5 < again.model.layers[1].mega.wv.weight.std() * (3 * SIZES["model_dim"]) ** 0.5 < 1.5


def test_tied_weights_that_a_folder_lacks_are_reported(tmp_path: Path) -> None:
    encoder = hf.MegalodonEncoderForMaskedLM(hf.MegalodonEncoderHFConfig(**SIZES))
    for model, head in (build_model(share_emb=True), "lm_head.weight"), (encoder, "output.weight"):
        model.save_pretrained(tmp_path)
        tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
        del tensors["embed.weight"]
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] == {head, "model.embed.weight"}
        assert again.get_parameter(head) is again.model.embed.weight
        assert 0.5 < again.model.embed.weight.std() * SIZES["model_dim"] ** 0.5 < 1.5


def test_resized_embeddings() -> None:
    model, ids = build_model(vocab_size=51, output_size=50), torch.randint(50, (1, 9))
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(60, mean_resizing=False)
        close(model(ids).logits[..., :50], before[..., :50])
    assert model.megalodon.config.num_outputs == 60
    cache = model(ids).get(CACHE)
    assert mo.Decoder(model.megalodon, cache.state).fused
    assert model.generate(torch.tensor([[55]]), max_new_tokens=3, do_sample=False).shape == (1, 4)


def test_configuration_raises_as_ours() -> None:
    with pytest.raises(ValueError, match="z_dim"):
        hf.MegalodonHFConfig(**{**SIZES, "z_dim": 15})
    config = hf.MegalodonHFConfig(**SIZES, bos_token_id=3)
    assert config == copy.deepcopy(config) != hf.MegalodonHFConfig(**{**SIZES, "num_layers": 3}, bos_token_id=3)
    assert config.hidden_size == config.model_dim == 32 and config.bos_token_id == 3


def test_generation_stops_where_documents_end(tmp_path) -> None:
    model = build_model(eos_token_id=3)
    assert model.generation_config.eos_token_id == 3
    model.save_pretrained(tmp_path / "theirs")
    ours = mo.Megalodon.load(tmp_path / "theirs")
    assert ours.config.eos_token_id == 3
    ours.save(tmp_path / "ours")
    kind = hf.MegalodonForCausalLM
    for read in (kind.from_pretrained(tmp_path / "ours"), kind.from_megalodon(ours)):
        assert read.generation_config.eos_token_id == 3
        torch.nn.init.zeros_(read.lm_head.weight)  # all tokens, the end included, are equally likely
        written = read.generate(torch.tensor([[1, 2]]), max_new_tokens=4000, do_sample=True, pad_token_id=0)[0].tolist()
        assert written.index(3) == len(written) - 1 < 4000


@pytest.mark.parametrize("kind", ["cu_seq_lens_q", "position_ids", "position_ids from 2", "seq_idx"])
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_documents_equal_single_runs(rows: int, kind: str) -> None:
    """The second of two rows ends with padding, except with offsets."""
    model = build_model()
    last = 9 if kind == "cu_seq_lens_q" else 7
    cuts = [[0, 21, 24, 37]] if rows == 1 else [[0, 4, 9], [0, 2, 5, last]]  # documents' bounds in each row
    spans = [(row, a, b) for row, bounds in enumerate(cuts) for a, b in zip(bounds, bounds[1:])]
    width = cuts[0][-1]
    ids, positions, numbers = torch.randint(50, (3, rows, width)).unbind()
    mask = torch.zeros(rows, width, dtype=torch.int64)
    for number, (row, a, b) in enumerate(spans):
        mask[row, a:b] = 1
        positions[row, a:b] = torch.arange(b - a)
        numbers[row, a:b] = number
    ends = torch.tensor([0, *(row * width + b for row, _, b in spans)])
    given = {
        "cu_seq_lens_q": dict(cu_seq_lens_q=ends.int(), cu_seq_lens_k=ends.int(), max_length_q=9),
        "position_ids": dict(position_ids=positions),
        "position_ids from 2": dict(position_ids=positions + 2),
        "seq_idx": dict(seq_idx=numbers.int()),
    }[kind]
    if kind != "cu_seq_lens_q":
        given["attention_mask"] = mask
    with torch.no_grad():
        output = model(ids, labels=ids, **given)
        texts = [ids[row : row + 1, a:b] for row, a, b in spans]
        singles = [model(text, labels=text) for text in texts]
    for (row, a, b), single in zip(spans, singles, strict=True):
        close(output.logits[row, a:b], single.logits[0])
    learned = sum(single.loss * (text.shape[1] - 1) for single, text in zip(singles, texts, strict=True))
    close(output.loss, learned / (mask.sum() - len(spans)))
    assert output.get(CACHE) is None


def test_wrong_packing() -> None:
    model, ids = build_model(), torch.randint(50, (2, 6))
    restart = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match=r"`spans` must be .* within one row of 6 .* got \[3, 9\) at 1"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 3, 9, 12]))
    with pytest.raises(ValueError, match="`attention_mask` must have no padding where `cu_seq_lens_q` is given"):
        mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
        model(ids[:1], attention_mask=mask, cu_seq_lens_q=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="must not be given with packed documents"):
        model(ids[:1], position_ids=restart, use_cache=True)


def test_loss_equals_the_logits_cross_entropy() -> None:
    model, ids = build_model(vocab_size=51, output_size=50), torch.randint(50, (2, 12))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[0, 7] = 50  # the start of a document, which the model never predicts
    output = model(ids, labels=labels)
    targets = labels[:, 1:].masked_fill(labels[:, 1:] == 50, -100)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1, :50].reshape(-1, 50), targets.reshape(-1))
    close(output.loss, expected)
    assert output.logits.shape == (2, 12, 51) and (output.logits[..., 50] == -torch.inf).all()
    close(model(ids, labels=labels, num_items_in_batch=torch.tensor(30)).loss, expected * 15 / 30)
    trained = model.train()(ids, labels=labels)
    close(trained.logits, output.logits)
    assert trained.get(CACHE) is None
    close(model(ids, labels=labels, logits_to_keep=2).logits, output.logits[:, -2:])


def test_shifted_labels() -> None:
    """`shift_labels` is the target of each token, also of a row's last one; it replaces `labels`."""
    model = build_model(vocab_size=51, output_size=50)
    batch = padded(prompts(), "left")
    shifted = torch.randint(50, (3, 21)).masked_fill(torch.rand(3, 21) < 0.3, -100)
    shifted[0, 4] = 50  # never predicted
    output = model(**batch, shift_labels=shifted, num_items_in_batch=torch.tensor(30))
    is_learned = (batch["attention_mask"] == 1) & (shifted >= 0) & (shifted < 50)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = cross_entropy(output.logits[is_learned][:, :50], shifted[is_learned], reduction="sum") / 30
    close(output.loss, expected)
    close(model(**batch, shift_labels=shifted, labels=batch["input_ids"]).loss, expected * 30 / is_learned.sum())
    ids = torch.cat(prompts())[None]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    targets[:, ends[1:] - 1] = -100
    packed = model(ids, shift_labels=targets, cu_seq_lens_q=ends)
    assert torch.equal(packed.loss, model(ids, labels=ids, cu_seq_lens_q=ends).loss)
    with pytest.raises(ValueError, match=r"`shift_labels` must be \(1, 37\)"):
        model(ids, shift_labels=targets[:, 1:])


def test_label_smoothing_covers_predicted_tokens() -> None:
    """Trainer passes the logits to a LabelSmoother; tokens without a logit, also as targets, add a constant."""
    model, ids = build_model(vocab_size=53, output_size=50), torch.randint(50, (2, 12))
    ids[0, 7] = 51
    smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.1)
    found = smoother(model(ids, num_items_in_batch=torch.tensor(22)), ids.clone(), shift_labels=True)
    minus_logs = -model.megalodon(ids)[:, :-1].log_softmax(-1)
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == 51, -100)
    target_loss = torch.nn.functional.nll_loss(-minus_logs.flatten(0, 1), targets.flatten(), reduction="sum") / 22
    low = 20 + math.log(3)  # what each of the 3 tokens without a logit adds
    expected = 0.9 * (target_loss + low / 22) + 0.1 * (minus_logs.sum(-1).mean() + 3 * low) / 53
    close(found, expected)
    gradients = (torch.autograd.grad(loss, [*model.parameters()]) for loss in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)


def test_logits_to_keep_and_embeddings() -> None:
    model, rows = build_model(**VARIANTS["released"]), prompts()
    batch = padded(rows, "left")
    with torch.no_grad():
        all_logits = model(**batch).logits
        close(model(**batch, logits_to_keep=2).logits, all_logits[:, -2:])
        close(model(**batch, logits_to_keep=torch.tensor([20, 18])).logits, all_logits[:, [20, 18]])
        close(model(batch["input_ids"], logits_to_keep=99).logits, model(batch["input_ids"]).logits)
        embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
        close(model(**batch, inputs_embeds=embeddings).logits[:, -3:], all_logits[:, -3:])
    assert len(model(**batch, inputs_embeds=embeddings, return_dict=False)) == 2


def test_wrong_calls() -> None:
    model, ids = build_model(), torch.randint(50, (2, 6))
    cache, new = model(ids).get(CACHE), hf.MegalodonCache()
    calls = [
        (ValueError, "exactly one of", lambda: model()),
        (ValueError, "output_attentions", lambda: model(ids, output_attentions=True)),
        (ValueError, "two names", lambda: model(ids, cache=new, past_key_values=hf.MegalodonCache())),
        (ValueError, "labels", lambda: model(ids, labels=ids[:, 1:])),
        (TypeError, "`labels` must be integers, got torch.float32", lambda: model(ids, labels=ids.float())),
        (TypeError, "`input_ids` must be a torch tensor, got list", lambda: model([[1, 2]])),
        (TypeError, "must be a Megalodon, got megalodon_ops.hf.conf", lambda: type(model).from_megalodon(model.config)),
        (TypeError, "MegalodonCache: `state` must be a MegalodonState or None, got 3", lambda: hf.MegalodonCache(3)),
        (IndexError, r"in \[0, 50\)", lambda: model(ids + 50)),
        (IndexError, "out of bounds", lambda: model(ids, logits_to_keep=torch.tensor([6]))),
        (IndexError, "out of bounds", lambda: model(ids, logits_to_keep=torch.tensor([0, -7]))),
    ]
    options = [
        (TypeError, "must be a megalodon_ops.hf.MegalodonCache", dict(past_key_values=transformers.DynamicCache())),
        (TypeError, "unexpected argument `unknown`, got .*; leave it out", dict(unknown=3)),
        (TypeError, "unexpected argument `is_causal`, got .*; leave it out", dict(is_causal=False)),
        (TypeError, "unexpected argument `output_router_logits`, got .*; leave", dict(output_router_logits=True)),
    ]
    calls += [(error, message, partial(model, ids, **wrong)) for error, message, wrong in options]
    for given in (dict(input_ids=ids[:1]), dict(inputs_embeds=torch.randn(1, 6, 32))):
        message = f"`cache` must have 1 rows, as `{[*given][0]}` has, got 2"
        calls.append((ValueError, message, partial(model, **given, past_key_values=cache)))
    with every_case() as case:
        for error, message, call in calls:
            with case(message), pytest.raises(error, match=message):
                call()


def test_arguments_of_other_models_change_nothing(tmp_path: Path) -> None:
    """Arguments that a Llama takes or ignores and that change no result of this model."""
    model, ids = build_model(), torch.randint(50, (2, 6))
    others = dict(token_type_ids=ids, cache_position=torch.arange(6), max_length_q=6, max_length_k=6, is_causal=True)
    others |= dict(output_router_logits=False, logits_to_keep=0, tokenizer=None, unknown=None)
    assert torch.equal(model(ids, **others).logits, model(ids).logits)
    model.save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        again.set_attn_implementation(name)
        assert again.config._attn_implementation == "eager"  # Trainer's context parallelism would need sdpa
        assert torch.equal(again(ids).logits, model(ids).logits)
    for name in ("flash_attention_2", "flex_attention", "paged|eager"):
        message = f'`attn_implementation` must be "eager" or "sdpa", got "{name}"'.replace("|", r"\|")
        with pytest.raises(ValueError, match=message):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """All kinds of checkpointing compute each layer twice, and also pass gradients through an earlier piece's state."""
    ids = torch.arange(40)[None]
    calls = []

    def counted(function, *args):
        calls.append("function")
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    def enable_re_entering(model):
        model.gradient_checkpointing_enable({"use_reentrant": True})

    kinds = {  # how it is enabled, calls of a layer, calls of the function
        "no": (lambda model: None, 1, 0),
        "configured": (lambda model: None, 2, 0),
        "enabled": (lambda model: model.gradient_checkpointing_enable(), 2, 0),
        "re-entering": (enable_re_entering, 2, 0),
        "configured, re-entering": (enable_re_entering, 2, 0),
        "another function": (lambda model: model._set_gradient_checkpointing(True, counted), 2, 2),
        "every second layer": (lambda model: model._set_gradient_checkpointing(True, counted, 2), 2, 1),
    }
    expected = expected_pieces = None
    with every_case() as case:
        for kind, (enable, num_calls, num_functions) in kinds.items():
            with case(kind):
                torch.manual_seed(1)
                model = build_model(layerwise_ckpt="configured" in kind).train()
                enable(model)
                assert model.is_gradient_checkpointing == (kind not in ("no", "configured"))
                calls.clear()
                model.model.layers[0].mega.register_forward_pre_hook(lambda *_: calls.append("layer"))
                model(ids, labels=ids).loss.backward()
                assert (calls.count("layer"), calls.count("function")) == (num_calls, num_functions)
                gradients = [parameter.grad.clone() for parameter in model.parameters()]
                model.zero_grad()
                cache = model(ids[:, :20], use_cache=True).get(CACHE)
                model(ids[:, 20:], past_key_values=cache).logits.mean().backward()
                pieces = [parameter.grad.clone() for parameter in model.parameters()]
                if expected is None:
                    expected, expected_pieces = gradients, pieces
                for a, b in zip((*gradients, *pieces), (*expected, *expected_pieces), strict=True):
                    close(a, b)  # sums of gradients have another order
                if "re-entering" not in kind:
                    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
                model.gradient_checkpointing_disable()
                calls.clear()
                model(ids, labels=ids).loss.backward()
                assert calls.count("layer") == (2 if "configured" in kind else 1)


def test_importing_the_models_leaves_the_public_block_alone() -> None:
    """A class with both bases of a recomputed layer is made before the import, in a fresh interpreter."""
    code = """
import megalodon_ops as mo
from transformers.modeling_layers import GradientCheckpointingLayer
bases = mo.MegalodonBlock.__bases__
class Block(GradientCheckpointingLayer, mo.MegalodonBlock): pass
import megalodon_ops.hf as hf
assert mo.MegalodonBlock.__bases__ == bases
sizes = dict(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
assert isinstance(hf.MegalodonModel(hf.MegalodonHFConfig(**sizes)).layers[0], GradientCheckpointingLayer)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ("raise ModuleNotFoundError(\"No module named 'transformers'\", name='transformers')", r"\[hf\]\"$"),
        ("__version__ = '4.57.1'", "transformers 5.0 or newer, got 4.57.1"),
    ],
    ids=["none", "too old"],
)
def test_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str, message: str) -> None:
    (tmp_path / "transformers.py").write_text(installed)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [*sys.modules]:
        if name.partition(".")[0] == "transformers" or f"{name}.".startswith("megalodon_ops.hf."):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=message):
        importlib.import_module("megalodon_ops.hf")

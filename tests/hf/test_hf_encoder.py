"""transformers: the encoder's features, classification, masked-token prediction, folders and losses."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from assertions import every_case
from hf_models import QUIET, LENGTHS, SIZES, close, hf, padded, prompts, randomized, transformers
from torch import Tensor

import megalodon_ops as mo

pytestmark = QUIET

CLASSES = {
    "features": (hf.MegalodonEncoderModel, {}),
    "classes": (hf.MegalodonEncoderForSequenceClassification, dict(num_classes=3)),
    "classes of numbers": (hf.MegalodonEncoderForSequenceClassification, dict(num_classes=3, num_features=2)),
    "masked tokens": (hf.MegalodonEncoderForMaskedLM, {}),
}


def build_encoder(kind: str, **fields) -> hf.MegalodonEncoderModel:
    """Build a model with no zero parameter, as after some training, so that each matters."""
    model_class, sizes = CLASSES[kind]
    core = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**{**SIZES, **sizes, **fields})).eval()
    return model_class.from_megalodon(randomized(core))


def rows_of(model: hf.MegalodonEncoderModel, side: str) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Rows of several lengths, as single calls and as one padded batch; the padding is not small."""
    rows = prompts()
    batch = padded(rows, side, value=49)
    if model.main_input_name == "input_ids":
        return [{"input_ids": row[None]} for row in rows], batch
    values = 9 * torch.randn(*batch.pop("input_ids").shape, 2)
    present = batch["attention_mask"] == 1
    singles = [{"input_values": values[i : i + 1, there]} for i, there in enumerate(present)]
    return singles, dict(**batch, input_values=values)


def expected_of(kind: str, core: mo.MegalodonEncoder, inputs: Tensor) -> Tensor:
    if kind.startswith("classes"):
        return core(inputs)
    features = core.features(inputs)
    return features @ core.embed.weight.T if kind == "masked tokens" else features


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_padded_and_single_rows_equal_our_encoders(kind: str, side: str) -> None:
    model = build_encoder(kind)
    singles, batch = rows_of(model, side)
    output = model(**batch, output_hidden_states=True)
    for i, single in enumerate(singles):
        unpadded = model(**single, output_hidden_states=True)
        close(unpadded[0], expected_of(kind, model.megalodon, *single.values()))
        present = batch["attention_mask"][i] == 1
        close(output[0][i] if kind.startswith("classes") else output[0][i, present], unpadded[0][0])
        assert len(output.hidden_states) == model.config.num_hidden_layers + 1
        for layer, one in zip(output.hidden_states, unpadded.hidden_states, strict=True):
            close(layer[i, present], one[0])
        close(unpadded.hidden_states[-1], model.megalodon.features(*single.values()))


@pytest.mark.parametrize("kind", CLASSES)
def test_rows_with_holes_have_the_bits_of_rows_without(kind: str) -> None:
    model = build_encoder(kind)
    name = model.main_input_name
    mask = (torch.rand(3, 24) < 0.6).long()
    given = torch.randint(50, (3, 24)) if name == "input_ids" else torch.randn(3, 24, 2)
    columns = [row.nonzero()[:, 0] for row in mask]
    width = int(mask.sum(1).max())
    dense = given.new_zeros(3, width, *given.shape[2:])
    dense_mask = torch.zeros(3, width)
    for i, there in enumerate(columns):
        dense[i, : len(there)] = given[i, there]
        dense_mask[i, : len(there)] = 1
    output = model(**{name: given}, attention_mask=mask, output_hidden_states=True)
    expected = model(**{name: dense}, attention_mask=dense_mask, output_hidden_states=True)
    pairs = list(zip(output.hidden_states, expected.hidden_states, strict=True))
    if kind.startswith("classes"):
        assert torch.equal(output.logits, expected.logits)
    else:
        pairs.append((output[0], expected[0]))
    for found, wanted in pairs:
        for i, there in enumerate(columns):
            assert torch.equal(found[i, there], wanted[i, : len(there)])
    if kind == "masked tokens":
        labels = torch.randint(50, (3, 24))
        loss = model(given, attention_mask=mask, labels=labels).loss
        assert torch.equal(loss, model(given, attention_mask=mask, labels=labels.masked_fill(mask == 0, -100)).loss)


@torch.no_grad()
def test_packed_rows_embeddings_and_tuples() -> None:
    model, rows = build_encoder("classes"), prompts()
    expected = torch.cat([model(row[None]).logits for row in rows])
    packed = torch.cat(rows)[None]
    close(model(packed, cu_seq_lens_q=torch.tensor([0, *LENGTHS]).cumsum(0)).logits, expected)
    close(model(packed, seq_idx=torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))[None]).logits, expected)
    close(model(packed, position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None]).logits, expected)
    embedded = model.get_input_embeddings()(rows[0][None])
    loss, logits = model(inputs_embeds=embedded, labels=torch.tensor([2]), use_cache=False, return_dict=False)
    close(logits, expected[:1])
    close(loss, F.cross_entropy(logits, torch.tensor([2])))
    numbers = build_encoder("classes of numbers", scale_inputs=False)  # else `embed` reads scaled numbers
    values = torch.randn(2, 9, 2)
    close(numbers(inputs_embeds=numbers.model.embed(values)).logits, numbers(input_values=values).logits)


def test_folders_are_read_by_all_classes_from_masked_tokens_to_classification(tmp_path: Path) -> None:
    predictor, ids = build_encoder("masked tokens"), torch.randint(50, (2, 21))
    predictor.save_pretrained(tmp_path / "predictor")
    ours = mo.MegalodonEncoder.load(tmp_path / "predictor")
    assert ours.classifier is None and torch.equal(ours(ids), predictor.megalodon(ids))
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "predictor")
    assert again.output.weight is again.model.embed.weight and torch.equal(again(ids).logits, predictor(ids).logits)
    features = transformers.AutoModel.from_pretrained(tmp_path / "predictor")
    assert torch.equal(features(ids).last_hidden_state, ours(ids))

    names = {0: "sad", 1: "so so", 2: "glad"}
    new = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "predictor", id2label=names)
    assert torch.equal(new.model.embed.weight, predictor.model.embed.weight) and new.classifier.proj.weight.std() > 0
    new.save_pretrained(tmp_path / "classes")
    ours = mo.MegalodonEncoder.load(tmp_path / "classes")
    assert ours.config.num_classes == 3 and torch.equal(ours(ids), new(ids).logits)
    ours.save(tmp_path / "ours", max_shard_bytes=20_000)
    for folder, labels in (("classes", names), ("ours", {i: f"LABEL_{i}" for i in range(3)})):
        read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        assert torch.equal(read(ids).logits, ours(ids)) and read.config.id2label == labels and not read.training
    headless = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    headless.save_pretrained(tmp_path / "headless")
    assert torch.equal(mo.MegalodonEncoder.load(tmp_path / "headless")(ids), ours.features(ids))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "classes")
    assert config.to_megalodon() == ours.config and config != hf.MegalodonEncoderHFConfig(**SIZES)


@pytest.mark.parametrize("vocab_size", [257, 4097])
@torch.no_grad()
def test_the_loss_of_a_new_masked_token_head_is_that_of_a_guess(vocab_size: int) -> None:
    sizes = dict(num_layers=2, model_dim=128, z_dim=32, value_dim=64, ffn_hidden_dim=64, norm_num_groups=8)
    targets = torch.randint(vocab_size - 1, (8, 100))
    is_hidden = torch.rand(targets.shape) < 0.15
    tokens = targets.masked_fill(is_hidden, vocab_size - 1)
    labels = targets.masked_fill(~is_hidden, -100)
    model = hf.MegalodonEncoderForMaskedLM(hf.MegalodonEncoderHFConfig(**sizes, vocab_size=vocab_size))
    encoder = mo.MegalodonEncoder(model.config.to_megalodon())
    encoder.init_tied_head()
    ours = mo.linear_cross_entropy(encoder.features(tokens), encoder.embed.weight, labels)
    for loss in (model(tokens, labels=labels).loss, ours):
        assert 0.95 * math.log(vocab_size) < loss < 1.1 * math.log(vocab_size)


def test_untied_masked_token_heads_have_a_matrix(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = hf.MegalodonEncoderForMaskedLM(hf.MegalodonEncoderHFConfig(**SIZES, tie_word_embeddings=False))
    torch.manual_seed(3)
    ours, ids = mo.MegalodonEncoder(model.config.to_megalodon()), torch.randint(50, (2, 21))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=False))
    assert 0.5 < model.output.weight.std() * SIZES["model_dim"] ** 0.5 < 1.5
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.output.weight, model.model.embed.weight)
    model.eval().save_pretrained(tmp_path / "untied")
    again, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "untied", output_loading_info=True)
    assert not info["missing_keys"] and again.config.tie_word_embeddings is False
    torch.testing.assert_close(dict(again.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)
    close(again(ids).logits, model.megalodon(ids) @ model.output.weight.T)
    again.resize_token_embeddings(60, mean_resizing=False)
    assert again.output.weight.shape == (60, SIZES["model_dim"]) and again.output.weight is not again.model.embed.weight
    close(again(ids).logits[..., :50], model(ids).logits)

    assert torch.equal(mo.MegalodonEncoder.load(tmp_path / "untied")(ids), model.megalodon(ids))
    auto = transformers.AutoModelForSequenceClassification
    new, info = auto.from_pretrained(tmp_path / "untied", output_loading_info=True)
    assert not info["unexpected_keys"] and torch.equal(new.model.embed.weight, model.model.embed.weight)
    new.save_pretrained(tmp_path / "classes")
    again, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "classes", output_loading_info=True)
    assert info["missing_keys"] == {"output.weight"}
    assert 0.5 < again.output.weight.std() * SIZES["model_dim"] ** 0.5 < 1.5


def test_token_ids_that_transformers_writes_into_a_configuration_are_stored_and_unused(tmp_path: Path) -> None:
    """As Trainer does before it saves, with a tokenizer's ids, which may exceed the model's vocabulary."""
    model, ids = build_encoder("classes"), torch.randint(50, (2, 21))
    others = dict(eos_token_id=50, bos_token_id=51, pad_token_id=3)
    for name, token in others.items():
        setattr(model.config, name, token)
    model.gradient_checkpointing_enable()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert {name: getattr(again.config, name) for name in others} == others
    ours = mo.MegalodonEncoder.load(tmp_path)
    assert torch.equal(again(ids).logits, ours(ids)) and ours.config == again.config.to_megalodon()


def test_numbers_are_saved_too(tmp_path: Path) -> None:
    model, values = build_encoder("classes of numbers").bfloat16(), torch.randn(2, 21, 2)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16 and again.model.final_norm.weight.dtype == torch.float32
    assert torch.equal(again(input_values=values).logits, model(input_values=values).logits)
    assert torch.equal(mo.MegalodonEncoder.load(tmp_path)(values), model(input_values=values).logits)


def test_loss_of_masked_tokens() -> None:
    model, ids = build_encoder("masked tokens"), torch.randint(50, (2, 12))
    labels = ids.masked_fill(torch.arange(12) % 3 > 0, -100)
    output = model(ids, labels=labels)
    close(output.loss, F.cross_entropy(output.logits[:, ::3].flatten(0, 1), ids[:, ::3].flatten()))
    close(model(ids, labels=labels, num_items_in_batch=torch.tensor(32)).loss, output.loss * 8 / 32)
    ours = mo.linear_cross_entropy(model.megalodon.features(ids), model.megalodon.embed.weight, labels)
    close(output.loss, ours)
    with torch.no_grad():
        model.resize_token_embeddings(60, mean_resizing=False)
        assert model.output.weight is model.model.embed.weight and model.megalodon.config.vocab_size == 60
        close(model(ids).logits[..., :50], output.logits)


def test_a_plain_loop_learns_masked_tokens_and_then_classes(tmp_path: Path) -> None:
    """A row repeats one of eight tokens, which is to be predicted; a new head learns which half it is from."""
    config = hf.MegalodonEncoderHFConfig(**SIZES)
    model = transformers.AutoModelForMaskedLM.from_config(config).train()
    model.gradient_checkpointing_enable()

    def learn(model: hf.MegalodonEncoderModel, steps: int) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(steps):
            ids = torch.randint(8, (8, 1)).repeat(1, 12)
            labels = (ids[:, 0] < 4).long()
            if isinstance(model, hf.MegalodonEncoderForMaskedLM):
                labels = ids.masked_fill(torch.arange(12) % 6 != 5, -100)
                ids = ids.masked_fill(labels >= 0, 49)
            loss = model(ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    losses = learn(model, 16)
    assert losses[-1] < 0.2 * losses[0]
    model.save_pretrained(tmp_path)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).train()
    assert learn(classifier, 10)[-1] < 0.1


def test_wrong_calls() -> None:
    model, numbers, ids = build_encoder("classes"), build_encoder("classes of numbers"), torch.randint(50, (2, 6))
    predictor, mask = build_encoder("masked tokens"), torch.ones(2, 6, dtype=torch.long)
    empty = mask.clone()
    empty[1] = 0
    no_state = r"must be None, got .*; an encoder has no state: it reads the whole row\.$"
    calls = {
        "unexpected argument `is_causal`, got True": lambda: model(ids, is_causal=True),
        "`attention_mask` must have a token in every row, got a row": lambda: model(ids, attention_mask=empty),
        "`cu_seqlens` must give each row": lambda: model(ids[:1], cu_seq_lens_q=torch.tensor([0, 3, 3, 6])),
        f"`use_cache` {no_state}": lambda: model(ids, use_cache=True),
        f"`past_key_values` {no_state}": lambda: predictor(ids, past_key_values=hf.MegalodonCache()),
        f"`cache` {no_state}": lambda: numbers(input_values=torch.randn(2, 6, 2), cache=hf.MegalodonCache()),
        "exactly one of `input_ids` and `inputs_embeds`": lambda: model(),
        "exactly one of `input_values` and `inputs_embeds`": lambda: numbers(),
        "unexpected argument `input_values`": lambda: model(ids, input_values=torch.randn(2, 6, 2)),
        "ForMaskedLM: unexpected argument `input_values`": lambda: predictor(ids, input_values=torch.randn(2, 6, 2)),
        "unexpected argument `input_ids`": lambda: numbers(ids, input_values=torch.randn(2, 6, 2)),
        r"`input_values` must have shape \(B, L, F\)": lambda: numbers(input_values=torch.randn(2, 6)),
        r"must be floating-point numbers \(B, L, 2\)": lambda: numbers(input_values=torch.randn(2, 6, 3)),
        r"`input_ids` must be integers \(B, L\)": lambda: model(ids.float()),
        "`labels` must have 2 rows": lambda: model(ids, labels=torch.tensor([1])),
        "`labels` must be a torch tensor": lambda: model(ids, labels=[1, 0]),
        r"`labels` must be \(2, 6\) as the tokens": lambda: predictor(ids, labels=ids[:, 1:]),
        "`labels` must be integers": lambda: predictor(ids, labels=ids.float()),
        "`num_features` must be None, got 2": lambda: hf.MegalodonEncoderForMaskedLM(numbers.config),
        "`model` must have a head": lambda: type(model).from_megalodon(predictor.megalodon),
        "`model` must be a MegalodonEncoder, got": lambda: type(model).from_megalodon(model),
        "`config` must be a MegalodonEncoderConfig": lambda: type(model.config).from_megalodon(mo.MegalodonConfig()),
    }
    with every_case() as case:
        for message, call in calls.items():
            with case(message), pytest.raises((TypeError, ValueError), match=message):
                call()

"""transformers: classes of rows and of tokens by causal models, and of tokens by encoders."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_models import QUIET, LENGTHS, SIZES, close, hf, padded, prompts, randomized, transformers
from torch import Tensor, nn

import megalodon_ops as mo

pytestmark = QUIET

NAMES = {0: "name", 1: "place", 2: "other"}
CLASSES = {
    "rows": (hf.MegalodonForSequenceClassification, transformers.AutoModelForSequenceClassification),
    "tokens": (hf.MegalodonForTokenClassification, transformers.AutoModelForTokenClassification),
    "tokens, encoder": (hf.MegalodonEncoderForTokenClassification, transformers.AutoModelForTokenClassification),
}


def build_classifier(kind: str, **fields) -> nn.Module:
    """Build a model with no zero parameter, as after some training, so that each matters."""
    model_class, _ = CLASSES[kind]
    return randomized(model_class(model_class.config_class(**SIZES, id2label=NAMES, **fields)).eval())


def logits_of(model: nn.Module, row: Tensor) -> Tensor:
    """Logits of one row (L,), from our model's features."""
    logits = model.score(model.megalodon.features(row[None]))[0]
    return logits[-1] if isinstance(model, hf.MegalodonForSequenceClassification) else logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_rows_are_classified_by_their_tokens_alone(kind: str, side: str) -> None:
    """Padding has the id of a common token, so that only the mask tells it."""
    model, rows = build_classifier(kind, pad_token_id=0), prompts()
    rows[0][-1] = 0
    batch = padded(rows, side)
    logits = model(**batch).logits
    packed = model(torch.cat(rows)[None], cu_seq_lens_q=torch.tensor([0, *LENGTHS]).cumsum(0).int()).logits
    expected = [logits_of(model, row) for row in rows]
    if kind == "rows":
        close(logits, torch.stack(expected))
        close(packed, torch.stack(expected))
    else:
        close(logits[batch["attention_mask"] == 1], torch.cat(expected))
        close(packed[0], torch.cat(expected))
    close(model(inputs_embeds=model.get_input_embeddings()(rows[0][None])).logits[0], expected[0])


LOSSES = {
    "one class a row": (3, torch.tensor([2, 0, 1]), F.cross_entropy),
    "some classes a row": (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]]), F.binary_cross_entropy_with_logits),
    "a number a row": (1, torch.tensor([0.5, -2.0, 1.0]), lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
}


@pytest.mark.parametrize("model_class", [CLASSES["rows"][0], hf.MegalodonEncoderForSequenceClassification])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_rows(kind: str, model_class: type) -> None:
    num_labels, labels, loss_of = LOSSES[kind]
    model = randomized(model_class(model_class.config_class(**SIZES, num_labels=num_labels)).eval())
    output = model(**padded(prompts(), "left"), labels=labels)
    close(output.loss, loss_of(output.logits, labels))
    *_, head = model.parameters()
    assert output.loss > 0.1 and torch.autograd.grad(output.loss, head)[0].abs().sum() > 0


@pytest.mark.parametrize("kind", ["tokens", "tokens, encoder"])
def test_loss_of_tokens_ignores_padding(kind: str) -> None:
    model, batch = build_classifier(kind), padded(prompts(), "left")
    labels = torch.randint(3, batch["input_ids"].shape)
    labels[0, 7] = -100
    output = model(**batch, labels=labels)
    learned = (batch["attention_mask"] == 1) & (labels >= 0)
    close(output.loss, F.cross_entropy(output.logits[learned], labels[learned]))


@pytest.mark.parametrize("kind", CLASSES)
def test_heads_are_new_at_first_and_saved_then(kind: str, tmp_path: Path) -> None:
    """The trunk comes from a folder of our own model, and back to one if the model is an encoder."""
    _, auto = CLASSES[kind]
    is_causal = "encoder" not in kind
    if is_causal:
        ours = mo.Megalodon(mo.MegalodonConfig(**SIZES))
    else:
        ours = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**SIZES))
    ours.save(tmp_path / "ours")
    model, info = auto.from_pretrained(tmp_path / "ours", id2label=NAMES, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"score"} and not info["unexpected_keys"]
    assert model.score.weight.shape == (3, 32) and 0.3 < model.score.weight.std() * (3 * 32) ** 0.5 < 3
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    assert {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad} == {"score"}
    ids = torch.randint(50, (2, 21))
    model(ids, labels=ids[:, 0] % 3 if kind == "rows" else ids % 3).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.save_pretrained(tmp_path / "theirs")
    again, info = auto.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"] and again.config.id2label == NAMES
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
        if not is_causal:
            assert torch.equal(mo.MegalodonEncoder.load(tmp_path / "theirs")(ids), ours(ids))


@pytest.mark.parametrize("kind", CLASSES)
def test_adapters_of_peft_train_and_save_the_head(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, ids = build_classifier(kind), torch.randint(50, (2, 21))
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS" if kind == "rows" else "TOKEN_CLS", target_modules=["wz", "wv"])
    adapted = peft.get_peft_model(model, config)
    labels = ids[:, 0] % 3 if kind == "rows" else ids % 3
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    base = type(model).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        assert not torch.allclose(base(ids).logits, logits)
        close(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits, logits)


def test_wrong_calls() -> None:
    rows, tokens, ids = build_classifier("rows"), build_classifier("tokens"), torch.randint(50, (2, 6))
    empty = torch.tensor([[1] * 6, [0] * 6])
    for message, call in (
        ("a token in every row", lambda: rows(ids, attention_mask=empty)),
        ("a token in every row", lambda: rows(ids[:1], cu_seq_lens_q=torch.tensor([0, 3, 3, 6]))),
        ("`labels` must have 2 rows", lambda: rows(ids, labels=torch.tensor([1]))),
        (r"`labels` must be \(2, 6\) as the tokens", lambda: tokens(ids, labels=ids[:, 1:])),
    ):
        with pytest.raises(ValueError, match=message):
            call()

"""peft: virtual tokens before padded text, and adapters in recomputed layers."""

import copy

import pytest
import torch
from hf_models import SIZES, build_model, close, padded, prompts

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,  # importing peft takes 2 s
    pytest.mark.filterwarnings("default"),  # peft warns about transformers
]


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_before_padded_text(kind: str) -> None:
    """Rows of a left-padded batch, with virtual tokens before the padding, equal single rows, and train."""
    sizes = dict(token_dim=SIZES["model_dim"], num_layers=SIZES["num_layers"], num_attention_heads=SIZES["num_heads"])
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5, **sizes)
    adapted = peft.get_peft_model(build_model(), config).eval()
    greedy = dict(max_new_tokens=12, do_sample=False)
    batch = padded(prompts(), "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    texts = [row[there == 1][None] for row, there in zip(ids, mask)]
    singles = [dict(input_ids=text, attention_mask=torch.ones_like(text)) for text in texts]
    for options in ({}, dict(use_cache=False), dict(num_beams=2)):
        together = adapted.generate(**batch, **greedy, pad_token_id=0, **options)[:, ids.shape[1] :]
        for row, single in zip(together, singles, strict=True):
            expected = adapted.generate(**single, **greedy, **options)
            assert torch.equal(row, expected[0, single["input_ids"].shape[1] :])
    losses = torch.stack([adapted(**single, labels=single["input_ids"]).loss for single in singles])
    loss = adapted(**batch, labels=ids).loss  # the last virtual token predicts the first one of the text
    close(loss, (losses * mask.sum(1)).sum() / mask.sum())
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapted.parameters() if parameter.requires_grad)


def test_adapters_that_begin_at_a_token_are_recomputed_so() -> None:
    """An aLoRA begins at its invocation tokens; when a block is recomputed, peft must tell its layers that place again."""
    base, ids = build_model(), torch.randint(10, 50, (2, 24))
    ids[0, 8:10] = ids[1, 12:14] = torch.tensor([7, 9])
    options = dict(target_modules=["wz", "wv", "fc1"], init_lora_weights=False, alora_invocation_tokens=[7, 9])
    gradients = []
    for kind in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        adapted = peft.get_peft_model(copy.deepcopy(base), config).train()
        if kind is not None:
            adapted.gradient_checkpointing_enable(kind)
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in adapted.parameters() if parameter.requires_grad])
    assert max(gradient.abs().max() for gradient in gradients[0]) > 0.01
    for others in gradients[1:]:
        for a, b in zip(gradients[0], others, strict=True):
            close(a, b)

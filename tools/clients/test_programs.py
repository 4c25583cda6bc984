"""Short programs as people write them: trl's trainers, sentence-transformers, `transformers serve`."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from transformers import AutoModelForCausalLM, AutoTokenizer

LM, FEATURES = "MegalodonForCausalLM", ["MegalodonModel", "MegalodonEncoderModel"]
TEXTS = ["the quick brown fox jumps over the lazy dog. " * n for n in (1, 3, 2, 4)]
OPTIONS = dict(max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True, bf16=False)
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["wz", "wv"])


def train(kind: str, options: Any, kind_of_trainer: type, **arguments: Any) -> list[float]:
    """Train for two steps a model from a path or an object; return the losses."""
    model = LM if kind == "path" else AutoModelForCausalLM.from_pretrained(LM)
    trainer = kind_of_trainer(model, args=options, processing_class=AutoTokenizer.from_pretrained(LM), **arguments)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not p.equal(before[name]) for name, p in trainer.model.named_parameters() if name in before)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and torch.tensor(losses).isfinite().all()
    return losses


SFT = {
    "plain": {},
    "packing": dict(packing=True, max_length=128),
    "wrapped": dict(packing=True, packing_strategy="wrapped", max_length=128),
    "padding_free": dict(padding_free=True, max_length=None),
    "completion_only": dict(completion_only_loss=True),
    "not_checkpointed": dict(gradient_checkpointing=False),
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)),
}


def sft(kind: str, folder: Path, name: str, peft_config: LoraConfig | None = None) -> list[float]:
    rows = [dict(text=text) for text in TEXTS]
    if name == "completion_only":
        rows = [dict(prompt=text[:9], completion=text[9:]) for text in TEXTS]
    data = Dataset.from_list(rows)
    options = trl.SFTConfig(folder, **OPTIONS, logging_steps=1, **SFT[name])
    return train(kind, options, trl.SFTTrainer, train_dataset=data, peft_config=peft_config)


@pytest.mark.parametrize("kind", ["path", "object"])
@pytest.mark.parametrize("name", SFT)
def test_sft(name: str, kind: str, tmp_path: Path) -> None:
    sft(kind, tmp_path, name)
    sft(kind, tmp_path, name, LORA)


def test_sft_without_padding_has_the_losses_of_padded_batches(tmp_path: Path) -> None:
    found, expected = (torch.tensor(sft("object", tmp_path, name)) for name in ("padding_free", "plain"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["path", "object"])
@pytest.mark.parametrize("reference", ["given", "none", "adapter"])
def test_dpo(reference: str, kind: str, tmp_path: Path) -> None:
    data = Dataset.from_list([dict(prompt="the quick", chosen=" brown fox", rejected=text) for text in TEXTS])
    options = trl.DPOConfig(tmp_path, **OPTIONS, logging_steps=1)
    model = AutoModelForCausalLM.from_pretrained(LM) if reference == "given" else None
    peft_config = LORA if reference == "adapter" else None
    train(kind, options, trl.DPOTrainer, train_dataset=data, ref_model=model, peft_config=peft_config)


@pytest.mark.parametrize("kind", ["path", "object"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(beta: float, kind: str, tmp_path: Path) -> None:
    def count_letters(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    data = Dataset.from_list([dict(prompt="the quick"), dict(prompt="jumps over the")])
    sizes = dict(num_generations=2, max_completion_length=8, beta=beta)
    options = trl.GRPOConfig(tmp_path, **OPTIONS, logging_steps=1, **sizes)
    train(kind, options, trl.GRPOTrainer, train_dataset=data, reward_funcs=count_letters)


@pytest.mark.parametrize("name", FEATURES)
def test_sentence_transformers(name: str, tmp_path: Path) -> None:
    words = Transformer(name)
    model = SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())], device="cpu")
    before = model.encode(TEXTS, batch_size=4, convert_to_tensor=True)
    torch.testing.assert_close(before, torch.stack([model.encode(text, convert_to_tensor=True) for text in TEXTS]))
    data = Dataset.from_dict(dict(anchor=TEXTS, positive=TEXTS[::-1]))
    options = SentenceTransformerTrainingArguments(tmp_path, **OPTIONS)
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model, options, train_dataset=data, loss=loss).train()
    model.save(str(tmp_path / "saved"))
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert saved.equal(model.encode(TEXTS, convert_to_tensor=True)) and not saved.equal(before)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """`transformers serve` in a process of its own, which has not imported this package."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    options = f"serve {LM} --port {port} --device cpu --trust-remote-code".split()
    command = [sys.executable, "-c", program, *options]
    with subprocess.Popen(command) as server:
        try:
            for _ in range(240):
                assert server.poll() is None, "the server ended"
                with socket.socket() as connection:
                    if connection.connect_ex(("localhost", port)) == 0:
                        break
                time.sleep(0.5)
            yield f"http://localhost:{port}/v1"
        finally:
            server.terminate()


QUESTION = {
    "completions": dict(prompt="the quick"),
    "chat/completions": dict(messages=[dict(role="user", content="the quick")]),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", QUESTION)
def test_serve(path: str, stream: bool, address: str) -> None:
    body = json.dumps(dict(model=LM, max_tokens=5, stream=stream, **QUESTION[path])).encode()
    request = urllib.request.Request(f"{address}/{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = response.read().decode()
    if stream:
        events = [json.loads(line[5:]) for line in answer.splitlines() if line.startswith("data: {")]
        assert len(events) > 1
    else:
        assert json.loads(answer)["choices"][0]["finish_reason"]

"""Programs for transformers, offline: pipelines, Trainer, PEFT, accelerate, lm-eval."""

import contextlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paths import DOCS
import pytest
import torch
from command_line import quick_commands
from command_line import train as train_on
from programs import run_python

import megalodon_ops as mo

transformers = pytest.importorskip("transformers")
pytest.importorskip("megalodon_ops.hf", exc_type=ImportError)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # these packages warn about each other
    pytest.mark.filterwarnings("error::UserWarning:megalodon_ops"),
]

import megalodon_ops.hf as hf
from megalodon_ops.hf.cache import CACHE
from megalodon_ops.tokenizers import ByteTokenizer

SENTENCE = "the quick brown fox jumps over the lazy dog. "
ENCODER = dict(num_layers=2, model_dim=64, z_dim=32, value_dim=64, num_heads=2, ffn_hidden_dim=64, cema_ndim=4)
ENCODER |= dict(chunk_size=32, norm_num_groups=4)
SIZES = dict(**ENCODER, vocab_size=257, output_size=256)


def fit(model: torch.nn.Module, steps: int, lr: float, batch: Callable[[], dict]) -> torch.Tensor:
    """Train with AdamW, and return the last loss."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss


def arguments_of(folder: Path, **options: Any) -> transformers.TrainingArguments:
    quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True)
    return transformers.TrainingArguments(output_dir=str(folder), **quiet, **options)


def losses_of(trainer: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `Megalodon.save` with a byte model that has learned one sentence, and its tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "fox"
    model = hf.MegalodonForCausalLM(hf.MegalodonHFConfig(**SIZES)).train()
    text = torch.tensor([256, *(SENTENCE * 5).encode()])[None]
    fit(model, 120, 5e-3, lambda: dict(input_ids=text, labels=text))
    model.megalodon.save(path, tokenizer=ByteTokenizer())
    return path


def loaded(folder: Path) -> tuple[hf.MegalodonForCausalLM, transformers.PreTrainedTokenizerFast]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_pipeline(folder: Path) -> None:
    pipe = transformers.pipeline("text-generation", model=str(folder))
    text = SENTENCE * 2
    assert pipe("the quick", max_new_tokens=30, do_sample=False)[0]["generated_text"] == text[:39]
    prompts = ["the quick brown fox", "the lazy dog. the", "jumps over"]
    found = pipe(prompts, max_new_tokens=9, do_sample=False, batch_size=3, return_full_text=False)
    for prompt, (output,) in zip(prompts, found, strict=True):
        at = text.index(prompt) + len(prompt)
        assert output["generated_text"] == text[at : at + 9]
    features = transformers.pipeline("feature-extraction", model=str(folder))("the quick")
    assert torch.tensor(features).shape == (1, 10, 64)


def test_pipelines_of_encoders(tmp_path: Path) -> None:
    """Classes of texts in padded batches; masked-token prediction with a tokenizer of words."""
    tokenizers = pytest.importorskip("tokenizers")
    encoder = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**ENCODER, vocab_size=257, num_classes=3)).eval()
    encoder.save(tmp_path / "classes", tokenizer=ByteTokenizer())
    texts = ["the quick", "brown fox jumps over", "the"]
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "classes"), top_k=None)
    for text, found in zip(texts, pipe(texts, batch_size=3), strict=True):
        with torch.no_grad():
            scores = encoder(torch.tensor([[256, *text.encode()]])).softmax(1)[0]
        found = {answer["label"]: answer["score"] for answer in found}
        torch.testing.assert_close(torch.tensor([found[f"LABEL_{i}"] for i in range(3)]), scores)

    sentence = SENTENCE.rstrip(". ").split()
    words = {word: i for i, word in enumerate(dict.fromkeys(["[PAD]", "[MASK]", *sentence]))}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", mask_token="[MASK]")
    config = hf.MegalodonEncoderHFConfig(**ENCODER, vocab_size=len(words))
    model = hf.MegalodonEncoderForMaskedLM(config).train()
    ids = [words[word] for word in sentence]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    fit(model, 60, 1e-2, lambda: collator([{"input_ids": ids}] * 4))
    guess = transformers.pipeline("fill-mask", model=model.eval(), tokenizer=tokenizer)
    assert guess("the quick [MASK] fox jumps over the lazy dog")[0]["token_str"] == "brown"


def test_trainer_with_an_encoder(tmp_path: Path) -> None:
    """Numbers of several lengths, padded by a custom collator: the loss falls, and MegalodonEncoder loads it."""
    rows = [{"input_values": torch.full((5 + i % 7, 1), 1.0 - 2 * (i % 2)), "labels": i % 2} for i in range(160)]

    def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
        values = torch.nn.utils.rnn.pad_sequence([row["input_values"] for row in rows], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row["input_values"])) for row in rows], batch_first=True)
        return dict(input_values=values, attention_mask=mask, labels=torch.tensor([row["labels"] for row in rows]))

    config = hf.MegalodonEncoderHFConfig(**ENCODER, num_features=1, scale_inputs=False)
    options = dict(per_device_train_batch_size=8, learning_rate=5e-3, num_train_epochs=1)
    options |= dict(save_steps=20, logging_steps=5)
    parts = dict(train_dataset=rows, eval_dataset=rows[:9], data_collator=padded)
    model = hf.MegalodonEncoderForSequenceClassification(config)
    trainer = transformers.Trainer(model, arguments_of(tmp_path, **options), **parts)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1
    ours = mo.MegalodonEncoder.load(tmp_path / "checkpoint-20")
    with torch.no_grad():
        assert ours(torch.ones(1, 9, 1)).argmax() == 0 and ours(-torch.ones(1, 9, 1)).argmax() == 1


def test_trainer_resumes_an_encoder_with_a_tokenizer_that_ends_texts(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[PAD]": 2, "[END]": 3}))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="[END]")
    rows = [{**tokenizer("a " * (i % 3) + "b"), "labels": i % 2} for i in range(8)]
    model = hf.MegalodonEncoderForSequenceClassification(hf.MegalodonEncoderHFConfig(**ENCODER, vocab_size=4))
    for steps, checkpoint in ((2, None), (4, tmp_path / "checkpoint-2")):
        if checkpoint is not None:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint)
            assert model.config.eos_token_id == 3
            mo.MegalodonEncoder.load(checkpoint)
        arguments = arguments_of(tmp_path, per_device_train_batch_size=4, save_steps=2, max_steps=steps)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        assert trainer.state.global_step == steps


def test_streamer_and_stop_strings(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    inputs = tokenizer("the quick", return_tensors="pt")
    stop = dict(stop_strings=["lazy"], tokenizer=tokenizer)
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False, streamer=streamer, **stop)
    assert "".join(streamer) == tokenizer.decode(output[0, 10:]) == SENTENCE[9 : SENTENCE.index(" dog")]


@pytest.mark.parametrize("packing", ["position_ids", "cu_seq_lens"])
def test_trainer_with_packed_documents(tmp_path: Path, packing: str) -> None:
    """Loss and gradient equal the mean over the tokens of all documents, read one by one."""
    documents = [SENTENCE[: 5 + 7 * i] for i in range(6)]
    data = [{"input_ids": [256, *document.encode()]} for document in documents]
    kinds = {"cu_seq_lens": dict(return_position_ids=False, return_flash_attn_kwargs=True), "position_ids": {}}
    collator = transformers.DataCollatorWithFlattening(**kinds[packing])
    model = transformers.AutoModelForCausalLM.from_config(hf.MegalodonHFConfig(**SIZES))
    expected = hf.MegalodonForCausalLM(model.config)
    expected.load_state_dict(model.state_dict())
    plain = dict(optim="sgd", learning_rate=1e-3, weight_decay=0.0, max_grad_norm=0.0, lr_scheduler_type="constant")
    steps = dict(per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=1)
    arguments = arguments_of(tmp_path, **plain, **steps, save_strategy="no", logging_steps=1)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    nats, num_targets = 0.0, 0
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        nats += expected(ids, labels=ids).loss * (ids.shape[1] - 1)
        num_targets += ids.shape[1] - 1
    loss = nats / num_targets
    loss.backward()
    assert losses_of(trainer)[0] == pytest.approx(loss.item(), rel=1e-3)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 1e-3 * theirs.grad, rtol=1e-4, atol=1e-6)


def test_trainer_learns_evaluates_saves_and_resumes(tmp_path: Path) -> None:
    ids = [256, *SENTENCE.encode()]
    model = hf.MegalodonForCausalLM(hf.MegalodonHFConfig(**SIZES))
    options = dict(per_device_train_batch_size=4, learning_rate=5e-3, lr_scheduler_type="constant", logging_steps=10)
    options |= dict(save_steps=20, eval_strategy="steps", eval_steps=20, gradient_checkpointing=True)
    data = [{"input_ids": ids, "labels": [-100, *ids[1:]]}] * 160  # 5.0 counts every label that is not -100
    parts = dict(train_dataset=data, eval_dataset=data[:3], data_collator=transformers.default_data_collator)
    trainer = transformers.Trainer(model, arguments_of(tmp_path, **options, num_train_epochs=1), **parts)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0] / 3
    evaluated = trainer.evaluate()
    again = hf.MegalodonForCausalLM.from_pretrained(tmp_path / "checkpoint-40")
    with torch.no_grad():
        row = torch.tensor([ids])
        assert again(row, labels=row).loss.item() == pytest.approx(evaluated["eval_loss"], rel=1e-4)
    fresh = hf.MegalodonForCausalLM(hf.MegalodonHFConfig(**SIZES))
    trainer = transformers.Trainer(fresh, arguments_of(tmp_path, **options, max_steps=41), **parts)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-40"))
    assert trainer.state.global_step == 41 and trainer.evaluate()["eval_loss"] < 2 * evaluated["eval_loss"]


def test_trainer_with_label_smoothing(tmp_path: Path) -> None:
    """The model learns the next token, not the current one, although one token is never predicted."""
    ids = torch.tensor([256, *SENTENCE.encode()])
    model = hf.MegalodonForCausalLM(hf.MegalodonHFConfig(**SIZES))
    options = dict(per_device_train_batch_size=4, max_steps=60, learning_rate=1e-2)
    options |= dict(save_strategy="no", logging_steps=10)
    data = [{"input_ids": ids, "labels": ids}] * 240
    arguments = arguments_of(tmp_path, **options, label_smoothing_factor=0.1)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    least = -0.9 * math.log(0.9) - 0.1 * math.log(0.1 / 256)  # the entropy of the target distribution
    losses = losses_of(trainer)
    assert 2 * losses[-1] < losses[0] and least < trainer.evaluate()["eval_loss"] < 1.2 * least
    with torch.no_grad():
        assert (model.eval()(ids[None]).logits[0, :-1].argmax(-1) == ids[1:]).float().mean() > 0.9


def test_lora_trained_and_merged(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = loaded(folder)
    prompt = tokenizer("the quick", return_tensors="pt")
    greedy = dict(**prompt, max_new_tokens=20, do_sample=False)
    base = model.generate(**greedy)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["wv", "wz", "wr", "wh1", "wh2", "fc1", "fc2"])
    adapted = peft.get_peft_model(model, config)
    adapted.gradient_checkpointing_enable()
    text = torch.tensor([256, *(b"the slow green turtle creeps under a busy cat. " * 5)])[None]
    assert fit(adapted.train(), 80, 1e-2, lambda: dict(input_ids=text, labels=text)) < 0.5
    adapted.save_pretrained(tmp_path / "adapter")

    restored = peft.PeftModel.from_pretrained(hf.MegalodonForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    with pytest.warns(UserWarning, match="Decoder: `layers.0.mega.wv`"):  # it calls the layers with adapters
        expected_ids = restored.generate(**greedy)
    assert not torch.equal(expected_ids, base)
    with restored.disable_adapter(), pytest.warns(UserWarning, match="Decoder"):
        assert torch.equal(restored.generate(**greedy), base)
    with torch.no_grad():
        cache = restored(**prompt, use_cache=True).get(CACHE)
        token = prompt.input_ids[:, -1:]
        for is_disabled in (False, True, False):  # inside a sequence
            before = cache.state
            switch = restored.disable_adapter() if is_disabled else contextlib.nullcontext()
            with switch, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = restored.get_base_model().megalodon(token, state=before)
                found = restored(input_ids=token, past_key_values=cache).logits[..., :256]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    merged = restored.merge_and_unload()
    assert type(merged) is hf.MegalodonForCausalLM
    assert torch.equal(merged.generate(**greedy), expected_ids)
    cache = merged(**prompt, use_cache=True).get(CACHE)
    assert mo.Decoder(merged.megalodon, cache.state).fused
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again.generate(**greedy), expected_ids)


@pytest.mark.parametrize("layers", [["wz", "wv", "wr", "wh1", "wh2"], "all-linear"], ids=["some layers", "all layers"])
def test_lora_of_an_encoder_trains_and_saves_the_new_head(tmp_path: Path, layers: list[str] | str) -> None:
    peft = pytest.importorskip("peft")
    config = hf.MegalodonEncoderHFConfig(**ENCODER, vocab_size=16)
    hf.MegalodonEncoderForMaskedLM(config).save_pretrained(tmp_path / "base")

    def load_base() -> hf.MegalodonEncoderForSequenceClassification:
        return transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")

    model = load_base()
    new = model.classifier.classes.weight.clone()
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=layers)).train()
    assert adapted.get_submodule("base_model.model.model.layers.0.mega.wz").lora_A
    assert not [name for name, _ in adapted.named_parameters() if "classifier" in name and "lora" in name]
    ids = torch.randint(16, (64, 12))
    labels = (ids[:, 0] < 8).long()
    ids[:, 1:] = ids[:, :1]
    fit(adapted, 20, 1e-2, lambda: dict(input_ids=ids, labels=labels))
    adapted.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        assert (logits.argmax(1) == labels).all()
        restored = peft.PeftModel.from_pretrained(load_base(), tmp_path / "adapter").eval()
        torch.testing.assert_close(restored(input_ids=ids).logits, logits)
        merged = restored.merge_and_unload()
        assert not torch.equal(merged.classifier.classes.weight, new)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(mo.MegalodonEncoder.load(tmp_path / "merged")(ids), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["cpu", "auto", "disk"])
def test_device_maps(folder: Path, tmp_path: Path, target: str) -> None:
    pytest.importorskip("accelerate")
    device_maps = {"cpu": {"": "cpu"}, "auto": "auto"}
    device_maps["disk"] = {"model.embed": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_maps["disk"] |= {"model.output": "disk", "lm_head": "disk"}
    model, tokenizer = loaded(folder)
    placed = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_maps[target], offload_folder=tmp_path
    )
    inputs = tokenizer(["the quick", "lazy"], return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(placed(**inputs).logits, model(**inputs).logits)
        loss = placed(**inputs, labels=inputs.input_ids).loss
        torch.testing.assert_close(loss, model(**inputs, labels=inputs.input_ids).loss)
    hooked = pytest.warns(UserWarning, match="Decoder") if target == "disk" else contextlib.nullcontext()
    with hooked:
        output = placed.generate(**inputs, max_new_tokens=9, do_sample=False)
    assert torch.equal(output, model.generate(**inputs, max_new_tokens=9, do_sample=False))


def test_compiled_forward() -> None:
    """One graph for the logits; one for a loss and its gradient, with torch's generated code."""
    model = hf.MegalodonForCausalLM(hf.MegalodonHFConfig(**SIZES | {"num_layers": 1}))
    ids = torch.arange(40)[None]  # more than a chunk
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids).logits)
    model.train()
    torch.compile(model, fullgraph=True)(ids, labels=ids).loss.backward()
    gradient = model.model.embed.weight.grad.clone()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(gradient, model.model.embed.weight.grad)


def test_lm_eval(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local task with two kinds of answers gives equal scores in padded batches and one by one."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETSCACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    words = SENTENCE.strip(". ").split()
    rows = []
    for n in range(2, len(words)):
        start, word = " ".join(words[:n]), words[n]
        rows.append({"start": start, "choices": [f" {word}", f" {word[::-1]}"], "answer": 0})
        rows[-1]["next"] = (SENTENCE * 2)[len(start) :][:8]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path}/rows.jsonl"}}}}
test_split: test
doc_to_text: "{{{{start}}}}"
target_delimiter: ""
"""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "choice.yaml").write_text(
        f"task: fox_choice\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer{common}"
        "metric_list: [{metric: acc}]\n"
    )
    (tasks / "words.yaml").write_text(
        f"task: fox_words\noutput_type: generate_until\ndoc_to_target: next{common}"
        'generation_kwargs: {until: ["#"], max_gen_toks: 8, do_sample: false}\n'
        "metric_list: [{metric: exact_match}]\n"
    )
    model, tokenizer = loaded(folder)
    accuracies, log_likelihoods = [], []
    options = dict(task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0)
    for batch in (1, 4):
        batched = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=64)
        found = lm_eval.simple_evaluate(model=batched, tasks=["fox_choice", "fox_words"], **options)
        accuracies.append(found["results"]["fox_choice"]["acc,none"])
        assert found["results"]["fox_words"]["exact_match,none"] == 1.0
        samples = [sample["resps"] for sample in found["samples"]["fox_choice"]]
        log_likelihoods.append(torch.tensor([[response[0][0] for response in sample] for sample in samples]))
    assert accuracies == [1.0, 1.0]
    torch.testing.assert_close(*log_likelihoods, rtol=1e-3, atol=1e-3)


def test_reads_a_checkpoint_of_a_training_run(text: Path, tmp_path: Path) -> None:
    with quick_commands():
        assert train_on(text, tmp_path / "run", "--steps", 2) == 0
    *_, last = sorted((tmp_path / "run" / "checkpoints").iterdir())
    model, tokenizer = loaded(last)
    ids = tokenizer(SENTENCE[:15], return_tensors="pt").input_ids  # a chunk
    with torch.no_grad():
        assert torch.equal(model(ids).logits, mo.Megalodon.load(last)(ids))


def test_page_runs(folder: Path, tmp_path: Path) -> None:
    """The programs in docs/transformers.md, in order, as one."""
    pytest.importorskip("peft")
    page = (DOCS / "transformers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "model").symlink_to(folder)
    path = os.pathsep.join(sys.path)
    run = run_python("\n".join(blocks), folder=tmp_path, HF_HUB_OFFLINE="1", PYTHONPATH=path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(blocks) >= 4

"""Tensor parallel gives what one process gives: logits, losses, gradients, states."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor
from assertions import every_case, message_of
from chunk_parallel import worst_error
from data_parallel import gradients_of, parameters_of, train
from models import TINY, tiny_model, tokens_of
from tensor_parallel import Work, compare

import megalodon_ops as mo
from megalodon_ops.distributed import make_mesh, parallelize
from megalodon_ops.evaluation import evaluate
from megalodon_ops.model.model_state import named_tensors

EXACT, FLOAT32 = 1e-10, 1e-5
ONE_HEAD = Work(config=dict(num_heads=1), past=11)
CONFIGS = {
    "two heads, swiglu, rescaled": Work(config=dict(swiglu=True, rescale_nffn=True), past=8),
    "one head, shared embedding": Work(
        config=dict(share_emb=True, scale_emb=True, num_heads=1), past=11, reduction="sum"
    ),
    "recomputed": Work(config=dict(layerwise_ckpt=True), lengths=(21, 9)),
    "no affine norms": Work(config=dict(norm_affine=False, cema_ndim=1), rows=1, cu_seqlens=(0, 5, 5, 21)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_equals_one_process(ranks, case):
    error, where = worst_error(ranks.run(compare, 2, CONFIGS[case]))
    assert error < EXACT, where


def gradients(parallel: bool) -> dict[str, torch.Tensor]:
    """Gradients of a function of logits, features, single losses and the returned state."""
    model = tiny_model(num_heads=1)
    tokens, targets = tokens_of(4, 13).split(2)
    if parallel:
        model = parallelize(model, make_mesh("tensor=2", device_type="cpu"))
    logits, state = model(tokens, return_state=True)
    losses = model.loss(tokens, targets, reduction="none")
    weights = torch.arange(losses.numel(), dtype=losses.dtype).view_as(losses)
    total = logits.square().sum() + (losses * weights).sum() + model.features(tokens).sum(-1).pow(3).sum()
    total = total + state.layers[0].cema.abs().sum() + state.norm.mean.square().sum()
    total.backward()
    return gradients_of(model)


def test_gradients_of_logits_features_losses_and_states_are_those_of_one_process(ranks):
    wanted = gradients(False)
    for found in ranks.run(gradients, 2, True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def results_of_numbers(parallel: bool, config: dict[str, bool]) -> dict[str, torch.Tensor]:
    """Outputs, states and gradients of two calls on numbers, the second with the state of the first."""
    model = tiny_model(num_features=3, output_size=5, num_heads=1, **config)
    x = 5 + torch.randn(2, 21, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).cumsum(1)
    if model.config.missing_values:
        x[:, ::4, 1] = torch.nan
    x.requires_grad_()
    if parallel:
        model = parallelize(model, make_mesh("tensor=2", device_type="cpu"))
    first, state = model(x[:, :8], return_state=True)
    second, after = model(x[:, 8:], lengths=torch.tensor([13, 9]), state=state, return_state=True)
    outputs = torch.cat([first, second], 1)[:, :17]
    (outputs.square().sum() + model.features(x).sum(-1).pow(3).sum()).backward()
    results = {f"state {name}": tensor.detach() for name, tensor in named_tensors(after).items()}
    grad = x.grad[:, 2:]  # those of the first values are divided by a deviation of 0
    return results | gradients_of(model) | {"outputs": outputs.detach(), "d x": grad}


def test_a_model_of_numbers_equals_one_process(ranks):
    with every_case() as case:
        for config in ({}, dict(missing_values=True, swiglu=True), dict(scale_inputs=False)):
            wanted = results_of_numbers(False, config)
            for rank, found in enumerate(ranks.run(results_of_numbers, 2, True, config)):
                with case(config, rank):
                    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_16_bit_matrices_differ_by_their_rounding_alone(ranks):
    work = replace(ONE_HEAD, dtype=torch.float32, options=dict(param_dtype=torch.bfloat16))
    error, where = worst_error(ranks.run(compare, 2, work))
    assert 1e-4 < error < 0.15, where  # a rounding of bfloat16 is 0.004


MESHES = {
    "data, tensor": ("data=2,tensor=2", 4, Work(past=8, config=dict(ffn_hidden_dim=42))),  # shards of 11 and 10
    "replicated": ("data=2,tensor=2", 4, Work(options=dict(data="replicate"), config=dict(share_emb=True))),
    "chunk, tensor": ("chunk=2,tensor=2", 4, Work(past=16, lengths=(21, 17), config=dict(num_heads=1))),
    "a piece without columns": ("chunk=2,tensor=2", 4, Work(length=7, past=16)),
    "heads shared by two": ("tensor=4", 4, Work(past=11)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MESHES)
def test_meshes_of_four_equal_one_process(ranks, case):
    sizes, count, work = MESHES[case]
    error, where = worst_error(ranks.run(compare, count, replace(work, sizes=sizes)))
    assert error < EXACT, where


@pytest.mark.slow
def test_data_chunk_and_tensor_on_eight_processes_equal_one_in_float32(ranks):
    config = dict(swiglu=True, share_emb=True)
    work = Work("data=2,chunk=2,tensor=2", config=config, rows=4, past=8, dtype=torch.float32)
    error, where = worst_error(ranks.run(compare, 8, work))
    assert error < FLOAT32, where


def refusals() -> list[str]:
    mesh = make_mesh("tensor=2", device_type="cpu")
    texts = []
    for config in (
        dict(norm_num_groups=1),
        dict(value_dim=25, num_heads=1),
        dict(ffn_hidden_dim=41),
        dict(num_heads=3, z_dim=12),
        dict(visible_chunks=2),
    ):
        model = tiny_model(**config)
        texts.append(message_of(lambda: parallelize(model, mesh)))  # noqa: B023
        assert type(model) is mo.Megalodon
    model = tiny_model()
    model.layers[0].mega.wv.extra = torch.nn.Parameter(torch.zeros(1))
    parallel = parallelize(tiny_model(), mesh)
    tokens = (tokens_of(1, 9) + dist.get_rank()) % TINY["vocab_size"]  # others on each rank
    return [*texts, message_of(lambda: parallelize(model, mesh)), message_of(lambda: parallel(tokens))]


def mesh_of_two_ranks_error() -> str:
    mesh = dist.device_mesh.DeviceMesh("cpu", [0, 1], mesh_dim_names=("tensor",))
    if dist.get_rank() == 2:
        return ""
    return message_of(lambda: parallelize(tiny_model(), mesh))


@pytest.mark.slow
def test_a_mesh_without_some_processes_is_refused(ranks):
    words = "parallelize: `mesh` must have all 3 processes, got 2."
    assert ranks.run(mesh_of_two_ranks_error, 3) == [words, words, ""]


def test_a_model_that_cannot_be_split_is_refused_on_every_rank(ranks):
    first, second = ranks.run(refusals, 2)
    assert first == second
    groups, values, hidden, heads, two, others, tokens = first
    assert "`mesh` must have a dimension `tensor` whose size divides norm_num_groups = 1, got 2" in groups
    assert "divides value_dim = 25" in values and "divides ffn_hidden_dim = 41" in hidden
    assert "divides num_heads = 3 or is a multiple of num_heads, got 2" in heads
    unsplit = "a working memory or attention to two chunks"
    assert two == f"parallelize: `mesh` must have tensor = 1 for a model with {unsplit}, got 2."
    assert "such as layers.0.mega.wv.extra; merge adapters first" in others
    assert "`tokens` must be the same on the ranks 0, 1, got int64 (1, 9) of checksum " in tokens


PROMPT = tokens_of(2, 13)


def generate_save_and_initialise(folder: str):
    """Tokens, nats, parameters of the saved and of the loaded model, and those of a model initialised on `meta`."""
    mesh = make_mesh("tensor=2", device_type="cpu")
    model = parallelize(tiny_model(torch.float32, share_emb=True).eval(), mesh)
    tokens = model.generate(PROMPT, max_new_tokens=9, seed=[0, 1])
    nats = evaluate(model, [PROMPT[0]])[0].nats
    model.save(folder)
    loaded = parallelize(mo.Megalodon.load(folder), mesh, data="replicate")
    saved_and_loaded = parameters_of(model), parameters_of(loaded)
    torch.manual_seed(7 + dist.get_rank())
    with torch.device("meta"):
        fresh = mo.Megalodon(mo.MegalodonConfig(**TINY))
    return tokens, nats, saved_and_loaded, parameters_of(parallelize(fresh, mesh))


def test_generates_evaluates_is_saved_and_initialised_on_meta(ranks, tmp_path):
    model = tiny_model(torch.float32, share_emb=True).eval()
    wanted = model.generate(PROMPT, max_new_tokens=9, seed=[0, 1])
    nats = evaluate(model, [PROMPT[0]])[0].nats
    torch.manual_seed(7)
    fresh = mo.Megalodon(mo.MegalodonConfig(**TINY))
    for tokens, found_nats, saved_and_loaded, values in ranks.run(generate_save_and_initialise, 2, f"{tmp_path}/model"):
        assert torch.equal(tokens, wanted) and found_nats == pytest.approx(nats, rel=1e-5)
        torch.testing.assert_close(*saved_and_loaded, rtol=0, atol=0)
        torch.testing.assert_close(values, parameters_of(fresh), rtol=0, atol=0)
    loaded = mo.Megalodon.load(tmp_path / "model")
    torch.testing.assert_close(parameters_of(loaded), parameters_of(model), rtol=0, atol=0)


def train_on_mesh(sizes: str | None, frozen: str) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Train for some steps of two micro-batches each, without the parameters whose name has `frozen`."""
    model = tiny_model(torch.float64, ffn_hidden_dim=42)
    rows = slice(None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    if sizes is not None:
        mesh = make_mesh(sizes, device_type="cpu")
        model = parallelize(model, mesh)
        if "data" in sizes:
            first = 2 * mesh.get_local_rank("data")
            rows = slice(first, first + 2)
    return train(model, 2, accumulate=2, rows=rows, lr=1e-2)


def train_with_log(*arguments):
    """Results of `train_on_mesh`, and torch's advice to merge exchanges: whether it has some, and what it logs of it.

    Torch looks for exchanges to merge since version 2.10; before that, the first is None.
    """
    module = torch.distributed.tensor._redistribute
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    issues = getattr(module, "_warned_flatten_issues", None)  # each is logged once
    if issues is not None:
        issues.clear()
    module.logger.addHandler(handler)
    result = train_on_mesh(*arguments)
    module.logger.removeHandler(handler)
    return *result, None if issues is None else bool(issues), messages


@pytest.mark.parametrize("sizes", ["tensor=2", pytest.param("data=2,tensor=2", marks=pytest.mark.slow)])
def test_trains_as_one_process(ranks, sizes):
    """Torch's advice on its own exchanges is not logged."""
    frozen = "rmsnorm" if "data" in sizes else ""
    losses, norms, parameters = train_on_mesh(None, frozen)
    count = 4 if "data" in sizes else 2
    for *found, values, has_issues, messages in ranks.run(train_with_log, count, sizes, frozen):
        assert has_issues is not False and not messages
        assert found == [pytest.approx(losses, rel=1e-10), pytest.approx(norms, rel=1e-10)]
        torch.testing.assert_close(values, parameters, rtol=1e-7, atol=1e-8)


def compare_on_two_process_groups(store: str) -> list[dict[str, float]]:
    """The errors on a first process group, and on a second one whose groups have other names."""
    errors = []
    rank = dist.get_rank()
    for data in ("replicate", "shard"):
        if errors:
            dist.destroy_process_group()
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
        errors.append(compare(Work("data=2,tensor=2", past=8, options=dict(data=data))))
    return errors


@pytest.mark.slow
def test_a_second_process_group_serves_as_the_first(ranks, tmp_path):
    for errors in ranks.run(compare_on_two_process_groups, 4, f"{tmp_path}/store"):
        assert worst_error(errors)[0] < EXACT

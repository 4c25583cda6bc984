"""Generation after a prompt that ranks of a chunk group read together, evaluation, saving."""

import itertools
import re
from typing import Any

import torch
import torch.distributed as dist
from assertions import message_of
from chunk_parallel import cut_over_all_ranks
from models import TINY, tiny_model, tokens_of

import megalodon_ops as mo
from megalodon_ops.evaluation import evaluate
from megalodon_ops.model.model_state import named_tensors


def models(**config: Any) -> tuple[mo.Megalodon, mo.Megalodon]:
    """A model that is split over all ranks, and the same for one process."""
    return cut_over_all_ranks(tiny_model(**config).eval()), tiny_model(**config).eval()


def generate_after_shared_prompt() -> float:
    """Largest difference between this rank's state and that of one process, after the same generated tokens.

    The ranks read a prompt together, like any batch; then each generates by itself.
    """
    model, unsharded = models()
    prompt = tokens_of(3, 38)
    widths = (24, 8, 5)  # of each rank, 37 in all: the last token is read when generation begins
    options = dict(max_new_tokens=12, seed=3, return_state=True)
    with torch.no_grad():
        _, state = model(prompt[:, :-1].split(widths, 1)[dist.get_rank()], return_state=True)
    found, after = model.generate(prompt[:, -1:], state=state, **options)
    whole = model.generate(prompt, **options)[0]
    expected, end = unsharded.generate(prompt, **options)
    assert torch.equal(found, expected[:, -found.shape[1] :]) and torch.equal(whole, expected)
    pairs = zip(named_tensors(after).values(), named_tensors(end).values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_ranks_read_a_prompt_together_and_each_goes_on(ranks):
    assert max(ranks.run(generate_after_shared_prompt, 3)) < 1e-10


def generate_from_pieces() -> str:
    model, _ = models()
    return message_of(lambda: model.generate(tokens_of(1, 16).chunk(2, 1)[dist.get_rank()], max_new_tokens=1))


def test_a_piece_is_refused_as_a_prompt(ranks):
    for error in ranks.run(generate_from_pieces, 2):
        assert re.fullmatch(
            r"generate: `prompt` must be the same on the ranks 0, 1, got \[\[.* on rank 0 and \[\[.* on rank 1; "
            r"pass the same whole prompts on each rank\.",
            error,
        )


def stream_and_evaluate(folder: str) -> None:
    model, unsharded = models(share_emb=True)
    prompt = tokens_of(1, 33)
    stream = model.stream(prompt, seed=0)
    assert type(stream._decoder._model) is mo.Megalodon and stream._decoder.fused
    expected = unsharded.stream(prompt, seed=0)
    for a, b in itertools.islice(zip(stream, expected), 5):
        assert torch.equal(a, b)
    documents = [tokens_of(30 + n, 1)[:, 0] for n in range(3)]
    contexts = [16, "all"]
    for a, b in zip(evaluate(model, documents, contexts=contexts), evaluate(unsharded, documents, contexts=contexts)):
        assert a == b
    gathered = model.alone()
    if dist.get_rank() == 0:  # other ranks need not take part
        assert torch.equal(gathered(prompt), unsharded(prompt))
    model.save(folder)
    loaded = mo.Megalodon.load(folder)
    assert all(map(torch.equal, loaded.parameters(), unsharded.parameters()))
    # on some processors, the rounding of MKL's float64 products depends on a matrix's address
    torch.testing.assert_close(loaded(prompt), unsharded(prompt), rtol=0, atol=1e-14)


def test_streams_evaluates_and_saves(ranks, tmp_path):
    ranks.run(stream_and_evaluate, 2, f"{tmp_path}/model")


def unsharded_model_shares_parameters() -> None:
    model, _ = models()
    unsharded = model.alone()
    assert type(unsharded) is mo.Megalodon and unsharded.alone() is unsharded
    for (name, a), (_, b) in zip(model.named_parameters(), unsharded.named_parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr(), name
    modules = [*model.modules(), *unsharded.modules()]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    block = model.layers[0]
    x = torch.randn(1, 5, TINY["model_dim"], dtype=torch.float64)
    assert torch.equal(block(x), model.alone().layers[0](x))  # a block by itself exchanges nothing


def test_the_unsharded_model_shares_the_parameters(ranks):
    ranks.run(unsharded_model_shares_parameters, 2)

"""The model's loss: golden values and gradients, streaming, padding, dtypes."""

import pytest
import torch
import torch.nn.functional as F
from golden import DATA, golden_model
from models import tiny_model, tokens_of
from torch.utils._pytree import tree_leaves
from safetensors.torch import load_file

from megalodon_ops.ops.linear_cross_entropy import linear_cross_entropy as loss


@pytest.fixture(scope="module")
def golden():
    return golden_model()


@pytest.fixture(params=[False, True], ids=["one-block", "blocks"])
def blocks(request, monkeypatch):
    """The loss of all tokens at once, and of 64 at a time."""
    if request.param:
        monkeypatch.setattr(loss, "_CPU_BLOCK", 1)


def test_golden_loss_and_gradients_in_blocks(golden, blocks):
    model, io = golden
    grads = load_file(DATA / "official_c_grads_f64.safetensors")
    found = model.loss(io["tokens"], io["targets"])
    torch.testing.assert_close(found, io["loss"].reshape(()), rtol=1e-12, atol=0)
    model.zero_grad()
    found.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[f"grad.{name}"], rtol=1e-9, atol=1e-11)


def test_loss_streams(blocks):
    model, tokens, targets = tiny_model(), tokens_of(4, 50), tokens_of(4, 51)[:, 1:]
    whole = model.loss(tokens, targets, reduction="none")
    torch.testing.assert_close(whole.mean(), model.loss(tokens, targets), rtol=1e-12, atol=0)
    first, state = model.loss(tokens[:, :20], targets[:, :20], reduction="none", return_state=True)
    expected = model(tokens[:, :20], return_state=True)[1]
    torch.testing.assert_close(tree_leaves(state), tree_leaves(expected), rtol=0, atol=0)
    rest = model.loss(tokens[:, 20:], targets[:, 20:], reduction="none", state=state)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=0, atol=1e-12)


def test_loss_counts_no_padding(blocks):
    model, tokens, targets = tiny_model(), tokens_of(4, 50), tokens_of(4, 51)[:, 1:].clone()
    targets[0, :9] = -100
    lengths = torch.tensor([50, 17, 0, 31])
    inside = torch.arange(50) < lengths[:, None]
    rows = F.cross_entropy(model(tokens, lengths=lengths)[inside], targets[inside])
    garbage = targets.where(inside, 10**6)
    torch.testing.assert_close(model.loss(tokens, garbage, lengths=lengths), rows, rtol=1e-12, atol=0)
    bytes_ = model.loss(tokens[1:], targets[1:].to(torch.uint8), lengths=lengths[1:])
    torch.testing.assert_close(bytes_, model.loss(tokens[1:], targets[1:], lengths=lengths[1:]), rtol=0, atol=0)

    row, row_targets = tokens.reshape(1, 200), targets.reshape(1, 200)
    spans = torch.tensor([[5, 60], [60, 60], [60, 190]])
    documents = F.cross_entropy(model(row, spans=spans)[0, 5:190], row_targets[0, 5:190])
    row_targets[0, :5] = -7
    row_targets[0, 190:] = 10**6
    options = dict(spans=spans.int(), ignore_index=-100)
    torch.testing.assert_close(model.loss(row, row_targets, **options), documents, rtol=1e-12, atol=0)
    each = model.loss(row, row_targets, reduction="none", **options)
    assert not each[0, :5].any() and not each[0, 190:].any()
    assert each.count_nonzero() == 185 - 4  # the targets from 5 to 8 are ignored


def test_loss_of_a_16_bit_model_and_under_autocast(blocks):
    model, tokens = tiny_model(torch.float32), tokens_of(3, 41)
    wanted = model.loss(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.loss(tokens[:, :-1], tokens[:, 1:])
    mixed.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    narrow = model.bfloat16().loss(tokens[:, :-1], tokens[:, 1:])
    narrow.backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    for found in (mixed, narrow):
        assert found.dtype == torch.float32 and found != wanted
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)


def test_loss_compiles_to_one_graph(monkeypatch):
    """In blocks; test_linear_cross_entropy.py compiles the loss of one block."""
    monkeypatch.setattr(loss, "_CPU_BLOCK", 1)
    model, tokens = tiny_model(torch.float32, num_layers=1), tokens_of(4, 21)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([20, 3, 11, 20])
    grads = []
    for function in (model.loss, compiled):
        found = function(tokens[:, :-1], tokens[:, 1:], lengths=lengths)
        grads.append((found.detach(), *torch.autograd.grad(found, tuple(model.parameters()))))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("is_plain", [True, False])
def test_rows_that_do_not_count_may_hold_nan(blocks, reduction, is_plain):
    """Neither the loss nor a gradient is NaN, whatever stands in the rows of ignored targets."""
    hidden, targets = torch.randn(1, 150, 8), torch.randint(9, (1, 150))
    targets[0, 3:90:7] = -100
    weight = torch.randn(9, 8, requires_grad=True)

    def run(hidden):
        hidden, weight.grad = hidden.requires_grad_(), None
        if is_plain:
            value = loss.linear_cross_entropy(hidden, weight, targets, reduction=reduction)
        else:
            logits_of = lambda x: x @ weight.t()  # noqa: E731
            value = loss.blockwise_cross_entropy(hidden, logits_of, targets, width=9, reduction=reduction)
        value.sum().backward()
        return value.detach(), hidden.grad, weight.grad

    expected = run(hidden.clone())
    found = run(hidden.clone().masked_fill((targets == -100)[..., None], torch.nan))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, theirs)

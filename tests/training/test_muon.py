"""Muon: its updates, the parameters that it takes, and resuming."""

import copy

import pytest
import torch
from torch import nn

import megalodon_ops as mo
from megalodon_ops.training import Muon, adamw, optimizer
from megalodon_ops.training.optimizer import orthogonal

CONFIG = mo.MegalodonConfig(
    num_layers=2, model_dim=32, z_dim=16, value_dim=48, ffn_hidden_dim=40, chunk_size=8, norm_num_groups=4, vocab_size=9
)


def model_and_batches(steps: int):
    torch.manual_seed(0)
    return mo.Megalodon(CONFIG), torch.randint(9, (steps, 4, 25), generator=torch.Generator().manual_seed(1))


def train(model: mo.Megalodon, optimizer: torch.optim.Optimizer, batches: torch.Tensor) -> list[float]:
    losses = []
    for tokens in batches:
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 40), (1, 1, 5)])
def test_orthogonal_keeps_the_singular_vectors_and_evens_the_values(shape):
    """In the basis of its singular vectors the result is diagonal; values, but for small ones, become about 1."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonal(matrices)
    assert result.shape == shape
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    within = left.mT @ result @ right.mT
    evened = within.diagonal(dim1=-2, dim2=-1)
    large = values > 0.05 * values.amax(-1, keepdim=True)
    assert evened[large].min() > 0.6 and evened.max() < 1.25
    torch.testing.assert_close(within, torch.diag_embed(evened), rtol=0, atol=1e-4)


def test_an_update_follows_the_formula():
    """A matrix decays, and moves by 0.2 sqrt(max(rows, columns)) lr times Nesterov's momentum, orthogonalized."""
    model, batches = model_and_batches(2)
    muon = Muon(model, lr=0.01, weight_decay=0.5)
    matrix = model.layers[0].mega.wv.weight
    momentum = torch.zeros_like(matrix)
    for tokens in batches:
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        before, gradient = matrix.detach().clone(), matrix.grad.clone()
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = orthogonal((0.95 * momentum + 0.05 * gradient).mT[None])[0].mT
        muon.step()
        muon.zero_grad()
        wanted = (1 - 0.01 * 0.5) * before - 0.01 * 0.2 * 48**0.5 * direction
        torch.testing.assert_close(matrix, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
def test_updates_equal_torchs_up_to_its_bfloat16():
    torch.manual_seed(0)
    shapes = [(16, 40), (40, 16), (24, 24)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    container = nn.Module()
    container.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in shapes)
    for layer, weight in zip(container.layers, weights, strict=True):
        layer.weight = nn.Parameter(weight.detach().clone())
    ours = Muon(container, lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(weights, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for layer, weight in zip(container.layers, weights, strict=True):
            weight.grad = torch.randn_like(weight)
            layer.weight.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    for layer, weight in zip(container.layers, weights, strict=True):
        moved = 3 * 0.02 * 0.2 * max(weight.shape) ** 0.5 * 0.3
        torch.testing.assert_close(layer.weight.detach(), weight.detach(), rtol=0, atol=0.05 * moved)


def test_other_parameters_move_by_adamw():
    """Embedding, output, norms, biases and CEMA move as by AdamW alone."""
    (model, batches), (other, _) = model_and_batches(1), model_and_batches(1)
    train(model, Muon(model, lr=0.01), batches)
    train(other, adamw(other, lr=0.01), batches)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        is_matrix = name.startswith("layers.") and ours.ndim == 2 and name.endswith("weight")
        assert torch.equal(ours, theirs) != is_matrix, name


def test_a_resume_from_its_state_is_exact():
    model, batches = model_and_batches(6)
    muon = Muon(model, lr=0.01)
    train(model, muon, batches[:3])
    again = copy.deepcopy(model)
    other = Muon(again, lr=0.01)
    other.load_state_dict(copy.deepcopy(muon.state_dict()))
    assert train(model, muon, batches[3:]) == train(again, other, batches[3:])


def test_frozen_matrices_and_matrices_without_a_gradient_do_not_move():
    model, batches = model_and_batches(2)
    model.layers[0].mega.wv.weight.requires_grad_(False)
    before = model.layers[0].mega.wv.weight.clone()
    muon = Muon(model, lr=0.01)
    train(model, muon, batches)
    assert torch.equal(model.layers[0].mega.wv.weight, before)
    muon.step()  # no gradients at all


def test_it_learns():
    model, batches = model_and_batches(1)
    losses = train(model, Muon(model, lr=0.02), batches.expand(40, -1, -1))
    assert losses[-1] < 0.5 * losses[0]


def test_matrices_one_at_a_time_get_the_same_updates(monkeypatch):
    (model, batches), (other, _) = model_and_batches(3), model_and_batches(3)
    train(model, Muon(model, lr=0.01), batches)
    monkeypatch.setattr(optimizer, "STACKED_NUMBERS", 1)
    train(other, Muon(other, lr=0.01), batches)
    torch.testing.assert_close([*model.parameters()], [*other.parameters()], rtol=1e-4, atol=1e-5)

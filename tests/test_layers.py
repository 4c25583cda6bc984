"""Layers: initialisation, coefficients."""

import math

import pytest
import torch

import megalodon_ops as mo
from test_model import TINY, tokens_of


def test_initialisation():
    torch.manual_seed(0)
    config = mo.MegalodonConfig(
        num_layers=2, model_dim=512, z_dim=64, value_dim=256, ffn_hidden_dim=256, rescale_nffn=True
    )
    model = mo.Megalodon(config)
    mega, nffn = model.layers[1].mega, model.layers[1].nffn
    assert mega.wv.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 512), rel=0.02)
    assert model.embed.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert model.embed.weight.abs().max() <= 3 * 512**-0.5
    assert mega.cema.alpha.std().item() == pytest.approx(0.2, rel=0.05)
    assert mega.cema.omega.abs().max() <= 1 and mega.cema.omega.std().item() == pytest.approx(0.25, rel=0.1)
    assert mega.cema.gamma[..., 0].std().item() == pytest.approx(1, rel=0.05) and not mega.cema.gamma[..., 1].any()
    angles = torch.sigmoid(mega.cema.theta.double()).flatten().sort(descending=True).values
    expected = torch.exp(-torch.arange(1, 513, dtype=torch.float64) * math.log(512) / 512)
    torch.testing.assert_close(angles, expected, rtol=1e-4, atol=0)
    assert torch.equal(nffn.alpha, torch.full((512,), 0.05))
    for offsets in (
        mega.gamma,
        mega.beta,
        mega.timenorm.weight,
        mega.timenorm.bias,
        mega.rmsnorm.weight,
        nffn.norm.weight,
    ):
        assert not offsets.any()


def test_cema_coefficients_follow_their_formula():
    layer = mo.ComplexEMA(5, ndim=3).double()
    p, q, gamma, omega = layer.coefficients()
    for d in range(5):
        for n in range(3):
            alpha, delta = torch.sigmoid(layer.alpha[d, n, 0]), torch.sigmoid(layer.delta[d, n, 0])
            angle = (n + 1) * torch.sigmoid(layer.theta[d, 0, 0]).item() * 2 * math.pi / 3
            expected = (1 - alpha * delta).item() * complex(math.cos(angle), math.sin(angle))
            assert p[d, n].item() == pytest.approx(alpha.item(), rel=1e-14)
            assert q[d, n].item() == pytest.approx(expected, rel=1e-13)
            assert gamma[d, n].item() == pytest.approx(complex(*layer.gamma[d, n].tolist()) / math.sqrt(3), rel=1e-13)
    assert torch.equal(omega, layer.omega[:, 0])


def test_meta_initialisation_then_reset():
    with torch.device("meta"):
        model = mo.Megalodon(mo.MegalodonConfig(**TINY))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert model(tokens_of(1, 9)).isfinite().all()

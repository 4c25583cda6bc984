"""Gecko (bench/claims/gecko.py), MEGALODON's successor: each part against float64 numbers of the released code.

tests/data/gecko has outputs of gecko-llm (github XuezheMax/gecko-llm, commit fe04b3b, MIT). Its Python was changed to
float64, and its CUDA functions were replaced by references in plain torch. Rows start without a state.
"""

import dataclasses
import math

from paths import DATA
import pytest
import torch
from safetensors.torch import load_file

import megalodon_ops as mo

pytest.importorskip("transformers")

from bench.claims import gecko, models, train  # noqa: E402
from bench.claims.gecko import Gecko, Parts  # noqa: E402

CONFIG = dataclasses.replace(train.config("tiny", 8), num_layers=2, num_heads=2)
EXACT = dict(rtol=1e-11, atol=1e-11)


def golden(name, prefix=""):
    tensors = load_file(DATA / "gecko" / f"{name}.safetensors")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def input_grads(outputs, output_grads, inputs):
    return torch.autograd.grad(outputs, inputs, output_grads)


def test_the_memory_is_the_released_one():
    data = golden("awm", "plain.")
    inputs = [data[name].requires_grad_() for name in "qkv"]
    y, memory = gecko.working_memory(*inputs, chunk_size=4)
    names = ("y", "memory", "log_mass")
    for name, found in zip(names, (y, *memory), strict=True):
        torch.testing.assert_close(found, data[name], **EXACT)
    got = input_grads((y, *memory), [data[f"grad_{name}"] for name in names], inputs)
    for name, found in zip("qkv", got, strict=True):
        torch.testing.assert_close(found, data[f"grad_{name}"], **EXACT)
    _, (M, mass) = gecko.working_memory(*(t[:, :, :8] for t in inputs), chunk_size=4)
    torch.testing.assert_close(M, data["memory_after_2_chunks"], **EXACT)
    torch.testing.assert_close(mass, data["log_mass_after_2_chunks"], **EXACT)


@pytest.mark.parametrize("case", ["default", "fast"])
def test_the_decay_norm_is_the_released_one(case):
    """A document's beginning restarts the norm: each piece between two of them is a call of its own."""
    data = golden("timestep_decay_norm", f"{case}.")
    inputs = [data[name].requires_grad_() for name in ("x", "scale", "shift", "mean", "var")]
    x, scale, shift, mean, var = inputs
    ys, states = [], []
    betas = data["betas"].tolist()
    for row in range(len(x)):
        rows = slice(row, row + 1)
        bos = data["bos"][row]  # True where a document begins
        parts = []
        state = (data["count"][rows], mean[rows], var[rows])
        begins = sorted({0, *bos.nonzero()[:, 0].tolist()})
        for begin, end in zip(begins, [*begins[1:], len(bos)], strict=True):
            if bos[begin]:
                state = None
            piece = x[rows, begin:end]
            y, state = gecko.timestep_decay_norm(piece, scale - 1, shift, num_groups=3, betas=betas, state=state)
            parts.append(y)
        ys.append(torch.cat(parts, 1))
        states.append(state)
    count, mean_out, var_out = (torch.cat(tensors) for tensors in zip(*states, strict=True))
    found = dict(y=torch.cat(ys), count_out=count, mean_out=mean_out, var_out=var_out)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, data[name], **EXACT)
    names = ("y", "mean_out", "var_out")
    got = torch.autograd.grad(
        [found[name] for name in names], inputs, [data[f"grad_{name}"] for name in names], allow_unused=True
    )
    for name, tensor in zip(("x", "scale", "shift", "mean", "var"), got, strict=True):
        wanted = data[f"reference_grad_{name}"]
        torch.testing.assert_close(torch.zeros_like(wanted) if tensor is None else tensor, wanted, **EXACT)


def test_attention_to_two_chunks_is_the_released_one():
    data = golden("sliding_chunk_attention", "plain.")
    inputs = [data[name].requires_grad_() for name in "qkv"]
    q, k, v = inputs
    rotated = [gecko.rotate(t.transpose(1, 2), gecko.ROPE_BASE) for t in (q, k)]
    for found, name in zip(rotated, ("q_rotated", "k_rotated"), strict=True):
        torch.testing.assert_close(found.transpose(1, 2), data[name], **EXACT)
    y = gecko.chunk_attention(*rotated, v.transpose(1, 2), chunk_size=4, visible_chunks=2).transpose(1, 2)
    torch.testing.assert_close(y, data["y"], **EXACT)
    for name, found in zip("qkv", input_grads(y, data["grad_y"], inputs), strict=True):
        torch.testing.assert_close(found, data[f"grad_{name}"], **EXACT)


@pytest.mark.parametrize("name", ["model", "model_two_hop"])
def test_all_parts_make_the_released_model(name, monkeypatch):
    """The released model has no omega (here 1), and does not divide CEMA's gamma by sqrt(N) (here `root`)."""
    monkeypatch.setattr(gecko.DecayNorm, "betas", (0.9, 0.95))
    data = golden(name)
    two_hop = name == "model_two_hop"
    sizes = dict(num_layers=2, model_dim=16, z_dim=8, value_dim=12, num_heads=2, ffn_hidden_dim=20, cema_ndim=3)
    sizes |= dict(chunk_size=4, vocab_size=11, norm_num_groups=4)
    config = mo.MegalodonConfig(**sizes, swiglu=True, rescale_nffn=two_hop, scale_emb=two_hop)
    model = Gecko(config, Parts(visible_chunks=2, decay_norm=True, memory="mean")).double()
    model = model if two_hop else models.one_hop(model)
    assert {type(m) for m in model.modules() if isinstance(m, mo.TimestepNorm)} == {gecko.DecayNorm}
    parameters = dict(model.named_parameters())
    root = math.sqrt(config.cema_ndim)
    weights = {n.removeprefix("weights."): t for n, t in data.items() if n.startswith("weights.") and "prior" not in n}
    omegas = {n: torch.ones_like(p) for n, p in parameters.items() if n.endswith("omega")}
    assert parameters.keys() == weights.keys() | omegas.keys() and len(omegas) == 2
    for n, parameter in parameters.items():
        value = (weights | omegas)[n] * (root if n.endswith("cema.gamma") else 1)
        parameter.data = value.reshape(parameter.shape).clone()
    torch.testing.assert_close(model(data["tokens"]), data["logits"], **EXACT)
    loss = model.loss(data["tokens"], data["tokens"].roll(-1, 1))
    torch.testing.assert_close(loss, data["loss"], **EXACT)
    loss.backward()
    gradients = {n.removeprefix("grads."): t for n, t in data.items() if n.startswith("grads.")}
    for n, wanted in gradients.items():
        found = parameters[n].grad.reshape(wanted.shape) * (root if n.endswith("cema.gamma") else 1)
        torch.testing.assert_close(found, wanted, **EXACT, msg=lambda text, n=n: f"{n}: {text}")


def test_without_parts_it_is_megalodon():
    torch.manual_seed(0)
    model = Gecko(CONFIG, Parts()).double()
    for layer in model.layers:
        torch.nn.init.normal_(layer.mega.gamma)
        torch.nn.init.normal_(layer.mega.beta)
    plain = mo.Megalodon(CONFIG).double()
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(257, (2, 29))
    torch.testing.assert_close(model(tokens), plain(tokens), **EXACT)
    row, targets = tokens[:1], tokens[:1].roll(-1, 1)
    packed = dict(cu_seqlens=torch.tensor([0, 3, 3, 20, 29]))
    nats, expected = (m.loss(row, targets, **packed, reduction="none") for m in (model, plain))
    torch.testing.assert_close(nats, expected, **EXACT)
    assert model.loss(row, targets, **packed).shape == ()


MEMORY = dict(working_memory=True)
TWO_CHUNKS = dict(visible_chunks=2, rope_base=gecko.ROPE_BASE)
KEPT = {
    "memory, logits of 3": MEMORY,
    "two chunks": TWO_CHUNKS,
    "two chunks with memory, logits of 3": MEMORY | TWO_CHUNKS,
}


@pytest.mark.parametrize(("name", "fields"), KEPT.items(), ids=KEPT)
def test_the_package_has_the_parts_that_pay(name, fields):
    """The claim's part and the configuration's fields give the same model, also at initialization."""
    torch.manual_seed(0)
    part = Gecko(CONFIG, gecko.PARTS[name]).double()
    model = mo.Megalodon(dataclasses.replace(CONFIG, **fields)).double()
    for layer, other in zip(model.layers, part.layers, strict=True):
        torch.testing.assert_close(layer.mega.gamma, other.mega.gamma, **EXACT)
        torch.nn.init.normal_(other.mega.beta)
    model.load_state_dict(part.state_dict())
    tokens = torch.randint(257, (2, 29))
    torch.testing.assert_close(model(tokens), part(tokens), **EXACT)
    model.loss(tokens, tokens).backward()
    part.loss(tokens, tokens).backward()
    for own, other in zip(model.parameters(), part.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, **EXACT)


def test_the_delta_rule_writes_keys_in_order():
    torch.manual_seed(0)
    k, v, M = (torch.randn(1, 2, *size).double() for size in ((5, 3), (5, 4), (3, 4)))
    found, _ = gecko.write_delta((M, torch.zeros(1, 2, 3)), k, v)
    for key, value in zip(k.unbind(2), v.unbind(2), strict=True):
        key = key / key.norm(dim=-1, keepdim=True)
        M = M + key[..., None] * (value - (key[..., None, :] @ M)[..., 0, :])[..., None, :]
    torch.testing.assert_close(found, M, **EXACT)


@pytest.mark.parametrize("name", gecko.PARTS)
def test_each_part_sees_its_chunks(name):
    """Gradients of the last position's output, without CEMA and norm, are nonzero where attention or memory sees an input."""
    parts = gecko.PARTS[name]
    torch.manual_seed(0)
    attention = gecko.Attention(dataclasses.replace(CONFIG, rope_base=1e4), parts).double()
    for parameter in (attention.gamma, attention.beta):
        parameter.data = parameter.data + torch.randn_like(parameter)
    attention.timenorm = torch.nn.Identity()
    attention.cema = models.NoEMA(32, 1)
    x = torch.randn(1, 29, 32, dtype=torch.float64, requires_grad=True)  # chunks of 8: 3 whole ones and a part
    (gradient,) = torch.autograd.grad(attention(x)[0, -1].sum(), x)
    visible = gradient[0].abs().amax(-1) > 1e-12
    first = 0 if parts.memory else 8 * (4 - parts.visible_chunks)
    assert visible[first:].all() and not visible[:first].any()
    if parts.memory_logits:
        gain = (1 + gecko.Attention(CONFIG, parts).gamma) / CONFIG.z_dim**0.5 * CONFIG.num_heads**0.5
        torch.testing.assert_close(gain[:, 0], torch.tensor([0.125, 0.125, 1, 1]).sqrt() * torch.tensor([1, 1, 3, 3]))
    if parts.memory_gate:  # a first chunk has no memory
        y = attention(x[:, :8])
        attention.wg.bias.data += 9
        torch.testing.assert_close(y, attention(x[:, :8]))
        assert (attention(x) - attention(x)[0, 0]).abs().sum() > 0

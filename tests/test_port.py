"""Checkpoints of the pure-PyTorch port: what is converted is the same function but for its timestep norm, as is said."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from models import tiny_model, tokens_of
from safetensors.torch import save_file

import megalodon_ops as mo
from megalodon_ops.cli import main
from megalodon_ops.model.port import PortTimestepNorm, difference, load_port, pseudo_text

CONFIGS = {
    "plain": {}, "gated": dict(swiglu=True, scale_emb=True), "rescaled": dict(rescale_nffn=True),
    "no affine norms": dict(norm_affine=False), "fewer outputs": dict(output_size=29),
}  # fmt: skip


def model_of(config, dtype=torch.float64):
    """A model whose embedding is tied where the port ties it, and whose gains of FFNs are the port's constants."""
    options = CONFIGS[config]
    model = tiny_model(dtype, share_emb="output_size" not in options, **options).eval()
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            if layer.nffn.alpha is not None:
                layer.nffn.alpha.fill_(0.1 * 0.5**i)
            if not model.config.norm_affine:
                layer.mega.timenorm.reset_parameters()
        if not model.config.norm_affine:
            model.output.final_norm.reset_parameters()
    return model


def halves(tensor, dim, heads):
    """Each head's numbers 0, 2, 4, .. and then 1, 3, 5, .."""
    parts = tensor.unflatten(dim, (heads, -1)).movedim(dim + 1, -1)
    return torch.cat([parts[..., ::2], parts[..., 1::2]], -1).movedim(-1, dim + 1).flatten(dim, dim + 1)


def port_tensors(model):
    """The model's parameters as the port names and arranges them."""
    config, ours = model.config, {name: value.detach() for name, value in model.named_parameters()}
    theirs = {"model.embed.weight": ours["embed.weight"], "lm_head.weight": model.output.output.weight.detach()}
    norms = ("weight", "bias") if config.norm_affine else ()
    theirs |= {f"model.norm.{part}": ours[f"output.final_norm.{part}"] for part in norms}
    for i in range(config.num_layers):
        a, b = f"layers.{i}.", f"model.layers.{i}."
        theirs |= {f"{b}attn.timenorm.{part}": ours[f"{a}mega.timenorm.{part}"] for part in norms}
        theirs |= {f"{b}attn.cema.{n}": ours[f"{a}mega.cema.{n}"] for n in ("alpha", "delta", "theta")}
        theirs[f"{b}attn.cema.gamma_real"] = ours[f"{a}mega.cema.gamma"][..., 0]
        theirs[f"{b}attn.cema.gamma_imag"] = ours[f"{a}mega.cema.gamma"][..., 1]
        theirs[f"{b}attn.cema.omega"] = ours[f"{a}mega.cema.omega"][:, 0]
        for name, dim in (("wz.weight", 0), ("wz.bias", 0), ("gamma", 1), ("beta", 1)):
            theirs[f"{b}attn.{name}"] = halves(ours[f"{a}mega.{name}"], dim, config.num_heads)
        for name in ("wv.weight", "wv.bias", "wr.weight", "wr.bias", "wh1.weight", "wh1.bias", "wh2.weight"):
            theirs[f"{b}attn.{name}"] = ours[f"{a}mega.{name}"]
        theirs[f"{b}attn.wh2.bias"] = torch.zeros(config.model_dim)
        if config.norm_affine:
            theirs[f"{b}attn.rmsnorm.gamma"] = ours[f"{a}mega.rmsnorm.weight"]
            theirs[f"{b}ffn.norm.weight"] = ours[f"{a}nffn.norm.weight"] + 1
            theirs[f"{b}ffn.norm.bias"] = ours[f"{a}nffn.norm.bias"]
        for name in ("fc1", "fc2", *(["fc3"] if config.swiglu else [])):
            weight = theirs[f"{b}ffn.{name}.weight"] = ours[f"{a}nffn.{name}.weight"]
            theirs[f"{b}ffn.{name}.bias"] = torch.zeros(len(weight))
    return theirs


def save_port(folder, model, tensors=None, binary=False, **fields):
    folder.mkdir(exist_ok=True)
    config = {name: value for name, value in model.config.to_dict().items() if name != "layerwise_ckpt"}
    config |= {"share_emb": False, "model_type": "megalodon", "architectures": ["MegalodonForCausalLM"]}
    config |= {
        "max_positions": 10**6, "max_cache_len": 8, "cache_unbounded": False, "efficient_attn": None, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "gradient_checkpointing": False, "is_decoder": True, "use_cache": True,
        "num_attention_heads": config["num_heads"], "transformers_version": "4.57.0", "dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    tensors = port_tensors(model) if tensors is None else tensors
    if binary:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:  # transformers leaves a tied matrix out
        tensors = {
            name: t.clone().contiguous()
            for name, t in tensors.items()
            if binary or name != "lm_head.weight" or not model.config.share_emb
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def port_function(tensors, config, tokens):
    """Logits (L, V) of the port, in plain torch: half-split rotary at absolute positions, its norm, its layer norms."""
    D, H, C, eps = config.model_dim, config.num_heads, config.chunk_size, config.norm_eps
    zeros = torch.zeros(D, dtype=torch.float64)

    def get(name, default=zeros):
        return tensors.get(name, default).double()

    def timestep_norm(x, name):
        mean, total, out = torch.zeros(config.norm_num_groups).double(), torch.ones(config.norm_num_groups).double(), []
        for n, row in enumerate(x, 1):
            groups = row.view(config.norm_num_groups, -1)
            delta = groups.mean(-1) - mean
            mean = mean + delta / n
            total = total + delta * (groups.mean(-1) - mean)
            var = (total / n).clamp(min=1e-6)
            out.append(((groups - mean[:, None]) / (var[:, None] + eps).sqrt()).flatten())
        return torch.stack(out) * (1 + get(f"{name}.weight")) + get(f"{name}.bias")

    def rotate(x):
        half = x.shape[-1] // 2
        angles = torch.arange(len(x)).double()[:, None] * config.rotary_base ** -(torch.arange(half).double() / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def cema(x, p):
        alpha, delta = get(f"{p}alpha")[..., 0].sigmoid(), get(f"{p}delta")[..., 0].sigmoid()
        k = torch.arange(1, config.cema_ndim + 1).double()
        phase = k * get(f"{p}theta")[..., 0].sigmoid() * 2 * math.pi / config.cema_ndim
        q = (1 - alpha * delta) * torch.polar(torch.ones_like(phase), phase)
        gamma = torch.complex(get(f"{p}gamma_real"), get(f"{p}gamma_imag")) / math.sqrt(config.cema_ndim)
        h, out = torch.zeros_like(q), []
        for row in x:
            h = q * h + alpha * row[:, None]
            out.append((gamma * h).real.sum(-1) + get(f"{p}omega") * row)
        return torch.stack(out)

    def linear(x, name):
        return x @ get(f"{name}.weight").T + get(f"{name}.bias", torch.zeros(()))

    x = get("model.embed.weight")[tokens] * config.embedding_scale
    for i in range(config.num_layers):
        a, f = f"model.layers.{i}.attn.", f"model.layers.{i}.ffn."
        t = timestep_norm(x, f"{a}timenorm")
        c = cema(t, f"{a}cema.")
        m = c / (c.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + get(f"{a}rmsnorm.gamma"))
        z = linear(m, f"{a}wz").unflatten(-1, (H, -1))
        z = (z / (z.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
        q, k = (
            rotate(
                (z * (1 + get(f"{a}gamma")[j]) / math.sqrt(config.z_dim // H) + get(f"{a}beta")[j]).unflatten(
                    -1, (H, -1)
                )
            )
            for j in (0, 1)
        )
        v = F.silu(linear(t, f"{a}wv")).unflatten(-1, (H, -1))
        scores = torch.einsum("ihd,jhd->hij", q, k)
        row, column = torch.arange(len(x))[:, None], torch.arange(len(x))
        scores = scores.masked_fill((column > row) | (column // C != row // C), -math.inf)
        o = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(-2)
        y = x + linear(m, f"{a}wh1") + linear(o * F.silu(linear(m, f"{a}wr")), f"{a}wh2")
        n = F.layer_norm(y, (D,), get(f"{f}norm.weight", torch.ones(D)), get(f"{f}norm.bias"), eps)
        hidden = F.silu(linear(n, f"{f}fc1")) * (linear(n, f"{f}fc3") if config.swiglu else 1)
        x = x + linear(hidden, f"{f}fc2") * (0.1 * 0.5**i if config.rescale_nffn else 1)
    return timestep_norm(x, "model.norm") @ get("lm_head.weight").T


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_parameters_are_renamed_and_rearranged(tmp_path, config, binary):
    model = model_of(config)
    loaded = load_port(save_port(tmp_path / "port", model, binary=binary), dtype=torch.float64)
    assert loaded.config == model.config and not loaded.training
    for name, parameter in model.named_parameters():
        if name.endswith("nffn.norm.weight"):
            torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=0, atol=1e-15)
        else:
            assert torch.equal(loaded.get_parameter(name), parameter), name


@pytest.mark.parametrize("config", CONFIGS)
def test_under_the_ports_norm_the_converted_model_is_the_ports_function(tmp_path, config):
    """Compared with the port's mathematics on the port's own tensors, biases of wh2 among them."""
    model, tokens = model_of(config), tokens_of(1, 21)
    tensors = port_tensors(model)
    for name, tensor in tensors.items():
        if name.endswith("wh2.bias"):
            tensors[name] = torch.randn(len(tensor)).double()
    loaded = load_port(save_port(tmp_path / "port", model, tensors), dtype=torch.float64)
    wanted = port_function(tensors, model.config, tokens[0])
    plain = loaded(tokens)[0].detach()
    for owner, name in [(layer.mega, "timenorm") for layer in loaded.layers] + [(loaded.output, "final_norm")]:
        norm = getattr(owner, name)
        setattr(owner, name, PortTimestepNorm(norm.weight, norm.bias, norm.num_groups, norm.eps))
    torch.testing.assert_close(loaded(tokens)[0].detach(), wanted, rtol=1e-9, atol=1e-9)

    found = difference(load_port(tmp_path / "port", dtype=torch.float64), tokens)
    assert found.tokens == 21
    assert found.largest == pytest.approx((plain - wanted).abs().max().item())
    assert found.root_mean_square == pytest.approx((plain - wanted).square().mean().sqrt().item())
    assert found.largest > 0.01 * found.spread
    assert found.spread == pytest.approx(plain.std().item())
    targets = tokens[0, 1:].where(tokens[0, 1:] < plain.shape[1], -100)
    assert found.model_loss == pytest.approx(F.cross_entropy(plain[:-1], targets).item())
    assert found.port_loss == pytest.approx(F.cross_entropy(wanted[:-1], targets).item())
    assert found.agreement == pytest.approx((plain.argmax(-1) == wanted.argmax(-1)).double().mean().item())


def test_the_measurement_leaves_the_model_as_it_was(tmp_path):
    model = model_of("plain", torch.float32)
    before = [type(module) for module in model.modules()]
    names = list(dict(model.named_parameters()))
    difference(model, pseudo_text(31, 40))
    assert before == [type(module) for module in model.modules()] and names == list(dict(model.named_parameters()))


FAULTS = {
    "bias": ({"model.layers.1.ffn.fc2.bias": torch.full((32,), 0.25)}, {}, "`model.layers.1.ffn.fc2.bias` must be zero, .* got values up to 0.25"),
    "older": ({"model.layers.0.attn.cema.gamma_real": None}, {}, "gamma_real` is missing; checkpoints of older versions"),
    "more": ({"model.extra": torch.ones(2)}, {}, "'model.extra' is no parameter of the port's version 0.1.5"),
    "shape": ({"model.norm.bias": torch.ones(33)}, {}, r"`model.norm.bias` must have shape \(32,\), got \(33,\)"),
    "nan": ({"model.norm.bias": torch.full((32,), math.nan)}, {}, "must be finite"),
    "field": ({}, {"attention_window": 3}, "config.json: 'attention_window' is an unknown field"),
    "kernels": ({}, {"efficient_attn": "swift"}, "config.json: `efficient_attn` must be null, got 'swift'"),
    "range": ({}, {"num_layers": -1}, "config.json: MegalodonConfig: `num_layers` must be"),
    "large": ({}, {"num_layers": 10**9}, "a model of its configuration takes .* GiB"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_what_has_no_counterpart_is_refused(tmp_path, kind):
    changes, fields, message = FAULTS[kind]
    model = model_of("plain", torch.float32)
    tensors = {n: t for n, t in (port_tensors(model) | changes).items() if t is not None}
    with pytest.raises(ValueError, match=f"^{tmp_path}/port.*{message}"):
        load_port(save_port(tmp_path / "port", model, tensors, **fields))


def test_an_untied_matrix_where_the_port_ties_is_refused(tmp_path):
    model = model_of("plain", torch.float32)
    tensors = {**port_tensors(model), "lm_head.weight": torch.ones(31, 32)}
    with pytest.raises(ValueError, match="`lm_head.weight` must be the embedding"):
        load_port(save_port(tmp_path / "port", model, tensors, binary=True))


def test_the_plain_loaders_name_the_command(tmp_path):
    with pytest.raises(
        ValueError, match="megalodon-hf, another function; `python -m megalodon_ops convert --from port`"
    ):
        mo.Megalodon.load(save_port(tmp_path / "port", model_of("plain", torch.float32)))


@pytest.mark.parametrize("to", ["own", "official", "hf"])
def test_convert(tmp_path, capsys, to):
    port = save_port(tmp_path / "port", model_of("plain", torch.float32))
    assert main(["convert", "--from", "port", "--to", to, str(port), str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert "parameters, float32, read by megalodon_ops." in out
    model = (mo.load_official if to == "official" else mo.Megalodon.load)(tmp_path / "m")
    assert difference(model, pseudo_text(31)).paragraph() in out
    assert "On 512 tokens" in out


@pytest.mark.parametrize(
    "fields, said",
    [({}, False), ({"max_cache_len": None}, False), ({"max_cache_len": 64}, True), ({"cache_unbounded": True}, True)],
)
def test_convert_says_where_the_ports_decoding_looks_beyond_the_chunk(tmp_path, capsys, fields, said):
    port = save_port(tmp_path / "port", model_of("plain", torch.float32), **fields)
    assert main(["convert", "--from", "port", "--to", "own", str(port), str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert ("attend to earlier chunks" in out) == said and out.count("\n\n") == 1


def test_convert_measures_on_given_tokens(tmp_path, capsys):
    port = save_port(tmp_path / "port", model_of("plain", torch.float32))
    (tmp_path / "ids").write_text("1 2 3\n4 5")
    flags = ["--tokens", str(tmp_path / "ids")]
    assert main(["convert", "--from", "port", "--to", "own", str(port), str(tmp_path / "m"), *flags]) == 0
    assert (
        difference(mo.Megalodon.load(tmp_path / "m"), torch.tensor([[1, 2, 3, 4, 5]])).paragraph()
        in capsys.readouterr().out
    )

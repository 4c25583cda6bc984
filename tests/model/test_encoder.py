"""The encoder: equality with a plain model, time reversed, padding and packing, files, learning, and refusals.

Its parts have tests of their own: test_sequence_norm.py, test_bidirectional_cema.py and test_chunked_attention.py.
"""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_all_close, assert_close, every_case
from models import TINY, tiny_model, tokens_of
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops import reference, training
from megalodon_ops.distributed.plan import plan
from megalodon_ops.storage.files import FileError
from megalodon_ops.evaluation import evaluate

CONTINUOUS = dict(num_features=2, num_classes=3)
KINDS = {
    "tokens": dict(num_classes=3),
    "numbers, swiglu, gains": dict(**CONTINUOUS, swiglu=True, rescale_nffn=True),
    "no affine norms, unscaled": dict(num_classes=3, norm_affine=False, scale_emb=False),
    "no head, a group a channel": dict(num_features=1, norm_num_groups=32),
}


def tiny_encoder(dtype=torch.float64, **overrides) -> mo.MegalodonEncoder:
    """Return an encoder with random parameters, even offsets, which are initially zero."""
    torch.manual_seed(0)
    encoder = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**{**TINY, **overrides})).to(dtype)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def inputs_of(encoder: mo.MegalodonEncoder, *shape: int) -> Tensor:
    size, generator = encoder.config.num_features, torch.Generator().manual_seed(1)
    return tokens_of(*shape) if size is None else torch.randn(*shape, size, dtype=torch.float64, generator=generator)


def plain_results(
    encoder: mo.MegalodonEncoder, p: dict[str, Tensor], inputs: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """Compute features and logits by plain torch and the reference ops, from parameters by name."""
    c, rows = encoder.config, dict(lengths=lengths)
    norm = dict(num_groups=c.norm_num_groups, eps=c.norm_eps, **rows)
    if c.num_features is None:
        x = p["embed.weight"][inputs] * (math.sqrt(c.model_dim) if c.scale_emb else 1)
    else:
        scale = dict(num_groups=c.num_features, eps=1e-30, **rows)
        scaled = reference.sequence_norm(inputs, *inputs.new_zeros(2, c.num_features), **scale)
        x = scaled @ p["embed.weight"].T + p["embed.bias"]
    # t is the normalized x, m CEMA's output, a attention's; y, normalized to n, is x after the block's first half.
    for layer in range(c.num_layers):
        b = {name.removeprefix(f"layers.{layer}."): value for name, value in p.items()}

        def linear(name: str, x: Tensor) -> Tensor:
            return F.linear(x, b[f"{name}.weight"], b.get(f"{name}.bias"))

        t = reference.sequence_norm(x, b["mega.timenorm.weight"], b["mega.timenorm.bias"], **norm)
        coefficients = reference.cema_coefficients(*(b[f"mega.cema.{n}"] for n in ("alpha", "delta", "theta", "gamma")))
        m = reference.bidirectional_cema(t, *coefficients, b["mega.cema.omega"][:, 0], **rows)
        m = reference.rms_norm(m, b.get("mega.rmsnorm.weight"), eps=c.norm_eps)
        z, v = linear("mega.wz", m), F.silu(linear("mega.wv", t))
        heads = dict(num_heads=c.num_heads, chunk_size=c.chunk_size, causal=False, eps=c.norm_eps)
        a = reference.normalized_attention(z, v, b["mega.gamma"], b["mega.beta"], **heads, **rows)
        y = x + linear("mega.wh1", m) + linear("mega.wh2", a * F.silu(linear("mega.wr", m)))
        n = reference.layer_norm(y, b.get("nffn.norm.weight"), b.get("nffn.norm.bias"), eps=c.norm_eps)
        hidden = F.silu(linear("nffn.fc1", n)) * (linear("nffn.fc3", n) if c.swiglu else 1)
        x = x + linear("nffn.fc2", hidden) * (b["nffn.alpha"] if c.rescale_nffn else 1)
    h = reference.sequence_norm(x, p["final_norm.weight"], p["final_norm.bias"], **norm)
    if c.num_classes is None:
        return {"features": h}
    s = F.silu(h @ p["classifier.proj.weight"].T + p["classifier.proj.bias"] + h)
    mean = torch.stack([row[:n].mean(0) for row, n in zip(s, lengths.tolist(), strict=True)])
    return {"features": h, "logits": mean @ p["classifier.classes.weight"].T + p["classifier.classes.bias"]}


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_a_plain_model(kind):
    encoder, lengths = tiny_encoder(**KINDS[kind]), torch.tensor([21, 9])
    inputs, parameters = inputs_of(encoder, 2, 21), dict(encoder.named_parameters())
    found = {"features": encoder.features(inputs, lengths=lengths)}
    if encoder.classifier is not None:
        found["logits"] = encoder(inputs, lengths=lengths)
    expected = plain_results(encoder, parameters, inputs, lengths)
    assert_all_close(found, expected, tolerance=1e-11)
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(y.shape, dtype=y.dtype, generator=generator) for name, y in expected.items()}

    def gradients(results: dict[str, Tensor]) -> dict[str, Tensor]:
        total = sum((weights[name] * y).sum() for name, y in results.items())
        return dict(zip(parameters, torch.autograd.grad(total, [*parameters.values()]), strict=True))

    assert_all_close(gradients(found), gradients(expected), tolerance=1e-9)


@torch.no_grad()
def swap_directions(encoder: mo.MegalodonEncoder) -> None:
    """Change the encoder so that it computes from a reversed row what it computed from the row.

    CEMA's forward direction includes the current position, the other begins at the next one, so the current position's
    weight moves between gamma and omega. Conjugating each pair of z and beta reverses rotary angles.
    """
    for layer in encoder.layers:
        cema = layer.mega.cema
        D = cema.omega.shape[0]
        p, q, _, _ = cema.coefficients()
        gamma = torch.view_as_complex(cema.gamma.detach().clone())
        scale = p.shape[1] ** -0.5
        first, second = gamma[:D], gamma[D:] / q[D:]
        current = scale * ((first * p[:D]).real.sum(1) - (second * p[D:]).real.sum(1))
        cema.gamma.copy_(torch.view_as_real(torch.cat([second, first * q[:D]])))
        cema.omega.add_(current[:, None])
        for parameter in (cema.alpha, cema.delta, cema.theta):
            parameter.copy_(parameter.roll(D, 0))
        for z_rows in (layer.mega.wz.weight, layer.mega.wz.bias, layer.mega.beta.T):
            z_rows[1::2] *= -1


@pytest.mark.parametrize("L", [24, 7], ids=["whole chunks", "less than a chunk"])
def test_a_reversed_row_with_swapped_directions_gives_the_reversed_features(L):
    encoder = tiny_encoder(**CONTINUOUS)
    inputs = inputs_of(encoder, 2, L)
    features, logits = encoder.features(inputs), encoder(inputs)
    assert (encoder.features(inputs.flip(1)).flip(1) - features).abs().max() > 0.1  # directions differ
    swap_directions(encoder)
    assert_close(encoder.features(inputs.flip(1)).flip(1), features, tolerance=1e-9)
    assert_close(encoder(inputs.flip(1)), logits, tolerance=1e-9)


def test_every_position_sees_its_whole_row_and_no_other():
    encoder = tiny_encoder(**CONTINUOUS)
    inputs = inputs_of(encoder, 2, 21).requires_grad_()
    is_seen = torch.autograd.grad(encoder.features(inputs)[0, 10].square().sum(), inputs)[0].abs().sum(-1) > 0
    assert is_seen[0].all() and not is_seen[1].any()


@pytest.mark.parametrize("kind", ["tokens", "numbers, swiglu, gains"])
def test_padding_and_packing_change_nothing(kind):
    """Values and gradients: the batch's loss is the sum of its sequences' losses, whatever is in the padding."""
    encoder, lengths = tiny_encoder(**KINDS[kind]), [21, 1, 13, 8]
    inputs = inputs_of(encoder, 4, 24)
    singles = [inputs[s : s + 1, :n] for s, n in enumerate(lengths)]
    before, after = inputs[:1, -2:], inputs[1:2, -3:]
    offsets = torch.tensor([0, *lengths]).cumsum(0) + 2
    packed = torch.cat([before, *singles], 1), dict(cu_seqlens=offsets)
    padded = torch.cat([before, *singles, after], 1), dict(spans=torch.stack([offsets[:-1], offsets[1:]], 1))
    inside = (torch.arange(24) < torch.tensor(lengths)[:, None]).view(4, 24, *[1] * (inputs.dim() - 2))
    noise = inputs if kind == "tokens" else inputs.where(inside, 1e3 * inputs)

    def results(*calls: tuple[Tensor, dict]) -> dict[str, Tensor]:
        logits = torch.cat([encoder(given, **options) for given, options in calls])
        gradients = torch.autograd.grad(logits.square().sum(), [*encoder.parameters()])
        return {"logits": logits, **{str(i): gradient for i, gradient in enumerate(gradients)}}

    expected = results(*((row, {}) for row in singles))
    assert_all_close(results((noise, dict(lengths=torch.tensor(lengths)))), expected, tolerance=1e-10)
    assert_all_close(results(packed), expected, tolerance=1e-10)
    assert_all_close(results(padded), expected, tolerance=1e-10)
    features = encoder.features(noise, lengths=torch.tensor(lengths))
    for s, n in enumerate(lengths):
        assert_close(features[s : s + 1, :n], encoder.features(singles[s]), tolerance=1e-10)
        assert not features[s, n:].any()


def test_pooling_is_the_mean_over_positions():
    x, lengths = torch.randn(3, 5, 4, dtype=torch.float64), torch.tensor([5, 2, 0])
    found = mo.MegalodonEncoder.pool(x, lengths=lengths)
    assert_close(found, torch.stack([x[0].mean(0), x[1, :2].mean(0), torch.zeros(4).double()]), tolerance=1e-14)
    assert mo.MegalodonEncoder.pool(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    for dtype, shard in ((torch.float32, 1 << 30), (torch.bfloat16, 5000)):
        encoder = tiny_encoder(dtype, **KINDS[kind]).eval()
        encoder.save(tmp_path / str(dtype), max_shard_bytes=shard)
        loaded = mo.MegalodonEncoder.load(tmp_path / str(dtype))
        assert loaded.config == encoder.config and not loaded.training
        for (name, a), (other, b) in zip(loaded.named_parameters(), encoder.named_parameters(), strict=True):
            assert name == other and a.dtype == b.dtype and torch.equal(a, b)
        assert torch.equal(loaded(inputs_of(encoder, 1, 20)), encoder(inputs_of(encoder, 1, 20)))
        loaded.save(tmp_path / str(dtype))  # over the files that it is mapped from
    shapes = [(name, tuple(parameter.shape)) for name, parameter in encoder.named_parameters()]
    assert sorted(shapes) == sorted(encoder.config.parameter_shapes())
    assert encoder.config.num_parameters() == encoder.num_parameters()
    assert mo.MegalodonEncoderConfig.from_dict(encoder.config.to_dict()) == encoder.config


def test_each_model_refuses_the_other_models_folder(tmp_path):
    encoder, model = tiny_encoder(), tiny_model()
    encoder.save(tmp_path / "encoder")
    model.save(tmp_path / "model")
    for kind, folder, wanted in ((type(model), "encoder", "megalodon"), (type(encoder), "model", "megalodon_encoder")):
        with pytest.raises(FileError, match=f'config.json: `model_type` must be "{wanted}", got'):
            kind.load(tmp_path / folder)
    for save, folder in ((model.save, "encoder"), (encoder.save, "model")):
        with pytest.raises(ValueError, match="must be a new folder or a checkpoint, got .*, which holds other files"):
            save(tmp_path / folder)


def test_checkpoints_of_a_training(tmp_path):
    encoder, inputs = tiny_encoder(torch.float32, num_classes=3), tokens_of(2, 13)
    optimizer = training.adamw(encoder, lr=1e-3)
    encoder(inputs).sum().backward()
    optimizer.step()
    training.save_checkpoint(tmp_path, 7, encoder, optimizer=optimizer, record={"position": 3})
    found, loaded = training.load_checkpoint(tmp_path), mo.MegalodonEncoder(encoder.config)
    found.load_weights(loaded)
    loaded_optimizer = training.adamw(loaded, lr=1e-3)
    found.load_optimizer(loaded_optimizer, loaded)
    assert (found.step, found.record["position"]) == (7, 3) and torch.equal(loaded(inputs), encoder(inputs))
    for one, model in ((optimizer, encoder), (loaded_optimizer, loaded)):
        one.zero_grad()
        model(inputs).square().sum().backward()
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), loaded.parameters(), strict=True))


def test_functions_of_language_models_refuse_an_encoder(tmp_path):
    encoder, refusal = tiny_encoder(torch.float32), r"must be a Megalodon\w*, got megalodon_ops(\.\w+)+\.$"
    encoder.save(tmp_path / "encoder")
    calls = {
        "plan: `config`": lambda: plan(encoder.config, {"data": 2}, context=64),
        "save_official: `model`": lambda: mo.save_official(encoder, tmp_path / "official"),
        "evaluate: `model`": lambda: evaluate(encoder, [b"text"]),
        "Decoder: `model`": lambda: mo.Decoder(encoder, None),
        "MegalodonState.fresh: `config`": lambda: mo.MegalodonState.fresh(encoder.config, 1),
    }
    with every_case() as case:
        for argument, call in calls.items():
            with case(argument), pytest.raises(TypeError, match=f"^{argument} {refusal}"):
                call()
    assert not (tmp_path / "official").exists()
    with pytest.raises(FileError, match='`model_type` must be "megalodon", got .megalodon_encoder'):
        training.load_any(tmp_path / "encoder")  # as the commands do


def test_recomputed_layers_meta_construction_and_pickling():
    encoder = tiny_encoder(**CONTINUOUS)
    inputs = inputs_of(encoder, 2, 21)
    expected = torch.autograd.grad(encoder(inputs).sum(), [*encoder.parameters()])
    recomputing = tiny_encoder(**CONTINUOUS, layerwise_ckpt=True)
    calls = []
    recomputing.layers[0].mega.register_forward_pre_hook(lambda *_: calls.append(1))
    found = torch.autograd.grad(recomputing(inputs).sum(), [*recomputing.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(calls) == 2
    with torch.device("meta"):
        new = mo.MegalodonEncoder(encoder.config)
    new.to_empty(device="cpu").reset_parameters()
    theta = new.layers[1].mega.cema.theta.flatten()
    assert new(inputs).isfinite().all() and torch.equal(theta[:32], theta[32:]) and len(theta) == 64
    assert torch.equal(pickle.loads(pickle.dumps(encoder))(inputs), encoder(inputs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
def test_compiles_and_exports_as_one_graph():
    encoder, lengths = tiny_encoder(torch.float32, num_classes=3), torch.tensor([21, 9])
    inputs, parameters = inputs_of(encoder, 2, 21), [*encoder.parameters()]
    expected = encoder(inputs, lengths=lengths)
    torch.compiler.reset()
    found = torch.compile(encoder, fullgraph=True)(inputs, lengths=lengths)
    assert_close(found, expected, tolerance=1e-5)
    gradients = (torch.autograd.grad(logits.square().sum(), parameters) for logits in (found, expected))
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, tolerance=1e-5)
    exported = torch.export.export(encoder, (inputs,), dict(lengths=lengths)).module()
    assert_close(exported(inputs, lengths=lengths.flip(0)), encoder(inputs, lengths=lengths.flip(0)), tolerance=1e-5)


def test_sixteen_bits_keep_wide_parameters():
    encoder = tiny_encoder(**CONTINUOUS)
    inputs = inputs_of(encoder, 2, 21)
    expected = encoder(inputs)
    short = encoder.to(torch.bfloat16)
    assert {p.dtype for p in mo.wide_parameters(short).values()} == {torch.float32}
    assert short.features(inputs).dtype == torch.bfloat16
    assert short(inputs).dtype == torch.float32
    torch.testing.assert_close(short(inputs).double(), expected, rtol=0.05, atol=0.05)


def test_it_learns_which_of_two_marks_comes_first():
    """They are up to 23 positions, three chunks, apart; rows of both classes have the same tokens."""
    torch.manual_seed(0)
    encoder = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**TINY, num_classes=2))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)

    def batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens, lengths = torch.randint(3, 6, (rows, 24)), torch.randint(12, 25, (rows,))
        positions = torch.stack([torch.randperm(int(n))[:2] for n in lengths])
        tokens.scatter_(1, positions, torch.tensor([[1, 2]]).expand(rows, 2))
        return tokens, lengths, (positions[:, 0] < positions[:, 1]).long()

    for _ in range(70):
        tokens, lengths, classes = batch(32)
        F.cross_entropy(encoder(tokens, lengths=lengths), classes).backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        tokens, lengths, classes = batch(256)
        accuracy = (encoder(tokens, lengths=lengths).argmax(1) == classes).float().mean()
    assert accuracy > 0.9


def test_empty_rows_are_refused():
    encoder, inputs = tiny_encoder(num_classes=3), tokens_of(2, 13)
    wanted = "must give each row at least one position, got none for"
    calls = {
        f"`lengths` {wanted} row 1": lambda **kw: encoder(inputs, lengths=torch.tensor([13, 0]), **kw),
        f"`cu_seqlens` {wanted} row 1": lambda **kw: encoder(inputs[:1], cu_seqlens=torch.tensor([0, 9, 9, 13]), **kw),
        f"`inputs` {wanted} row 0": lambda **kw: encoder(inputs[:, :0], **kw),
    }
    with every_case() as case:
        for words, call in calls.items():
            for features in (False, True):
                with case(words, features), pytest.raises(ValueError, match=f"^MegalodonEncoder: {words}; leave"):
                    call(features=features)
    assert encoder(inputs[:0]).shape == (0, 3)


def test_an_encoder_has_no_state():
    encoder, state = tiny_encoder(), tiny_model()(tokens_of(1, 4), return_state=True)[1]
    no_state = "an encoder has no state: it reads the whole row"
    calls = {
        "state": lambda: encoder(tokens_of(1, 4), state=state),
        "return_state": lambda: encoder.features(tokens_of(1, 4), return_state=True),
        "of a block": lambda: encoder.layers[0](torch.randn(1, 4, 32).double(), state=state.layers[0]),
        "of a layer": lambda: encoder.final_norm(torch.randn(1, 4, 32).double(), state=state.norm),
    }
    with every_case() as case:
        for name, call in calls.items():
            with case(name), pytest.raises(ValueError, match=rf"`\w+` must be (None|False), got .*; {no_state}\.$"):
                call()
    with pytest.raises(ValueError, match=f"MegalodonBlock: `return_state` must be False, got True; {no_state}"):
        encoder.layers[0](torch.randn(1, 4, 32).double(), return_state=True)

"""adaptive_working_memory: golden data, recall, models with a working memory. See also test_ops.py."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from assertions import assert_all_close, assert_bit_equal, assert_close, assert_refuses, every_case
from calls import evaluate, forward
from cases import adaptive_working_memory_case
from models import tiny_model, tokens_of
from paths import DATA
from safetensors.torch import load_file

import megalodon_ops as mo
from megalodon_ops.model.model_state import CallOptions, named_tensors

GOLDEN = DATA / "gecko" / "awm.safetensors"


def test_the_released_memory():
    data = {name.removeprefix("plain."): tensor for name, tensor in load_file(GOLDEN).items()}
    inputs = [data[name].requires_grad_() for name in "qkv"]  # (B, H, L, ...)
    o, state = mo.adaptive_working_memory(
        *(t.transpose(1, 2) for t in inputs), chunk_size=4, visible_chunks=2, return_state=True
    )
    found = {"y": o.transpose(1, 2), "memory": state.memory, "log_mass": state.mass}
    assert_all_close(found, {name: data[name] for name in found}, tolerance=1e-11)
    grads = torch.autograd.grad([*found.values()], inputs, [data[f"grad_{name}"] for name in found])
    for name, grad in zip("qkv", grads, strict=True):
        assert_close(grad, data[f"grad_{name}"], tolerance=1e-11)


def test_a_value_is_found_again_by_its_key():
    """With one-hot keys, a row of the memory keeps the value written with its key; later writes do not change it."""
    C, K, V = 4, 9, 3
    k = 60 * torch.eye(K)[None, :, None]  # scores of 60 or 0: a softmax of one key
    v = torch.randn(1, K, 1, V)
    for wanted in range(C):  # in the first of two complete chunks
        q = torch.cat((torch.zeros(1, K - 1, 1, K), k[:, wanted : wanted + 1]), 1)
        o = mo.adaptive_working_memory(q, k, v, chunk_size=C)
        torch.testing.assert_close(o[0, -1, 0], v[0, wanted, 0])


SIDE_BY_SIDE = {
    "few rows": dict(B=1, L=40),
    "many rows": dict(B=13, L=24),
    "a part of a chunk": dict(B=2, L=5),
    "one chunk": dict(B=2, L=8),
    "packed": dict(B=1, L=48, cu_seqlens=[0, 16, 32, 48]),
}


def without_end_state(function, case):
    """Results and gradients if the end state is not used."""
    inputs = [tensor.clone().requires_grad_() for tensor in case.tensors.values()]
    o = function(*inputs, **case.options)
    grads = torch.autograd.grad(o.square().sum(), inputs, materialize_grads=True)
    return dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *grads), strict=True))


def test_chunks_of_one_head_side_by_side():
    """Chunks of one head are read in place; the last ones are written to the memory only if the end state is used."""
    options = dict(H=1, C=8, dtype=torch.float64)
    with every_case() as each:
        for name, sizes in SIDE_BY_SIDE.items():
            for run in (evaluate, without_end_state):
                for visible_chunks in (1, 2):
                    with each(name, run.__name__, visible_chunks):
                        case = adaptive_working_memory_case(**options, **sizes, visible_chunks=visible_chunks)
                        found, expected = (run(module.adaptive_working_memory, case) for module in (mo, mo.reference))
                        assert_all_close(found, expected, tolerance=1e-11)


def test_a_state_after_complete_chunks():
    case = adaptive_working_memory_case(B=3, L=32, H=1, C=8, dtype=torch.float64, state=True)
    case = case.with_options(kept=case.options["kept"]._replace(position=torch.tensor([16, 16, 24])))
    found, expected = (evaluate(module.adaptive_working_memory, case) for module in (mo, mo.reference))
    assert_all_close(found, expected, tolerance=1e-11)


def test_padding_of_a_short_call_changes_nothing():
    """The call continues a state; in some rows a chunk ends."""
    case = adaptive_working_memory_case(B=4, L=3, C=4, lengths=[2, 0, 3, 1], dtype=torch.float64, state=True)
    clean, poisoned = (evaluate(mo.adaptive_working_memory, replace(case, poison=x)) for x in (0.0, torch.nan))
    assert_bit_equal(poisoned, clean)


@pytest.mark.parametrize("visible_chunks", [1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_query_that_is_not_finite_reads_nan(value, visible_chunks):
    """Results and gradients have NaN where the reference has it, also while the memory is empty."""
    case = adaptive_working_memory_case(L=13, visible_chunks=visible_chunks, dtype=torch.float64)
    for t in range(13):
        q = case.tensors["q"].clone()
        q[0, t, 0, 1] = value
        spoiled = case.with_tensors(q=q)
        found, wanted = (evaluate(module.adaptive_working_memory, spoiled) for module in (mo, mo.reference))
        assert {n: x.isnan().nonzero().tolist() for n, x in found.items()} == {
            n: x.isnan().nonzero().tolist() for n, x in wanted.items()
        }
        assert found["o"][0, t, 0].isnan().all()


@pytest.mark.parametrize("L", [5, 40], ids=["few", "many"])
def test_positions_that_would_overflow_are_refused(L):
    case = adaptive_working_memory_case(L=L, state=True)
    for wrong in (-1, 2**62 + 1, 2**63 - 3):  # below 0, above the limit, int64 overflows within the call
        kept = case.options["kept"]._replace(position=torch.tensor([0, wrong]))
        call = partial(forward, mo.adaptive_working_memory, case.with_options(kept=kept))
        assert_refuses(ValueError, "adaptive_working_memory", "state.position", call)


@pytest.fixture(params=[(True, 1), (True, 2), (False, 2)], ids=["memory", "memory, two chunks", "two chunks"])
def form(request):
    """Fields of the configuration."""
    return dict(zip(("working_memory", "visible_chunks"), request.param))


def test_a_model_has_the_parameters_of_its_configuration():
    model = tiny_model(working_memory=True)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == dict(model.config.parameter_shapes())
    attention = mo.Megalodon(model.config).layers[0].mega
    gain = (1 + attention.gamma) / (model.config.z_dim // model.config.num_heads) ** 0.5
    torch.testing.assert_close(gain[2:], torch.full_like(gain[2:], 3.0))  # mean square 1
    assert (attention.gamma[:2] == 0).all() and (attention.beta == 0).all()


@pytest.mark.parametrize("cuts", [[3, 8, 9, 20], [16], [*range(1, 37)]], ids=str)
def test_a_model_reads_in_pieces(cuts, form):
    model, tokens = tiny_model(**form), tokens_of(2, 37)
    whole, end = model(tokens, return_state=True)
    parts, state = [], None
    for begin, stop in pairwise([0, *cuts, 37]):
        logits, state = model(tokens[:, begin:stop], state=state, return_state=True)
        parts.append(logits)
    assert_close(torch.cat(parts, 1), whole, tolerance=1e-10)
    assert_all_close(named_tensors(state), named_tensors(end), tolerance=1e-10)


@pytest.mark.parametrize("working_memory", [True, False])
def test_it_reaches_beyond_the_chunk(working_memory):
    """Without CEMA and the norm, the last output depends on earlier chunks only through the memory."""
    half = tiny_model(working_memory=working_memory).layers[0].mega
    x = torch.randn(1, 37, 32, dtype=torch.float64, requires_grad=True)
    identity = lambda x, **_: x  # noqa: E731
    half.timenorm.forward = half.cema.forward = identity
    (gradient,) = torch.autograd.grad(half(x)[0, -1].sum(), x)  # position 36, in the fifth chunk of 8
    seen = gradient[0].abs().amax(-1) > 0
    assert seen[32:].all()
    assert seen[:32].all() if working_memory else not seen[:32].any()


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)], ids=str)
def test_a_model_reads_nothing(shape, form):
    model = tiny_model(**form)
    logits, state = model(tokens_of(*shape), return_state=True)
    assert logits.shape == (*shape, 31) and (state.norm.count == 0).all()


def test_packed_documents_are_independent(form):
    model, tokens, bounds = tiny_model(**form), tokens_of(1, 37), [0, 3, 3, 20, 37]
    together = model(tokens, cu_seqlens=torch.tensor(bounds))
    apart = [model(tokens[:, begin:end]) for begin, end in pairwise(bounds) if begin < end]
    assert_close(together, torch.cat(apart, 1), tolerance=1e-10)


def test_a_decoder_continues_and_reorders(form):
    model, tokens = tiny_model(**form).eval(), tokens_of(2, 30)
    decoder = mo.Decoder(model, model(tokens[:, :5], return_state=True)[1])
    with torch.no_grad():
        logits = torch.cat([decoder(tokens[:, i : i + 1]) for i in range(5, 30)], 1)
    assert_close(logits, model(tokens)[:, 5:].detach(), tolerance=1e-10)
    decoder.reorder(torch.tensor([1, 1]))
    more = tokens[[1, 1], :1]
    expected = model(torch.cat((tokens[[1, 1]], more), 1))[:, -1:]
    assert_close(decoder(more), expected.detach(), tolerance=1e-10)


def test_files(tmp_path, form):
    model, tokens = tiny_model(torch.float32, **form), tokens_of(2, 13)
    _, state = model(tokens, return_state=True)
    state.save(tmp_path / "state.safetensors", model.config)
    model.save(tmp_path / "model")
    again = mo.Megalodon.load(tmp_path / "model")
    state_again = mo.MegalodonState.load(tmp_path / "state.safetensors", again.config)
    torch.testing.assert_close(again(tokens, state=state_again), model(tokens, state=state), rtol=0, atol=0)
    keys = "layers.0.memory_k" if form["working_memory"] else "layers.0.attention.k"
    assert named_tensors(state.to(torch.bfloat16))[keys].dtype == torch.bfloat16


def test_a_fresh_or_reset_state_changes_nothing(form):
    model, tokens = tiny_model(**form), tokens_of(2, 13)
    expected, state = model(tokens, return_state=True)
    for start in (mo.MegalodonState.fresh(model.config, 2, dtype=torch.float64), state.reset([0, 1])):
        assert_close(model(tokens, state=start), expected, tolerance=1e-12)


def test_refusals_of_a_working_memory(tmp_path):
    model = tiny_model(working_memory=True)
    with pytest.raises(ValueError, match="working memory"):
        mo.save_official(model.float(), tmp_path / "model")
    with pytest.raises(ValueError, match="working_memory"):
        mo.MegalodonEncoderConfig(working_memory=True)
    with pytest.raises(ValueError, match="without a working memory"):
        tiny_model()(tokens_of(2, 5), state=mo.MegalodonState.fresh(model.config, 2, dtype=torch.float64))


def test_attention_to_two_chunks_depends_on_distances_only():
    """A start at position 4 * 10^7 gives the results of a start at 0."""
    half = tiny_model(torch.float64, visible_chunks=2, chunk_size=4).layers[0].mega
    m, v = (torch.randn(2, 21, layer.weight.shape[1], dtype=torch.float64) for layer in (half.wz, half.wh2))
    for parameter in (half.gamma, half.beta):
        torch.nn.init.normal_(parameter)

    def found(chunks):
        norm = mo.TimestepNormState(21 + 4 * torch.tensor(chunks), None, None)
        return half._attend(m, half.wz(m), v, norm, mo.BlockState(None, None, None), CallOptions())[0]

    assert_close(found([10**7, 3]), found([0, 0]), tolerance=1e-9)

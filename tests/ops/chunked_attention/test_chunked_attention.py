"""chunked_attention: golden data, whole chunks, DropKey, large scores, the state in place, errors. See also test_ops.py."""

import itertools
import math

import pytest
import torch
from assertions import assert_all_as_accurate_as, assert_close, assert_refuses, every_case, with_references
from backends import each_implementation, every_backend, every_backend_with_amx
from backends import wide_every_backend, wide_every_backend_with_amx
from calls import evaluate, forward, streamed
from cases import chunked_attention_case
from golden import TOLERANCE, golden_case, golden_config

import megalodon_ops as mo
from megalodon_ops import AttentionState
from megalodon_ops.ops.common.philox import dropkey_mask

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def rotate(x, chunk):
    """Interleaved rotary, base 1e4, of (B, L, H, K), with positions that restart in every chunk."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    frequency = 10000.0 ** (-torch.arange(0, x.shape[-1], 2).double() / x.shape[-1])
    angle = (torch.arange(x.shape[1]) % chunk)[:, None, None] * frequency
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


@each_implementation
@pytest.mark.parametrize("name", ["one_chunk", "short", "three_chunks"])
def test_golden(name, implementation, backend):
    """The released code's q and k are stored without rotary."""
    t, config = golden_case("attention", name), golden_config("attention")[name]
    leaves = {key: t[key].clone().requires_grad_() for key in "qkv"}
    q, k, v = (leaf.unflatten(-1, (config["H"], -1)) for leaf in leaves.values())
    q, k = rotate(q, config["chunk"]), rotate(k, config["chunk"])
    first = t["q_roped_first_chunk"].shape[1]
    assert_close(q[:, :first], t["q_roped_first_chunk"], tolerance=TOLERANCE)
    assert_close(k[:, :first], t["k_roped_first_chunk"], tolerance=TOLERANCE)
    out = implementation.chunked_attention(q, k, v, chunk_size=config["chunk"]).flatten(-2)
    assert_close(out, t["out"], tolerance=TOLERANCE)
    out.backward(t["grad_out"])
    for key, leaf in leaves.items():
        assert_close(leaf.grad, t[f"d{key}"], tolerance=TOLERANCE, name=key)


@each_implementation
@pytest.mark.parametrize("name", ["rect_causal", "rect_full"])
def test_golden_with_fewer_queries_than_keys(name, implementation, backend):
    """The first keys come from the state."""
    t = golden_case("attention", name)
    cached = t["k"].shape[1] - t["q"].shape[1]
    pad = torch.zeros(2, 16 - cached, 2, 1, dtype=torch.float64)
    state = AttentionState(
        torch.cat([t["k"][:, :cached], pad.expand(-1, -1, -1, 4)], 1),
        torch.cat([t["v"][:, :cached], pad.expand(-1, -1, -1, 3)], 1),
        torch.full((2,), cached),
    )
    q, k, v = (a.clone().requires_grad_() for a in (t["q"], t["k"][:, cached:], t["v"][:, cached:]))
    out = implementation.chunked_attention(q, k, v, chunk_size=16, state=state)
    assert_close(out, t["out"], tolerance=TOLERANCE)
    out.backward(t["grad_out"])
    assert_close(q.grad, t["dq"], tolerance=TOLERANCE)
    assert_close(k.grad, t["dk"][:, cached:], tolerance=TOLERANCE)
    assert_close(v.grad, t["dv"][:, cached:], tolerance=TOLERANCE)


SHAPES = {
    "K64-V64": {"B": 1, "L": 300, "H": 1, "K": 64, "V": 64, "C": 256},
    "K256-V512": {"B": 1, "L": 100, "H": 1, "K": 256, "V": 512, "C": 96},
    "K3-V1": {"B": 2, "L": 67, "H": 3, "K": 3, "V": 1, "C": 33},
    "K1-V130": {"B": 1, "L": 40, "H": 2, "K": 1, "V": 130, "C": 7},
    "whole-chunks": {"B": 1, "L": 490, "H": 1, "K": 48, "V": 80, "C": 470, "causal": False},
}


@with_references
def model_case(shape, dtype):
    return chunked_attention_case(**SHAPES[shape], dtype=dtype, scale=SHAPES[shape]["K"] ** -0.5)


@wide_every_backend_with_amx
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_models(shape, backend):
    with every_case() as each:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with each(dtype):
                case, same, exact = model_case(shape, dtype)
                factor, floor = (4, 8) if dtype == torch.float32 else (2, 0.5)
                results = evaluate(mo.chunked_attention, case)
                assert_all_as_accurate_as(results, same, exact, factor=factor, floor=floor)


@each_implementation
def test_whole_chunks_are_attention_without_a_mask(implementation, backend):
    case = chunked_attention_case(B=2, L=40, H=2, K=8, V=6, C=16, scale=0.4, causal=False, dtype=torch.float64)
    o = forward(implementation.chunked_attention, case)["o"]
    for start in (0, 16, 32):
        q, k, v = (t[:, start : start + 16].transpose(1, 2) for t in case.tensors.values())
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4)
        assert_close(o[:, start : start + 16], expected.transpose(1, 2), tolerance=1e-12)


@wide_every_backend
def test_a_nan_reaches_its_whole_chunk_and_no_other(backend):
    """Chunks shorter than a tile of queries; chunks longer than two blocks of keys. The NaN is in the second chunk."""
    longer = (200, 150) if backend == "cuda-emulated" else (700, 600)
    for L, C in ((60, 20), longer):
        case = chunked_attention_case(B=1, L=L, H=1, K=8, V=16, C=C, causal=False)
        clean = evaluate(mo.chunked_attention, case)
        seen = torch.arange(L) // C == 1
        for name in "qkv":
            tensor = case.tensors[name].clone()
            tensor[:, C + 3] = torch.nan
            results = evaluate(mo.chunked_attention, case.with_tensors(**{name: tensor}))
            reached = seen if name != "q" else torch.arange(L) == C + 3
            assert results["o"][:, reached].isnan().all()
            for output, unseen in (("o", ~reached), ("dq", ~seen), ("dk", ~seen), ("dv", ~seen)):
                found, expected = results[output][:, unseen], clean[output][:, unseen]
                tolerance = 4e-6 * expected.abs().max().item()  # recomputed sums have another order
                torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=f"{output} of {name}")


@with_references
def tall_case(K, V, cached, L):
    case = chunked_attention_case(B=1, L=L, H=1, K=K, V=V, C=256, state=True, scale=K**-0.5)
    state = case.options["state"]
    return case.with_options(state=state._replace(position=torch.full_like(state.position, cached)))


TALL = ((9, 230), (44, 200), (100, 156), (0, 64))  # positions in the cache, L
WIDTHS = ((32, 16), (16, 32), (64, 64))  # K, V


@wide_every_backend
def test_tiles_of_every_height_end_with_their_block(backend):
    """Each width with each number of queries; on the emulator with one, as test_cuda_chunked_attention.py has more."""
    tiles = zip(WIDTHS, TALL, strict=False) if backend == "cuda-emulated" else itertools.product(WIDTHS, TALL)
    with every_case() as each:
        for (K, V), (cached, L) in tiles:
            with each(K, V, cached, L):
                case, same, exact = tall_case(K, V, cached, L)
                assert_all_as_accurate_as(evaluate(mo.chunked_attention, case), same, exact, factor=4, floor=8)


@every_backend_with_amx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_without_elements_give_the_mean_of_the_values(dtype, backend):
    """All scores are 0, although the scratch memory holds scores of an earlier call."""
    v = torch.randn(1, 70, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    nothing = v[..., :0]
    q = torch.arange(70.0).to(dtype)[None, :, None, None].expand(1, 70, 2, 1)
    mo.chunked_attention(q, q, v, chunk_size=32)  # leaves its scores in the scratch memory
    o = mo.chunked_attention(nothing, nothing, v, chunk_size=32).double()
    expected = torch.stack([v.double()[:, t // 32 * 32 : t + 1].mean(1) for t in range(70)], 1)
    torch.testing.assert_close(o, expected, rtol=0, atol=8e-3 if dtype == torch.bfloat16 else 1e-6)


@every_backend_with_amx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("L", [3, 70])
def test_the_log_sum_exp_needs_no_values(L, dtype, backend):
    case = chunked_attention_case(B=1, L=L, C=32, dtype=dtype, state=True)
    q, k, v = case.tensors.values()
    cache_k, cache_v, position = case.options["state"]
    fwd = torch.ops.megalodon_ops.chunked_attention_fwd.default
    options = dict(chunk_size=32, causal=True, scale=1.0, dropkey=0.0, dropkey_seed=None, spans=None)
    _, expected = fwd(q, k, v, cache_k, cache_v, position, **options)
    _, lse = fwd(q, k, v[..., :0], cache_k, cache_v[..., :0], position, **options)
    torch.testing.assert_close(lse, expected, rtol=1e-6, atol=1e-5)


@every_backend
@pytest.mark.parametrize("offset", [-500.0, 300.0, 30000.0], ids=str)
def test_large_scores_neither_overflow_nor_vanish(offset, backend):
    """Softmax does not change when a constant is added to all scores of a row: the offset, by the first component."""
    case = chunked_attention_case(B=1, L=40, H=1, K=4, V=5, C=32, dtype=torch.float64)
    q, k = case.tensors["q"].clone(), case.tensors["k"].clone()
    q[..., 0] = 0.0
    k[..., 0] = 1.0
    shifted = q.clone()
    shifted[..., 0] = offset
    expected = forward(mo.chunked_attention, case.with_tensors(q=q, k=k))["o"]
    assert_close(forward(mo.chunked_attention, case.with_tensors(q=shifted, k=k))["o"], expected, tolerance=1e-9)


def observed_mask(seed, dropkey, *, H=2, L=70, C=32, B=2, state=None, lengths=None):
    """Equal scores and one-hot values: o_i shows which columns of its chunk row i kept. Returns (B, L, H, C)."""
    q = torch.zeros(B, L, H, 2)
    position = 0 if state is None else state.position[:, None]
    columns = (position + torch.arange(L).expand(B, L)) % C
    v = torch.nn.functional.one_hot(columns, C).float()[:, :, None].expand(-1, -1, H, -1)
    o = mo.chunked_attention(
        q, q, v, chunk_size=C, dropkey=dropkey, dropkey_seed=torch.tensor([seed]), state=state, lengths=lengths
    )
    return o > 0


@wide_every_backend
def test_dropkey_mask_is_philox(backend):
    rows = columns = torch.arange(70)
    allowed = (columns <= rows[:, None]) & (columns // 32 == rows[:, None] // 32)
    with every_case() as each:
        for seed, dropkey in ((0, 0.1), (12345, 0.5), (2**32, 0.99), (2**63 - 1, 0.1), (-1, 0.5)):
            with each(seed, dropkey):
                kept = observed_mask(seed, dropkey)  # (B, L, H, C)
                for s in range(2):
                    dropped = dropkey_mask(dropkey, seed, sequence=s, num_heads=2, rows=rows, columns=columns)
                    expected = allowed & ~dropped  # (H, L, L); below, each row has its chunk's columns alone
                    folded = torch.stack([expected[:, i, i // 32 * 32 :][:, :32] for i in range(64)])
                    assert torch.equal(kept[s, :64], folded)


def test_dropkey_counts_rows_and_columns_from_the_states_chunk():
    position = torch.tensor([5, 0])
    state = AttentionState(torch.zeros(2, 32, 2, 2), torch.zeros(2, 32, 2, 32), position)
    kept = observed_mask(7, 0.4, L=20, state=state)
    for s, start in enumerate(position.tolist()):
        rows = columns = start + torch.arange(20)
        dropped = dropkey_mask(0.4, 7, sequence=s, num_heads=2, rows=rows, columns=columns)
        expected = ~dropped & (columns <= rows[:, None])
        assert torch.equal(kept[s, :, :, start : start + 20], expected.transpose(0, 1))


def test_dropkey_of_a_head_or_row_does_not_depend_on_the_others():
    whole = observed_mask(3, 0.3, H=3, B=3)
    assert torch.equal(observed_mask(3, 0.3, H=1, B=2), whole[:2, :, :1])
    assert torch.equal(observed_mask(3, 0.3, H=3, B=3, lengths=torch.tensor([70, 0, 41]))[2, :41], whole[2, :41])


def test_dropkey_drops_at_its_rate():
    """Up to five standard deviations of the share that is kept."""
    kept = observed_mask(11, 0.3, H=4, L=256, C=128, B=4)
    allowed = 4 * 4 * 2 * 128 * 129 // 2  # sequences, heads and chunks of 128 positions, each with those before it
    assert abs(kept.sum().item() / allowed - 0.7) < 5 * math.sqrt(0.3 * 0.7 / allowed)


def test_rows_that_lose_every_score_give_zeros():
    case = chunked_attention_case(B=1, L=30, dropkey=0.99, C=4)
    results = evaluate(mo.chunked_attention, case)
    dead = (results["o"] == 0).all(-1)  # (B, L, H)
    assert dead.sum() > 40 and not dead.all()
    assert (results["dq"][dead] == 0).all()
    assert all(value.isfinite().all() for value in results.values())


def test_a_seed_is_drawn_from_torchs_generator():
    case = chunked_attention_case(L=50, C=32).with_options(dropkey=0.5)
    torch.manual_seed(0)
    first, second = (forward(mo.chunked_attention, case)["o"] for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(forward(mo.chunked_attention, case)["o"], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("visible_chunks", [1, 2])
def test_state_in_place(visible_chunks):
    """Pieces that overwrite the given state equal one call that returns a new one; rows are at different positions."""
    case = chunked_attention_case(B=3, L=13, state=True, dtype=torch.float64, visible_chunks=visible_chunks)
    given = AttentionState(*(t.nan_to_num().clone() for t in case.options["state"]))
    o, copied = mo.chunked_attention(**case.tensors, **case.options | {"state": given}, return_state=True)
    kept = AttentionState(*(t.clone() for t in given))
    options = {"chunk_size": 4, "visible_chunks": visible_chunks, "return_state": True, "inplace_state": True}
    run = streamed(mo.chunked_attention, "chunked_attention", [1, 1, 3, 0, 1, 7])
    with torch.no_grad():
        o_pieces, returned = run(*case.tensors.values(), state=kept, **options)
    assert_close(o_pieces, o, tolerance=1e-12)
    assert all(a is b for a, b in zip(returned, kept, strict=True))
    assert torch.equal(kept.position, copied.position)
    for s, position in enumerate(copied.position.tolist()):
        assert torch.equal(kept.k[s, :position], copied.k[s, :position])
        assert torch.equal(kept.v[s, :position], copied.v[s, :position])


def test_gradients_of_a_state_that_was_overwritten_are_refused():
    q, k, v = (torch.randn(1, 2, 1, 4, requires_grad=True) for _ in range(3))
    _, state = mo.chunked_attention(q.detach(), k.detach(), v.detach(), chunk_size=8, return_state=True)
    o = mo.chunked_attention(q, k, v, chunk_size=8, state=state, inplace_state=True)
    assert state.position.item() == 4
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def _state(k=(2, 4, 2, 3), v=(2, 4, 2, 5), position=(0, 3), dtype=torch.float32):
    return AttentionState(torch.zeros(*k, dtype=dtype), torch.zeros(*v, dtype=dtype), torch.tensor(position))


ERRORS = {  # test_wrong_calls.py has wrong numbers and flags
    "no-batch": (ValueError, "k", {"q": torch.zeros(9, 2, 3), "k": torch.zeros(9, 2, 3)}),
    "q-unlike-k": (ValueError, "q", {"q": torch.zeros(2, 9, 2, 4)}),
    "q-dtype": (ValueError, "q", {"q": torch.zeros(2, 9, 2, 3, dtype=torch.float64)}),
    "k-integer": (TypeError, "k", {"k": torch.zeros(2, 9, 2, 3, dtype=torch.int64)}),
    "v-heads": (ValueError, "v", {"v": torch.zeros(2, 9, 1, 5)}),
    "v-rank": (ValueError, "v", {"v": torch.zeros(2, 9, 10)}),
    "v-dtype": (TypeError, "v", {"v": torch.zeros(2, 9, 2, 5, dtype=torch.float16)}),
    "state.k-chunk": (ValueError, "state.k", {"state": _state(k=(2, 5, 2, 3))}),
    "state.v-shape": (ValueError, "state.v", {"state": _state(v=(2, 4, 2, 3))}),
    "state.k-dtype": (TypeError, "state.k", {"state": _state(dtype=torch.float64)}),
    "position-shape": (ValueError, "state.position", {"state": _state(position=(0,))}),
    "position-too-large": (ValueError, "state.position", {"state": _state(position=(0, 4))}),
    "position-float": (TypeError, "state.position", {"state": _state(position=(0.0, 1.0))}),
    "state-in-place-without-one": (ValueError, "inplace_state", {"inplace_state": True}),
    "whole-chunks-from-a-state": (ValueError, "causal", {"causal": False, "state": _state()}),
    "whole-chunks-into-a-state": (ValueError, "causal", {"causal": False, "return_state": True}),
    "lengths-too-long": (ValueError, "lengths", {"lengths": torch.tensor([3, 10])}),
    "packed-batch": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 9])}),
}


@pytest.mark.parametrize(("error", "argument", "changes"), ERRORS.values(), ids=ERRORS)
def test_errors(error, argument, changes):
    arguments = {**chunked_attention_case(B=2, L=9, H=2, K=3, V=5).tensors, "chunk_size": 4, **changes}
    assert_refuses(error, "chunked_attention", argument, lambda: mo.chunked_attention(**arguments))


def test_the_error_for_queries_without_heads_names_the_fix():
    q = torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match="add a batch dimension, or a head dimension of size 1"):
        mo.chunked_attention(q, q, q, chunk_size=2)


def test_a_state_that_wants_gradients_is_refused():
    """The state is a constant: its gradient would silently be wrong."""
    state = _state()
    state.k.requires_grad_()
    with pytest.raises(ValueError, match="^chunked_attention: `state` must not require gradients"):
        mo.chunked_attention(**chunked_attention_case().tensors, chunk_size=4, state=state)

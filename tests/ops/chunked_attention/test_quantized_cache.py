"""chunked_attention with keys and values of 8 bits in its state: results, rounding, pieces, values that are not finite."""

from functools import partial

import pytest
import torch
from assertions import LIMITS, assert_all_as_accurate_as, assert_bit_equal, assert_refuses, every_case, references
from backends import each_isa, isa
from calls import evaluate, forward, streamed
from cases import chunked_attention_case, generator, randn
from chunked_attention_case import attention_state, chunked_attention_cases
from hypothesis import given
from hypothesis import strategies as st

import megalodon_ops as mo
from megalodon_ops import AttentionState
from megalodon_ops.ops.common.quantized_rows import pack_rows, unpack_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def packed_state(state):
    return AttentionState(pack_rows(state.k), pack_rows(state.v), state.position)


def small_case(**sizes):
    """A case whose state has 8 bits."""
    case = chunked_attention_case(state=True, **sizes)
    return case.with_options(state=packed_state(case.options["state"]))


@each_isa
@given(data=st.data())
def test_results_and_states_are_those_of_the_reference(name, data):
    """Results as accurate as the reference's, and the bytes of the new state."""
    cases = chunked_attention_cases(st.sampled_from(DTYPES)).filter(lambda case: "state" in case.options)
    case = data.draw(cases)
    case = case.with_options(state=packed_state(case.options["state"]))
    factor, floor = LIMITS[case.dtype]
    with isa(name):
        found = forward(mo.chunked_attention, case)
    same, exact = (forward(mo.reference.chunked_attention, each) for each in (case, case.double()))
    assert_all_as_accurate_as(found, same, exact, factor=factor, floor=floor)


@each_isa
def test_more_than_four_queries_have_the_bits_of_the_rounded_state(name):
    """For more than four queries, the kernels read a copy of the state, rounded to the dtype of the queries."""
    with isa(name), every_case() as each:
        for dtype in DTYPES:
            for visible_chunks in (1, 2):
                with each(dtype, visible_chunks):
                    sizes = dict(B=3, L=29, H=2, K=18, V=37, C=13, visible_chunks=visible_chunks, lengths=[29, 5, 0])
                    case = full_case(5, **sizes, dtype=dtype)
                    k, v, position = case.options["state"]
                    rounded = AttentionState(unpack_rows(k).to(dtype), unpack_rows(v).to(dtype), position)
                    found, expected = (
                        evaluate(mo.chunked_attention, case.with_options(state=state))
                        for state in (case.options["state"], rounded)
                    )
                    for key in ("o", "dq", "dk", "dv"):
                        assert torch.equal(found[key], expected[key]), key


SHAPES = {
    "mega200M": dict(B=1, H=1, K=256, V=2048, C=600),
    "heads": dict(B=2, H=3, K=34, V=50, C=300),
    "segments": dict(B=1, H=2, K=16, V=8, C=1100),
}


@each_isa
def test_shapes_of_models(name):
    """Up to four queries read the cache in place, more a copy of it; after C - 1 positions the call ends the chunk."""
    with isa(name), every_case() as each:
        for number, (shape, sizes) in enumerate(SHAPES.items()):
            for L in (1, 4, 5, 40):
                for position in (129, sizes["C"] - 1):
                    dtype = DTYPES[(number + L) % 3]
                    with each(shape, L, position, dtype):
                        case = full_case(position, **sizes, L=L, dtype=dtype, scale=sizes["K"] ** -0.5)
                        factor, floor = (4, 8) if dtype == torch.float32 else (2, 0.5)
                        found = evaluate(mo.chunked_attention, case)
                        assert_all_as_accurate_as(found, *references(case), factor=factor, floor=floor)


def full_case(position, **sizes):
    """A case whose sequences all have `position` rows in the cache, followed by NaN."""
    case = small_case(**sizes)
    gen, state = generator(7), case.options["state"]
    seen = (torch.arange(state.k.shape[1]) < position)[:, None, None]
    k, v = (pack_rows(randn(gen, *x.shape[:3], x.shape[3] - 4).where(seen, torch.nan)) for x in state[:2])
    return case.with_options(state=AttentionState(k, v, torch.full_like(state.position, position)))


def test_a_row_has_the_scale_of_its_largest_number():
    x = randn(generator(0), 3, 5, 2, 9, dtype=torch.float32)
    largest = x.abs().amax(-1, keepdim=True)
    rounded = unpack_rows(pack_rows(x))
    assert ((rounded - x).abs() <= largest / 254 * 1.0001).all()  # half a step: the largest number is 127 steps
    assert torch.equal(rounded.abs().amax(-1, keepdim=True), largest)


def test_rows_of_zeros_and_of_the_smallest_numbers_stay_finite():
    x = torch.tensor([0.0, 1e-41, -1e-37, 3e-36])[:, None] * torch.linspace(-1, 1, 7)
    x = x[None, :, None]
    empty = AttentionState(*(pack_rows(torch.zeros(1, 5, 1, 7)) for _ in range(2)), torch.tensor([0]))
    _, state = mo.chunked_attention(x, x, x, chunk_size=5, state=empty, return_state=True)
    assert torch.equal(state.k[:, :4], pack_rows(x)) and unpack_rows(state.k[:, :4]).isfinite().all()
    assert (unpack_rows(state.k[:, :4]) - x).abs().max() <= x.abs().max() / 254 * 1.0001


@each_isa
def test_in_place_is_a_copy_to_the_bit(name):
    with isa(name), every_case() as each:
        for dtype in DTYPES:
            for L in (1, 6, 40):
                with each(dtype, L):
                    case = small_case(B=3, L=L, H=2, K=18, V=37, C=31, dtype=dtype)
                    inputs, state = list(case.tensors.values()), case.options["state"]
                    options = dict(chunk_size=31, return_state=True)
                    o, after = mo.chunked_attention(*inputs, state=state, **options)
                    own = AttentionState(*(x.clone() for x in state))
                    o_in_place, same = mo.chunked_attention(*inputs, state=own, inplace_state=True, **options)
                    assert same is own and torch.equal(o, o_in_place) and torch.equal(after.position, own.position)
                    for x, y in zip(after[:2], own[:2], strict=True):
                        seen = torch.arange(31)[:, None, None] < own.position[:, None, None, None]
                        assert torch.equal(x.where(seen, 0), y.where(seen, 0)) and not x.where(~seen, 0).any()


def test_pieces_are_the_whole_up_to_the_rounding_of_keys_and_values():
    case = chunked_attention_case(B=2, L=90, H=2, K=32, V=48, C=40, scale=32**-0.5)
    fresh = packed_state(attention_state(generator(0), 2, 40, 2, 32, 48, torch.float32))
    fresh = fresh._replace(position=torch.zeros(2, dtype=torch.int64))
    inputs, options = list(case.tensors.values()), dict(chunk_size=40, return_state=True)
    whole, state = mo.chunked_attention(*inputs, state=fresh, **options)
    exact = mo.chunked_attention(*inputs, chunk_size=40)
    assert torch.equal(whole, exact)
    for pieces in ([1] * 90, [7, 1, 60, 22]):
        o, after = streamed(mo.chunked_attention, "chunked_attention", pieces)(*inputs, state=fresh, **options)
        # Keys and values are off by at most half of a scale, which is the largest of about three deviations / 127.
        assert 0 < (o - exact).std() < 2 * 3 / 254 * exact.std()
        assert_bit_equal(after._asdict(), state._asdict())


def test_the_fake_kernels_know_shapes_and_dtypes_of_the_state():
    with every_case() as each:
        for visible_chunks in (1, 2):
            with each(visible_chunks):
                case = small_case(visible_chunks=visible_chunks)
                options = {**case.options, "return_state": True}
                real = mo.chunked_attention(*case.tensors.values(), **options)
                options["state"] = AttentionState(*(x.to("meta") for x in case.options["state"]))
                fake = mo.chunked_attention(*(x.to("meta") for x in case.tensors.values()), **options)
                for x, y in zip((real[0], *real[1]), (fake[0], *fake[1]), strict=True):
                    assert x.shape == y.shape and x.dtype == y.dtype


def test_threads_change_nothing():
    case = small_case(B=3, L=2, H=3, K=33, V=65, C=1201, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(mo.chunked_attention, case))
    finally:
        torch.set_num_threads(before)
    assert_bit_equal(results[1], results[0])
    assert_bit_equal(results[2], results[0])


@pytest.mark.parametrize("L", [1, 6])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_nan_for_its_chunk_alone(L, value):
    case = small_case(B=1, L=9, H=1, K=8, V=12, C=12)
    empty = case.options["state"]._replace(position=torch.tensor([0]))
    for name in "kv":
        tensor = case.tensors[name].clone()
        tensor[0, 4, 0, 3] = value
        inputs = list(case.with_tensors(**{name: tensor}).tensors.values())
        _, state = mo.chunked_attention(*inputs, chunk_size=12, state=empty, return_state=True)
        assert unpack_rows(getattr(state, name))[0, 4].isnan().all()
        q, k, v = (x[:, :L] for x in case.tensors.values())
        o = mo.chunked_attention(q, k, v, chunk_size=12, state=state)
        assert o[:, :3].isnan().all() and not o[:, 3:].isnan().any()


def test_other_states_are_refused():
    case = small_case()
    state, inputs = case.options["state"], list(case.tensors.values())
    cases = {
        "beside float64": (ValueError, "state.k", [x.double() for x in inputs], state),
        "short keys": (ValueError, "state.k", inputs, state._replace(k=state.k[..., 1:])),
        "short values": (ValueError, "state.v", inputs, state._replace(v=state.v[..., 4:])),
        "wide values": (TypeError, "state.v", inputs, state._replace(v=state.v.float())),
        "wide keys": (TypeError, "state.v", inputs, state._replace(k=state.k[..., 4:].float(), v=state.v[..., 4:])),
    }
    with every_case() as each:
        for name, (error, argument, tensors, wrong) in cases.items():
            with each(name):
                attend = partial(mo.chunked_attention, *tensors, chunk_size=4, state=wrong)
                assert_refuses(error, "chunked_attention", argument, attend)


@pytest.mark.parametrize("backend", ["cuda-emulated"], indirect=True)
def test_kernels_of_cuda_refuse_8_bits(backend):
    case = small_case()
    with pytest.raises(ValueError, match="`state.k` must be .*int8 requires the CPU.*got torch.int8"):
        mo.chunked_attention(*case.tensors.values(), chunk_size=4, state=case.options["state"])

"""Emulated kernels at larger sizes: each dimension that a kernel constant bounds takes one, two and three units.

Other tests stay near one unit, without a second slice of V, a third round or a ninth panel.
"""

import pytest
import torch
from assertions import assert_all_close, assert_close, assert_matches_reference
from calls import forward
from cases import (
    cema_case,
    cema_end_state_case,
    chunked_attention_case,
    normalized_qk_case,
    timestep_norm_case,
    timestep_norm_end_state_case,
)
from emulated import run_emulated
from emulated_attention import GRADIENTS, arguments_of, assert_accurate, assert_right, scaled_case, update_state
from emulated_attention import gradients  # noqa: F401, a fixture
from emulated_attention import run as run_attention

import megalodon_ops as mo
from megalodon_ops import AttentionState

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def one_sequence(position=None, **shape):
    """A case of one sequence; its state, if any, is at `position`."""
    case = scaled_case(B=1, state=position is not None, **shape)
    if position is None:
        return case
    k, v, _ = (t.nan_to_num() for t in case.options["state"])
    return case.with_options(state=AttentionState(k, v, torch.tensor([position])))


def with_rising_scores(case, slope=0.05):
    """The case with scores that rise along the keys: each tile raises the maxima, and all tiles contribute."""
    scale = case.options["scale"]
    q, k = case.tensors["q"].clone(), case.tensors["k"].clone()
    state = case.options.get("state")
    before = 0 if state is None else state.k.shape[1]
    level = slope * torch.arange(before + k.shape[1])
    q[..., 0] = 2
    k[..., 0] = (level[before:, None] / (2 * scale)).to(k.dtype)
    case = case.with_tensors(q=q, k=k)
    if state is None:
        return case
    cache = state.k.clone()
    cache[..., 0] = (level[:before, None] / (2 * scale)).to(cache.dtype)
    return case.with_options(state=AttentionState(cache, state.v, state.position))


# A block has 128 rows (16-bit types) or 64. Slabs of queries and keys have 64 channels (16-bit types) or 128 bytes,
# tiles of keys 32 to 64 rows, slices of V 64 to 512 columns.
FORWARD = {
    "three-slices-of-values": dict(L=130, H=2, K=136, V=520, C=110, dtype=BF16, dropkey=0.2, lengths=[121]),
    "four-blocks-of-rows": dict(L=390, H=2, K=8, V=16, C=200, dtype=F16, dropkey=0.3),
    "128-columns": dict(L=150, H=2, K=16, V=104, C=150, dtype=BF16),
    "128-columns-of-many-channels": dict(L=130, H=1, K=136, V=128, C=130, dtype=F16),
    "float-64": dict(L=132, H=2, K=72, V=24, C=132, dtype=F32, dropkey=0.3),
    "float-256": dict(L=132, H=1, K=8, V=200, C=132, dtype=F32),
    "float-512-thrice": dict(L=34, H=1, K=8, V=1028, C=140, dtype=F32, position=100),
    "double-64": dict(L=132, H=1, K=40, V=6, C=132, dtype=F64),
    "double-256-thrice": dict(L=34, H=2, K=6, V=514, C=140, dtype=F64, position=60),
    "bfloat16-256-thrice": dict(L=10, H=1, K=264, V=520, C=140, dtype=BF16, position=60),
}


@pytest.mark.parametrize("shape", FORWARD.values(), ids=FORWARD)
def test_forward(emulator, shape):
    case = with_rising_scores(one_sequence(**shape))
    assert_accurate(run_attention(emulator, case), case)


FEW_QUERIES = {  # slices of 512 columns, in float64 256, without vectors 128; tiles of 64 keys
    "vectors": ({"K": 520, "V": 1032, "dtype": BF16}, 0),
    "float": ({"K": 36, "V": 1028, "dtype": F32}, 0),
    "double": ({"K": 6, "V": 514, "dtype": F64}, 0),
    "elements": ({"K": 40, "V": 264, "dtype": F16}, 1),
}


@pytest.mark.parametrize(("shape", "offset"), FEW_QUERIES.values(), ids=FEW_QUERIES)
def test_steps(emulator, shape, offset):
    case = with_rising_scores(scaled_case(B=2, L=2, H=2, C=150, state=True, dropkey=0.2, **shape))
    assert_accurate(run_attention(emulator, case, offset), case)


STEEP = {  # on tensor cores, without them, and few queries
    "bfloat16": {"L": 130, "K": 8, "V": 16, "C": 130, "dtype": BF16},
    "float": {"L": 70, "K": 4, "V": 8, "C": 70, "dtype": F32},
    "few-queries": {"L": 2, "K": 8, "V": 8, "C": 150, "dtype": BF16, "position": 140},
}


@pytest.mark.parametrize("shape", STEEP.values(), ids=STEEP)
def test_the_maximum_is_over_all_keys(emulator, shape):
    """exp(89) overflows float32: relative to a maximum of some keys, scores of a tile would overflow."""
    case = with_rising_scores(one_sequence(H=1, **shape), slope=4)
    assert_accurate(run_attention(emulator, case), case)


# Tiles have 128 rows, in float64 64.
BACKWARD = {
    "nine-slices-of-values": {"L": 20, "H": 2, "K": 264, "V": 1032, "C": 16, "dtype": BF16},
    "nine-panels": {"L": 70, "H": 1, "K": 8, "V": 8, "C": 1100, "dtype": BF16, "position": 990},
    "dropkey-of-heads-and-tiles": {"L": 300, "H": 2, "K": 8, "V": 8, "C": 300, "dtype": BF16, "dropkey": 0.3},
    "dropkey-in-double": {"L": 150, "H": 2, "K": 3, "V": 2, "C": 140, "dtype": F64, "dropkey": 0.3},
    "packed-chunks": {"L": 420, "H": 1, "K": 8, "V": 8, "C": 150, "dtype": BF16, "cu_seqlens": [3, 200, 200, 410]},
    "padding": {"L": 20, "H": 1, "K": 264, "V": 520, "C": 20, "dtype": BF16, "lengths": [11]},
    "padding-by-elements": {"L": 70, "H": 2, "K": 65, "V": 70, "C": 70, "dtype": F64, "lengths": [3]},
}


@pytest.mark.parametrize("shape", BACKWARD.values(), ids=BACKWARD)
def test_backward(gradients, shape):  # noqa: F811
    case = one_sequence(**shape)
    assert_right(gradients(case), case)


@pytest.mark.parametrize(("dtype", "edge"), [(BF16, 128), (F64, 64)], ids=str)
def test_backward_at_edges_of_tiles(emulator, gradients, dtype, edge):  # noqa: F811
    """Chunks, lengths and caches of a tile's rows, of one less and one more; one panel a round, too."""
    sizes = {"H": 1, "K": 8, "V": 8, "dtype": dtype}
    for off in (-1, 0, 1):
        n = edge + off
        for case in (
            one_sequence(L=2 * n - 3, C=n, **sizes),
            one_sequence(L=n, C=2 * edge, **sizes),
            one_sequence(L=2, C=2 * edge, position=n, **sizes),
        ):
            assert_right(gradients(case), case)
    with emulator.launch_sizes(attention_panels=1):
        case = one_sequence(L=edge + 1, C=2 * edge, **sizes)
        assert_right(gradients(case), case)


@pytest.mark.parametrize(("dtype", "K", "edge"), [(BF16, 136, 128), (F64, 66, 64)], ids=["vectors", "double"])
def test_three_rounds_hand_on_wide_sums(emulator, gradients, dtype, K, edge):  # noqa: F811
    """A chunk of three blocks, whose sums of dq pass through three rounds."""
    case = scaled_case(B=1, L=2 * edge + 20, H=1, K=K, V=8, C=2 * edge + 20, dtype=dtype)
    with emulator.launch_sizes(attention_panels=1):
        assert_right(gradients(case), case)


@pytest.mark.slow
def test_attention_of_a_released_model(emulator):
    """K 256 and V 2048: four slabs of channels, eight slices of values, five tiles of keys; with DropKey."""
    case = chunked_attention_case(B=1, L=150, H=2, K=256, V=2048, C=140, scale=1 / 16, dtype=BF16, dropkey=0.2)
    assert_matches_reference(run_emulated(emulator, case), case)


def backward(emulator, case, results, do, offset=0):
    """Gradients of q, k and v by the kernels alone, from o, lse and do."""
    found = {name: torch.empty_like(case.tensors[name[1]]) for name in GRADIENTS}
    emulator.call("chunked_attention_bwd", **arguments_of(case), **results, do=do, **found, offset=offset)
    return found


@pytest.mark.parametrize(("dtype", "offset", "K"), [(BF16, 0, 136), (BF16, 1, 136), (F64, 0, 70)], ids=str)
def test_a_nan_of_a_row_stays_with_the_keys_that_it_sees(emulator, dtype, offset, K):
    """A NaN in a row of do reaches gradients of this row and of the keys that it sees; one in a key, dq of later rows.

    Both in all slices of channels, with a cache. Elsewhere, products of NaN with zeros of P and dS are repaired.
    """
    tolerance = 1e-2 if dtype == BF16 else 1e-12
    case = one_sequence(L=30, H=1, K=K, V=K, C=60, dtype=dtype, position=20)
    results = run_attention(emulator, case)
    do = case.tensors["v"]
    spoilt = do.clone()
    spoilt[:, 7] = torch.nan
    right = backward(emulator, case, results, do, offset)
    found = backward(emulator, case, results, spoilt, offset)
    for name in GRADIENTS:
        assert_close(found[name][:, 8:], right[name][:, 8:], tolerance=tolerance, name=name)
    assert torch.equal(found["dq"][:, :7], right["dq"][:, :7]) and found["dq"][:, 7].isnan().all()
    assert found["dk"][:, :8].isnan().all() and found["dv"][:, :8].isnan().all()

    k = case.tensors["k"].clone()
    k[:, 25] = torch.nan
    found = backward(emulator, case.with_tensors(k=k), results, do, offset)
    assert_close(found["dq"][:, :25], right["dq"][:, :25], tolerance=tolerance)
    assert found["dq"][:, 25:].isnan().all()


def test_infinity_in_a_row_of_do_leaves_dq_of_other_rows(emulator):
    """In float16, a tile of dS has a factor, from its finite elements. A chunk of two blocks has infinite ones."""
    case = one_sequence(L=140, H=1, K=8, V=8, C=140, dtype=F16)
    results = run_attention(emulator, case)
    do = case.tensors["v"]
    infinite = do.clone()
    infinite[:, 100, :, 0] = torch.inf
    right = backward(emulator, case, results, do)["dq"]
    found = backward(emulator, case, results, infinite)["dq"]
    others = torch.arange(140) != 100
    assert torch.equal(found[:, others], right[:, others]) and not found[:, 100].isfinite().any()


def test_a_cached_key_of_nan_makes_all_gradients_nan(emulator):
    """Cached rows have no queries, so that their NaN probabilities multiply nothing."""
    case = one_sequence(L=10, H=1, K=70, V=70, C=60, dtype=F64, position=20)
    case.options["state"].k[:, 3] = torch.nan
    found = backward(emulator, case, run_attention(emulator, case), case.tensors["v"])
    assert all(gradient.isnan().all() for gradient in found.values())


@pytest.mark.parametrize(("dtype", "offset", "K", "V"), [(BF16, 0, 1032, 2056), (F32, 1, 65, 130)], ids=str)
def test_rows_of_a_state_of_several_turns(emulator, dtype, offset, K, V):
    """An iteration of a block copies 128 units of 16 bytes or of one element."""
    case = chunked_attention_case(B=2, L=3, H=2 if offset else 1, K=K, V=V, C=4, dtype=dtype, state=True)
    state = case.options["state"]
    expected = forward(mo.reference.chunked_attention, case)
    copied = [torch.empty_like(t) for t in state]
    update_state(emulator, case, state, copied, offset)
    for name, actual in zip(("k", "v", "position"), copied, strict=True):
        assert torch.equal(actual, expected[f"state.{name}"])


def test_states_in_place_of_more_sequences_than_two_blocks_take(emulator):
    """A block takes 128 sequences. At each position, three rows are added, or a new chunk begins."""
    case = chunked_attention_case(B=300, L=3, H=1, K=2, V=2, C=6, state=True)
    expected = forward(mo.reference.chunked_attention, case)
    k, v, position = (t.clone() for t in case.options["state"])
    update_state(emulator, case, [k, v, position], [k, v, position])
    assert torch.equal(position, expected["state.position"])
    live = torch.arange(6) < position[:, None]
    assert torch.equal(k[live], expected["state.k"][live]) and torch.equal(v[live], expected["state.v"][live])


QK = {  # an item has 8 tokens, a block four items; an iteration of a large head has 256 vectors
    "heads": {"L": 17, "H": 9, "K": 16, "dtype": BF16},
    "heads-of-blocks": {"L": 17, "H": 5, "K": 264, "dtype": BF16},
    "three-turns": {"L": 18, "H": 1, "K": 2056, "dtype": F32},
    "elements-of-three-turns": {"L": 3, "H": 1, "K": 1026, "dtype": F16},
}


@pytest.mark.parametrize("shape", QK.values(), ids=QK)
def test_normalized_qk(emulator, shape):
    case = normalized_qk_case(B=1, C=7, position=True, **shape)
    assert_matches_reference(run_emulated(emulator, case), case)


@pytest.mark.parametrize(("part", "L"), [(8, 530), (136, 300)])
def test_parts_of_normalized_qk(emulator, part, L):
    """67 shares, three for each warp; parts in which a warp looks up its tokens three times."""
    case = normalized_qk_case(B=1, L=L, H=1, K=2, C=100, dtype=F64, position=True, lengths=[L - 9])
    with emulator.launch_sizes(qk_part=part):
        assert_matches_reference(run_emulated(emulator, case), case)


def test_rows_of_the_rotary_table_beyond_16_bits(emulator):
    case = normalized_qk_case(B=2, L=20, H=1, K=4, C=200_000, dtype=F64)
    case = case.with_options(position=torch.tensor([65_530, 199_990]))
    assert_matches_reference(run_emulated(emulator, case), case)


@pytest.mark.parametrize("K", [2, 1026])
def test_squares_that_vanish(emulator, K):
    """z is about 2^-60, eps is less than its square."""
    case = normalized_qk_case(B=1, L=3, H=1, K=K, eps=2.0**-125, size=2.0**-60)
    assert_matches_reference(run_emulated(emulator, case), case)


NORM = {  # vectors of a group by 32 lanes, slices of 32 groups
    "three-turns-of-a-group": {"L": 66, "G": 2, "width": 520, "dtype": BF16},
    "elements-of-three-turns": {"L": 3, "G": 3, "width": 69, "dtype": F16},
    "three-slices-of-groups": {"L": 66, "G": 70, "width": 8, "dtype": BF16},
    "many-channels": {"L": 3, "G": 8, "width": 257, "dtype": F32},
}


@pytest.mark.parametrize("shape", NORM.values(), ids=NORM)
def test_timestep_norm(emulator, shape):
    for case in (timestep_norm_case(B=1, count=3, **shape), timestep_norm_end_state_case(B=1, **shape)):
        assert_matches_reference(run_emulated(emulator, case), case)


def test_sequences_against_tiles_of_timestep_norm(emulator):
    """Lengths around a tile's 64 rows; sequences of 65 tokens, which begin and end at each row."""
    for B, L in ((1, 63), (1, 64), (1, 65), (1, 127), (1, 128), (1, 129), (65, 65)):
        case = timestep_norm_case(B=B, L=L, G=1, width=1, dtype=F64, count=3)
        assert_matches_reference(run_emulated(emulator, case), case)


def test_groups_of_many_empty_sequences(emulator):
    """A block takes 256 of them."""
    case = timestep_norm_case(B=180, L=1, G=3, width=1, dtype=F64, count=2, lengths=[0] * 179 + [1])
    assert_matches_reference(run_emulated(emulator, case), case)


def test_tiles_of_timestep_norm(emulator):
    """20 tiles of 64 tokens, three for each share and each thread of the scan; groups for two blocks of the scan."""
    case = timestep_norm_case(B=1, L=19 * 64 + 9, G=5, width=1, dtype=F64, count=3, cu_seqlens=[5, 200, 1220])
    with emulator.launch_sizes(norm_shares=7, norm_carry_threads=32):
        assert_matches_reference(run_emulated(emulator, case), case)


@pytest.mark.parametrize(("D", "L"), [(2056, 5), (520, 9)])
def test_cema_over_blocks_of_channels(emulator, D, L):
    """Nine blocks of 256 channels; three blocks and two tiles. The second sequence is empty."""
    case = cema_case(B=1, L=L, D=D, N=1, state=True, cu_seqlens=[0, L, L])
    with emulator.launch_sizes(cema_tile=8):
        assert_matches_reference(run_emulated(emulator, case), case)


def test_end_states_of_cema_over_three_blocks_of_channels(emulator):
    case = cema_end_state_case(B=1, L=5, D=520, N=2, dtype=F64)
    assert_matches_reference(run_emulated(emulator, case), case)


def test_three_rounds_of_the_carry(emulator):
    """A round has 128 tiles; poles on the unit circle remember all of them."""
    sizes = {"B": 1, "L": 8 * 260, "D": 2, "N": 2, "cu_seqlens": [0, 300, 8 * 260]}
    case = cema_case(**sizes, radius=(1.0, 1.0), angle=(-0.01, 0.01), state=True, dtype=F64)
    with emulator.launch_sizes(cema_tile=8):
        assert_matches_reference(run_emulated(emulator, case), case)


def test_steps_of_more_sequences_than_a_grid_has(emulator):
    """Two blocks take a second sequence, which begins from zeros."""
    case = cema_case(B=1026, L=1, D=2, N=1)
    assert_all_close(run_emulated(emulator, case, forward), forward(mo.reference.cema, case), tolerance=1e-5)


def test_steps_of_cema_over_nine_blocks_of_channels(emulator):
    case = cema_case(B=2, L=1, D=2056, N=1, state=True, dtype=F64)
    assert_all_close(run_emulated(emulator, case, forward), forward(mo.reference.cema, case), tolerance=1e-12)

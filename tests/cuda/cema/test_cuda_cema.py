"""Emulated CUDA kernels of cema: every path and template, orders of threads, bytes moved, bank conflicts."""

from functools import partial

import assertions
import pytest
import torch
from assertions import assert_all_close, assert_as_accurate_as, assert_bit_equal, references
from calls import evaluate, forward
from cases import cema_case, generator, randn
from emulated import assert_equal_in_every_order, assert_no_bank_conflicts, run_emulated

import megalodon_ops as mo
from megalodon_ops import _C

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODES = (3, 8, 11, 17)  # for the templates of 4, 8, 16 and 32 modes
SCAN = {"cema_table_kernel", "cema_local_kernel", "cema_carry_kernel", "cema_output_kernel"}
GRADIENTS = {"cema_sums_kernel", "cema_finish_kernel"}
assert_matches_reference = partial(assertions.assert_matches_reference, tolerance=1e-12)


def gradients_of_y(function, case):
    """The gradients of y alone: no state has one."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors.items()}
    y = function(**leaves, **case.options)
    dy = randn(generator(1), *y.shape, dtype=case.dtype).to(y.dtype)
    return {f"d{name}": grad for name, grad in zip(leaves, torch.autograd.grad(y, leaves.values(), dy), strict=True)}


@pytest.mark.parametrize("N", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_modes_and_type(emulator, dtype, N):
    """Several tiles; vector and scalar accesses; half of the cases have a state."""
    state = (DTYPES.index(dtype) + MODES.index(N)) % 2 == 0
    case = cema_case(B=1, L=67, D=4, N=N, dtype=dtype, state=state)
    actual = run_emulated(emulator, case)
    assert emulator.launched() == SCAN | GRADIENTS
    assert_matches_reference(actual, case)
    assert_bit_equal(run_emulated(emulator, case, offset=1), actual)


MANY_MODES = {
    "dense": (torch.float64, {"B": 2, "L": 40}),
    "packed": (torch.float32, {"B": 1, "cu_seqlens": [1, 4, 4, 40, 70], "L": 80}),
}


@pytest.mark.parametrize(("dtype", "sequences"), MANY_MODES.values(), ids=MANY_MODES)
def test_more_modes_than_a_launch_takes(emulator, dtype, sequences):
    """Outputs of groups of 32 modes are summed in the workspace."""
    case = cema_case(**sequences, D=3, N=70, dtype=dtype, state=True)
    assert_matches_reference(run_emulated(emulator, case), case)


def test_outputs_of_many_modes_and_tokens_have_room(emulator):
    """The sums of outputs are most of the workspace here."""
    case = cema_case(B=1, L=1200, D=2, N=33)
    assert_matches_reference(run_emulated(emulator, case, forward), case, run=forward)


# A tile has 32 tokens.
SEQUENCES = {
    "tiles-that-match": {"B": 3, "L": 64},
    "starts-in-tiles": {"B": 3, "L": 77},
    "several-in-a-tile": {"B": 1, "L": 130, "cu_seqlens": [0, 3, 3, 10, 31, 32, 33, 130]},
    "padding-around": {"B": 1, "L": 140, "cu_seqlens": [40, 72, 72, 100]},
    "ends-with-tiles": {"B": 1, "L": 128, "cu_seqlens": [0, 32, 96, 128]},
    "ragged": {"B": 4, "L": 70, "lengths": [70, 0, 33, 64]},
    "all-empty": {"B": 1, "L": 70, "cu_seqlens": [70, 70, 70]},
    "none": {"B": 1, "L": 70, "cu_seqlens": [5]},
}


@pytest.mark.parametrize(("D", "state"), [(1, False), (6, True)], ids=["one-channel-fresh", "state"])
@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
def test_sequences_against_tiles(emulator, sequences, D, state):
    case = cema_case(**sequences, D=D, N=5, state=state)
    assert_matches_reference(run_emulated(emulator, case), case)


def test_several_blocks_a_tile(emulator):
    case = cema_case(B=1, L=35, D=70, N=32)
    assert_matches_reference(run_emulated(emulator, case), case)


@pytest.mark.parametrize("only", ["y", "state"])
def test_the_gradient_of_one_output(emulator, only):
    """Only y, or only the state, has a gradient."""
    case = cema_case(B=2, L=75, D=4, N=4, state=True, dtype=torch.float64)
    run = partial(evaluate, incoming=lambda name, grad: grad * (name == only))
    assert_matches_reference(run_emulated(emulator, case, run), case, run=run)


def test_the_gradient_of_y_without_states(emulator):
    """Without a state, dp is a sum over y."""
    case = cema_case(B=2, L=75, D=4, N=4, dtype=torch.float64)
    assert_matches_reference(run_emulated(emulator, case, gradients_of_y), case, run=gradients_of_y)


def test_nothing_is_launched_for_no_channels(emulator):
    run_emulated(emulator, cema_case(B=1, L=5, D=0, N=3, state=True))
    assert not emulator.launched()


TILES = (32, 64, 128, 256, 512)  # tokens; large tensors take the longer tiles


def test_every_tile_is_as_accurate_as_the_direct_form(emulator):
    """Slow poles on the unit circle: rounding errors of one sign would add up along a tile."""
    case = cema_case(B=1, L=2100, D=2, N=2, radius=(1.0, 1.0), angle=(-0.01, 0.01), state=True)
    same, exact = references(case)
    for tile in TILES:
        with emulator.launch_sizes(cema_tile=tile):
            actual = run_emulated(emulator, case)
        for name, value in actual.items():
            where = f"{name} in tiles of {tile}"
            assert_as_accurate_as(value, same[name], exact[name], factor=1, floor=4, name=where)


LONGER_TILES = list(zip(TILES[1:], 2 * (torch.float32, torch.float64), strict=True))


@pytest.mark.parametrize(("tile", "dtype"), LONGER_TILES, ids=str)
def test_sequences_against_longer_tiles(emulator, tile, dtype):
    """A sequence that fills tiles, sequences inside one tile, padding, and a short last tile."""
    ends = [3, 2 * tile + 9, 2 * tile + 9, 2 * tile + 20, 3 * tile + 5]
    case = cema_case(B=1, L=3 * tile + 7, D=2, N=3, dtype=dtype, radius=(0.9, 1.0), state=True, cu_seqlens=ends)
    with emulator.launch_sizes(cema_tile=tile):
        assert_matches_reference(run_emulated(emulator, case), case)


FEW_TOKENS = {
    "decode": {"B": 3, "L": 1},
    "one-sequence": {"B": 1, "L": 61},
    "short": {"B": 1, "L": 12, "cu_seqlens": [1, 4, 4, 5, 11]},
    "ragged": {"B": 4, "L": 5, "lengths": [0, 5, 2, 0]},
    "more-sequences-than-blocks": {"B": 2100, "L": 1},
}
TYPES = {1: torch.float64, 6: torch.bfloat16, 32: torch.float32}  # by number of modes
# Many sequences only with one number of modes.
TOKEN_CASES = [(name, N) for name in FEW_TOKENS for N in TYPES if N == 6 or name != "more-sequences-than-blocks"]


@pytest.mark.parametrize(("tokens", "N"), TOKEN_CASES)
def test_few_tokens_take_one_launch(emulator, tokens, N):
    """Half of the cases have an initial state."""
    sequences = FEW_TOKENS[tokens]
    state = TOKEN_CASES.index((tokens, N)) % 2 == 0
    case = cema_case(**sequences, D=1 if sequences["B"] > 4 else 9, N=N, dtype=TYPES[N], state=state)
    actual = run_emulated(emulator, case, forward)
    assert emulator.launched() == {"cema_step_kernel"}
    assert_matches_reference(actual, case, run=forward)


@pytest.mark.slow
@pytest.mark.parametrize(("B", "D", "N"), [(1, 8300, 32), (66_000, 1, 1)], ids=["channels", "sequences"])
def test_few_tokens_of_more_than_fills_a_gpu(emulator, B, D, N):
    """More blocks of channels, or sequences, than a grid may have rows."""
    case = cema_case(B=B, L=1, D=D, N=N)
    with emulator.replacing(_C):
        y = mo.cema(**case.tensors)
    assert emulator.launched() == {"cema_step_kernel"}
    assert_all_close({"y": y.double()}, {"y": mo.reference.cema(**case.double().tensors)}, tolerance=1e-5)


def test_orders_of_threads_give_equal_bits(emulator):
    case = cema_case(B=1, L=130, D=5, N=16, cu_seqlens=[2, 40, 40, 105, 125], state=True)
    few = case.tensors | {"x": case.tensors["x"][:, :3], "state": None}

    def both_paths(function, case):
        return evaluate(function, case) | {"few tokens": function(**few)}

    assert_equal_in_every_order(emulator, lambda: run_emulated(emulator, case, both_paths))


POLES = {
    "by-the-circle": {"radius": (1 - 1e-5, 1 - 1e-5), "angle": (-3.1, 3.1)},
    "slow": {"radius": (1 - 1e-5, 1 - 1e-5), "angle": (0.0, 1e-4)},
    "on-the-circle": {"radius": (1.0, 1.0), "angle": (-3.1, 3.1)},
}


@pytest.mark.parametrize("poles", POLES.values(), ids=POLES)
def test_long_memory_is_as_accurate_as_the_direct_form(emulator, poles):
    """Coefficients are rounded once, so that phases do not drift with the length."""
    case = cema_case(B=1, L=1503, D=3, N=4, **poles, state=True)
    same, exact = references(case)
    for name, value in run_emulated(emulator, case).items():
        assert_as_accurate_as(value, same[name], exact[name], factor=1, floor=4, name=name)


def test_long_memory_ends_with_its_sequence(emulator):
    """The second sequence starts in the tiles of the carry's second warp and continues in those of the third."""
    case = cema_case(B=1, L=700, D=2, N=4, **POLES["by-the-circle"], cu_seqlens=[0, 300, 700], state=True)
    assert_matches_reference(run_emulated(emulator, case), case)


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
def test_weights_and_phases_of_zero_keep_the_state(emulator, state):
    """p, gamma and Im(q) near 0: the kernel must not divide a state by them."""
    case = cema_case(B=1, L=100, D=3, N=4, state=state)
    zero = torch.tensor([0.0, 1e-30, 1e-6, 1.0])
    q = torch.complex(case.tensors["q"].real, case.tensors["q"].imag * zero)
    case = case.with_tensors(p=case.tensors["p"] * zero.flip(0), gamma=case.tensors["gamma"] * zero, q=q)
    assert_matches_reference(run_emulated(emulator, case), case)


def test_weights_along_the_axes_keep_the_state(emulator):
    """Gammas with a real or imaginary part of 0 are not changed."""
    case = cema_case(B=1, L=70, D=3, N=4, state=True)
    axes = torch.tensor([1, -1, 1j, -1j], dtype=torch.complex64).expand(3, 4).contiguous()
    case = case.with_tensors(gamma=axes)
    assert_matches_reference(run_emulated(emulator, case), case)


def test_small_weights_without_a_state_are_not_changed(emulator):
    case = cema_case(B=1, L=300, D=3, N=4)
    case = case.with_tensors(gamma=case.tensors["gamma"] * 1e-15, omega=torch.zeros(3))
    with emulator.replacing(_C):
        y = mo.cema(**case.tensors)
    assert_all_close({"y": y.double() * 1e15}, {"y": mo.reference.cema(**case.double().tensors) * 1e15}, tolerance=1e-5)


@pytest.mark.parametrize("L", [3, 400], ids=["few-tokens", "scan"])
def test_null_pointers_for_states(emulator, L):
    """The forward gets no final state, the backward no gradient of the initial state; one sequence is empty."""
    case = cema_case(B=2, L=L, D=4, N=4, state=True, lengths=[L, 0])
    inputs = case.tensors | {"spans": torch.tensor([[[0, L]], [[L, L]]])}
    expected = run_emulated(emulator, case)
    y = torch.empty_like(inputs["x"])
    emulator.call("cema_fwd", **inputs, y=y)
    incoming = {"dy": torch.ones_like(y), "dstate_out": torch.ones_like(inputs["state"])}
    wanted = {f"d{name}": torch.empty_like(tensor) for name, tensor in case.tensors.items()}
    grads = {name: torch.empty_like(tensor) for name, tensor in wanted.items() if name != "dstate"}
    emulator.call("cema_bwd", **inputs, **incoming, **grads)
    emulator.call("cema_bwd", **inputs, **incoming, **wanted)
    assert_bit_equal({"y": y}, {"y": expected["y"]})
    for name, grad in grads.items():
        assert torch.equal(grad, wanted[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_moved(emulator, dtype):
    """The forward reads x twice, for states and for y; the backward reads x and dy for states and for gradients."""
    case = cema_case(B=2, L=96, D=32, N=16, dtype=dtype)
    x = case.tensors["x"].requires_grad_()
    with emulator.replacing(_C):
        mo.cema(**case.tensors).backward(torch.ones_like(x))
    expected = {
        "cema_local_kernel": {("x", "load"): 2, ("dy", "load"): 1},  # forward and backward
        "cema_output_kernel": {("x", "load"): 1, ("y", "store"): 1, ("dy", "load"): 1, ("dx", "store"): 1},
        "cema_sums_kernel": {("x", "load"): 1, ("dy", "load"): 1},
    }
    for kernel, buffers in expected.items():
        for (name, access), times in buffers.items():
            assert emulator.sectors(kernel, name, access) == times * x.nbytes, (kernel, name)
    D, N, tiles = 32, 16, 6  # a tile has 32 tokens
    states = 8 * N * D * tiles  # bytes of one of three scans: of x, of x again and of dy in the backward
    assert emulator.sectors("cema_carry_kernel", "workspace", "store") == 3 * states
    assert emulator.traffic("cema_local_kernel")["workspace"]["store_bytes"] == 3 * (states + 4 * tiles)
    assert emulator.sectors("cema_sums_kernel", "workspace", "store") == 2 * states + 4 * D * tiles


def test_bytes_moved_in_decoding(emulator):
    case = cema_case(B=8, L=1, D=64, N=16, dtype=torch.bfloat16, state=True)
    run_emulated(emulator, case, forward)
    state = case.tensors["state"].nbytes
    assert emulator.sectors("cema_step_kernel", "state", "load") == state
    assert emulator.sectors("cema_step_kernel", "state_out", "store") == state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_bank_conflicts(emulator, dtype):
    run_emulated(emulator, cema_case(B=1, L=35, D=34, N=16, dtype=dtype, state=True))
    assert not [site for site in emulator.sites("cema_table_kernel") if site["shared"]]
    assert_no_bank_conflicts(emulator, *(SCAN | GRADIENTS) - {"cema_table_kernel"})

"""Offsets beyond 2^31 elements in CUDA kernels: sparse tensors of gigabytes, of which only the ends are computed.

Most tests assert nothing: a launch fails if an offset that was cut to 32 bits leads out of a tensor.
"""

from functools import partial

import pytest
import torch
from emulated import A100
from emulator.planted_launchers import run
from test_cuda_smoke import CASES

BF16, F32, C64 = torch.bfloat16, torch.float32, torch.complex64
D = 2**16
T = 2**31 // D + 72  # tokens: the last rows lie beyond 2^31 elements
APART = 2**33  # bytes between tensors: an offset without its upper half is off by 4 GiB


@pytest.fixture
def large(emulator, monkeypatch):
    """large(*shape): a sparse tensor. Workspaces are sparse, too; only the two ends of each grid run."""
    monkeypatch.setattr(emulator, "empty", lambda *shape, dtype, name: emulator.sparse(*shape, dtype=dtype, name=name))
    with emulator.only_bounds(apart=APART, ends=1):
        yield lambda *shape, dtype=F32: emulator.sparse(*shape, dtype=dtype, name=str(shape))


def cema_parameters(large, channels, modes=1):
    modal = {name: large(channels, modes, dtype=dtype) for name, dtype in (("p", F32), ("q", C64), ("gamma", C64))}
    return {**modal, "omega": large(channels)}


def cema_gradients(large, channels, modes=1):
    return {f"d{name}": tensor for name, tensor in cema_parameters(large, channels, modes).items()}


# More than 32 modes are computed in groups, whose outputs are summed in the workspace.
@pytest.mark.parametrize("modes", [1, 33])
def test_cema_scans_offsets_beyond_31_bits(emulator, large, modes):
    x, y = large(1, T, D, dtype=BF16), large(1, T, D, dtype=BF16)
    emulator.launch("cema_fwd", x=x, **cema_parameters(large, D, modes), y=y)


def test_cema_steps_at_offsets_beyond_31_bits(emulator, large):
    """Sequences of one token take a kernel of their own."""
    channels, count = 2**26, 40
    x, y = large(count, 1, channels, dtype=BF16), large(count, 1, channels, dtype=BF16)
    before, after = large(count, channels, 1, dtype=C64), large(count, channels, 1, dtype=C64)
    emulator.launch("cema_fwd", x=x, **cema_parameters(large, channels), state=before, y=y, state_out=after)


@pytest.mark.parametrize("modes", [1, 33])
def test_cema_differentiates_at_offsets_beyond_31_bits(emulator, large, modes):
    x, dy, dx = (large(1, T, D, dtype=BF16) for _ in range(3))
    inputs = cema_parameters(large, D, modes)
    emulator.launch("cema_bwd", x=x, **inputs, dy=dy, dx=dx, **cema_gradients(large, D, modes))


def test_cema_differentiates_on_tensor_cores_at_offsets_beyond_31_bits(emulator, large):
    channels = 2**22
    x, dy, dx = (large(1, 640, channels, dtype=BF16) for _ in range(3))
    inputs, gradients = cema_parameters(large, channels), cema_gradients(large, channels)
    emulator.set_order("random", shared_limit=A100)
    with emulator.launch_sizes(cema_tile=128, cema_shares=1):
        emulator.launch("cema_bwd", x=x, **inputs, dy=dy, dx=dx, **gradients)


def test_end_states_of_cema_at_offsets_beyond_31_bits(emulator, large):
    inputs = {"x": large(1, T, D, dtype=BF16), "p": large(D, 1), "q": large(D, 1, dtype=C64)}
    gradients = {"dx": large(1, T, D, dtype=BF16), "dp": large(D, 1), "dq": large(D, 1, dtype=C64)}
    state = large(1, D, 1, dtype=C64)
    emulator.launch("cema_end_state_fwd", **inputs, state_out=state)
    emulator.launch("cema_end_state_bwd", **inputs, dstate_out=state, **gradients)


GROUPS = 2**10


def test_timestep_norm_at_offsets_beyond_31_bits(emulator, large):
    x, y = (large(1, T, D, dtype=BF16) for _ in range(2))
    inputs = {"x": x, "weight": large(D), "bias": large(D), "num_groups": GROUPS, "eps": 1e-5}
    emulator.launch("timestep_norm_fwd", **inputs, y=y, stats=large(3, 1, T, GROUPS))


def test_timestep_norm_differentiates_at_offsets_beyond_31_bits(emulator, large):
    x, dy, dx = (large(1, T, D, dtype=BF16) for _ in range(3))
    inputs = {"x": x, "weight": large(D), "bias": large(D), "num_groups": GROUPS, "eps": 1e-5}
    results = {"dx": dx, "dweight": large(D), "dbias": large(D)}
    emulator.launch("timestep_norm_bwd", **inputs, stats=large(3, 1, T, GROUPS), dy=dy, **results)


def test_end_states_of_timestep_norm_at_offsets_beyond_31_bits(emulator, large):
    x, dx = large(1, T, D, dtype=BF16), large(1, T, D, dtype=BF16)
    moments = {"mean_out": large(1, GROUPS), "residual_out": large(1, 2, GROUPS)}
    others = {"var_out": large(1, GROUPS), "count_out": large(1, dtype=torch.int64)}
    gradients = {"dmean_out": large(1, GROUPS), "dvar_out": large(1, GROUPS)}
    emulator.launch("timestep_norm_end_state_fwd", x=x, num_groups=GROUPS, **moments, **others)
    emulator.launch("timestep_norm_end_state_bwd", x=x, num_groups=GROUPS, **moments, **gradients, dx=dx)


def launch_normalized_qk(emulator, large, *, tokens, heads, K, chunk_size, **options):
    z, dz = (large(1, tokens, heads * K, dtype=BF16) for _ in range(2))
    q, k = (large(1, tokens, heads, K, dtype=BF16) for _ in range(2))
    gamma, beta, dgamma, dbeta = (large(2, heads * K) for _ in range(4))
    inputs = {"z": z, "gamma": gamma, "beta": beta, "num_heads": heads, "chunk_size": chunk_size, "eps": 1e-5}
    inputs |= {"rotary": large(chunk_size, K // 2, 2), **options}
    emulator.launch("normalized_qk_fwd", **inputs, q=q, k=k)
    emulator.launch("normalized_qk_bwd", **inputs, dq=q, dk=k, dz=dz, dgamma=dgamma, dbeta=dbeta)


@pytest.mark.parametrize("K", [256, 520])
def test_normalized_qk_at_offsets_beyond_31_bits(emulator, large, K):
    """Kernels by warp and by block; the rotary table has large offsets, too."""
    tokens = 2**25 // K + 40  # of 64 heads: z has more than 2^31 elements
    C = 2**32 // K
    position = large(1, dtype=torch.int64)
    position[0] = C - tokens
    launch_normalized_qk(emulator, large, tokens=tokens, heads=64, K=K, chunk_size=C, position=position)


@pytest.mark.parametrize("channels", [D, D - 1, 2**12, 2**12 - 1])
def test_layer_norm_at_offsets_beyond_31_bits(emulator, large, channels):
    """Vectors and elements; sums of the parameters' gradients in global memory, and, of narrow rows, in shared memory."""
    rows = 2**31 // channels + 72
    x, y, dy, dx = (large(rows, channels, dtype=BF16) for _ in range(4))
    weight, bias, dweight, dbias = (large(channels) for _ in range(4))
    options = {"eps": 1e-5, "is_rms_norm": False}
    emulator.launch("layer_norm_fwd", x=x, weight=weight, bias=bias, **options, y=y)
    with emulator.launch_sizes(norm_part=2):
        emulator.launch("layer_norm_bwd", x=x, weight=weight, **options, dy=dy, dx=dx, dweight=dweight, dbias=dbias)


@pytest.mark.parametrize(("width", "columns"), [(8, 2**28 + 72), (7, 2**29)], ids=["vectors", "elements"])
def test_products_of_few_rows_at_offsets_beyond_31_bits(emulator, large, width, columns):
    x, weight = large(8, width, dtype=BF16), large(columns, width, dtype=BF16)
    value, add, y = (large(8, columns, dtype=BF16) for _ in range(3))
    options = {"bias": large(columns, dtype=BF16), "silu": True, "value": value, "add": add}
    emulator.launch("linear_few_rows", x=x, weight=weight, **options, y=y)


ATTENTION = {"chunk_size": 256, "causal": True, "scale": 1.0, "dropkey": 0.0}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_attention_at_offsets_beyond_31_bits(emulator, large, dtype):
    q, k, v, o = (large(1, 2**24 + 200, 1, 128, dtype=dtype) for _ in range(4))
    v[0, -1] = torch.nan  # rows that are not finite are computed again
    emulator.launch("chunked_attention_fwd", q=q, k=k, v=v, **ATTENTION, o=o, lse=large(1, 2**24 + 200, 1))


def test_steps_of_attention_at_offsets_beyond_31_bits(emulator, large):
    S, K, V = 2**20 + 8, 8, 2048
    inputs = {name: large(S, 1, 1, K, dtype=BF16) for name in ("q", "k", "cache_k")}
    inputs |= {name: large(S, 1, 1, V, dtype=BF16) for name in ("v", "cache_v")}
    inputs |= {"position": large(S, dtype=torch.int64), **ATTENTION, "chunk_size": 1}
    emulator.launch("chunked_attention_fwd", **inputs, o=large(S, 1, 1, V, dtype=BF16), lse=large(S, 1, 1))


@pytest.mark.parametrize("L", [1, 256])
@pytest.mark.parametrize("K", [256, 255], ids=["vectors", "elements"])
def test_states_of_attention_at_offsets_beyond_31_bits(emulator, large, K, L):
    """The last sequence continues from position 200 by one token or a whole chunk."""
    S = 2**15 + 300

    def new_state(suffix=""):
        caches = {f"{name}{suffix}": large(S, 256, 1, K, dtype=BF16) for name in ("cache_k", "cache_v")}
        return caches | {f"position{suffix}": large(S, dtype=torch.int64)}

    old = new_state()
    old["position"][-1] = 200
    q, k, v, o = (large(S, L, 1, K, dtype=BF16) for _ in range(4))
    emulator.launch("chunked_attention_fwd", q=q, k=k, v=v, **old, **ATTENTION, o=o, lse=large(S, L, 1))
    with emulator.only_bounds(apart=APART, ends=60):  # rows of the last cache from 196 on
        emulator.launch("chunked_attention_state", k=k, v=v, **old, chunk_size=256, **new_state("_out"))


def test_attention_differentiates_at_offsets_beyond_31_bits(emulator, large):
    """A chunk has two tiles. The second round begins beyond 2^31 elements.

    Offsets of P and dS are 3.6 times as large: without their upper half they are negative.
    """
    tokens = 58_833 * ATTENTION["chunk_size"]  # of 144 elements: 1 % beyond 2^31
    q, k, v, o, do, dq, dk, dv = (large(1, tokens, 1, 144, dtype=BF16) for _ in range(8))
    inputs = {"q": q, "k": k, "v": v, **ATTENTION, "o": o, "lse": large(1, tokens, 1), "do": do}
    with emulator.only_bounds(apart=APART, ends=4), emulator.launch_sizes(attention_panels=tokens // 128 - 2):
        emulator.launch("chunked_attention_bwd", **inputs, dq=dq, dk=dk, dv=dv)


def test_cema_outputs_on_tensor_cores_at_offsets_beyond_31_bits(emulator, large):
    """Outputs, end states, states between tiles and coefficients; dx by the same kernels."""
    S, channels, modes = 9, 2**24, 16
    x, y, dx = (large(S, 256, channels, dtype=BF16) for _ in range(3))
    inputs = cema_parameters(large, channels, modes)
    state = large(S, channels, modes, dtype=C64)
    emulator.set_order("random", shared_limit=A100)
    with emulator.launch_sizes(cema_tile=128):
        emulator.launch("cema_fwd", x=x, **inputs, y=y, state_out=state)
    assert "cema_mma_output_kernel" in emulator.launched()
    del state
    gradients = cema_gradients(large, channels, modes)
    with emulator.launch_sizes(cema_tile=128, cema_shares=1):
        emulator.launch("cema_bwd", x=x, **inputs, dy=y, dx=dx, **gradients)
    assert {"cema_tiles_kernel", "cema_mma_output_kernel"} <= emulator.launched()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_states_of_cema_at_offsets_beyond_31_bits(emulator, large, dtype):
    """130 sequences of 5 tokens; the number of channels is odd, and the last block has three.

    Values are compared: the last state is not zero, and an index of it that is cut to 32 bits would reach a zero.
    """
    S, channels = 130, 2**24 + 3
    x, y, dx = (large(S, 5, channels, dtype=dtype) for _ in range(3))
    state, new = (large(S, channels, 1, dtype=C64) for _ in range(2))
    inputs, gradients = cema_parameters(large, channels), cema_gradients(large, channels)
    inputs["p"][-1] = 0.5
    inputs["q"][-1] = 0.5
    inputs["gamma"][-1] = 1
    state[-1, -1] = 2
    with emulator.launch_sizes(cema_tile=32):
        emulator.launch("cema_fwd", x=x, **inputs, state=state, y=y, state_out=new)
        assert y[-1, :, -1].tolist() == [2**-t for t in range(5)] and new[-1, -1].real == 2**-4
        dstate = large(S, channels, 1, dtype=C64)
        gradients |= {"dx": dx, "dstate": dstate}
        emulator.launch("cema_bwd", x=x, **inputs, state=state, dy=y, dstate_out=new, **gradients)
    with emulator.launch_sizes(cema_tile=8):
        emulator.launch("cema_end_state_fwd", x=x, p=inputs["p"], q=inputs["q"], state_out=new)


def test_states_of_sequences_without_tokens_at_offsets_beyond_31_bits(emulator, large):
    S, channels, modes = 2**24 + 8, 4, 33
    spans = large(S, 2, dtype=torch.int64)
    x, y = large(1, 1, channels), large(1, 1, channels)
    before, after = (large(S, channels, modes, dtype=C64) for _ in range(2))
    inputs = cema_parameters(large, channels, modes) | {"state": before, "spans": spans}
    emulator.launch("cema_fwd", x=x, **inputs, y=y, state_out=after)


def test_padding_between_steps_of_cema_at_offsets_beyond_31_bits(emulator, large):
    channels = 2**26
    spans = large(40, 1, 2, dtype=torch.int64)
    y = large(40, 2, channels, dtype=BF16)
    inputs = cema_parameters(large, channels)
    emulator.launch("cema_fwd", x=large(40, 2, channels, dtype=BF16), **inputs, spans=spans, y=y)


@pytest.mark.parametrize("rows", [1, T], ids=["one-row", "rows-of-a-token"])
def test_statistics_and_states_of_timestep_norm_at_offsets_beyond_31_bits(emulator, large, rows):
    """A group for each channel, so T G is beyond 2^31; with rows of one token, so are the states."""
    x, y, dx = (large(rows, T // rows, D, dtype=BF16) for _ in range(3))
    weight, bias, dweight, dbias = (large(D) for _ in range(4))
    stats = large(3, rows, T // rows, D)
    new_count = large(rows, dtype=torch.int64)
    mean, var = large(rows, D), large(rows, D)
    new = {"mean_out": large(rows, D), "var_out": large(rows, D), "residual_out": large(rows, 2, D)}
    inputs = {"x": x, "weight": weight, "bias": bias, "num_groups": D, "eps": 1e-5}
    inputs |= {"count": large(rows, dtype=torch.int64).fill_(1), "mean": mean, "var": var}
    inputs["residual"] = large(rows, 2, D)
    empty = inputs | {"spans": large(rows, 1, 2, dtype=torch.int64)}  # spans of no token
    if rows == 1:  # (T, 2, G) sums are beyond 2^32: blocks at 3/4 of the grid are between 2^31 and 2^32
        emulator.module.set_bounds(only=True, red_zone=APART, ends=1, middle=T // 64 * D // 32 * 3 // 4)
    results = {"y": y, "stats": stats, "count_out": new_count, **new}
    emulator.launch("timestep_norm_fwd", **inputs, **results)
    emulator.launch("timestep_norm_fwd", **empty, **results)
    incoming = {"stats": stats, "dy": y, "dmean_out": new["mean_out"], "dvar_out": new["var_out"]}
    gradients = {"dx": dx, "dweight": dweight, "dbias": dbias, "dmean": mean, "dvar": var}
    emulator.launch("timestep_norm_bwd", **empty, **incoming, **gradients)
    emulator.launch("timestep_norm_bwd", **inputs, **incoming, **gradients)
    emulator.launch("timestep_norm_end_state_fwd", x=x, num_groups=D, **new, count_out=new_count)
    incoming = {"mean_out": new["mean_out"], "residual_out": new["residual_out"], "dmean_out": mean, "dvar_out": var}
    emulator.launch("timestep_norm_end_state_bwd", x=x, num_groups=D, **incoming, dx=dx)


@pytest.mark.parametrize(
    ("dtype", "width"), [*(pytest.param(BF16, width, marks=pytest.mark.slow) for width in (8, 7)), (F32, 7)], ids=str
)
def test_heads_of_attention_at_offsets_beyond_31_bits(emulator, large, dtype, width):
    """T H is beyond 2^31, and with it lse."""
    tokens, heads = 2**21 + 200, 2**10
    q, k, v, o = (large(1, tokens, heads, width, dtype=dtype) for _ in range(4))
    inputs = {"q": q, "k": k, "v": v, **ATTENTION, "o": o, "lse": large(1, tokens, heads)}
    emulator.launch("chunked_attention_fwd", **inputs)
    if dtype == BF16:
        panels = (2**13 * 2 + 2) * heads  # all in one round, whose last queries are the blocks before `panels`
        with emulator.only_bounds(apart=APART, ends=4, middle=panels), emulator.launch_sizes(attention_panels=panels):
            emulator.launch("chunked_attention_bwd", **inputs, do=o, dq=q, dk=k, dv=v)


@pytest.mark.slow
def test_heads_of_attention_steps_at_offsets_beyond_31_bits(emulator, large):
    S, heads, C = 2**13 + 8, 2**16, 70  # two spans of keys, the second without any
    q, k, v, o = (large(S, 1, heads, 4, dtype=BF16) for _ in range(4))
    cache_k, cache_v = (large(S, C, heads, 4, dtype=BF16) for _ in range(2))
    state = {"cache_k": cache_k, "cache_v": cache_v, "position": large(S, dtype=torch.int64)}
    inputs = {"q": q, "k": k, "v": v, **state, **ATTENTION, "chunk_size": C}
    with emulator.launch_sizes(attention_tile=64), emulator.only_bounds(apart=APART, ends=2):  # both tiles
        emulator.launch("chunked_attention_fwd", **inputs, o=o, lse=large(S, 1, heads))


def test_attention_refuses_more_blocks_than_a_grid_has(emulator, large):
    """A block for each token and head, of rows or of steps; two for its values; a block for each row of a state."""
    S = 2**15
    positions = large(S, dtype=torch.int64)

    def forward(heads, width, with_state):
        k, v = large(S, 1, heads, 8, dtype=BF16), large(S, 1, heads, width, dtype=BF16)
        state = {"cache_k": k, "cache_v": v, "position": positions} if with_state else {}
        inputs = {"q": k, "k": k, "v": v, **state, **ATTENTION, "chunk_size": 1}
        emulator.launch("chunked_attention_fwd", **inputs, o=v, lse=large(S, 1, heads))

    def state():
        k, v = large(S, 1, 1, 8, dtype=BF16), large(S, 1, 1, 8, dtype=BF16)
        old_k, old_v, new_k, new_v = (large(S, 2**16, 1, 8, dtype=BF16) for _ in range(4))
        old = {"cache_k": old_k, "cache_v": old_v, "position": positions}
        new = {"cache_k_out": new_k, "cache_v_out": new_v, "position_out": large(S, dtype=torch.int64)}
        emulator.launch("chunked_attention_state", k=k, v=v, **old, chunk_size=2**16, **new)

    calls = [
        partial(forward, heads=2**16, width=8, with_state=False),
        partial(forward, heads=2**16, width=8, with_state=True),
        partial(forward, heads=2**15, width=136, with_state=True),
        state,
    ]
    for call in calls:
        with pytest.raises(ValueError, match="`k` must .* 2147483647 blocks of a CUDA kernel, got 2147483648; pass"):
            call()


@pytest.mark.parametrize("K", [6, 258])
def test_elements_of_normalized_qk_at_offsets_beyond_31_bits(emulator, large, K):
    """K is no multiple of a vector's 8 elements."""
    launch_normalized_qk(emulator, large, tokens=2**19 // K + 40, heads=2**12, K=K, chunk_size=16)


def test_padding_of_normalized_qk_at_offsets_beyond_31_bits(emulator, large):
    empty = large(1, 1, 2, dtype=torch.int64)  # the span [0, 0)
    for K in (256, 520):
        tokens = 2**25 // K + 40
        launch_normalized_qk(emulator, large, tokens=tokens, heads=64, K=K, chunk_size=16, spans=empty)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_padding_of_attention_at_offsets_beyond_31_bits(emulator, large, dtype):
    """All rows are padding: zeros of o, lse and the gradients."""
    tokens, heads = 2**24 + 200, 130
    spans = large(1, 1, 2, dtype=torch.int64)
    q, k, v, o, do, dq, dk, dv = (large(1, tokens, heads, 8, dtype=dtype) for _ in range(8))
    inputs = {"q": q, "k": k, "v": v, **ATTENTION, "spans": spans, "o": o, "lse": large(1, tokens, heads)}
    emulator.launch("chunked_attention_fwd", **inputs)
    with emulator.launch_sizes(attention_panels=1 << 20), emulator.only_bounds(apart=APART, ends=1):
        emulator.launch("chunked_attention_bwd", **inputs, do=do, dq=dq, dk=dk, dv=dv)


# Choices by size. The kernels that are not chosen would refuse the launch, or never run in a small test.


def test_cema_chooses_kernels_by_size(emulator, large):
    """Steps up to 4 tokens a sequence, or T D N = 2^22; tensor cores from B L D N = 2^28 on."""
    for kernel, (B, L, channels, modes) in (
        ("cema_step_kernel", (1, 8, 2**15, 16)),
        ("cema_output_kernel", (1, 8, 2**15 + 2, 16)),
        ("cema_step_kernel", (2, 4, 2**15 + 2, 16)),
        ("cema_mma_output_kernel", (1, 1024, 2**14, 16)),
        ("cema_output_kernel", (1, 1024, 2**14 - 8, 16)),
    ):
        x, y = large(B, L, channels, dtype=BF16), large(B, L, channels, dtype=BF16)
        emulator.reset()
        emulator.set_order("random", shared_limit=A100)
        emulator.launch("cema_fwd", x=x, **cema_parameters(large, channels, modes), y=y)
        assert kernel in emulator.launched(), (B, L, channels, modes)


def takes_tensor_cores(emulator, direction, **tensors) -> bool:
    """Return True if the workspace has another size than for the scan, which is chosen where shared memory is small."""
    sizes = []
    for limit in (A100, 48 * 1024):
        emulator.set_order("random", shared_limit=limit)
        with emulator.only_asking(sizes), pytest.raises(InterruptedError):
            emulator.launch(f"cema_{direction}", **tensors)
    return sizes[0] != sizes[1]


def test_the_smoke_test_takes_tensor_cores(emulator, large):
    """At its real sizes, which only a GPU can compute; with 4 modes, for the gradients alone."""
    for name, expected in (("cema, tensor cores", True), ("cema, tensor cores, 4 modes", False)):
        B, L, channels, modes = (CASES[name].sizes[letter] for letter in "BLDN")
        x, y = large(B, L, channels, dtype=BF16), large(B, L, channels, dtype=BF16)
        inputs, gradients = cema_parameters(large, channels, modes), cema_gradients(large, channels, modes)
        assert takes_tensor_cores(emulator, "fwd", x=x, **inputs, y=y) == expected, name
        assert takes_tensor_cores(emulator, "bwd", x=x, **inputs, dy=x, dx=y, **gradients), name


def test_cema_takes_the_scan_where_a_grid_would_be_too_large(emulator, large):
    tile, rows_of_a_grid = 128, 65_535
    longest = rows_of_a_grid * 16 * tile  # a block takes 16 tiles
    for L, expected in ((longest, True), (longest + tile, False)):
        x, y = large(1, L, 8, dtype=BF16), large(1, L, 8, dtype=BF16)
        inputs = cema_parameters(large, channels=8, modes=5)
        with emulator.launch_sizes(cema_tile=2**13):
            assert takes_tensor_cores(emulator, "fwd", x=x, **inputs, y=y) == expected


def test_a_sparse_tensor_has_bounds(emulator):
    x, y = emulator.sparse(2**31 + 1024, name="x"), emulator.empty(1024)
    x[-1] = 7
    run(emulator, "strided_copy", x[-1024:], y, 1, 1)
    assert y[-1] == 7 and (y[:-1] == 0).all()
    with pytest.raises(emulator.Error, match=r"out of bounds: read of 4 bytes at 0 bytes past the end of buffer 'x'"):
        run(emulator, "strided_copy", x[-1023:], y, 1, 1)
    with pytest.raises(emulator.Error, match=r"out of bounds: write of 4 bytes at .* buffer 'x'"):
        run(emulator, "strided_copy", emulator.tensor(torch.zeros(1024)), x[-1023:], 1, 1)

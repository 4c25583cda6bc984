"""chunked_attention on emulated CUDA kernels: every kernel and tiling, log-sum-exp, blocks of rows, bytes moved."""

import pytest
import torch
from assertions import assert_all_close, assert_bit_equal, assert_close
from calls import forward
from cases import chunked_attention_case
from emulated import A100, assert_equal_in_every_order, assert_no_bank_conflicts
from emulated_attention import assert_accurate, run, scaled_case
from emulator.device import Emulator
from hypothesis import given, settings
from hypothesis import strategies as st

import megalodon_ops as mo
from megalodon_ops import _C, AttentionState
from megalodon_ops.ops.common.reference_helpers import sequences

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Shapes by kernel: each tiling and each kind of tail. Sequences, chunks and tiles end at arbitrary rows.
ON_TENSOR_CORES = {
    "64-columns": dict(L=75, H=2, K=40, V=24, C=67, dtype=BF16, state=True, dropkey=0.3),
    "64-columns-chunk-before-the-tiles-end": dict(B=1, L=70, H=1, K=8, V=8, C=47, dtype=BF16),
    "64-columns-one-head": dict(L=130, H=1, K=128, V=64, C=200, dtype=F16),
    "128-columns": dict(L=70, H=1, K=128, V=72, C=48, dtype=BF16, lengths=[70, 33]),
    "128-columns-short-tiles": dict(B=1, L=66, H=1, K=136, V=120, C=64, dtype=F16, dropkey=0.5),
    "128-columns-with-dropkey": dict(B=1, L=140, H=1, K=8, V=72, C=140, dtype=BF16, dropkey=0.3),
    "256-columns": dict(L=34, H=1, K=16, V=136, C=33, dtype=BF16, state=True),
    "256-columns-twice": dict(L=35, H=2, K=250, V=258, C=20, dtype=BF16, dropkey=0.2, lengths=[35, 20]),
    "one-channel": dict(L=20, H=3, K=1, V=1, C=7, dtype=F16),
    "whole-chunks": dict(B=1, L=150, H=2, K=8, V=8, C=47, dtype=BF16, causal=False),
    "whole-chunks-of-two-blocks": dict(
        L=150, H=1, K=8, V=8, C=141, dtype=F16, causal=False, lengths=[130, 150], dropkey=0.3
    ),
    "whole-chunks-packed": dict(B=1, L=70, H=1, K=8, V=8, C=9, dtype=BF16, causal=False, cu_seqlens=[1, 8, 8, 40, 67]),
}
WITHOUT_TENSOR_CORES = {
    "float-64-columns": dict(B=1, L=70, H=1, K=20, V=24, C=67, dtype=F32, state=True, dropkey=0.3),
    "float-256-columns": dict(L=33, H=1, K=37, V=100, C=48, dtype=F32, lengths=[30, 17]),
    "float-512-columns": dict(L=20, H=1, K=16, V=260, C=13, dtype=F32, dropkey=0.9),
    "float-512-columns-twice": dict(B=1, L=20, H=1, K=3, V=514, C=13, dtype=F32, lengths=[15]),
    "double-64-columns": dict(L=20, H=2, K=18, V=10, C=32, dtype=F64, state=True, dropkey=0.3),
    "double-256-columns": dict(B=1, L=20, H=1, K=5, V=258, C=70, dtype=F64),
    "bfloat16-many-channels": dict(B=1, L=20, H=1, K=264, V=72, C=13, dtype=BF16, dropkey=0.2),
    "float-whole-chunks": dict(B=1, L=70, H=1, K=20, V=24, C=33, dtype=F32, causal=False),
    "double-whole-chunk-of-two-blocks": dict(L=70, H=1, K=6, V=8, C=2**33, dtype=F64, causal=False, lengths=[70, 66]),
}
FEW_QUERIES = {
    "decode": dict(B=3, L=1, H=2, K=32, V=40, C=200, dtype=BF16, state=True),
    "wide": dict(B=2, L=2, H=1, K=264, V=520, C=70, dtype=F16, state=True, dropkey=0.5),
    "float": dict(B=3, L=8, H=2, K=36, V=44, C=70, dtype=F32, state=True, lengths=[1, 0, 8]),
    "double": dict(B=2, L=3, H=1, K=18, V=258, C=90, dtype=F64, state=True, dropkey=0.2),
    "packed": dict(B=1, L=12, H=1, K=8, V=8, C=7, dtype=BF16, state=True, cu_seqlens=[1, 2, 2, 11]),
}
KERNELS = {
    "chunked_attention_fwd_mma_kernel": ON_TENSOR_CORES,
    "chunked_attention_fwd_fma_kernel": WITHOUT_TENSOR_CORES,
    "chunked_attention_step_kernel": FEW_QUERIES,
}
PATHS = {name: (kernel, shape) for kernel, shapes in KERNELS.items() for name, shape in shapes.items()}
MISALIGNED = (
    "64-columns 128-columns 256-columns-twice one-channel float-64-columns float-512-columns double-64-columns".split()
)
ALIGNMENTS = {f"{name}-0": (*path, 0) for name, path in PATHS.items()}
ALIGNMENTS |= {f"{name}-1": (*PATHS[name], 1) for name in (*MISALIGNED, *FEW_QUERIES)}


@pytest.mark.parametrize(("kernel", "shape", "offset"), ALIGNMENTS.values(), ids=ALIGNMENTS)
def test_every_tiling_matches_the_reference(emulator, kernel, shape, offset):
    case = scaled_case(**shape)
    assert_accurate(run(emulator, case, offset), case)
    assert emulator.traffic(kernel)["o" if "step" not in kernel else "workspace"]["store_bytes"] > 0


@pytest.mark.parametrize("path", ["64-columns", "256-columns", "float-256-columns", "wide", "double"])
def test_the_order_of_threads_changes_no_bit(emulator, path):
    case = scaled_case(**PATHS[path][1])

    def finite():
        return {name: value.nan_to_num(neginf=-1e30) for name, value in run(emulator, case).items()}

    results = assert_equal_in_every_order(emulator, finite)
    assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize(("dtype", "longest"), [(BF16, 600), (F32, 200)], ids=str)
def test_blocks_of_rows_cover_every_token_once(emulated_module, dtype, longest):
    """Many sequences, empty sequences, arbitrary chunk ends; padding is NaN and gives zeros."""
    emulator = Emulator(emulated_module)

    @settings(max_examples=8)
    @given(data=st.data())
    def check(data):
        packed = data.draw(st.booleans())
        C = data.draw(st.sampled_from([1, 7, 32, 100, 128, 300]))
        L = data.draw(st.sampled_from([n for n in (1, 63, 64, 65, 127, 128, 129, 200, 257, 600) if n <= longest]))
        if packed:
            ends = data.draw(st.lists(st.integers(0, L), min_size=1, max_size=5))
            batch = {"B": 1, "cu_seqlens": sorted(ends)}
        else:
            batch = {"B": 2, "lengths": [data.draw(st.integers(0, L)), L]}
        case = scaled_case(**batch, L=L, H=1, K=8, V=8, C=C, dtype=dtype, causal=data.draw(st.booleans()))
        tokens = case.tensors["q"][..., 0, 0]
        padding = torch.ones_like(tokens, dtype=torch.bool)
        for row, inside in sequences(tokens, case.spans()):
            padding[row, inside] = False
        spoilt = {name: t.masked_fill(padding[..., None, None], torch.nan) for name, t in case.tensors.items()}
        result = run(emulator, case.with_tensors(**spoilt))
        assert_accurate(result, case)
        assert (result["o"][padding] == 0).all() and (result["lse"][padding] == 0).all()

    check()


def test_rows_begin_anywhere_in_a_tile(emulator):
    """Every alignment of a warp's rows with a tile of keys; chunks that begin at a tile's second key.

    With C 97, rows of the second block see all other keys of that tile.
    """
    for C, L in ((49, 98), (97, 161)):
        second = scaled_case(B=1, L=L, H=1, K=8, V=8, C=C, dtype=BF16)
        assert_accurate(run(emulator, second), second)
    case = scaled_case(B=48, L=17, H=1, K=8, V=8, C=100, dtype=BF16, state=True)
    k, v, _ = (t.nan_to_num() for t in case.options["state"])
    case = case.with_options(state=AttentionState(k, v, torch.arange(48)))
    assert_accurate(run(emulator, case), case)


def shared_requests(emulator, case, *, limit=A100, least=1, offset=0):
    """Requests to shared memory of an accurate forward; `least`: of the chunks that take tiles of 64 keys."""
    emulator.reset()
    emulator.set_order("random", shared_limit=limit)
    with emulator.launch_sizes(attention_long_tiles=least):
        assert_accurate(run(emulator, case, offset), case)
    return sum(site["requests"] for site in emulator.sites("chunked_attention_fwd_mma_kernel") if site["shared"])


def test_tiles_of_64_keys_beside_256_columns(emulator):
    """Only of long chunks, on cards with enough shared memory; then each kind of tail, and all alignments with rows."""
    case = scaled_case(B=1, L=128, H=1, K=250, V=136, C=128, dtype=BF16, causal=False)
    long = shared_requests(emulator, case)
    assert long < shared_requests(emulator, case, limit=99 * 1024) == shared_requests(emulator, case, least=129)
    twice = dict(L=70, H=2, K=72, V=258, C=65, dropkey=0.2, lengths=[70, 33])
    for options, offset in ((dict(dtype=BF16), 0), (dict(dtype=F16, causal=False), 1)):
        shared_requests(emulator, scaled_case(**twice, **options), offset=offset)
    rows = scaled_case(B=64, L=17, H=1, K=8, V=136, C=130, dtype=BF16, state=True)
    k, v, _ = (t.nan_to_num() for t in rows.options["state"])
    shared_requests(emulator, rows.with_options(state=AttentionState(k, v, torch.arange(64))))


@pytest.mark.parametrize(("L", "dtype"), [(6, BF16), (6, F32), (40, BF16)], ids=str)
def test_a_sequence_does_not_see_its_neighbours(emulator, dtype, L):
    case = scaled_case(B=1, L=3 * L, H=1, K=8, V=8, C=32, dtype=dtype, state=True, cu_seqlens=[0, L, 2 * L, 3 * L])
    clean = run(emulator, case)
    spoilt = {name: tensor.clone() for name, tensor in case.tensors.items()}
    for tensor in spoilt.values():
        tensor[:, L : 2 * L] = torch.nan
    results = run(emulator, case.with_tensors(**spoilt))
    assert results["o"][:, L : 2 * L].isnan().all()
    for name, value in results.items():
        for part in (slice(0, L), slice(2 * L, 3 * L)):
            assert torch.equal(value[:, part], clean[name][:, part])


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_a_whole_chunk_does_not_see_its_neighbours(emulator, dtype):
    """Three chunks share a block of rows and tiles of keys.

    A NaN makes a kernel recompute four rows at once; after a chunk's last token, the other three are of another chunk.
    """
    case = scaled_case(B=1, L=57, H=1, K=8, V=8, C=19, dtype=dtype, causal=False)
    clean = run(emulator, case)["o"]
    for token in (25, 50):
        v = case.tensors["v"].clone()
        v[:, token] = torch.nan
        o = run(emulator, case.with_tensors(v=v))["o"]
        same_chunk = torch.arange(57) // 19 == token // 19
        assert o[:, same_chunk].isnan().all()
        tolerance = 8e-3 if dtype == BF16 else 1e-6
        torch.testing.assert_close(o[:, ~same_chunk], clean[:, ~same_chunk], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "rows", "C"), [(BF16, 128, 110), (F32, 64, 50)], ids=str)
def test_a_block_does_not_see_the_chunk_before_its_first(emulator, dtype, rows, C):
    """Columns are counted from a multiple of 4, here in the chunk before."""
    case = scaled_case(B=1, L=rows + 10, H=1, K=8, V=8, C=C, dtype=dtype)
    spoilt = {name: tensor.clone() for name, tensor in case.tensors.items()}
    for tensor in spoilt.values():
        tensor[:, :C] = torch.nan
    clean = run(emulator, case)
    results = run(emulator, case.with_tensors(**spoilt))
    for name, value in results.items():
        assert torch.equal(value[:, rows:], clean[name][:, rows:])


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_a_chunk_beyond_32_bits(emulator, dtype):
    case = scaled_case(B=1, L=20, H=1, K=8, V=8, C=2**32 + 5, dtype=dtype)
    assert_bit_equal(run(emulator, case), run(emulator, case.with_options(chunk_size=20)))


def test_nothing_is_launched_for_no_heads(emulator):
    assert run(emulator, chunked_attention_case(H=0))["o"].numel() == 0
    assert emulator.module.traffic() == {}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("tile_keys", [None, 48, 200, 512])
def test_steps_over_many_and_over_long_tiles(emulator, dtype, tile_keys):
    """More tiles than the merge loads at once; tiles of more than 64 keys, as in real batches."""
    case = scaled_case(B=2, L=1, H=1, K=16, V=24, C=1200, dtype=dtype, state=True, dropkey=0.2)
    sizes = {} if tile_keys is None else {"attention_tile": tile_keys}
    with emulator.launch_sizes(**sizes):
        assert_accurate(run(emulator, case), case)


def test_the_largest_tile(emulator):
    """It has 2048 keys: for 2049, the workspace has a maximum, a sum and a value of two tiles."""
    sequences = 2048
    tokens = torch.zeros(sequences, 1, 1, 1)
    cache = torch.zeros(sequences, 2049, 1, 1)
    sizes = []
    inputs = {"q": tokens, "k": tokens, "v": tokens, "chunk_size": 2049, "causal": True, "scale": 1.0, "dropkey": 0.0}
    state = {"cache_k": cache, "cache_v": cache, "position": torch.zeros(sequences).long()}
    results = {"o": torch.empty_like(tokens), "lse": torch.empty(sequences, 1, 1)}
    with emulator.only_asking(sizes), pytest.raises(InterruptedError):
        emulator.call("chunked_attention_fwd", **inputs, **state, **results)
    assert sizes == [sequences * 2 * 3 * 4]  # 3 numbers of 4 bytes for each of 2 tiles


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_steps_are_rounded_once(emulator, dtype):
    """At least 99 % of the results have the bits of float32's: probabilities and sums of tiles are not rounded."""
    case = scaled_case(B=40, L=1, H=2, K=16, V=24, C=150, dtype=dtype, state=True)
    k, v, position = case.options["state"]
    wide = case.with_tensors(**{name: tensor.float() for name, tensor in case.tensors.items()})
    wide = wide.with_options(state=AttentionState(k.float(), v.float(), position))
    found, exact = (run(emulator, each)["o"] for each in (case, wide))
    assert (found == exact.to(dtype)).double().mean() >= 0.99


@pytest.mark.parametrize(("dtype", "offset"), [(BF16, 0), (BF16, 1), (F32, 0), (F64, 1)], ids=str)
def test_steps_refuse_queries_that_shared_memory_does_not_hold(emulator, dtype, offset):
    """The limit is the shared memory minus a tile of scores and the partial sums, in planes of 8 + 4 vectors."""
    emulator.set_order("random", shared_limit=24 * 1024)
    size = 8 if dtype == F64 else 4  # bytes of a number in shared memory
    width = 1 if offset else 16 // dtype.itemsize  # elements of a vector
    left = 24 * 1024 // size - 64 - (128 + 4) * width
    largest = (left // width - 4) // 8 * 8 * width
    shape = {"B": 2, "L": 1, "H": 1, "V": 8, "C": 3, "dtype": dtype, "state": True}
    run(emulator, scaled_case(**shape, K=largest), offset)
    more = largest + width
    with pytest.raises(ValueError, match=rf"`q` must have at most {largest} channels .*, got {more}; split K"):
        run(emulator, scaled_case(**shape, K=more), offset)


def test_a_chunk_is_read_once_for_each_block_of_rows(emulator):
    """Q and K are read for each 256 columns of V; K and V for each 128 rows, up to these rows."""
    case = scaled_case(B=1, L=256, H=1, K=32, V=512, C=256, dtype=BF16)
    run(emulator, case)
    kernel = "chunked_attention_fwd_mma_kernel"
    nbytes = {name: tensor.nbytes for name, tensor in case.tensors.items()}
    assert emulator.sectors(kernel, "q", "load") == 2 * nbytes["q"]
    assert emulator.sectors(kernel, "k", "load") == 2 * nbytes["k"] * 3 // 2
    assert emulator.sectors(kernel, "v", "load") == nbytes["v"] * 3 // 2
    assert emulator.sectors(kernel, "o", "store") == emulator.traffic(kernel)["o"]["store_footprint"] == nbytes["v"]


@pytest.mark.parametrize(("dtype", "key_dim", "value_dim", "reads"), [(BF16, 256, 512, 1), (F32, 64, 1024, 2)])
def test_a_step_reads_the_cached_rows_once(emulator, dtype, key_dim, value_dim, reads):
    """Keys are read for each 512 columns; rows beyond the position are not read."""
    case = scaled_case(B=2, L=1, H=1, K=key_dim, V=value_dim, C=150, dtype=dtype, state=True)
    run(emulator, case)
    kernel = "chunked_attention_step_kernel"
    rows = int(case.options["state"].position.sum()) + 2  # rows of the cache, and two tokens
    for name, width in (("k", reads * key_dim), ("v", value_dim)):
        read = emulator.sectors(kernel, f"cache_{name}", "load") + emulator.sectors(kernel, name, "load")
        assert read == rows * width * dtype.itemsize
    tiles = -(-150 // 64)
    assert emulator.traffic(kernel)["workspace"]["store_bytes"] <= 2 * tiles * (value_dim + 2) * 4


@pytest.mark.parametrize(
    ("K", "V", "dtype"), [(64, 64, F16), pytest.param(256, 512, F16, marks=pytest.mark.slow), (72, 64, F32)], ids=str
)
def test_values_of_nan_cost_a_few_forwards(emulator, K, V, dtype):
    """Rows before a NaN in their tile, or all rows, are recomputed, four at a time, two in the last group.

    The cost is the number of sectors and shared-memory wavefronts.
    """
    key, chunk = 119, 122  # position of the NaN in the first chunk; positions of a chunk
    case = scaled_case(B=1, L=126, H=1, K=K, V=V, C=chunk, dtype=dtype, dropkey=0.1)
    kernel = f"chunked_attention_fwd_{'mma' if dtype == F16 else 'fma'}_kernel"

    def output_and_cost(v):
        emulator.reset()
        o = run(emulator, case.with_tensors(v=v))["o"]
        return o, sum(site["transactions"] for site in emulator.sites(kernel))

    v = case.tensors["v"].clone()
    v[:, key, :, ::2] = torch.nan
    expected, usual = output_and_cost(case.tensors["v"])
    found, cost = output_and_cost(v)
    lost, largest_cost = output_and_cost(torch.full_like(v, torch.nan))
    assert found[:, key:chunk, :, ::2].isnan().all() and lost.isnan().all()
    found[:, key:chunk, :, ::2] = expected[:, key:chunk, :, ::2]
    assert_close(found, expected, tolerance=1e-5 if dtype == F32 else 2e-3)
    assert usual < cost < 5 * usual and 2 * usual < largest_cost < 8 * usual


@pytest.mark.parametrize(
    "path", "64-columns-one-head 128-columns float-64-columns float-512-columns double-256-columns wide float".split()
)
def test_no_bank_conflicts(emulator, path):
    kernel, shape = PATHS[path]
    run(emulator, scaled_case(**shape))
    assert_no_bank_conflicts(emulator, kernel)


def test_pieces_through_every_kernel_give_the_whole(emulator):
    """A prompt, single tokens, a few tokens; the state is updated in place."""
    case = chunked_attention_case(B=2, L=31, H=1, K=8, V=8, C=12, dtype=F64)
    whole = forward(mo.reference.chunked_attention, case)
    empty = torch.zeros(2, 12, 1, 8, dtype=F64)
    state = AttentionState(empty, empty.clone(), torch.zeros(2).long())
    outputs, start = [], 0
    with emulator.replacing(_C):
        for size in (18, 1, 1, 1, 10):
            piece = [case.tensors[name][:, start : start + size] for name in "qkv"]
            outputs.append(mo.chunked_attention(*piece, chunk_size=12, state=state, inplace_state=True))
            start += size
    kept = 31 % 12  # tokens of the last chunk
    actual = {"o": torch.cat(outputs, dim=1), "k": state.k[:, :kept], "v": state.v[:, :kept]}
    expected = {"o": whole["o"], "k": whole["state.k"][:, :kept], "v": whole["state.v"][:, :kept]}
    assert_all_close(actual, expected, tolerance=1e-12)
    assert torch.equal(state.position, whole["state.position"])

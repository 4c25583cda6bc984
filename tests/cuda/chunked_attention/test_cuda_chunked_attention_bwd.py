"""Backward kernels of chunked_attention on the emulated device: every path, determinism, bytes moved, bank conflicts.

The forward runs on the CPU.
"""

import pytest
import torch
from assertions import assert_bit_equal
from calls import evaluate
from cases import chunked_attention_case
from emulated import assert_equal_in_every_order
from emulated_attention import GRADIENTS, arguments_of, assert_right, gradients  # noqa: F401, a fixture
from emulator.device import ROOT, DeviceTensor

import megalodon_ops as mo
from megalodon_ops.ops.common.philox import dropkey_mask

KERNELS = "chunked_attention_bwd_{}_kernel"
EDGE = 128  # rows of a tile of 16-bit elements

ODD = {"B": 2, "L": 21, "H": 3, "K": 5, "V": 3, "C": 9}
SHAPES = {
    # A tile has 128 rows (float64: 64), a slab 64 elements (float32 and float64: 16).
    "a-chunk-in-a-tile": {"B": 1, "L": 50, "H": 2, "K": 24, "V": 40, "C": 40},
    "tiles-of-a-chunk": {"B": 1, "L": 150, "H": 1, "K": 8, "V": 16, "C": 140},
    "slabs-and-slices": {"B": 1, "L": 20, "H": 1, "K": 136, "V": 264, "C": 16},
    "odd": ODD,
    "keys-in-the-cache": {"B": 3, "L": 7, "H": 2, "K": 8, "V": 8, "C": 136, "state": True},
    "dropkey": {"B": 1, "L": 33, "H": 2, "K": 8, "V": 8, "C": 16, "dropkey": 0.4},
    "dropkey-in-odd-chunks": {"B": 1, "L": 23, "H": 2, "K": 8, "V": 8, "C": 10, "dropkey": 0.4},
    "rows-without-scores": {"B": 1, "L": 30, "H": 1, "K": 8, "V": 8, "C": 4, "dropkey": 0.95},
    "padded": {"B": 3, "L": 11, "H": 2, "K": 8, "V": 8, "C": 4, "lengths": [3, 0, 11]},
    "packed": {"B": 1, "L": 70, "H": 2, "K": 8, "V": 8, "C": 8, "cu_seqlens": [3, 3, 5, 30, 30, 64, 66]},
    "packed-and-cached": {"B": 1, "L": 40, "H": 1, "K": 8, "V": 8, "C": 8, "cu_seqlens": [1, 9, 9, 36], "state": True},
    "a-sequence-more-than-lanes": {"B": 1, "L": 45, "H": 1, "K": 8, "V": 8, "C": 64, "cu_seqlens": list(range(34))},
    "many-sequences": {"B": 1, "L": 45, "H": 1, "K": 8, "V": 8, "C": 64, "cu_seqlens": list(range(41))},
    "whole-chunks": {"B": 1, "L": 150, "H": 2, "K": 8, "V": 16, "C": 140, "causal": False},
    "whole-chunks-padded": ODD | {"H": 2, "causal": False, "lengths": [21, 12], "dropkey": 0.2},
    "no-keys": {"B": 1, "L": 5, "H": 1, "K": 0, "V": 3, "C": 4},
    "no-values": {"B": 1, "L": 5, "H": 1, "K": 3, "V": 0, "C": 4},
}
PATHS = {
    "vectors": (torch.bfloat16, 0),
    "elements": (torch.bfloat16, 1),
    "half": (torch.float16, 0),
    "single": (torch.float32, 1),
    "double": (torch.float64, 1),
}
RUNS = [(shape, path) for shape in ("tiles-of-a-chunk", "odd") for path in PATHS]
RUNS += [("a-sequence-more-than-lanes", "single"), ("many-sequences", "vectors")]
OTHERS = [shape for shape in SHAPES if shape not in {shape for shape, _ in RUNS}]  # each on two of three paths
RUNS += [(shape, ("vectors", "elements", "single")[(i + j) % 3]) for i, shape in enumerate(OTHERS) for j in range(2)]


@pytest.mark.parametrize(("shape", "path"), RUNS)
def test_gradients(gradients, shape, path):
    dtype, offset = PATHS[path]
    case = chunked_attention_case(**SHAPES[shape], dtype=dtype)
    assert_right(gradients(case, offset), case)


@pytest.mark.parametrize("panels", [4, pytest.param(32, marks=pytest.mark.slow)])
def test_a_chunk_that_rounds_share(emulator, gradients, panels):
    """Each empty sequence takes two panel numbers, so that the chunk's three panels are in two rounds.

    In a chunk of 2048 a panel is 32 tiles of P and of dS, 2 MiB, and the launcher chooses rounds of 32.
    """
    C, launch_sizes = (2048, {}) if panels == 32 else (192, {"attention_panels": panels})
    empty = panels // 2 - 1
    sizes = {"B": 1, "L": max(C, 300), "H": 1, "K": 1, "V": 2, "C": C, "cu_seqlens": [0] * (empty + 1) + [150, 300]}
    case = chunked_attention_case(**sizes, dtype=torch.float64)
    with emulator.launch_sizes(**launch_sizes):
        assert_right(gradients(case), case)
    sums = {line for line in stored_lines(emulator, "products") if "after[at] =" in line}
    assert sums, "no sum passed from one round to the next"


SLOW_ROUNDS = [pytest.param("vectors", 1, marks=pytest.mark.slow), pytest.param("single", 3, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("path", "panels"), [("vectors", 2), ("vectors", 3), *SLOW_ROUNDS])
def test_a_chunk_of_many_tiles_in_many_rounds(emulator, gradients, path, panels):
    """Four row blocks in a chunk, so that rounds begin and end at each; a second chunk and head follow."""
    dtype, offset = PATHS[path]
    case = chunked_attention_case(B=1, L=500, H=1, K=8, V=8, C=3 * EDGE + 20, dtype=dtype, dropkey=0.1)
    with emulator.launch_sizes(attention_panels=panels):
        assert_right(gradients(case, offset), case)


WHOLE = [("double", 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("double", 1), ("vectors", 3)))]


@pytest.mark.parametrize(("path", "panels"), WHOLE)
def test_whole_chunks_in_many_rounds(emulator, gradients, path, panels):
    """Every query block takes part in all rounds of its chunk, also for later keys."""
    dtype, offset = PATHS[path]
    C = 3 * (EDGE if dtype == torch.bfloat16 else 64) + 20
    case = chunked_attention_case(B=1, L=2 * C - 30, H=2, K=4, V=4, C=C, dtype=dtype, causal=False)
    with emulator.launch_sizes(attention_panels=panels):
        assert_right(gradients(case, offset), case)


OPTIONS = {"causal": True, "scale": 1.0, "dropkey": 0.0}


def workspace_bytes(emulator, x, **options):
    """Size of the workspace for which the launcher asks, with x (B, L, 1, K) for every tensor."""
    inputs = dict.fromkeys(("q", "k", "v", "o", "do"), x) | {"lse": torch.zeros(x.shape[:3]).double()}
    results = {name: torch.empty_like(x) for name in GRADIENTS}
    sizes = []
    with emulator.only_asking(sizes), pytest.raises(InterruptedError):
        emulator.call("chunked_attention_bwd", **inputs, **OPTIONS, **options, **results)
    return sizes


def test_a_round_has_a_panel_of_every_size(emulator):
    """A panel of 137 MiB: only the size of the workspace is checked, as the products would take an hour."""
    (size,) = workspace_bytes(emulator, torch.zeros(1, 70_000, 1, 1, dtype=torch.float64), chunk_size=70_000)
    panel_bytes = 2 * 8 * EDGE // 2 * 70_000  # P and dS of float64, in tiles of 64
    assert panel_bytes <= size <= 1.03 * panel_bytes


@pytest.mark.parametrize(
    ("B", "L", "C", "cu_seqlens", "panels"),
    [(2, 64, 128, None, 2), (1, 128, 64, [0, 64, 128], 6)],  # if packed, two more panels for each sequence
    ids=["dense", "packed"],
)
def test_the_workspace_has_no_unused_panels(emulator, B, L, C, cu_seqlens, panels):
    """Chunks of one block need only panels, of 64 x 64 elements of P and of dS."""
    spans = None if cu_seqlens is None else torch.tensor(cu_seqlens).unfold(0, 2, 1)
    sizes = workspace_bytes(emulator, torch.zeros(B, L, 1, 3, dtype=torch.float64), chunk_size=C, spans=spans)
    assert sizes == [panels * 2 * 8 * 64 * 64]


def backward(emulator, case, chunk_size, v=None):
    """Gradients by the kernels alone, without a state; `v`, if given, replaces the forward's values."""
    inputs = arguments_of(case) | {"chunk_size": chunk_size}
    results = {"o": torch.empty_like(inputs["v"]), "lse": torch.empty(inputs["q"].shape[:-1])}
    emulator.call("chunked_attention_fwd", **inputs, **results)
    found = {name: torch.empty_like(case.tensors[name[1]]) for name in GRADIENTS}
    inputs["v"] = inputs["v"] if v is None else v
    emulator.call("chunked_attention_bwd", **inputs, **results, do=torch.ones_like(results["o"]), **found)
    return found


def test_a_chunk_beyond_32_bits(emulator):
    case = chunked_attention_case(B=1, L=20, H=1, K=3, V=5, dtype=torch.float32)
    assert_bit_equal(backward(emulator, case, 2**33), backward(emulator, case, 20))


def test_sequences_that_begin_at_the_end_of_a_large_chunk(gradients):
    """Each sequence takes three panels: two of the cached chunk and one of the next."""
    shape = {"B": 1, "L": 6, "H": 1, "K": 8, "V": 8, "C": 140}
    case = chunked_attention_case(**shape, cu_seqlens=[0, 2, 4, 6], dtype=torch.float32, state=True)
    k, v, position = (t.nan_to_num() for t in case.options["state"])
    case = case.with_options(state=mo.AttentionState(k, v, torch.full_like(position, 139)))
    assert_right(gradients(case), case)


@pytest.mark.parametrize("L", [40, 140], ids=["a-tile", "several-tiles"])
def test_hidden_values_may_be_nan(emulator, L):
    """Only the last query sees the last value; the first query sees only the first key."""
    case = chunked_attention_case(B=1, L=L, H=1, K=8, V=16, dtype=torch.bfloat16)
    expected = backward(emulator, case, L)
    q, v = case.tensors["q"].clone(), case.tensors["v"].clone()
    q[:, 0] = torch.nan
    v[:, -1] = torch.nan
    dq = backward(emulator, case, L, v)["dq"]
    assert torch.equal(dq[:, :-1], expected["dq"][:, :-1]) and dq[:, -1].isnan().all()
    dv = backward(emulator, case.with_tensors(q=q), L)["dv"]
    assert torch.equal(dv[:, 1:], expected["dv"][:, 1:]) and dv[:, 0].isnan().all()


@pytest.mark.parametrize("path", ["vectors", "elements", "single"])
def test_non_finite_do_reaches_only_dependent_results(emulator, gradients, path):
    """DropKey leaves few keys, in all tiles and both rounds: dv by channel, dk and dq in all channels."""
    dtype, offset = PATHS[path]
    L = 2 * EDGE + 20 if dtype == torch.bfloat16 else EDGE + 20
    case = chunked_attention_case(B=1, L=L, H=1, K=8, V=8, C=L, dtype=dtype, dropkey=0.95)
    places = {(3, 0): torch.nan, (EDGE - 1, 1): torch.inf, (EDGE, 2): -torch.inf, (L - 1, 3): torch.nan}

    def with_places(grad, values):
        grad = grad.clone()
        for (row, channel), value in zip(places, values, strict=True):
            grad[0, row, 0, channel] = value
        return grad

    with emulator.launch_sizes(attention_panels=2):
        found = gradients(case, offset, lambda _, grad: with_places(grad, places.values()))
    rows = torch.arange(L)
    seed = int(case.options["dropkey_seed"])
    sees = (rows <= rows[:, None]) & ~dropkey_mask(0.95, seed, 0, 1, rows, rows)[0]
    reached = {name: torch.zeros(1, L, 1, 8, dtype=torch.bool) for name in GRADIENTS}
    for row, channel in places:
        reached["dq"][0, row] |= sees[row].any()
        reached["dk"][0, sees[row]] = True
        reached["dv"][0, sees[row], :, channel] = True
    for name, where in reached.items():
        assert torch.equal(found[name].isfinite(), ~where), name
    for (row, channel), value in places.items():
        if value in (torch.inf, -torch.inf):
            assert (found["dv"][0, sees[row], 0, channel] == value).all(), "an infinity turned into NaN"
    zeroed = lambda _, grad: with_places(grad, (0.0,) * len(places))  # noqa: E731
    exact = evaluate(mo.reference.chunked_attention, case.double(), zeroed)
    assert_right({name: torch.where(reached[name], exact[name], found[name]).to(dtype) for name in found}, case, zeroed)


@pytest.mark.parametrize("path", ["half", "single"])
def test_an_overflow_costs_three_products(emulator, gradients, path):
    """No gradient is finite, as after an overflow under GradScaler; cost: sectors and shared-memory wavefronts."""
    dtype, offset = PATHS[path]
    case = chunked_attention_case(B=1, L=70, H=1, K=EDGE, V=EDGE, C=70, dtype=dtype, scale=EDGE**-0.5)

    def run(incoming):
        emulator.reset()
        found = gradients(case, offset, incoming)
        assert all(value.isfinite().any() != (incoming is not None) for value in found.values())
        return sum(site["transactions"] for site in emulator.sites(KERNELS.format("products")))

    clean, infinite = run(None), run(lambda _, grad: torch.full_like(grad, torch.inf))
    assert 2 * clean < infinite < 3.5 * clean


def test_ds_beyond_the_range_of_fp16(emulator, gradients):
    """do . v around 1e6 in some tiles, in others around 1 and 1e-3; the tiles of a chunk are in several rounds."""
    case = chunked_attention_case(B=1, L=300, H=1, K=8, V=64, C=290, dtype=torch.float16, scale=0.01)
    scales = torch.tensor([1e3, 1.0, 0.03, 1e3]).repeat_interleave(torch.tensor([60, 100, 100, 40]))
    wide = case.with_tensors(v=(case.tensors["v"] * scales[:, None, None]).half())
    incoming = lambda _, grad: grad * 200  # noqa: E731
    for offset, panels, big in ((0, 1, wide), (1, 3, wide.with_tensors(v=wide.tensors["v"].flip(1)))):
        with emulator.launch_sizes(attention_panels=panels):
            found = gradients(big, offset, incoming)
        assert_right(found, big, incoming)


@pytest.mark.parametrize("shape", [{"H": 0}, {"K": 0, "V": 0}], ids=["no-heads", "no-channels"])
def test_nothing_is_launched_for_no_elements(emulator, gradients, shape):
    found = gradients(chunked_attention_case(**shape))
    assert all(value.numel() == 0 for value in found.values())
    assert emulator.module.traffic() == {}


def test_no_sequences_with_a_nonzero_cache_pointer(emulator):
    """The state's tensors are empty, but their pointers need not be null."""

    def at_some_address(*shape, dtype=torch.float32):
        empty = DeviceTensor(torch.empty(*shape, dtype=dtype))
        empty.data_ptr = lambda: 256
        return empty

    x = emulator.tensor(torch.ones(1, 1, 1, 2))
    lse = emulator.tensor(torch.zeros(1, 1, 1))
    state = {name: at_some_address(0, 4, 1, 2) for name in ("cache_k", "cache_v")}
    state["position"] = at_some_address(0, dtype=torch.int64)
    found = {name: emulator.empty(1, 1, 1, 2) for name in GRADIENTS}
    spans = emulator.tensor(torch.zeros(0, 2, dtype=torch.int64))
    inputs = {"q": x, "k": x, "v": x, **state, "chunk_size": 4, **OPTIONS, "spans": spans, "o": x, "lse": lse, "do": x}
    emulator.launch("chunked_attention_bwd", **inputs, **found)
    assert all(torch.equal(gradient, torch.zeros(1, 1, 1, 2)) for gradient in found.values())


def stored_lines(emulator, kernel):
    """Source lines of the kernel's stores to global memory."""
    source = (ROOT / "cuda" / "chunked_attention" / "chunked_attention_bwd.cuh").read_text().split("\n")
    for site in emulator.sites(KERNELS.format(kernel)):
        file, line = site["where"].split(" < ")[0].split(":")
        if site["store"] and not site["shared"] and file == "chunked_attention_bwd.cuh":
            yield source[int(line) - 1]


@pytest.mark.parametrize("path", ["vectors", "single"])
def test_the_order_of_threads_changes_nothing(emulator, gradients, path):
    """Two chunks; the first begins in the cache."""
    dtype, offset = PATHS[path]
    sizes = {"B": 1, "L": 40, "H": 1, "K": 24, "V": 40, "C": 48}
    case = chunked_attention_case(**sizes, state=True, dropkey=0.2, dtype=dtype)
    assert_equal_in_every_order(emulator, lambda: gradients(case, offset))


def test_bytes_moved(emulator, gradients):
    """A chunk of 2 x 2 tiles, three of them computed: each reads its operands once and is written once."""
    K, V, L = 64, 192, 256
    gradients(chunked_attention_case(B=1, L=L, H=1, K=K, V=V, C=L, dtype=torch.bfloat16))
    row = {"q": K, "k": K, "v": V, "do": V, "o": V, "dq": K, "dk": K, "dv": V}
    once = {name: 2 * L * width for name, width in row.items()}
    tiles = 3 * 2 * 2 * EDGE**2  # P and dS

    prepare, scores, products = (emulator.traffic(KERNELS.format(k)) for k in ("prepare", "scores", "products"))
    assert all(prepare[name]["load_sectors"] * 32 == once[name] for name in ("o", "do"))
    assert all(scores[name]["load_sectors"] * 32 == once[name] * 3 // 2 for name in ("q", "k", "v", "do"))
    assert scores["workspace"]["store_sectors"] * 32 == tiles
    assert all(products[name]["load_sectors"] * 32 == once[name] * 3 // 2 for name in ("q", "k", "do"))
    assert all(products[name]["store_sectors"] * 32 == once[name] for name in ("dq", "dk", "dv"))
    # P is read for two slices of dv, dS for dk and for dq.
    assert products["workspace"]["load_sectors"] * 32 == 2 * tiles


def test_shared_memory_has_no_bank_conflicts(emulator, gradients):
    gradients(chunked_attention_case(B=1, L=150, H=1, K=64, V=128, C=150, dtype=torch.bfloat16))
    sites = [s for k in ("scores", "products") for s in emulator.sites(KERNELS.format(k)) if s["shared"]]
    assert len(sites) > 10
    assert all(site["transactions"] == site["ideal"] for site in sites), sites

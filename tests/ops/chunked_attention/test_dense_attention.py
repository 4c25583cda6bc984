"""Dense attention by torch's libraries: the choice of a path, and that both paths give the kernels' results.

Only CUDA tensors take these paths. Here they run on the CPU: "products" with the CPU's log-sum-exp kernel, "flash" with
torch's flash attention for the CPU, whose results have the layout of CUDA's.
"""

import importlib.util
import math

import pytest
import torch
from assertions import assert_all_close, assert_as_accurate_as, assert_matches_reference, every_case, references
from backends import every_backend
from calls import evaluate, forward
from cases import Case, chunked_attention_case, normalized_attention_case
from profiling import allocated, counted
from torch._subclasses.fake_tensor import FakeTensorMode

import megalodon_ops as mo
from megalodon_ops.ops.chunked_attention import dense_attention as module

DTYPES = {  # in float16, torch's flash attention for the CPU exceeds the bound
    "flash": (torch.float64, torch.float32, torch.bfloat16),
    "products": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}
PATHS = tuple(DTYPES)
SUMS_IN_FLOAT32 = pytest.mark.skipif(
    torch.__version__ < (2, 6), reason="torch 2.5 rounds the sums of softmax's gradient"
)


@pytest.fixture
def force_path(monkeypatch):
    """Force a path for all shapes: chunks of 40 positions have strips of 16, 16 and 8; two chunks run at once."""
    aten = torch.ops.aten

    # Takes the arguments of CUDA's op; the CPU's has no use for those that begin with _.
    def flash_bwd(do, q, k, v, o, lse, _q, _k, length, _, dropout, is_causal, *_state, scale):
        assert lse.is_contiguous() and length == q.shape[2]
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, dropout, is_causal, scale=scale
        )

    def force_path(path, dtype=torch.float64):
        two_chunks = 2 * 40 * 40 * dtype.itemsize
        for name, value in {"_STRIP": 8, "_STRIPS": 4, "_ROWS": 1, "WORKSPACE": two_chunks}.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(module, "path_of", lambda *_: path)
        if path == "flash":
            monkeypatch.setattr(module, "_flash", aten._scaled_dot_product_flash_attention_for_cpu)
            monkeypatch.setattr(module, "_flash_backward", flash_bwd)

    return force_path


def case_of(path: str, dtype: torch.dtype = torch.float64, **sizes) -> Case:
    return chunked_attention_case(
        **{"B": 2, "L": 80, "H": 2, "K": 8, "V": 8 if path == "flash" else 24, "C": 40, "dtype": dtype} | sizes
    )


def assert_accurate(case: Case) -> None:
    """Assert the bounds of every op; in 16 bits dq and dk may be off by more, as "products" rounds dP and dS."""
    found = evaluate(mo.chunked_attention, case)
    if case.dtype.itemsize > 2:
        return assert_matches_reference(found, case)
    same, exact = references(case)
    for name, (factor, floor) in {"o": (2, 0.5), "dq": (3, 0.5), "dk": (3, 0.5), "dv": (2, 0.5)}.items():
        assert_as_accurate_as(found[name], same[name], exact[name], factor=factor, floor=floor, name=name)


SIZES = {  # other types than float64 take the first three
    "chunks of two rows": {},
    "short ends": {"L": 103, "scale": 0.35},
    "a strip that is not whole": {"L": 84, "C": 42, "B": 1},
    "a chunk is longer than the row": {"L": 33, "scale": 0.1},
    "five chunks, in three rounds of at most two": {"L": 200, "B": 1, "H": 1},
    "shorter than a strip": {"L": 7, "C": 3, "B": 3},
}


@pytest.mark.parametrize("path", PATHS)
def test_results_and_gradients_are_the_references(path, force_path):
    with every_case() as each:
        for dtype in DTYPES[path]:
            force_path(path, dtype)
            for name in SIZES if dtype == torch.float64 else list(SIZES)[:3]:
                with each(dtype, name):
                    assert_accurate(case_of(path, dtype, **SIZES[name]))
        if path == "flash":
            with each("whole chunks"):
                force_path(path)
                assert_accurate(case_of(path, L=103, causal=False))
        with each("normalized_attention"):
            force_path(path)
            case = normalized_attention_case(L=80, K=8, V=8, C=40, dtype=torch.float64)
            assert_matches_reference(evaluate(mo.normalized_attention, case), case)


@SUMS_IN_FLOAT32
@every_backend
def test_products_around_each_kernel_of_the_log_sum_exp(backend, force_path):
    force_path("products", torch.bfloat16)
    assert_accurate(case_of("products", torch.bfloat16, L=100, K=16, V=32))


@pytest.mark.parametrize("path", PATHS)
def test_forward_and_backward_may_take_different_paths(path, force_path, monkeypatch):
    """A setting of torch may change between them: o and lse of all paths are the same."""
    case = case_of(path, L=103)
    force_path(path)

    def results(**path_by_direction):
        monkeypatch.setattr(module, "path_of", lambda direction, *_: path_by_direction[direction])
        return evaluate(mo.chunked_attention, case)

    expected = results(forward=None, backward=None)  # by the kernels
    for found in results(forward=None, backward=path), results(forward=path, backward=None):
        assert_all_close(found, expected, tolerance=1e-10, terms=1.0)


@SUMS_IN_FLOAT32
def test_log_probabilities_are_rounded_instead_of_scores(force_path):
    """Scores of up to 100, rounded to bfloat16, would be off by a quarter."""
    force_path("products", torch.bfloat16)
    assert_accurate(case_of("products", torch.bfloat16, K=64, scale=3.0))


OP_OPTIONS = dict(cache_k=None, cache_v=None, position=None, dropkey=0.0, dropkey_seed=None, spans=None)
OP_OPTIONS |= dict(chunk_size=40, causal=True, scale=1.0)


@pytest.mark.parametrize("L", [80, 103])
@pytest.mark.parametrize("path", PATHS)
def test_the_fake_kernels_know_shapes_and_strides(path, L, force_path):
    force_path(path, torch.float32)
    case = case_of(path, torch.float32, L=L)
    inputs = [t.clone().requires_grad_() for t in case.tensors.values()]
    fwd = torch.ops.megalodon_ops.chunked_attention_fwd.default
    torch.library.opcheck(fwd, tuple(inputs), OP_OPTIONS, test_utils="test_faketensor")
    inputs = [t.detach() for t in inputs]
    o, lse = fwd(*inputs, **OP_OPTIONS)
    bwd = torch.ops.megalodon_ops.chunked_attention_bwd.default
    torch.library.opcheck(bwd, (o, *inputs, o, lse), OP_OPTIONS, test_utils="test_faketensor")


@pytest.mark.parametrize("path", PATHS)
def test_operations_and_saved_tensors_are_those_of_the_kernels(path, force_path):
    case = case_of(path, torch.float32)
    found = []
    for choice in (path, None):
        force_path(choice, torch.float32)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
            leaves = {name: t.clone().requires_grad_() for name, t in case.tensors.items()}
            mo.chunked_attention(**leaves, **case.options)
        found.append((kept, counted(lambda: evaluate(mo.chunked_attention, case))))
    assert found[0] == found[1]


def test_autocast_does_not_change_the_paths(force_path):
    """They compute in the dtype of their tensors, not in autocast's."""
    force_path("products", torch.float16)
    case = case_of("products", torch.float16)
    expected = evaluate(mo.chunked_attention, case)
    ops = torch.ops.megalodon_ops
    with torch.autocast("cpu", torch.bfloat16):
        o, lse = ops.chunked_attention_fwd(*case.tensors.values(), **OP_OPTIONS)
        grads = ops.chunked_attention_bwd(o, *case.tensors.values(), o, lse, **OP_OPTIONS)
    assert torch.equal(o, expected["o"]) and all(grad.dtype == torch.float16 for grad in grads)


def test_the_workspace_does_not_grow_with_the_length(force_path):
    force_path("products", torch.float32)
    C, H, K, itemsize = 40, 2, 64, 4

    def workspace(L: int, backward: bool) -> int:
        case = case_of("products", torch.float32, B=1, L=L, H=H, K=K, V=128, C=C)
        q, k, v = case.tensors.values()
        options = dict(chunk_size=C, causal=True, scale=1.0)
        o, lse = module.compute("forward", "products", (q, k, v), **options)
        direction, tensors = ("backward", (o, q, k, v, o, lse)) if backward else ("forward", (q, k, v))
        kept, peak = allocated(lambda: module.compute(direction, "products", tensors, **options))
        return peak - kept

    square = 2 * C * C * itemsize  # scores of two chunks
    extended = 2 * 2 * C * (2 * K + 8) * itemsize  # q and k of two chunks with added columns, and their parts
    for backward, matrices in (False, 1), (True, 2):
        short, long = workspace(4 * C, backward), workspace(40 * C, backward)
        columns = (40 - 4) * C * H * 16 * itemsize  # at most 16 numbers for each row and head
        assert long - short <= columns
        assert square / 5 <= short <= matrices * square + extended + columns, (backward, short)


@pytest.mark.parametrize("last", [40, 33])
def test_values_that_are_not_finite_stay_in_their_strip(last, force_path):
    """As docs/semantics.md says: NaN reaches outputs from the start of its strip (v) or from its own position (k)."""
    force_path("products")
    case = case_of("products", L=80 + last)
    plain = evaluate(mo.chunked_attention, case)
    for name in ("v", "k"):
        poisoned = case.tensors[name].clone()
        poisoned[1, 61, 0] = math.nan
        found = evaluate(mo.chunked_attention, case.with_tensors(**{name: poisoned}))
        hit = ~found["o"].isfinite().all(-1)
        reached = slice(56, 80) if name == "v" else slice(61, 80)  # strips of 16 positions: 40 to 55, and from 56
        expected = torch.zeros_like(hit)
        expected[1, reached, 0] = True
        assert torch.equal(hit, expected), name
        assert torch.equal(found["o"][~hit], plain["o"][~hit])
        before = slice(0, 61 if name == "v" else 56)  # dq = dS k, over the whole strip: 0 times NaN is NaN
        assert torch.equal(found["dq"][1, before, 0], plain["dq"][1, before, 0])


def fake_tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="cuda")


SHAPES = {  # dtype, B, L, H, K, V, C: presets, small heads, both sides of each bound
    ("bfloat16", 8, 2048, 1, 256, 2048, 2048): "products",
    ("float16", 1, 16384, 4, 256, 2048, 4096): "products",
    ("bfloat16", 8, 2048, 8, 64, 64, 2048): "flash",
    ("bfloat16", 8, 2048, 4, 128, 128, 2048): "flash",
    ("bfloat16", 8, 2048, 4, 256, 256, 2048): "flash in the backward",
    ("bfloat16", 16, 1024, 4, 256, 256, 1024): None,
    ("bfloat16", 16, 1024, 1, 128, 128, 4096): "flash",
    ("bfloat16", 16, 1016, 4, 128, 128, 4096): None,
    ("bfloat16", 8, 2048, 8, 96, 96, 2048): None,
    ("bfloat16", 8, 2048, 8, 64, 128, 2048): None,
    ("bfloat16", 1, 16384, 1, 64, 2048, 8192): "products",
    ("bfloat16", 1, 16384, 1, 64, 2040, 8192): None,
    ("bfloat16", 1, 16384, 1, 56, 2048, 8192): None,
    ("bfloat16", 1, 16384, 1, 264, 2048, 2048): None,
    ("bfloat16", 1, 16384, 1, 256, 2048, 8200): None,
    ("bfloat16", 1, 16384, 1, 256, 2044, 2048): None,
    ("bfloat16", 1, 16376, 2, 256, 2048, 2048): None,
    ("bfloat16", 1, 8192, 2, 64, 64, 2048): "flash",
    ("bfloat16", 1, 16384, 1, 256, 2048, 2044): None,
    ("float64", 8, 2048, 1, 256, 2048, 2048): None,
    ("float32", 8, 2048, 1, 256, 2048, 2048): None,
}


@pytest.fixture
def flash_available(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    torch.use_deterministic_algorithms(False)


def path_of(direction, q, k, v, chunk_size=2048, causal=True, scale=1.0):
    return module.path_of(direction, q, k, v, chunk_size, causal, scale)


def test_shapes_take_their_path(flash_available):
    with FakeTensorMode(), every_case() as each:
        for (dtype, B, L, H, K, V, C), path in SHAPES.items():
            with each(dtype, B, L, H, K, V, C):
                q, v = (fake_tensor(B, L, H, width, dtype=getattr(torch, dtype)) for width in (K, V))
                forward = None if path == "flash in the backward" else path
                backward = {"products": None, "flash in the backward": "flash"}.get(path, path)
                assert path_of("forward", q, q, v, chunk_size=C) == forward
                assert path_of("backward", q, q, v, chunk_size=C) == backward


def test_largest_chunks_fit_the_workspace():
    for shapes in module.TABLE:
        longest, itemsize = shapes.chunk[1], shapes.dtypes[0].itemsize
        if longest < math.inf:
            assert longest**2 * itemsize <= module.WORKSPACE < (longest + 8) ** 2 * itemsize


def test_settings_of_torch_decide(flash_available):
    """Scale and causal do, too: paths need a scale of at least 2**-10, and "products" needs causal."""
    with FakeTensorMode():
        q, v = fake_tensor(8, 2048, 8, 64), fake_tensor(8, 2048, 8, 2048)
        assert path_of("forward", q, q, q) == "flash"
        assert all(path_of("forward", q, q, v, scale=scale) is None for scale in (-1.0, 0.0, 2.0**-11))
        assert path_of("forward", q, q, q, causal=False) == "flash"
        assert path_of("forward", q, q, v, causal=False) is None
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert path_of("forward", q, q, q) is None
        try:
            torch.use_deterministic_algorithms(True)
            assert path_of("forward", q, q, q) is None
            assert path_of("forward", q, q, v) is None
        finally:
            torch.use_deterministic_algorithms(False)
        try:
            torch.set_float32_matmul_precision("high")
            for direction in module.DIRECTIONS:
                assert path_of(direction, q.float(), q.float(), v.float()) == "products"
        finally:
            torch.set_float32_matmul_precision("highest")
        assert path_of("forward", q.float(), q.float(), v.float()) is None


def test_calls_that_are_not_dense_keep_the_kernels(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "path_of", lambda *_: asked.append(1))
    case = chunked_attention_case(B=1, L=9, state=True)
    plain = case.with_options(state=None)
    forward(mo.chunked_attention, plain)
    assert len(asked) == 1
    for changes in {"cu_seqlens": torch.tensor([0, 9])}, {"lengths": torch.tensor([8])}, {"dropkey": 0.1}:
        evaluate(mo.chunked_attention, plain.with_options(**changes))
    evaluate(mo.chunked_attention, case)
    assert len(asked) == 1


def test_wrong_arguments_keep_the_kernels(flash_available):
    with FakeTensorMode():
        q = fake_tensor(8, 2048, 8, 64)
        half = fake_tensor(8, 2048, 8, 64, dtype=torch.float16)
        meta = torch.empty(1, device="meta").expand(q.shape)
        fewer, one_head, row = fake_tensor(1, 2048, 8, 64), fake_tensor(8, 2048, 1, 64), fake_tensor(2048, 8, 64)
        for k, v in (fewer, q), (q, fewer), (q, one_head), (q, row), (half, q), (q, half), (q, meta):
            assert path_of("forward", q, k, v) is None
        assert path_of("forward", row, row, row) is None


def test_arguments_of_torchs_flash_attention():
    """The meta kernel of CUDA's flash attention takes them and gives the expected shapes."""
    q = torch.empty(2, 40, 3, 64, dtype=torch.bfloat16, device="meta")
    o, lse = module._flash_fwd(q, q, q, 1.0, causal=True)
    assert o.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    assert o.is_contiguous() and lse.is_contiguous()
    grads = module._flash_bwd(o, q, q, q, o, lse, 1.0, causal=True)
    assert all(grad.shape == q.shape and grad.is_contiguous() for grad in grads)


def test_environment_variable_keeps_the_kernels(monkeypatch):
    spec = importlib.util.spec_from_file_location("megalodon_ops.ops.chunked_attention.dense_again", module.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("MEGALODON_OPS_ATTENTION", "kernels")
    spec.loader.exec_module(again)
    assert again.TABLE == () and module.TABLE
    monkeypatch.setenv("MEGALODON_OPS_ATTENTION", "flash")
    with pytest.raises(ImportError, match="megalodon_ops: MEGALODON_OPS_ATTENTION must be auto or kernels, got flash"):
        spec.loader.exec_module(again)

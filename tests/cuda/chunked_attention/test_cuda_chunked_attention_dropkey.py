"""DropKey's random words for rows, columns, heads and sequences beyond 16 bits; tiles of which all keys are dropped."""

import pytest
import torch
from assertions import assert_close
from emulated_attention import arguments_of, assert_accurate, run, scaled_case

from megalodon_ops import AttentionState
from megalodon_ops.ops.common.philox import dropkey_mask

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
FAR = 2**18 + 21  # a word of the mask has four columns: columns / 4 is beyond 2^16
MANY = 32 * 2049


def last_head(case, rows: int):
    """o, dk and dv in float64, for do = o, of the last sequence's last head and last `rows` rows, which are a chunk."""
    q, k, v = (case.tensors[name][-1, -rows:, -1].double() for name in "qkv")
    i = j = torch.arange(rows) + case.tensors["q"].shape[1] - rows
    k.requires_grad_()
    v.requires_grad_()
    B, _, heads, _ = case.tensors["q"].shape
    seed, s = int(case.options["dropkey_seed"]), B - 1
    hidden = (j > i[:, None]) | dropkey_mask(case.options["dropkey"], seed, s, heads, i, j)[-1]
    scores = (case.options["scale"] * q @ k.T).masked_fill(hidden, -torch.finfo(torch.float64).max)
    o = scores.softmax(-1) * ~hidden @ v
    dk, dv = torch.autograd.grad(o, (k, v), o.detach())
    return {"o": o.detach(), "dk": dk, "dv": dv}


SHAPES = {"far-rows": (1, FAR, 1, 60), "many-heads": (1, 2, MANY, 4), "many-sequences": (MANY, 2, 1, 4)}
SLOW = {("far-rows", F32), ("many-heads", F32), ("many-sequences", BF16)}
# Both products take rows; heads and sequences each one of them, and the other among the slow tests.
WORDS = [
    pytest.param(shape, dtype, marks=pytest.mark.slow if (shape, dtype) in SLOW else ())
    for shape in SHAPES
    for dtype in (BF16, F32)
]


@pytest.mark.parametrize(("shape", "dtype"), WORDS, ids=str)
def test_words_beyond_16_bits(emulator, shape, dtype):
    """Only the last blocks run, and their rows are compared. The last round of the backward is full."""
    B, L, H, C = SHAPES[shape]
    panels = MANY // 32 if L == 2 else L // C + 1
    case = scaled_case(B=B, L=L, H=H, K=8, V=8, C=C, dtype=dtype, dropkey=0.4)
    rows = L - (L - 1) // C * C  # of the last chunk
    with emulator.only_bounds(ends=4 if L > 2 else 2):
        found = run(emulator, case)
        o = torch.zeros_like(case.tensors["v"])
        o[-1, -rows:, -1] = found["o"][-1, -rows:, -1]
        dq, dk, dv = (torch.empty_like(case.tensors[name]) for name in "qkv")
        inputs = arguments_of(case) | {"o": o, "lse": found["lse"], "do": o}
        with emulator.launch_sizes(attention_panels=panels):
            emulator.call("chunked_attention_bwd", **inputs, dq=dq, dk=dk, dv=dv)
    expected = last_head(case, rows)
    for name, actual in ("o", found["o"]), ("dk", dk), ("dv", dv):
        tolerance = 2e-2 if dtype == BF16 else 1e-5
        assert_close(actual[-1, -rows:, -1].double(), expected[name], tolerance=tolerance, terms=1.0, name=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_words_of_steps_beyond_16_bits(emulator, shape):
    """A step has at most 8 tokens a sequence on average, so most sequences beside a long one are empty."""
    B, L, H, _ = SHAPES[shape]
    C = 20
    case = scaled_case(B=B, L=L, H=H, K=8, V=8, C=C, dtype=F32, dropkey=0.4)
    S = B if L == 2 else L // 8 + 1
    cache = torch.zeros(S, C, H, 8)
    state = AttentionState(cache, cache.clone(), torch.zeros(S, dtype=torch.int64))
    packed = {} if L == 2 else {"cu_seqlens": torch.tensor([0] * S + [L])}
    with emulator.only_bounds(ends=1):
        found = run(emulator, case.with_options(state=state, **packed))["o"]
    if packed:  # the mask's word has the number of the sequence
        case = case.with_tensors(**{name: t.expand(S, *t.shape[1:]) for name, t in case.tensors.items()})
    expected = last_head(case, L - (L - 1) // C * C)["o"]
    assert_close(found[-1, -1:, -1].double(), expected[-1:], tolerance=1e-5, terms=1.0)


def test_a_dropped_tile_has_no_maximum(emulator):
    """Scores near -200: relative to a maximum of 0, all exponentials would vanish. V has three slices of 512 columns."""
    case = scaled_case(B=3, L=1, H=2, K=8, V=1032, C=70, dtype=BF16, state=True, dropkey=0.9)
    q = case.tensors["q"].clone()
    k = case.tensors["k"].clone()
    state = case.options["state"]
    cache = state.k.clone()
    q[..., 0] = 8
    k[..., 0] = -25 / case.options["scale"]
    cache[..., 0] = k[..., 0].unique()
    case = case.with_tensors(q=q, k=k).with_options(state=state._replace(k=cache))
    with emulator.launch_sizes(attention_tile=8):
        assert_accurate(run(emulator, case), case)

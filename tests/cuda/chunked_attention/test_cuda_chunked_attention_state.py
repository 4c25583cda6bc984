"""States of chunked_attention on emulated CUDA kernels: copied, in place, half in place; bytes moved."""

import pytest
import torch
from assertions import assert_bit_equal
from calls import forward
from cases import chunked_attention_case
from emulated_attention import update_state

import megalodon_ops as mo
from megalodon_ops import AttentionState

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

STATES = {
    "dense": {"B": 3, "L": 5, "H": 2, "K": 8, "V": 12},
    "many-chunks": {"B": 2, "L": 29, "H": 1, "K": 3, "V": 5},
    "padded": {"B": 3, "L": 9, "H": 1, "K": 8, "V": 8, "lengths": [9, 0, 2]},
    "packed": {"B": 1, "L": 20, "H": 1, "K": 8, "V": 8, "cu_seqlens": [2, 3, 3, 15, 18]},
}


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("shape", STATES.values(), ids=STATES)
def test_state(emulator, shape, dtype, offset):
    """A copied state equals the reference's; in place, rows up to the position do, and other rows do not change."""
    case = chunked_attention_case(**shape, C=6, dtype=dtype, state=True)
    state = case.options["state"]
    expected = forward(mo.reference.chunked_attention, case)
    names = {"k": "state.k", "v": "state.v", "position": "state.position"}
    copied = [torch.empty_like(t) for t in state]
    update_state(emulator, case, state, copied, offset)
    assert_bit_equal(dict(zip(names, copied, strict=True)), {name: expected[key] for name, key in names.items()})

    before = AttentionState(*(t.clone() for t in state))
    kept = AttentionState(*(t.clone() for t in state))
    update_state(emulator, case, kept, kept, offset)
    assert torch.equal(kept.position, expected["state.position"])
    for s, (old, new) in enumerate(zip(before.position.tolist(), kept.position.tolist(), strict=True)):
        for name, value in (("k", kept.k), ("v", kept.v)):
            assert torch.equal(value[s, :new], expected[names[name]][s, :new])
            untouched = slice(max(old, new), None)
            assert torch.equal(value[s, untouched].nan_to_num(7), getattr(before, name)[s, untouched].nan_to_num(7))


@pytest.mark.parametrize("in_place", ["k", "v"])
def test_a_state_half_in_place(emulator, in_place):
    case = chunked_attention_case(B=2, L=2, H=1, K=8, V=8, C=6, dtype=F32, state=True)
    state = case.options["state"]
    expected = AttentionState(*map(torch.empty_like, state))
    update_state(emulator, case, state, expected)
    old = AttentionState(*(t.clone() for t in state))
    new = AttentionState(*map(torch.empty_like, old))._replace(**{in_place: getattr(old, in_place)})
    update_state(emulator, case, old, new)
    copied = "v" if in_place == "k" else "k"
    assert torch.equal(getattr(new, copied), getattr(expected, copied))
    for s, position in enumerate(expected.position.tolist()):
        assert torch.equal(getattr(new, in_place)[s, :position], getattr(expected, in_place)[s, :position])


def test_a_state_in_place_after_no_tokens(emulator):
    case = chunked_attention_case(B=2, L=0, H=1, K=8, V=8, C=6, dtype=F32, state=True)
    state = AttentionState(*(t.clone() for t in case.options["state"]))
    update_state(emulator, case, state, state)
    assert torch.equal(state.position, case.options["state"].position)


def test_one_token_in_place_is_one_launch(emulator):
    """The next position is in the same chunk, or 0 of the next one; a position beyond the chunk size gives -1."""
    case = chunked_attention_case(B=4, L=1, H=1, K=8, V=8, C=6, dtype=F32, state=True)
    state = case.options["state"]._replace(position=torch.tensor([5, 2, 0, 6]))
    update_state(emulator, case, state, state)
    assert state.position.tolist() == [0, 3, 1, -1]
    assert emulator.module.launched() == {"chunked_attention_state_kernel": 1}


def test_bytes_moved_by_the_state(emulator):
    """In place, only new rows move; a copy also moves old rows and zeros. The first sequence ends its chunk."""
    case = chunked_attention_case(B=3, L=1, H=1, K=64, V=256, C=40, dtype=BF16, state=True)
    state = case.options["state"]
    in_place = AttentionState(*(t.clone() for t in state))
    update_state(emulator, case, in_place, in_place)
    traffic = emulator.traffic("chunked_attention_state_kernel")
    for name, width in (("k", 64), ("v", 256)):
        assert traffic[name]["load_sectors"] * 32 == traffic[f"cache_{name}"]["store_sectors"] * 32 == 2 * width * 2
        assert traffic[f"cache_{name}"]["load_sectors"] == 0
    emulator.reset()
    copied = [torch.empty_like(t) for t in state]
    update_state(emulator, case, state, copied)
    traffic = emulator.traffic("chunked_attention_state_kernel")
    rows = int(state.position[1:].sum())
    for name, width in (("k", 64), ("v", 256)):
        assert traffic[f"cache_{name}"]["load_sectors"] * 32 == rows * width * 2
        assert traffic[f"cache_{name}_out"]["store_sectors"] * 32 == 3 * 40 * width * 2

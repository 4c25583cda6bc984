"""Every op on emulated CUDA kernels: misaligned tensors, all orders of threads, many sequences. test_ops.py has the rest."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bit_equal, assert_close
from cases import BUILDERS, OPS, WITH_STATE, evaluate
from cuda_emulator.emulator import BINDINGS, Emulator
from hypothesis import given, settings
from strategies import CASES
from test_ops import assert_matches_reference
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops import _C

ORDERS = ("forward", "reverse", "random")


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_ops_on_misaligned_memory_in_every_order(emulated_module, op):
    """The public function reaches kernel, launcher and binding. Aligned memory: test_ops.py."""
    emulator = Emulator(emulated_module)

    @settings(max_examples=5)
    @given(case=CASES[op]())
    def check(case):
        results = []
        for order in ORDERS:
            emulator.set_order(order)
            with emulator.replacing(_C, offset=1):
                results.append(evaluate(getattr(mo, op), case))
        assert_matches_reference(results[0], case)
        for result in results[1:]:
            assert_bit_equal(result, results[0])

    check()


ALIGNED = {  # sizes and addresses that allow the widest accesses, and a scan as well as its last state
    "cema": [{"B": 1, "L": 70, "D": 8, "N": 4, "state": True}, {"B": 2, "L": 2, "D": 8, "N": 4, "state": True}],
    "timestep_norm": [{"B": 1, "L": 70, "G": 2, "width": 32, "count": 2}],
    "cema_end_state": [{"B": 1, "L": 70, "D": 8, "N": 4}],
    "timestep_norm_end_state": [{"B": 1, "L": 70, "G": 2, "width": 32}],
    "normalized_qk": [{"K": 16, "position": True}, {"K": 512, "position": True}],
    "chunked_attention": [
        {"B": 2, "L": 9, "H": 1, "K": 16, "V": 16, "C": 20, "state": True, "dropkey": 0.1},
        {"B": 2, "L": 17, "H": 1, "K": 16, "V": 16, "C": 20, "state": True},
        {"B": 2, "L": 2, "H": 1, "K": 16, "V": 16, "C": 20, "state": True},
    ],
}
TENSORS = {op: sorted({name for binding, names in BINDINGS.items() if binding.startswith(op)
                       for name in names.replace("->", "").split()}) for op in ALIGNED}  # fmt: skip


# Attention in float32 has kernels of its own.
ALONE = [*((op, torch.bfloat16) for op in ALIGNED), ("chunked_attention", torch.float32)]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "dtype"), ALONE, ids=str)
def test_each_tensor_alone_may_be_misaligned(emulator, op, dtype):
    """A launcher looks at the address of every tensor that its kernels read or write in vectors."""
    for shape in ALIGNED[op]:
        case, moved = BUILDERS[op](dtype=dtype, **shape), set()
        call = emulator.call

        def record(name, *arguments, offset, call=call, moved=moved):
            labels = BINDINGS[name].replace("->", "").split()
            given = (name for name, a in zip(labels, arguments, strict=True) if isinstance(a, Tensor))
            moved.update(name for name in given if name in offset)
            call(name, *arguments, offset=offset)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(emulator, "call", record)
            for name in TENSORS[op]:
                with emulator.replacing(_C, offset={name: 1}):
                    results = evaluate(getattr(mo, op), case)
                if name in moved:
                    assert_matches_reference(results, case)
        assert len(moved) >= (7 if "end_state" in op else 10), moved


# Attention that goes on from a state, a few tokens a sequence, takes other kernels than attention from the start.
@pytest.mark.slow
@pytest.mark.parametrize(("op", "goes_on"), [*((op, True) for op in ALIGNED), ("chunked_attention", False)])
def test_more_sequences_than_1024(emulator, op, goes_on):
    """Each token finds its sequence: of 1,100 the first and the last have tokens, those between none."""
    lengths = [2] + [0] * 1069 + [(s % 3 + 1) // 2 for s in range(30)]
    lengths[1090] = 40
    cu_seqlens = [sum(lengths[:s]) for s in range(1101)]
    small = {
        "cema": {"D": 2, "N": 1}, "timestep_norm": {"G": 1, "width": 2}, "cema_end_state": {"D": 2, "N": 1},
        "timestep_norm_end_state": {"G": 1, "width": 2}, "normalized_qk": {"H": 1, "K": 2},
    }  # fmt: skip
    shape = small.get(op, {"H": 1, "K": 2, "V": 2, "C": 3})
    with_state = WITH_STATE.get(op, {}) if goes_on else {}
    case = BUILDERS[op](B=1, L=cu_seqlens[-1] + 3, cu_seqlens=cu_seqlens, **shape, **with_state)
    with emulator.replacing(_C):
        results = evaluate(getattr(mo, op), case)
    expected = evaluate(getattr(mo, op), case)
    for name, value in results.items():
        assert_close(value, expected[name], tolerance=1e-4, terms=case.terms, name=name)

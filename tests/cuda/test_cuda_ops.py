"""Every op on emulated CUDA kernels: misaligned tensors, orders of threads, many sequences. See also test_ops.py."""

import itertools

import pytest
import torch
from assertions import assert_close, assert_matches_reference, every_case
from calls import OPS, evaluate
from cases import BUILDERS, WITH_STATE
from emulated import assert_equal_in_every_order, run_emulated
from emulator.device import Emulator
from hypothesis import given, settings
from strategies import CASES
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops import _C


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_ops_on_misaligned_memory_in_every_order(emulated_module, op):
    """All orders give equal bits. Aligned memory: test_ops.py."""
    emulator = Emulator(emulated_module)

    @settings(max_examples=5)
    @given(case=CASES[op]())
    def check(case):
        results = assert_equal_in_every_order(emulator, lambda: run_emulated(emulator, case, offset=1))
        assert_matches_reference(results, case)

    check()


CUDA = {name: op.cuda for name, op in OPS.items() if op.cuda}

# Attention in float32 has its own forward kernel; its backward has no vectors.
MISALIGNED = [*((op, torch.bfloat16) for op in CUDA), ("chunked_attention", torch.float32)]


@pytest.mark.parametrize(("op", "dtype"), MISALIGNED, ids=str)
def test_each_tensor_alone_may_be_misaligned(emulator, monkeypatch, op, dtype):
    """A launcher checks the address of every tensor that its kernels access in vectors."""
    call = emulator.call
    launches = []

    def record(name, *arguments, offset):
        call(name, *arguments, offset=offset)
        launches.append((name, arguments))

    monkeypatch.setattr(emulator, "call", record)
    for shape in CUDA[op].aligned:
        case = BUILDERS[op](dtype=dtype, **shape)
        with emulator.replacing(_C):
            assert_matches_reference(evaluate(getattr(mo, op), case), case)
    for name, arguments in launches:
        if (name, dtype) == ("chunked_attention_bwd", torch.float32):
            continue
        inputs, results = emulator.bindings[name]
        given, expected = arguments[: len(inputs)], arguments[len(inputs) :]
        for label, argument in zip(inputs + results, arguments, strict=True):
            if isinstance(argument, Tensor):
                found = [torch.empty_like(t) if isinstance(t, Tensor) else t for t in expected]
                call(name, *given, *found, offset={label: 1})
                for result, actual, right in zip(results, found, expected, strict=True):
                    if isinstance(actual, Tensor):
                        tolerance = 2e-2 if actual.dtype == torch.bfloat16 else 1e-4
                        assert_close(actual, right, tolerance=tolerance, terms=case.terms, name=f"{label}: {result}")


TOKENS = {  # sizes with every path of 16-bit results
    "cema": (dict(B=2, L=40, D=40, N=4), dict(B=30, L=1, D=40, N=4)),
    "cema_end_state": (dict(B=2, L=40, D=40, N=4),),
    "timestep_norm": (dict(B=2, L=40, G=3, width=16), dict(B=2, L=40, G=3, width=5)),
    "timestep_norm_end_state": (dict(B=2, L=40, G=3, width=16),),
    "normalized_qk": (dict(B=2, L=20, H=2, K=64), dict(B=1, L=9, H=1, K=520)),
    "chunked_attention": (dict(B=1, L=70, H=2, K=16, V=24, C=70, scale=0.25),),
}
SHARES = {"o": 0.64, "dq": 0.57, "dk": 0.57, "dv": 0.57}  # P and dS are rounded to 16 bits: 59 % to 67 % are equal


@pytest.mark.parametrize("op", CUDA)
def test_16_bit_results_are_float32_results_rounded_once(emulator, op):
    """At least 99 % of the elements have the same bits; of attention's, the shares above."""
    with every_case() as each, emulator.replacing(_C):
        for sizes, dtype in itertools.product(TOKENS[op], (torch.bfloat16, torch.float16)):
            case = BUILDERS[op](dtype=dtype, **sizes)
            wide = case.with_tensors(**{name: case.tensors[name].float() for name in OPS[op].tokens})
            found, exact = (evaluate(getattr(mo, op), c) for c in (case, wide))
            for name, value in found.items():
                if value.dtype == dtype:
                    with each(sizes, dtype, name):
                        equal = (value == exact[name].to(dtype)).double().mean().item()
                        assert equal >= SHARES.get(name, 0.99), f"{equal:.4f} of the elements have the same bits"


# Attention with an initial state and few tokens takes other kernels than attention without.
@pytest.mark.slow
@pytest.mark.parametrize(("op", "from_state"), [*((op, True) for op in CUDA), ("chunked_attention", False)])
def test_more_sequences_than_1024(emulator, op, from_state):
    """Of 1,100 sequences only the first and some of the last 30 have tokens."""
    lengths = [2] + [0] * 1069 + [0, 1, 1] * 10
    lengths[1090] = 40
    cu_seqlens = list(itertools.accumulate(lengths, initial=0))
    with_state = WITH_STATE.get(op, {}) if from_state else {}
    case = BUILDERS[op](B=1, L=cu_seqlens[-1] + 3, cu_seqlens=cu_seqlens, **CUDA[op].smallest, **with_state)
    with emulator.replacing(_C):
        results = evaluate(getattr(mo, op), case)
    expected = evaluate(getattr(mo, op), case)
    for name, value in results.items():
        assert_close(value, expected[name], tolerance=1e-4, terms=case.terms, name=name)

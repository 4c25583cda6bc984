"""Doors, the conditions by which launchers choose kernels: for each term, a case in which only that term is false.

A wrong kernel may be right at the sizes of other tests. Choices by the sizes of large tensors: test_cuda_large_tensors.py;
by each tensor's address: test_cuda_ops.py; CEMA on tensor cores: test_cuda_cema_tensor*.py.
"""

import pytest
import torch
from assertions import assert_matches_reference, every_case
from calls import evaluate
from cases import BUILDERS

import megalodon_ops as mo
from megalodon_ops import _C

BF16, F32 = torch.bfloat16, torch.float32
CEMA, ATTENTION, QK, NORM = "cema", "chunked_attention", "normalized_qk", "timestep_norm"

# Sizes, and kernels: the first is launched, the others are not.
STEP, SCAN = ("cema_step_kernel",), ("cema_output_kernel", "cema_step_kernel")
FEW = ("chunked_attention_step_kernel", "chunked_attention_fwd_mma_kernel", "chunked_attention_fwd_fma_kernel")
MMA = ("chunked_attention_fwd_mma_kernel", "chunked_attention_fwd_fma_kernel", "chunked_attention_step_kernel")
FMA = ("chunked_attention_fwd_fma_kernel", "chunked_attention_fwd_mma_kernel", "chunked_attention_step_kernel")
WARPS = ("normalized_qk_fwd_warp_kernel", "normalized_qk_fwd_block_kernel")
BLOCKS = WARPS[::-1]
WARPS_BWD = ("normalized_qk_bwd_warp_kernel", "normalized_qk_bwd_block_kernel")
BLOCKS_BWD = WARPS_BWD[::-1]
CARRIED, ALONE = ("timestep_norm_carry_kernel",), (None, "timestep_norm_carry_kernel")
EMPTY, NONE_EMPTY = ("timestep_norm_fwd_empty_kernel",), (None, "timestep_norm_fwd_empty_kernel")
DOORS = {
    # cema_fwd.cu: T <= 64 S and T D N <= 2^22 (or T <= 4 S, at large sizes), at most 32 modes, some sequence
    "64-tokens-a-sequence": (CEMA, dict(B=2, L=64, D=2, N=2), STEP),
    "65-tokens-a-sequence": (CEMA, dict(B=2, L=65, D=2, N=2), SCAN),
    "32-modes": (CEMA, dict(B=2, L=2, D=3, N=32, state=True), STEP),
    "33-modes": (CEMA, dict(B=2, L=2, D=3, N=33, state=True), SCAN),
    "64-modes": (CEMA, dict(B=1, L=3, D=3, N=64), SCAN),
    "odd-channels": (CEMA, dict(B=1, L=70, D=3, N=2, dtype=BF16), SCAN),
    # chunked_attention_fwd.cu: a state, at most 8 tokens a sequence; K up to 256; vectors of both K and V
    "8-tokens-on-a-state": (ATTENTION, dict(L=8, K=8, V=8, C=20, state=True, dtype=BF16), FEW),
    "9-tokens-on-a-state": (ATTENTION, dict(L=9, K=8, V=8, C=20, state=True, dtype=BF16), MMA),
    "no-state": (ATTENTION, dict(L=8, K=8, V=8, C=20, dtype=BF16), MMA),
    "no-values": (ATTENTION, dict(L=8, K=8, V=0, C=20, state=True, dtype=BF16), MMA),
    "wide-types": (ATTENTION, dict(L=9, K=8, V=8, C=20, dtype=F32), FMA),
    "256-channels": (ATTENTION, dict(L=9, H=1, K=256, V=8, C=20, scale=0.06, dtype=BF16), MMA),
    "264-channels": (ATTENTION, dict(L=9, H=1, K=264, V=8, C=20, scale=0.06, dtype=BF16), FMA),
    "elements-of-keys": (ATTENTION, dict(L=20, H=1, K=12, V=16, C=20, dtype=BF16), MMA),
    "elements-of-values": (ATTENTION, dict(L=20, H=1, K=16, V=12, C=20, dtype=BF16), MMA),
    "steps-of-elements-of-keys": (ATTENTION, dict(L=2, H=1, K=12, V=16, C=20, state=True, dtype=BF16), FEW),
    "steps-of-elements-of-values": (ATTENTION, dict(L=2, H=1, K=16, V=12, C=20, state=True, dtype=BF16), FEW),
    # normalized_qk_fwd.cu and normalized_qk_bwd.cu: at most 32 vectors a warp, and a lane's vectors in the backward
    "a-warp-of-vectors": (QK, dict(L=9, H=1, K=256, dtype=BF16), WARPS),
    "33-vectors": (QK, dict(L=9, H=1, K=264, dtype=BF16), BLOCKS),
    "vectors-of-a-backward's-warp": (QK, dict(L=9, H=1, K=256, dtype=BF16), WARPS_BWD),
    "vectors-of-a-backward's-block": (QK, dict(L=9, H=1, K=264, dtype=BF16), BLOCKS_BWD),
    "floats-of-a-backward's-warp": (QK, dict(L=9, H=1, K=256), WARPS_BWD),
    "floats-of-a-backward's-block": (QK, dict(L=9, H=1, K=260), BLOCKS_BWD),
    "elements-of-heads": (QK, dict(L=9, H=2, K=12, dtype=BF16), WARPS),
    "a-warp-of-elements": (QK, dict(L=9, H=1, K=62, dtype=BF16), WARPS),
    "33-pairs-of-elements": (QK, dict(L=9, H=1, K=66, dtype=BF16), BLOCKS),
    # timestep_norm.cuh: tiles of 64 tokens depend if sequences cross them; states of sequences without tokens
    "rows-end-with-tiles": (NORM, dict(B=2, L=64, G=2, width=4), ALONE),
    "rows-cross-tiles": (NORM, dict(B=3, L=48, G=2, width=4), CARRIED),
    "one-short-tile": (NORM, dict(B=3, L=20, G=2, width=4), ALONE),
    "one-packed-tile": (NORM, dict(B=1, L=64, G=2, width=4, cu_seqlens=[0, 30, 64]), ALONE),
    "two-packed-tiles": (NORM, dict(B=1, L=128, G=2, width=4, cu_seqlens=[0, 64, 128]), CARRIED),
    "lengths-of-tiles": (NORM, dict(B=2, L=64, G=2, width=4, lengths=[64, 3]), ALONE),
    "dense-rows": (NORM, dict(B=2, L=3, G=2, width=4), NONE_EMPTY),
    "padded-rows": (NORM, dict(B=2, L=3, G=2, width=4, lengths=[3, 0]), EMPTY),
    "packed-rows": (NORM, dict(B=1, L=3, G=2, width=4, cu_seqlens=[0, 0, 3]), EMPTY),
    "vectors-of-a-group": (NORM, dict(B=1, L=9, G=2, width=12, dtype=BF16), ALONE),
}


@pytest.mark.parametrize("op", [CEMA, ATTENTION, QK, NORM])
def test_a_term_that_is_false_chooses_another_kernel(emulator, op):
    with every_case() as each:
        for name, (its_op, sizes, (chosen, *others)) in DOORS.items():
            if its_op != op:
                continue
            with each(name):
                case = BUILDERS[op](**sizes)
                emulator.reset()
                with emulator.replacing(_C):
                    found = evaluate(getattr(mo, op), case)
                launched = emulator.launched()
                assert (chosen is None or chosen in launched) and not launched & set(others), launched
                assert_matches_reference(found, case)

"""Emulated CUDA kernels of normalized_qk: every path, orders of threads, bytes moved, bank conflicts.

The public op on these kernels: test_ops.py.
"""

import pytest
import torch
from assertions import assert_matches_reference
from calls import forward
from cases import normalized_qk_case
from emulated import assert_equal_in_every_order, assert_no_bank_conflicts, run_emulated

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KEY_DIMS = {  # K for vectors of v elements
    "idle-lanes": lambda v: 3 * v,
    "a-warp-of-vectors": lambda v: 32 * v,
    "two-vectors-a-lane": lambda v: 64 * v,
    "a-block-of-vectors": lambda v: 67 * v,
}


@pytest.mark.parametrize("key_dim", KEY_DIMS.values(), ids=KEY_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_division_of_a_head(emulator, dtype, key_dim):
    """Two parts of the backward; warps and blocks with several tokens, but not full."""
    case = normalized_qk_case(B=1, L=29, H=1, K=key_dim(16 // dtype.itemsize), C=7, dtype=dtype, cu_seqlens=[1, 9, 27])
    assert_matches_reference(run_emulated(emulator, case), case)


@pytest.mark.parametrize(
    ("key_dim", "dtype"), [*zip((6, 98, 134, 514), DTYPES, strict=True), (64, torch.bfloat16)], ids=str
)
def test_misaligned_tensors(emulator, dtype, key_dim):
    """Pairs of elements replace the vectors of aligned tensors."""
    case = normalized_qk_case(B=1, L=19, H=2, K=key_dim, C=7, dtype=dtype, position=True, lengths=[18])
    assert_matches_reference(run_emulated(emulator, case, offset=1), case)


@pytest.mark.parametrize("key_dim", [32, 520])
def test_orders_of_threads_give_equal_bits(emulator, key_dim):
    case = normalized_qk_case(B=3, L=5, H=1, K=key_dim, C=3, lengths=[5, 0, 2], dtype=torch.bfloat16)
    assert_equal_in_every_order(emulator, lambda: run_emulated(emulator, case))


WIDE = [(torch.bfloat16, 256), (torch.float32, 128), (torch.float32, 64)]


def assert_moved_once(emulator, kernel: str, nbytes: int, **names: str) -> None:
    """Assert that each named buffer is loaded, or stored, once, in whole sectors."""
    traffic = emulator.traffic(kernel)
    for name, access in names.items():
        assert traffic[name][f"{access}_sectors"] * 32 == traffic[name][f"{access}_footprint"] == nbytes, name


@pytest.mark.parametrize(("dtype", "key_dim"), WIDE)
def test_bytes_moved_by_the_forward(emulator, dtype, key_dim):
    case = normalized_qk_case(B=2, L=40, H=2, K=key_dim, C=16, dtype=dtype)
    run_emulated(emulator, case, forward)
    kernel = "normalized_qk_fwd_warp_kernel"
    assert_moved_once(emulator, kernel, case.tensors["z"].nbytes, z="load", q="store", k="store")
    traffic = emulator.traffic(kernel)
    every_8_tokens = case.tensors["gamma"].nbytes * 2 * 40 // 8
    assert traffic["gamma"]["load_bytes"] == traffic["beta"]["load_bytes"] == every_8_tokens


@pytest.mark.parametrize(("dtype", "key_dim"), [*WIDE, (torch.float32, 256)])
def test_bytes_moved_by_the_backward(emulator, dtype, key_dim):
    """Each part of 16 tokens also writes a share of dgamma and dbeta."""
    B, L, H = 2, 40, 2
    case = normalized_qk_case(B=B, L=L, H=H, K=key_dim, C=16, dtype=dtype)
    run_emulated(emulator, case)
    kernel = "normalized_qk_bwd_warp_kernel"
    shares = B * L // 16 * 4 * H * key_dim * 4  # dgamma and dbeta of queries and of keys, in float32
    assert_moved_once(emulator, kernel, case.tensors["z"].nbytes, z="load", dq="load", dk="load", dz="store")
    assert_moved_once(emulator, kernel, shares, workspace="store")
    assert_moved_once(emulator, "sum_shares_kernel", shares, workspace="load")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bank_conflicts(emulator, dtype):
    run_emulated(emulator, normalized_qk_case(B=1, L=20, H=1, K=256, dtype=dtype))
    assert_no_bank_conflicts(emulator, "normalized_qk_bwd_warp_kernel")


@pytest.mark.parametrize(("dtype", "key_dim", "kernel"), [(torch.float32, 128, "warp"), (torch.bfloat16, 264, "block")])
def test_the_boundary_between_the_kernels(emulator, dtype, key_dim, kernel):
    case = normalized_qk_case(K=key_dim, dtype=dtype)
    run_emulated(emulator, case, forward)
    assert emulator.launched() == {f"normalized_qk_fwd_{kernel}_kernel"}


@pytest.mark.parametrize("name", ["z", "gamma", "beta", "rotary", "q", "k", "dq", "dk", "dz"])
def test_one_unaligned_tensor_leads_to_narrow_accesses(emulator, monkeypatch, name):
    allocate = emulator._allocate
    monkeypatch.setattr(
        emulator, "_allocate", lambda shape, dtype, label, _: allocate(shape, dtype, label, label == name)
    )
    case = normalized_qk_case(K=32, dtype=torch.bfloat16)
    assert_matches_reference(run_emulated(emulator, case), case)


@pytest.mark.parametrize("sizes", [{"L": 0}, {"B": 0}, {"K": 0}])
def test_nothing_is_launched_for_no_tokens(emulator, sizes):
    case = normalized_qk_case(dtype=torch.float32, **sizes)
    assert run_emulated(emulator, case, forward)["q"].numel() == 0
    assert not emulator.launched()


def test_no_channels_have_no_gradients(emulator):
    case = normalized_qk_case(K=0)
    assert all(value.numel() == 0 for value in run_emulated(emulator, case).values())
    assert not emulator.launched()

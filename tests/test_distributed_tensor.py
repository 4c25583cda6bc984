"""Tensor parallel gives what one process gives: logits, losses, gradients, states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tensor_parallel import Work, compare, worst

pytest.importorskip("torch.distributed.fsdp")

EXACT, FLOAT32 = 1e-10, 1e-5
CONFIGS = {
    "two heads": Work(),
    "one head": Work(config=dict(num_heads=1), past=11),
    "swiglu, rescaled": Work(config=dict(swiglu=True, rescale_nffn=True), past=8),
    "shared embedding": Work(config=dict(share_emb=True, scale_emb=True, num_heads=1), reduction="sum"),
    "recomputed": Work(config=dict(layerwise_ckpt=True), lengths=(21, 9)),
    "no affine norms": Work(config=dict(norm_affine=False, cema_ndim=1), rows=1, cu_seqlens=(0, 5, 5, 21)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_equals_one_process(ranks, case):
    error, where = worst(ranks.run(compare, 2, CONFIGS[case]))
    assert error < EXACT, where


def test_equals_one_process_in_float32(ranks):
    error, where = worst(ranks.run(compare, 2, replace(CONFIGS["one head"], dtype=torch.float32)))
    assert error < FLOAT32, where


MESHES = {
    "data, tensor": ("data=2,tensor=2", 4, Work(past=8)),
    "replicated": ("data=2,tensor=2", 4, Work(options=dict(data="replicate"), config=dict(share_emb=True))),
    "chunk, tensor": ("chunk=2,tensor=2", 4, Work(past=16, lengths=(21, 17), config=dict(num_heads=1))),
    "heads shared by two": ("tensor=4", 4, Work(past=11)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MESHES)
def test_meshes_of_four_equal_one_process(ranks, case):
    sizes, count, work = MESHES[case]
    error, where = worst(ranks.run(compare, count, replace(work, sizes=sizes)))
    assert error < EXACT, where


@pytest.mark.slow
@pytest.mark.parametrize("dtype, most", [(torch.float64, EXACT), (torch.float32, FLOAT32)], ids=str)
def test_data_chunk_and_tensor_on_eight_processes_equal_one(ranks, dtype, most):
    work = Work("data=2,chunk=2,tensor=2", config=dict(swiglu=True, share_emb=True), rows=4, past=8, dtype=dtype)
    error, where = worst(ranks.run(compare, 8, work))
    assert error < most, where

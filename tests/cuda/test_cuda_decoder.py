"""A decoder's CUDA graph on a GPU: what tests/inference/test_captured_step.py cannot see with its stand-in for graphs."""

import threading
import warnings
from collections import Counter

import pytest
import torch
from backends import needs_gpu
from decoding import Wrapped, assert_decodes, by_decoder
from models import tiny_model, tokens_of

import megalodon_ops as mo

pytestmark = needs_gpu


def decoder_on_gpu(dtype=torch.float32, rows=3, **options):
    model = tiny_model(dtype, **options).cuda().eval()
    return mo.Decoder(model, model(tokens_of(rows, 5).cuda(), return_state=True)[1]), model


@pytest.mark.parametrize("options", [{}, dict(visible_chunks=2, chunk_size=3)], ids=["one chunk", "two chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_graph_agrees_with_the_layers(dtype, options):
    """Over the ends of chunks, with rows that are reordered and replaced; then for drafts of two tokens."""
    decoder, model = decoder_on_gpu(dtype, **options)
    tokens = tokens_of(3, 24).cuda()
    assert_decodes(decoder, model, tokens[:, :4])
    decoder.reorder(torch.tensor([2, 0, 2]))
    assert_decodes(decoder, model, tokens[:, 4:8])
    decoder.replace(torch.tensor([1]), model(tokens[:1, :5], return_state=True)[1])
    assert_decodes(decoder, model, tokens[:, 8:16])
    assert_decodes(decoder, model, tokens[:, 16:], length=2)
    assert decoder.fused and decoder._steps[1]._graph is not None


@torch.no_grad()
def test_autocast_is_that_of_the_constructor():
    with torch.autocast("cuda", torch.bfloat16):
        decoder, model = decoder_on_gpu()
        assert_decodes(decoder, model, tokens_of(3, 6).cuda())
    by_decoder(decoder, tokens_of(3, 4).cuda().split(1, 1))  # its cast weights are the graph's own
    with torch.autocast("cuda", torch.bfloat16):
        assert_decodes(decoder, model, tokens_of(3, 4).cuda())


def test_a_replay_is_one_launch_without_a_wait_and_keeps_no_memory():
    decoder, _ = decoder_on_gpu()
    token = tokens_of(3, 1).cuda()
    by_decoder(decoder, [token] * 3)
    memory = torch.cuda.memory_allocated()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile() as profile:
            for _ in range(10):
                decoder(token)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    calls = Counter(event.name for event in profile.events())
    assert calls["cudaGraphLaunch"] == 10 and calls["cudaLaunchKernel"] <= 20
    assert torch.cuda.memory_allocated() == memory


def test_memory_is_freed_with_the_decoder():
    decoder_on_gpu()  # the libraries' workspaces
    torch.cuda.synchronize()
    memory = torch.cuda.memory_allocated()
    decoder, model = decoder_on_gpu()
    by_decoder(decoder, [tokens_of(3, 1).cuda()] * 3)
    del decoder, model
    assert torch.cuda.memory_allocated() <= memory + (32 << 20)  # a workspace of the side stream


def synchronise(y):
    torch.cuda.synchronize()
    return y


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y + y.mean().item(), "calls `_local_scalar_dense`"),
        (lambda y: y + torch.tensor(1.0, device="cuda"), "calls `lift_fresh`"),
        (lambda y: y.cpu().cuda(), "calls `_to_copy`"),
        (synchronise, "cannot be captured"),
    ],
    ids=["read", "upload", "copy", "synchronise"],
)
@torch.no_grad()
def test_a_module_that_waits_for_the_gpu_is_named(change, message):
    """After it, torch draws random numbers, and another decoder captures."""
    model = tiny_model(torch.float32).cuda().eval()
    model.layers[1].mega.wv = Wrapped(model.layers[1].mega.wv, change)
    tokens = tokens_of(1, 5).cuda()
    decoder = mo.Decoder(model, model(tokens, return_state=True)[1])
    with pytest.warns(UserWarning, match=f"Decoder: `layers.1.mega.wv` {message}"):
        assert_decodes(decoder, model, tokens)
    assert not decoder.fused and torch.randn(3, device="cuda").isfinite().all()
    other, model = decoder_on_gpu()
    assert_decodes(other, model, tokens_of(3, 4).cuda())
    assert other.fused


@torch.no_grad()
def test_threads_capture_at_once():
    pairs = [decoder_on_gpu() for _ in range(4)]
    errors = []

    def decode(decoder, model):
        try:
            with torch.no_grad():
                assert_decodes(decoder, model, tokens_of(3, 10).cuda())
            assert decoder.fused
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=decode, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors

"""A decoder's CUDA graph has the bits of the layers, on CPU tensors and emulated kernels; test_cuda.py needs a GPU."""

import dataclasses
import types
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from assertions import every_case
from decoding import Wrapped, assert_decodes, assert_equal, by_decoder, by_layers, model_and_state
from fake_graphs import count, described, fake_graphs, tensor_on  # noqa: F401
from models import tiny_model, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

import megalodon_ops as mo
from megalodon_ops.inference.captured_step import _waits, may_capture

pytestmark = pytest.mark.usefixtures("poisoned_memory", "fake_graphs")

VARIANTS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, dict(swiglu=True, share_emb=True)),
    "two chunks": (torch.float32, dict(visible_chunks=2, chunk_size=3)),
    "numbers": (torch.float32, dict(num_features=2, missing_values=True)),
}


def test_a_graph_has_the_bits_of_the_layers(fake_graphs):
    """Over the ends of two chunks, with rows that are reordered and replaced, which begin their chunks elsewhere."""
    with every_case() as case:
        for name, (dtype, options) in VARIANTS.items():
            with case(name):
                fake_graphs.clear()
                model = tiny_model(dtype, **options).eval()
                tokens = tokens_of(3, 12)
                if name == "numbers":
                    tokens = torch.where(tokens[..., None] > torch.tensor([3, 9]), tokens[..., None], torch.nan)
                decoder = mo.Decoder(model, model(tokens[:, :5], return_state=True)[1])
                assert_decodes(decoder, model, tokens[:, :4])
                decoder.reorder(torch.tensor([2, 0, 2]))
                assert_decodes(decoder, model, tokens[:, 4:8])
                decoder.replace(torch.tensor([1]), model(tokens[:1, :5], return_state=True)[1])
                assert_decodes(decoder, model, tokens[:, 8:])
                assert decoder.fused and count("capture") == 1
                # The first call warms up; the layers run the six calls in which a row's two chunks are full.
                assert count("replay") == (5 if name == "two chunks" else 11)


def test_a_warm_up_runs_on_a_side_stream(fake_graphs):
    """Both streams wait for each other, before a side stream is captured, too."""
    model, state = model_and_state()
    by_decoder(mo.Decoder(model, state), tokens_of(1, 3).split(1, 1))
    events = [event for event in fake_graphs if event[0] != "launch"]
    side, default = True, False  # `is_side` of the stream that waits, and of the one that it waits for
    assert events[:2] == [("wait", side, default), ("wait", default, side)]
    assert events[2:] == [("wait", side, default), ("capture",), ("replay",), ("replay",)]
    first = next(i for i, event in enumerate(fake_graphs) if event == ("wait", side, default))
    last = next(i for i, event in enumerate(fake_graphs) if event == ("wait", default, side))
    assert any(event[0] == "launch" for event in fake_graphs[first:last])


def test_a_graph_has_a_workspace_of_its_own(monkeypatch):
    """Also on a stream on which another graph was captured, and in a thread without a handle of cuBLAS."""
    stream = torch.cuda.Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    model, state = model_and_state()
    for _ in range(2):
        decoder, token = mo.Decoder(model, state), tokens_of(1, 1)
        decoder(token)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(decoder, token).result()
        assert decoder.fused


def is_capturing():
    return torch.cuda.is_current_stream_capturing()


def refuse_graphs(y):
    if is_capturing():
        raise ValueError("no graphs\nmore")
    return y + 1


WV = "`layers.1.mega.wv`"
ADAPTERS = {  # change of a layer's output, and the warning if no graph holds it
    "plain": (lambda y: y + 1, None),
    "number": (
        lambda y: y + y.mean().item(),
        f"{WV} calls `_local_scalar_dense`, which makes the host wait for the GPU, so",
    ),
    "condition": (lambda y: y + 1 if (y > 0).any() else y, f"{WV} calls `_local_scalar_dense`"),
    "mask": (lambda y: y + y[y > 0].sum(), f"{WV} calls `index`, which"),
    "size": (lambda y: y + len(y.nonzero()), f"{WV} calls `nonzero`"),
    "refusal": (refuse_graphs, f"{WV} cannot be captured by a CUDA graph (ValueError: no graphs), so modules run"),
    "number in a capture": (
        lambda y: y + (y.mean().item() if is_capturing() else 1),
        f"{WV} cannot be captured by a CUDA graph (RuntimeError: CUDA error: operation not permitted when",
    ),
}


def test_a_module_that_waits_for_the_gpu_runs_all_modules_one_by_one():
    """A warning names it, and the state is that of all tokens. An adapter that does not wait is captured."""
    with every_case() as case:
        for name, (change, message) in ADAPTERS.items():
            with case(name):
                model, state = model_and_state()
                model.layers[1].mega.wv = Wrapped(model.layers[1].mega.wv, change)
                decoder, pieces = mo.Decoder(model, state), tokens_of(1, 5).split(1, 1)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    found = by_decoder(decoder, pieces)
                assert_equal(found, by_layers(model, state, pieces))
                assert decoder.fused is (message is None) and len(caught) == (message is not None)
                for warning in caught:
                    assert str(warning.message).startswith(f"Decoder: {message}")
                    assert warning.filename.endswith("decoding.py")  # which calls the decoder


def test_hooks_are_called_for_every_token():
    model, state = model_and_state()
    expected = by_decoder(mo.Decoder(model, state), tokens_of(1, 4).split(1, 1))
    seen = []
    model.layers[0].mega.wz.register_forward_hook(lambda module, args, y: seen.append(y))
    with pytest.warns(UserWarning, match="Decoder: `layers.0.mega.wz` has hooks, so modules run one by one"):
        decoder = mo.Decoder(model, state)
    assert_equal(by_decoder(decoder, tokens_of(1, 4).split(1, 1)), expected)
    assert len(seen) == 4 and not decoder.fused


def test_cast_weights_live_in_the_graph():
    """torch caches cast weights as long as the caller's autocast lasts; a graph casts them again."""
    model, pieces = tiny_model(torch.float32).eval(), tokens_of(1, 10).split([5, 1, 1, 1, 1, 1], 1)
    with torch.autocast("cpu", torch.bfloat16):
        decoder = mo.Decoder(model, model(pieces[0], return_state=True)[1])
        for piece in pieces[1:4]:
            decoder(piece)
    state = decoder.state
    with torch.no_grad():
        model.layers[0].mega.wv.weight.mul_(1.5)
    found = by_decoder(decoder, pieces[4:])
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(found, by_layers(model, state, pieces[4:]))
    assert decoder.fused and count("replay") == 4


def test_a_caller_captures_the_layers_itself():
    model, state = model_and_state()
    decoder, pieces = mo.Decoder(model, state), tokens_of(1, 4).split(1, 1)
    found, token = [decoder(pieces[0])], pieces[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        logits = decoder(token)
        graph.capture_end()
    for piece in pieces[1:]:
        token.copy_(piece)
        graph.replay()
        found.append(logits.clone())
    assert_equal([*found, decoder._state], by_layers(model, state, pieces))


def test_generation_replays_a_graph(monkeypatch):
    """Greedy and with draws, by this package and by transformers; tokens are those of the layers."""
    hf = pytest.importorskip("megalodon_ops.hf", exc_type=ImportError)
    model, prompt = tiny_model(torch.float32, num_layers=1).eval(), tokens_of(2, 9)
    causal = hf.MegalodonForCausalLM(hf.MegalodonHFConfig(**dataclasses.asdict(model.config))).eval()

    def generated():
        own = [model.generate(prompt, max_new_tokens=4, temperature=t, seed=1) for t in (0.0, 1.0)]
        return [*own, causal.generate(prompt, max_new_tokens=4, do_sample=False)]

    found, captures = generated(), count("capture")
    monkeypatch.setattr("megalodon_ops.inference.decoder.may_capture", lambda model, state: False)
    monkeypatch.setattr(mo.Decoder, "_may_record", lambda self, autocast: False)
    assert_equal(found, generated())
    assert captures == count("capture") == 3


def test_a_call_is_the_same_at_every_position(emulator, fake_graphs):
    """Kernels, sizes of all tensors and numbers in Python, and so the launches and what they allocate."""
    model, state = model_and_state(torch.bfloat16, rows=2, seen=3)
    state = tree_map_only(torch.Tensor, torch.clone, state)
    workspaces, calls = [], []
    empty = emulator.empty
    emulator.empty = lambda *size, **options: workspaces.append((size, options)) or empty(*size, **options)
    for piece in tokens_of(2, 12).split(1, 1):  # a chunk has 8
        fake_graphs.clear()
        workspaces.clear()
        emulator.module.reset_counters()
        with torch.no_grad(), _Functions() as functions:
            model(piece, state=state, return_state=True, inplace_state=True)
        calls.append(([*fake_graphs], [*workspaces], Counter(emulator.module.launched()), functions.calls))
    launches, _, _, functions_of_torch = calls[0]
    assert len(launches) > 10 and len(functions_of_torch) > 20
    assert all(call == calls[0] for call in calls)


class _Functions(TorchDispatchMode):
    """Functions of torch outside of ops, with shapes of tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, tree_map(described, (args, kwargs, results))))
        return results


def test_copies_between_devices_wait():
    aten = torch.ops.aten
    gpu, cpu = tensor_on("cuda:0", torch.ones(2)), torch.ones(2)
    assert _waits(aten._to_copy.default, [gpu], cpu) and _waits(aten.copy_.default, [gpu, cpu], gpu)
    assert _waits(aten.lift_fresh.default, [gpu], gpu) and not _waits(aten.lift_fresh.default, [cpu], cpu)
    assert not _waits(aten.add.Tensor, [gpu, torch.tensor(1.0)], gpu)  # a number


def test_models_on_one_gpu_without_a_memory_are_captured():
    def is_captured(places, **options):
        model, _ = model_and_state(**options)
        parameters = [tensor_on(places[i % len(places)], tensor) for i, tensor in enumerate(model.parameters())]
        stand_in = types.SimpleNamespace(parameters=lambda: parameters, buffers=list, config=model.config)
        return may_capture(stand_in, ())

    assert is_captured(["cuda:1"]) and is_captured(["cuda:0"], visible_chunks=2)
    assert not (is_captured(["cuda:0", "cuda:1"]) or is_captured(["cuda:0", "cpu"]) or is_captured(["cpu"]))
    assert not is_captured(["cuda:0"], working_memory=True)

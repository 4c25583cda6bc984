"""CUDA tensors on a GPU: dispatch, streams, devices, graphs, compilation, the model. Results: test_ops.py."""

import warnings
from functools import partial

from paths import TEST_PATH
import pytest
import torch
from assertions import assert_all_close, assert_bit_equal, assert_matches_reference, every_case
from backends import needs_gpu
from calls import OPS, evaluate, forward
from cases import BUILDERS, WITH_STATE, Case, chunked_attention_case
from emulator.sanitized import small_cases
from models import tiny_model, tokens_of
from programs import run_python
from torch.utils._pytree import tree_leaves, tree_map_only

import megalodon_ops as mo
from megalodon_ops.ops.chunked_attention import dense_attention

pytestmark = needs_gpu
all_ops = pytest.mark.parametrize("op", OPS)


def to(device, values):
    return tree_map_only(torch.Tensor, lambda t: t.to(device), values)


def case_on(device: str, case: Case) -> Case:
    return case.with_tensors(**to(device, case.tensors)).with_options(**to(device, case.options))


def build_on(device: str, op: str, **sizes) -> Case:
    return case_on(device, BUILDERS[op](B=3, L=11, **WITH_STATE.get(op, {}), **sizes))


def run(op: str, case: Case):
    """Outputs and gradients for random incoming gradients."""
    device = next(iter(case.tensors.values())).device
    return evaluate(getattr(mo, op), case, lambda _, grad: grad.to(device))


@pytest.fixture
def no_synchronisation():
    """Waiting for the GPU raises an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@all_ops
def test_results_are_on_the_device_and_equal_the_cpus(op):
    found = run(op, build_on("cuda", op, dtype=torch.float64))
    assert all(value.is_cuda for value in found.values())
    assert_all_close(to("cpu", found), run(op, build_on("cpu", op, dtype=torch.float64)), tolerance=1e-10, terms=1.0)


# The cases of the emulator's sanitizers, and a chunk of several tiles of the backward.
CASES = [*small_cases(), ("chunked_attention", {"B": 1, "L": 150, "K": 8, "V": 160, "C": 140, "scale": 8**-0.5})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", sorted({op for op, _ in CASES}))
def test_every_kernel_of_a_narrow_type_is_right(op, dtype):
    """Bounds as for CPU kernels; aligned or not. bench/gpu_stages.py runs this test under compute-sanitizer."""
    with every_case() as each:
        for options in (options for name, options in CASES if name == op):
            case = BUILDERS[op](dtype=dtype, **options)
            for shift in (0, 1):
                with each(options, shift):
                    found = to("cpu", run(op, with_offset(case_on("cuda", case), shift)))
                    assert_matches_reference(found, case)


def with_offset(case: Case, elements: int) -> Case:
    """The case with tensors that begin `elements` past an aligned address."""

    def copy_with_offset(tensor: torch.Tensor) -> torch.Tensor:
        room = tensor.new_empty(tensor.numel() + elements)[elements:]
        return room.view(tensor.shape).copy_(tensor)

    return case.with_tensors(**{name: copy_with_offset(tensor) for name, tensor in case.tensors.items()})


@all_ops
def test_a_call_does_not_wait_for_the_gpu(op, request):
    case = build_on("cuda", op)
    call = partial(evaluate, getattr(mo, op), case, lambda _, grad: torch.ones_like(grad, device="cuda"))
    call()
    request.getfixturevalue("no_synchronisation")
    call()


@all_ops
def test_the_current_stream_is_used(op):
    """Inputs are computed late on the current stream, which alone orders the op after them."""
    case = build_on("cuda", op)
    expected = run(op, case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # clock cycles
        late = {name: tensor.clone() for name, tensor in case.tensors.items()}
        found = run(op, case.with_tensors(**late))
    stream.synchronize()
    assert_bit_equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@all_ops
def test_the_tensors_device_is_used(op):
    expected = to("cpu", run(op, build_on("cuda:0", op)))
    found = run(op, build_on("cuda:1", op))
    assert all(value.device == torch.device("cuda:1") for value in found.values())
    assert_bit_equal(to("cpu", found), expected)


@pytest.mark.parametrize("op", [op for op in OPS if OPS[op].parameters or len(OPS[op].tokens) > 1])
def test_tensors_on_two_devices_are_refused(op):
    case = build_on("cuda", op)
    first, *_ = OPS[op].parameters or OPS[op].tokens[1:]
    with pytest.raises((ValueError, RuntimeError), match="device|cuda"):
        forward(getattr(mo, op), case.with_tensors(**{first: case.tensors[first].cpu()}))


@all_ops
def test_compiles_into_one_graph(op):
    torch.compiler.reset()
    case = build_on("cuda", op)
    compiled = torch.compile(getattr(mo, op), fullgraph=True, backend="aot_eager")
    outputs = forward(getattr(mo, op), case)
    assert_bit_equal(forward(compiled, case), outputs)


@all_ops
def test_a_captured_call_repeats(op):
    """Forward and backward in a CUDA graph, replayed on new inputs."""
    case, other = build_on("cuda", op, seed=1), build_on("cuda", op, seed=2)
    expected = run(op, other.with_options(**case.options))
    held = {name: tensor.clone() for name, tensor in case.tensors.items()}
    warm_up(lambda: run(op, case.with_tensors(**held)))
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in held.items()}
        outputs = forward(getattr(mo, op), case.with_tensors(**leaves))
        wanted = {name: o for name, o in outputs.items() if o.requires_grad}
        douts = {name: torch.ones_like(o) for name, o in wanted.items()}
        grads = torch.autograd.grad(list(wanted.values()), list(leaves.values()), list(douts.values()))
    for name, tensor in other.tensors.items():
        held[name].copy_(tensor)
    graph.replay()
    assert_bit_equal(outputs, {name: expected[name] for name in outputs})
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


def warm_up(call):
    """Three calls on a side stream, as torch requires before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


FIRST_CAPTURE = """
import sys, torch
from test_cuda import OPS, BUILDERS, forward, mo, case_on, run
for op in OPS:
    case = case_on("cuda", BUILDERS[op](B=2, L=70, dtype=getattr(torch, sys.argv[1])))
    expected = run(op, case)  # the one call before: it loads the kernels
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        outputs = forward(getattr(mo, op), case)
    graph.replay()
    print(op, all(torch.equal(outputs[name], expected[name]) for name in outputs))
"""


@pytest.mark.parametrize("loading", ["LAZY", "EAGER"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_call_prepares_for_capture(dtype, loading):
    """In a new process, whose driver has loaded no kernels, or all."""
    ran = run_python(FIRST_CAPTURE, dtype, CUDA_MODULE_LOADING=loading, PYTHONPATH=TEST_PATH)
    assert ran.stdout.splitlines() == [f"{op} True" for op in OPS], ran.stderr


def test_a_captured_call_takes_a_new_table():
    """The captured call computes its rotary table on the device; later calls do not overwrite it."""
    case = build_on("cuda", "normalized_qk", rope_base=123.0)
    warm_up(lambda: run("normalized_qk", build_on("cuda", "normalized_qk")))
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        outputs = forward(mo.normalized_qk, case)
    for base in range(2, 40):
        forward(mo.normalized_qk, case.with_options(rope_base=float(base)))
    graph.replay()
    assert_bit_equal(outputs, forward(mo.normalized_qk, case))


@torch.inference_mode()
def test_a_captured_model_keeps_its_rotary_table():
    model, tokens = tiny_model(torch.float32).cuda().eval(), tokens_of(2, 30).cuda()
    expected = model(tokens)
    warm_up(lambda: model(tokens))
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        logits = model(tokens)
    others = [tiny_model(torch.float32, rope_base=float(base)).cuda() for base in range(2, 40)]
    for other in others:
        other(tokens)
    del other, others
    garbage = [torch.full((1 << 14,), float("nan"), device="cuda") for _ in range(100)]  # over freed memory
    graph.replay()
    assert_bit_equal({"logits": logits}, {"logits": expected})
    del garbage


def test_graphs_of_a_compiled_call_hold_no_table():
    """torch checks after each graph that its pool holds only the graph's outputs."""
    torch.compiler.reset()
    case = build_on("cuda", "normalized_qk", rope_base=321.0)
    compiled = torch.compile(mo.normalized_qk, mode="reduce-overhead")
    for _ in range(4):
        outputs = {name: value.clone() for name, value in forward(compiled, case).items()}
        torch.compiler.cudagraph_mark_step_begin()
    assert_all_close(to("cpu", outputs), to("cpu", forward(mo.normalized_qk, case)), tolerance=1e-5, terms=1.0)


@torch.inference_mode()
def test_a_captured_decode_step_follows_the_text():
    model, tokens = tiny_model(torch.float32).cuda().eval(), tokens_of(2, 30).cuda()
    expected = model(tokens)
    _, state = model(tokens[:, :5], return_state=True)
    token = tokens[:, 5:6].clone()
    scratch = to("cuda", tree_map_only(torch.Tensor, torch.clone, state))
    warm_up(lambda: model(token, state=scratch, return_state=True, inplace_state=True))

    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        logits, following = model(token, state=state, return_state=True, inplace_state=True)
        for old, new in zip(tree_leaves(state), tree_leaves(following), strict=True):
            if old is not new:
                old.copy_(new)
    for t in range(5, 30):  # over chunks of 8
        token.copy_(tokens[:, t : t + 1])
        graph.replay()
        torch.testing.assert_close(logits[:, 0], expected[:, t], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("path", "dtype", "H", "V"),
    [
        *(("flash", dtype, 8, 64) for dtype in (torch.bfloat16, torch.float16)),
        *(("products", dtype, 1, 2048) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    ],
    ids=str,
)
def test_libraries_give_the_results_of_the_kernels(path, dtype, H, V, monkeypatch):
    """Dense attention of more than 16,384 tokens, whose last chunk is short."""
    monkeypatch.setattr(dense_attention, "_tf32_is_allowed", lambda: True)
    case = chunked_attention_case(B=1, L=17000, H=H, K=64, V=V, C=1024, dtype=dtype, scale=0.125)
    found, peaks = [], []
    case = case.with_tensors(**to("cuda", case.tensors))
    assert dense_attention.path_of("forward", *case.tensors.values(), 1024, True, 0.125) == path
    libraries = [row._replace(directions=dense_attention.DIRECTIONS) for row in dense_attention.TABLE]
    for table in libraries, ():
        monkeypatch.setattr(dense_attention, "TABLE", table)
        torch.cuda.reset_peak_memory_stats()
        found.append(run("chunked_attention", case))
        peaks.append(torch.cuda.max_memory_allocated() >> 20)
    for name in ("o", "dq", "dk", "dv"):
        error = (found[0][name].double() - found[1][name].double()).norm() / found[1][name].double().norm()
        assert error < 0.02, (name, error)
    assert peaks[0] < peaks[1] + 450, "MiB"


def test_a_seed_is_drawn_on_the_device():
    case = chunked_attention_case(L=50, C=32)
    case = case.with_tensors(**to("cuda", case.tensors)).with_options(dropkey=0.5)
    torch.cuda.manual_seed(0)
    first, second = (forward(mo.chunked_attention, case)["o"] for _ in range(2))
    torch.cuda.manual_seed(0)
    assert torch.equal(forward(mo.chunked_attention, case)["o"], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_equals_the_cpus(dtype):
    grads = {}
    for device in ("cpu", "cuda"):
        model = tiny_model(torch.float64 if dtype == torch.float32 else torch.float32).to(device)
        tokens = tokens_of(3, 21).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(tokens)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        grads[device] = {name: p.grad.cpu().double() for name, p in model.named_parameters()}
    for name, expected in grads["cpu"].items():
        error = (grads["cuda"][name] - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.1), (name, float(error))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "one"])
def test_a_loss_equals_the_cpus(reduction, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr("megalodon_ops.ops.linear_cross_entropy.linear_cross_entropy._GPU_BLOCK", 1)
    model, tokens = tiny_model(), tokens_of(4, 40)
    found = {}
    lengths = torch.tensor([39, 2, 17, 39])
    for device in ("cpu", "cuda"):
        model, tokens = model.to(device), tokens.to(device)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], lengths=lengths.to(device), reduction=reduction)
        grads = torch.autograd.grad(loss.square().sum(), tuple(model.parameters()))
        found[device] = [t.detach().cpu() for t in (loss, *grads)]
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"seed": 3},
        {"seed": 3, "top_p": 0.9, "repetition_penalty": 1.2},
        {"seed": 3, "top_k": 5, "min_p": 0.1},
    ],
    ids=str,
)
@torch.inference_mode()
def test_generation_equals_the_cpus(options, deterministic):
    model, prompt, lengths = tiny_model(), tokens_of(2, 11), torch.tensor([11, 4])
    options = dict(max_new_tokens=20, stop_tokens=[1], return_lengths=True, return_state=True, **options)
    tokens, ends, state = model.generate(prompt, lengths=lengths, **options)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = model.cuda().generate(prompt.cuda(), lengths=lengths.cuda(), **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found[0].cpu(), tokens) and torch.equal(found[1].cpu(), ends)
    torch.testing.assert_close(found[2].norm.mean.cpu(), state.norm.mean, rtol=1e-9, atol=1e-11)

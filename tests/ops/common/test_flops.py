"""Operation counts of torch.utils.flop_counter; names of autograd nodes."""

import importlib
import math

import pytest
import torch
from calls import OPS, evaluate, forward
from cases import BUILDERS, adaptive_working_memory_case, chunked_attention_case
from profiling import counted
from programs import run_python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import megalodon_ops as mo
from megalodon_ops.ops.common import flops
from megalodon_ops.ops.linear_cross_entropy import linear_cross_entropy as loss
from megalodon_ops.ops.cema.cema_coefficients import cema_coefficients
from megalodon_ops.ops.gated_silu.gated_silu import gated_silu
from megalodon_ops.ops.layer_norm.layer_norm import layer_norm, rms_norm
from megalodon_ops.ops.linear.linear import linear_few_rows, linear_fwd
from megalodon_ops.ops.quantized_linear.quantized_linear import quantize_weight, quantized_linear_fwd

ops = torch.ops.megalodon_ops


def test_importing_the_package_does_not_import_the_counter():
    """torch's counter imports Triton, if that is installed. Formulas are registered when a program imports it."""
    program = """
import sys
import {}
print("torch.utils.flop_counter" in sys.modules)
import megalodon_ops as mo, torch.utils.flop_counter as counter
print("triton" in sys.modules, len([op for op in counter.flop_registry if "megalodon_ops" in str(op)]))
"""
    later, before = (run_python(program.format(name)) for name in ("megalodon_ops", "torch.utils.flop_counter"))
    assert later.stdout.startswith("False\n") and before.stdout.startswith("True\n"), later.stderr + before.stderr
    assert later.stdout.splitlines()[1] == before.stdout.splitlines()[1]
    assert int(later.stdout.split()[-1]) == sum("megalodon_ops" in str(op) for op in flop_registry)


def test_every_op_has_a_formula():
    names = torch._C._dispatch_get_all_op_names()
    packets = {getattr(ops, name.split("::")[1]) for name in names if name.startswith("megalodon_ops::")}
    assert len(packets) >= 20 and packets <= flop_registry.keys()


def test_a_formula_of_other_arguments_is_refused():
    message = r"`flops` of cema_fwd must name arguments of cema_fwd, got \['alpha'\]; it has \['x', 'p'"
    with pytest.raises(TypeError, match=message):
        flops.register_formula(ops.cema_fwd.default, lambda x, alpha: 0)


TOKENS = 2 * 9  # B times L of a case
D, N, G, WIDTH, H, K, V, C = 5, 4, 3, 4, 2, 3, 5, 4
PAIRS = 2 * H * (10 + 10 + 1)  # of a query and a key: nine positions are chunks of 4, 4 and 1
EXPECTED = {  # sizes of a case, operations of the forward, of the backward
    "cema": (dict(D=D, N=N), TOKENS * D * (12 * N + 2), TOKENS * D * (34 * N + 4)),
    "timestep_norm": (dict(G=G, width=WIDTH), TOKENS * G * WIDTH * 8, TOKENS * G * WIDTH * 13),
    "cema_end_state": (dict(D=D, N=N), TOKENS * D * 8 * N, TOKENS * D * 26 * N),
    "timestep_norm_end_state": (dict(G=G, width=WIDTH), TOKENS * G * WIDTH * 4, TOKENS * G * WIDTH * 3),
    "normalized_qk": (dict(H=H, K=6), TOKENS * H * 6 * 13, TOKENS * H * 6 * 23),
    "chunked_attention": (dict(H=H, K=K, V=V, C=C), PAIRS * 2 * (K + V), PAIRS * 2 * (3 * K + 2 * V)),
    # Each of the 2 H memories, K x V matrices, is read by nine positions and written by two chunks, eight positions.
    "adaptive_working_memory": (
        dict(H=H, K=K, V=V, C=C),
        2 * 2 * H * (9 * K * V + 8 * K * (K + V) + 2 * K * K * V),
        2 * 2 * H * (2 * 9 * K * V + 3 * 8 * K * (K + V) + 3 * 2 * K * K * V),
    ),
}


@pytest.mark.parametrize("op", EXPECTED)
def test_forward_and_backward_are_counted(op):
    sizes, forward_count, backward_count = EXPECTED[op]
    found = counted(lambda: evaluate(getattr(mo, op), BUILDERS[op](**sizes)))
    assert found.pop("chunked_attention_state", 0) == 0  # the op copies
    assert found == {f"{op}_fwd": forward_count, f"{op}_bwd": backward_count}


@pytest.mark.parametrize("op", EXPECTED)
def test_padding_is_not_counted(op):
    build = BUILDERS[op]
    nine, three = (counted(lambda n=n: evaluate(getattr(mo, op), build(B=1, L=n))) for n in (9, 3))
    expected = {name: nine[name] + three[name] for name in nine}
    for case in (build(B=3, lengths=[9, 0, 3]), build(B=1, L=15, cu_seqlens=[1, 10, 13])):
        assert counted(lambda case=case: evaluate(getattr(mo, op), case)) == expected


@pytest.mark.parametrize("first", range(8))
def test_attention_to_two_chunks_counts_visible_pairs(first):
    L = 11
    case = chunked_attention_case(B=1, L=L, H=1, K=K, V=V, C=C, visible_chunks=2, state=True)
    state = case.options["state"]._replace(position=torch.tensor([first]))
    t = torch.arange(first + L)
    chunks_before = t[first:, None] // C - t // C
    allowed = (chunks_before <= 1) & (t[first:, None] >= t)
    pairs, cached = int(allowed.sum()), int(allowed[:, :first].sum())
    found = counted(lambda: evaluate(mo.chunked_attention, case.with_options(state=state)))
    assert found["two_chunk_attention_fwd"] == 2 * pairs * (K + V)
    assert found["two_chunk_attention_bwd"] == 2 * (pairs * (2 * K + V) + (pairs - cached) * (K + V))


def test_attention_counts_visible_pairs():
    """Pairs with cached keys count, although these keys get no gradient."""
    first, L = 3, 9
    case = chunked_attention_case(B=1, L=L, H=1, K=K, V=V, C=C, state=True)
    assert case.options["state"].position.tolist() == [first]
    t = torch.arange(first + L)
    allowed = (t[first:, None] // C == t // C) & (t[first:, None] >= t)
    pairs, cached = int(allowed.sum()), int(allowed[:, :first].sum())
    found = counted(lambda: evaluate(mo.chunked_attention, case))
    assert found["chunked_attention_fwd"] == 2 * pairs * (K + V)
    assert found["chunked_attention_bwd"] == 2 * (pairs * (2 * K + V) + (pairs - cached) * (K + V))
    whole = chunked_attention_case(B=1, L=L, H=1, K=K, V=V, C=C, causal=False)
    found = counted(lambda: evaluate(mo.chunked_attention, whole))
    assert found["chunked_attention_fwd"] == 2 * (4 * 4 + 4 * 4 + 1) * (K + V)  # chunks of 4, 4 and 1 positions


@pytest.mark.parametrize("to_end", [False, True])
@pytest.mark.parametrize("L", [8, 12])
@pytest.mark.parametrize("visible_chunks", [1, 2])
@pytest.mark.parametrize("H", [1, 2])
def test_the_count_of_the_memory_is_that_of_its_products(H, L, to_end, visible_chunks):
    q, k, v = adaptive_working_memory_case(L=L, H=H, C=4, dtype=torch.float64).tensors.values()  # products by torch
    ends = [q.new_zeros(2, H, 3, 5), q.new_zeros(2, H, 3)] if to_end else [None, None]
    no_state = [None] * 5
    arguments = [q, k, v, *no_state, 4, visible_chunks, None]  # ..., chunk_size, visible_chunks, spans
    kernels = importlib.import_module("megalodon_ops.ops.adaptive_working_memory.adaptive_working_memory")
    calls = {
        ops.adaptive_working_memory_fwd: lambda function: function(*arguments, to_end),
        ops.adaptive_working_memory_bwd: lambda function: function(v, *ends, *arguments),
    }
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, *__, **___: 2 * math.prod(a) * b[2]}
    for op, kernel in zip(calls, (kernels._fwd, kernels._bwd), strict=True):
        counter = FlopCounterMode(display=False, custom_mapping=in_place)
        with counter:
            calls[op](kernel)
        assert counter.get_total_flops() == sum(counted(lambda: calls[op](op)).values())


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_count_whole_rows(op):
    build = BUILDERS["chunked_attention" if op == "normalized_attention" else op]
    real = counted(lambda: forward(getattr(mo, build().op), build()))
    with FakeTensorMode() as mode:
        padded = build(lengths=[2, 3])
        tensors = {name: mode.from_tensor(tensor) for name, tensor in padded.tensors.items()}
        options = {"lengths": mode.from_tensor(padded.options.pop("lengths"))}
        case = padded.with_tensors(**tensors).with_options(**options)
        assert counted(lambda: forward(getattr(mo, case.op), case)) == real


def test_layers_around_the_ops():
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 8), (8,), (8,)))
    matrix, index = torch.randn(5, 8), torch.tensor([1, 2, 3])
    elements = x.numel()

    def both(call):
        return lambda: sum(t.abs().sum() for t in call()).backward()

    layer = counted(both(lambda: [layer_norm(x, weight, bias)]))
    assert layer == {"layer_norm_fwd": elements * 7, "layer_norm_bwd": elements * 16}
    assert counted(both(lambda: [rms_norm(x)])) == {"layer_norm_fwd": elements * 3, "layer_norm_bwd": elements * 8}
    gated = counted(both(lambda: [gated_silu(x, x)]))
    assert gated == {"gated_silu_fwd": elements * 5, "gated_silu_bwd": elements * 11}
    alpha, theta, gamma = (torch.zeros(*shape, requires_grad=True) for shape in ((4, 3, 1), (4, 1, 1), (4, 3, 2)))
    coefficients = counted(both(lambda: cema_coefficients(alpha, alpha, theta, gamma)))
    modes = alpha.numel()
    assert coefficients == {"cema_coefficients_fwd": modes * 15, "cema_coefficients_bwd": modes * 31}
    product = 2 * 3 * 8 * 5  # x times the transposed matrix
    assert sum(counted(both(lambda: [linear_fwd(x, matrix, None)])).values()) == 2 * product
    assert counted(lambda: linear_few_rows(x.detach(), matrix, None)) == {"linear_few_rows": product}
    small = quantize_weight(matrix, "int8")
    assert counted(lambda: quantized_linear_fwd(x.detach(), *small, None, None)) == {"quantized_linear_fwd": product}
    losses = counted(both(lambda: [loss.linear_cross_entropy_fwd(x, matrix, index, -100)]))
    assert losses == {"linear_cross_entropy_fwd": product, "linear_cross_entropy_sum": 2 * product}
    total = counted(lambda: loss.linear_cross_entropy_sum(x, matrix, index, torch.ones(3), True, True))
    assert total == {"linear_cross_entropy_sum": 3 * product}


class WithoutHooks(TorchDispatchMode):
    """Count like FlopCounterMode, without its hooks on modules."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def test_counting_does_not_change_the_computation(monkeypatch):
    """Under FlopCounterMode, which hooks every module, the loss still computes each block of logits once."""
    sizes = dict(model_dim=64, z_dim=32, value_dim=96, num_heads=2, ffn_hidden_dim=80, cema_ndim=4, vocab_size=300)
    config = mo.MegalodonConfig(num_layers=2, chunk_size=16, norm_num_groups=8, swiglu=True, **sizes)
    rows, length = 2, 64
    monkeypatch.setattr(loss, "_CPU_BLOCK", 64 * config.vocab_size)  # two blocks
    model, tokens = mo.Megalodon(config), torch.zeros(rows, length, dtype=torch.int64)

    def train():
        model.loss(tokens, tokens).backward()

    T, D, N = rows * length, config.model_dim, config.cema_ndim
    V, F = config.value_dim, config.ffn_hidden_dim
    matrices = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    pairs = T * (config.chunk_size + 1) // 2  # a token and those before it in its chunk
    attention = 2 * pairs * (4 * config.z_dim + 3 * V)
    # Forward + backward of an element: timestep, RMS and layer norm; queries and keys; SiLU, gates
    norms = T * D * ((8 + 13) + (4 + 11) + (7 + 16)) + T * config.z_dim * (13 + 23)
    gates = T * V * ((4 + 8) + (5 + 11)) + T * F * (5 + 11)
    cema = T * D * (46 * N + 6) + D * N * (15 + 31)
    expected = 6 * T * matrices + 2 * (attention + norms + gates + cema) + T * D * 21  # the final norm
    with WithoutHooks() as counter:
        train()
    assert counter.total == expected
    assert sum(counted(train).values()) == expected
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with WithoutHooks() as counter:
            train()
    finally:
        handle.remove()
    assert counter.total == expected


@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize("op", EXPECTED)
def test_autograd_nodes_have_the_name_of_their_op(op, dispatched):
    case = BUILDERS[op]()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    run = lambda: next(iter(forward(getattr(mo, op), case.with_tensors(**leaves)).values()))  # noqa: E731
    if dispatched:
        with FlopCounterMode(display=False):
            node = run().grad_fn
    else:
        node = run().grad_fn
    assert type(node).__name__ == op.title().replace("_", "") + "Backward"

"""CPU kernels give the same bits on 1, 2 and 3 threads, at sizes that do not divide evenly.

Torch's own products and sums make no such promise; kernels that call them are not tested here.
"""

from collections.abc import Iterator

import pytest
import torch
from assertions import assert_bit_equal, every_case
from backends import each_isa_with_amx, isa
from calls import OPS, evaluate
from cases import generator, randn

import megalodon_ops as mo
from megalodon_ops.ops.common import definition as library
from megalodon_ops.ops.cema.cema_coefficients import cema_coefficients
from megalodon_ops.ops.gated_silu.gated_silu import gated_silu
from megalodon_ops.ops.layer_norm.layer_norm import layer_norm, rms_norm
from megalodon_ops.ops.linear.linear import linear_few_rows
from megalodon_ops.ops.linear_cross_entropy.linear_cross_entropy import _cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Each division of work: pieces of a sequence, groups of sequences, strips of channels, blocks of rows, chunks, blocks
# of a chunk, segments of keys of few queries.
CASES = {f"{name}-{way}": op.case(**sizes) for name, op in OPS.items() for way, sizes in op.threads.items()}


def each_number_of_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            yield threads
    finally:
        torch.set_num_threads(before)


def assert_threads_change_nothing(run):
    first, *others = [run() for _ in each_number_of_threads()]
    for other in others:
        assert_bit_equal(other, first)


@each_isa_with_amx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops(dtype, name):
    with every_case() as each, isa(name):
        for key, case in CASES.items():
            with each(key):
                case = in_dtype(case, dtype)
                assert_threads_change_nothing(lambda case=case: evaluate(getattr(mo, case.op), case))


def in_dtype(case, dtype):
    """The case with its tokens, and k and v of a state, in another dtype."""
    tokens = {token: case.tensors[token].to(dtype) for token in OPS[case.op].tokens}
    state = case.options.get("state")
    if isinstance(state, mo.AttentionState):
        case = case.with_options(state=mo.AttentionState(state.k.to(dtype), state.v.to(dtype), state.position))
    return case.with_tensors(**tokens)


def gradients(function, *tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gen = generator(1)
    incoming = [randn(gen, *o.shape, dtype=o.dtype) for o in outputs]
    found = torch.autograd.grad(outputs, leaves, incoming)
    return {str(i): value.detach() for i, value in enumerate((*outputs, *found))}


def tensors(*shapes, dtype=torch.float32):
    gen = generator(0)
    return [randn(gen, *shape, dtype=dtype) for shape in shapes]


def many_rows(x, weight):
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    library.launch("linear_many_rows", x, False, weight, False, None, False, y)  # x W^T, no bias, y is overwritten
    return {"y": y}


def several_products(a, b):
    y = torch.empty(len(a), a.shape[1], b.shape[2], dtype=a.dtype)
    library.launch("linear_many_rows", a, False, b, True, None, False, y)  # b is transposed
    return {"y": y}


def logits_to_gradients(logits, scales):
    logits = logits.clone()
    losses = _cross_entropy(logits, torch.arange(logits.shape[0]) % logits.shape[1], scales)
    return {"losses": losses, "logits": logits}


OTHERS = {
    "layer_norm": lambda dtype: gradients(layer_norm, *tensors((641, 67), dtype=dtype), *tensors((67,), (67,))),
    "rms_norm": lambda dtype: gradients(rms_norm, *tensors((67, 1031), dtype=dtype), *tensors((1031,))),
    "gated_silu": lambda dtype: gradients(gated_silu, *tensors((333, 131), (333, 131), dtype=dtype)),
    "cema_coefficients": lambda _: gradients(
        cema_coefficients, *tensors((517, 5, 1), (517, 5, 1), (517, 1, 1), (517, 5, 2))
    ),
    "linear_few_rows": lambda dtype: {"y": linear_few_rows(*tensors((7, 333), (517, 333), dtype=dtype), None)},
    "linear_many_rows": lambda dtype: many_rows(*tensors((300, 530), (700, 530), dtype=dtype)),
    "linear_many_rows-deep": lambda dtype: many_rows(*tensors((67, 2003), (35, 2003), dtype=dtype)),
    "linear_many_rows-several": lambda dtype: several_products(*tensors((5, 300, 67), (5, 67, 70), dtype=dtype)),
    "cross_entropy": lambda dtype: logits_to_gradients(*tensors((203, 517), dtype=dtype), *tensors((203,))),
}


@each_isa_with_amx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("run", OTHERS.values(), ids=OTHERS)
def test_kernels_around_the_ops(run, dtype, name):
    many_rows_runs = [run for other, run in OTHERS.items() if other.startswith("linear_many_rows")]
    if dtype == torch.bfloat16 and name == "v4_amx" and run in many_rows_runs:
        pytest.skip("computed by torch on AMX")
    with isa(name):
        assert_threads_change_nothing(lambda: run(dtype))


def test_decoder():
    sizes = dict(model_dim=33, z_dim=18, value_dim=35, ffn_hidden_dim=51, vocab_size=67)
    config = mo.MegalodonConfig(num_layers=2, num_heads=1, chunk_size=16, norm_num_groups=3, **sizes)
    torch.manual_seed(0)
    model, tokens = mo.Megalodon(config), torch.randint(67, (3, 45), generator=generator(0))
    with torch.no_grad():
        _, state = model(tokens[:, :30], return_state=True)

    def run():
        decoder = mo.Decoder(model, state)
        assert decoder.fused
        return {str(t): decoder(tokens[:, t : t + 1]).clone() for t in range(30, 45)}

    assert_threads_change_nothing(run)

"""Under a limit of the address space, a call gives a result or raises: it never crashes."""

import pytest
from backends import DEFAULT_ISA, ISAS
from programs import run_python

PROGRAM = """
import resource, torch, megalodon_ops as mo
from megalodon_ops.ops.linear import linear
from megalodon_ops.ops.linear_cross_entropy import linear_cross_entropy as loss
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def attention(dtype, L=2048, C=1024, K=64, V=1024):
    q, k, v = randn(1, L, 1, K, dtype=dtype), randn(1, L, 1, K, dtype=dtype), randn(1, L, 1, V, dtype=dtype)
    return lambda: mo.chunked_attention(q, k, v, chunk_size=C)


def decoding(dtype):
    q, k, v = (randn(8, 1024, 4, width, dtype=dtype).detach() for width in (64, 64, 256))
    _, state = mo.chunked_attention(q, k, v, chunk_size=2048, return_state=True)
    return lambda: mo.chunked_attention(q[:, :2], k[:, :2], v[:, :2], chunk_size=2048, state=state)


def cema(dtype, B=1, L=2048, D=1024, N=16):
    x, p, omega = randn(B, L, D, dtype=dtype), torch.rand(D, N), torch.ones(D)
    q = torch.polar(0.9 * torch.ones(D, N), torch.rand(D, N)).requires_grad_()
    return lambda: mo.cema(x, p, q, torch.randn(D, N, dtype=torch.complex64), omega)


def timestep_norm(dtype, D=4096):
    x, weight, bias = randn(1, 1024, D, dtype=dtype), torch.zeros(D), torch.zeros(D)
    return lambda: mo.timestep_norm(x, weight.requires_grad_(), bias, num_groups=1024)


def normalized_qk(dtype, size=4096):
    z, gamma, beta = randn(1, 1024, size, dtype=dtype), torch.zeros(2, size).requires_grad_(), torch.zeros(2, size)
    return lambda: mo.normalized_qk(z, gamma, beta, num_heads=16, chunk_size=512)[0]


def many_rows(dtype):
    x, weight = randn(2048, 2048, dtype=dtype), randn(1024, 2048, dtype=dtype)
    return lambda: linear.linear(x, weight)


def cross_entropy(dtype):
    x, weight = randn(1024, 512, dtype=dtype), randn(4096, 512, dtype=dtype)
    return lambda: loss.linear_cross_entropy(x, weight, torch.arange(1024))


def call(make):
    outcomes = []
    try:
        output = make()
        outcomes.append("result")
        if output.requires_grad:
            output.float().mean().backward()
            outcomes.append("gradient")
    except MemoryError:
        outcomes.append("MemoryError")
    except RuntimeError as error:
        assert "memory" in str(error).lower(), error
        outcomes.append("RuntimeError")
    return outcomes


ops = (attention, decoding, cema, timestep_norm, normalized_qk, many_rows, cross_entropy)
calls = [(op.__name__, dtype, op(dtype)) for op in ops for dtype in (torch.float32, torch.bfloat16)]
for _, _, make in calls:  # starts all threads and creates oneDNN's primitives
    call(make)
unlimited = resource.getrlimit(resource.RLIMIT_AS)
for name, dtype, make in calls:
    for room in {rooms}:
        held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (room << 20), unlimited[1]))
        outcome = call(make)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
        print(name, dtype, *outcome, flush=True)
        if not any("Error" in word for word in outcome):
            break
"""


def assert_a_result_or_an_error(isa: str, rooms: list[int]) -> None:
    """Run each call with more and more free memory, in MiB, until it succeeds."""
    ran = run_python(PROGRAM.replace("{rooms}", repr(rooms)), MEGALODON_OPS_ISA=isa)
    assert ran.returncode == 0, ran.stderr[-2000:] + ran.stdout[-500:]
    outcomes: dict[tuple[str, str], list[list[str]]] = {}
    for name, dtype, *outcome in map(str.split, ran.stdout.splitlines()):
        outcomes.setdefault((name, dtype), []).append(outcome)
    assert len(outcomes) == 7 * 2
    for (name, dtype), found in outcomes.items():
        assert found[-1] == (["result"] if name == "decoding" else ["result", "gradient"]), (name, dtype)
    words = {word for found in outcomes.values() for outcome in found for word in outcome}
    assert {"MemoryError", "RuntimeError"} <= words


def test_out_of_memory_is_an_error():
    assert_a_result_or_an_error(DEFAULT_ISA, [2, 25, 400])


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in (ISAS[0], ISAS[-1]) if isa != DEFAULT_ISA])
def test_out_of_memory_is_an_error_on_narrow_and_wide_vectors(isa):
    """Buffer sizes depend on the width of vectors."""
    assert_a_result_or_an_error(isa, [2, 20, 30, 40, 400])


@pytest.mark.slow
def test_out_of_memory_is_an_error_under_many_limits():
    assert_a_result_or_an_error(DEFAULT_ISA, [1, 2, 3, 5, 8, 12, 20, 30, 40, 60, 80, 120, 160, 240, 400])

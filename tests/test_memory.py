"""Memory of tensors on the CPU: the pool of large outputs, and freed memory that a process keeps."""

import copy
import io
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import run_python

import megalodon_ops as mo
from megalodon_ops.ops import memory

MIB = 1 << 18  # float32
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]


@pytest.fixture(autouse=True)
def empty_pool():
    mo.release_memory()
    yield
    mo.release_memory()


def output(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """From the pool, if it is large."""
    return memory.empty(torch.empty(0), shape, dtype)


def test_memory_is_used_again_and_a_little_more_of_it_too():
    first = output(8, MIB)
    address = first.data_ptr()
    view = first[3]
    del first
    other = output(8, MIB)
    assert other.data_ptr() != address  # the view has it
    del view
    for size in (8 * MIB, 7 * MIB, 8 * MIB - 1):
        assert output(size).data_ptr() == address
    assert output(6 * MIB).data_ptr() != address  # it would waste too much


@given(st.lists(st.integers(1, 6) | st.none(), max_size=40), st.data())
def test_no_two_tensors_share_memory(sizes, data):
    """Sizes in MiB; None frees one of those in use."""
    in_use = []
    for number, size in enumerate(sizes):
        if size is not None:
            tensor = output(size, MIB)
            assert tensor.data_ptr() % 64 == 0
            in_use.append((number, tensor.fill_(number)))
        elif in_use:
            in_use.pop(data.draw(st.integers(0, len(in_use) - 1)))
        assert all((tensor == number).all() for number, tensor in in_use)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_output_is_like_any_tensor(dtype):
    usual = torch.empty(3, 1, MIB, dtype=dtype)
    tensor = memory.empty_like(usual.transpose(0, 2).requires_grad_())
    assert (tensor.dtype, tensor.shape, tensor.stride()) == (dtype, (MIB, 1, 3), (3, 3, 1))
    assert tensor.is_leaf and not tensor.requires_grad and not tensor._is_view() and not tensor.is_inference()
    tensor.fill_(2)
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    shared, loaded = tensor.clone().share_memory_(), torch.load(file, weights_only=True)
    for copied in (copy.deepcopy(tensor), loaded, shared, tensor.share_memory_()):
        assert copied.eq(2).all()
    with torch.inference_mode():
        assert memory.empty_like(usual).is_inference()


def test_outputs_of_ops_may_be_written_and_differentiated():
    x = torch.randn(1, 4096, 256, requires_grad=True)
    plain = mo.timestep_norm(x, *torch.zeros(2, 256), num_groups=8)
    y = mo.timestep_norm(x, *torch.zeros(2, 256), num_groups=8)
    y.mul_(2).add_(1)
    assert y.equal(plain.detach() * 2 + 1)
    (expected,) = torch.autograd.grad(plain.sum() * 2, x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.equal(expected)


def test_what_is_small_or_of_another_kind_is_torchs(monkeypatch):
    def refuse(*args):
        raise AssertionError(args)

    monkeypatch.setattr(memory._C, "take_memory", refuse)
    with pytest.raises(AssertionError):
        output(MIB)
    assert output(MIB - 1).shape == (MIB - 1,)
    assert memory.empty(torch.empty(0, device="meta"), (MIB,)).is_meta
    assert memory.empty(torch.empty(0), (MIB,), torch.int64).dtype == torch.int64
    with torch._subclasses.FakeTensorMode() as mode:
        assert mode.is_our_fake(memory.empty(torch.empty(0), (MIB,)))
    torch.use_deterministic_algorithms(True)
    try:
        assert output(MIB).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_share_the_pool():
    failures = []

    def work(number):
        for size in range(1, 30):
            tensors = [output(1 + (size * number + i) % 5, MIB).fill_(number) for i in range(3)]
            failures.extend(t for t in tensors if not (t == number).all())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1 << 50,), torch.float32), ((1 << 40, 1 << 40), torch.float32), (((1 << 63) - 1,), torch.bfloat16)],
    ids=["memory", "address", "pages"],
)
def test_too_much_memory_is_an_error(shape, dtype):
    with pytest.raises(MemoryError):
        output(*shape, dtype=dtype)


MAPPED = """
import torch, megalodon_ops as mo
from megalodon_ops.ops import memory

def output(mib):
    return memory.empty(torch.empty(0), (mib << 18,)).fill_(1)

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) >> 10

first = [output(1)]  # whatever else is mapped at the first call
before, resident = status("VmSize"), status("VmRSS")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no Linux")
def test_the_pool_never_maps_more_than_was_in_use_at_once():
    program = """
try:
    output(1 << 30)
except MemoryError:
    pass
tensors = [output(32) for _ in range(3)]
del tensors
kept = status("VmSize") - before
tensors = [output(80)]  # fits in none of the three, so they go
print(kept, status("VmSize") - before)
del tensors
mo.release_memory()
print(status("VmSize") - before, status("VmRSS") - resident)
"""
    done = run_python(MAPPED + program)
    kept, mapped, after, resident = map(int, done.stdout.split())
    assert 96 <= kept <= 98 and 80 <= mapped <= 98, done.stderr
    assert after <= 1 and resident <= 2


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no Linux since 4.14")
def test_linux_may_take_what_is_kept():
    program = """
tensors = [output(64) for _ in range(4)]
del tensors
print(*(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("LazyFree:")))
"""
    done = run_python(MAPPED + program)
    assert int(done.stdout) >> 10 == 128, done.stderr  # all but the last 128 MiB


FAULTS_OF_AN_OP = """
import resource, torch, megalodon_ops as mo
x, zeros = torch.ones(1, 1 << 15, 1 << 9), torch.zeros(1 << 9)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    mo.timestep_norm(x, zeros, zeros, num_groups=8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(*(faults() for _ in range(6)))
"""


def test_large_outputs_need_no_fresh_memory():
    first, *later = map(int, run_python(FAULTS_OF_AN_OP).stdout.split())
    assert first >= 32  # pages of 2 MiB at most
    assert min(later) < 16


FEWEST_FAULTS_OF_A_TENSOR = """
import resource, torch, megalodon_ops
print(megalodon_ops.keep_freed_memory())

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for size in 1 << 24, 1 << 26:
    print(min(faults(size) for _ in range(6)))  # a small block may have taken a piece of the first
"""


def test_freed_memory_is_kept():
    kept, *faults = run_python(FEWEST_FAULTS_OF_A_TENSOR).stdout.split()
    if kept == "False":
        pytest.skip("no glibc")
    assert max(map(int, faults)) < 16, faults  # pages of 2 MiB at most: 32 and 128 of them


OUTPUT_OF_AN_OP = """
import torch, megalodon_ops
tensor = megalodon_ops.timestep_norm(torch.ones(1, 1 << 15, 1 << 8), *torch.zeros(2, 1 << 8), num_groups=8)
"""
FLAGS_OF_ITS_MEMORY = """
address = tensor.flatten()[tensor.numel() // 2].data_ptr()
for line in open("/proc/self/smaps"):
    first, *rest = line.split()
    if "-" in first:
        start, end = (int(part, 16) for part in first.split("-"))
    elif first == "VmFlags:" and start <= address < end:
        print(*rest)
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages in this system")
def test_outputs_are_marked_for_huge_pages():
    assert "hg" in run_python(OUTPUT_OF_AN_OP + FLAGS_OF_ITS_MEMORY).stdout.split()

"""Memory of tensors on the CPU: outputs are ordinary tensors, huge pages, memory kept after it is freed."""

import mmap
import re
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ranks import forkserver

import megalodon_ops as mo


def test_outputs_of_ops_may_be_written_and_differentiated():
    x = torch.randn(1, 4096, 256, requires_grad=True)
    plain = mo.timestep_norm(x, *torch.zeros(2, 256), num_groups=8)
    y = mo.timestep_norm(x, *torch.zeros(2, 256), num_groups=8)
    y.mul_(2).add_(1)
    assert y.equal(plain.detach() * 2 + 1)
    (expected,) = torch.autograd.grad(plain.sum() * 2, x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.equal(expected)


def test_the_storage_of_an_output_can_be_resized():
    y = mo.timestep_norm(torch.randn(1, 4096, 256), *torch.zeros(2, 256), num_groups=8)
    y.untyped_storage().resize_(0)
    y.untyped_storage().resize_(y.numel() * y.element_size())
    assert y.fill_(1).sum() == y.numel()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages to ask for")
def test_large_parameters_move_to_huge_pages_and_nothing_else_changes():
    config = mo.MegalodonConfig(
        num_layers=1, model_dim=1024, z_dim=64, value_dim=64, ffn_hidden_dim=64, vocab_size=600, share_emb=True
    )
    model = mo.Megalodon(config)
    parameters = dict(model.named_parameters())
    before = {name: (parameter.data_ptr(), parameter.detach().clone()) for name, parameter in parameters.items()}
    if not mo.use_huge_pages(model):
        pytest.skip("this kernel has no huge pages")
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and parameter.equal(before[name][1])
    assert model.output.output.weight is model.embed.weight
    moved = {name for name, parameter in parameters.items() if parameter.data_ptr() != before[name][0]}
    assert moved == {"embed.weight", "layers.0.mega.wh1.weight"}  # 2.4 and 4 MB
    for name in moved:
        assert parameters[name].data_ptr() % (2 << 20) == 0
        assert "hg" in map_flags(parameters[name].data_ptr()), "Linux was not asked for huge pages"
        assert "sh" not in map_flags(parameters[name].data_ptr()), "shared memory gets huge pages by another rule"
    model.loss(torch.randint(600, (1, 8)), torch.randint(600, (1, 8))).backward()


def map_flags(address):
    """Flags of the memory map that holds an address."""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
            elif inside and line.startswith("VmFlags:"):
                return line.split()[1:]
    raise AssertionError("no map holds this address")


def test_use_huge_pages_takes_a_module():
    with pytest.raises(TypeError, match="use_huge_pages: `model` must be a torch.nn.Module, got 3"):
        mo.use_huge_pages(3)


def count_page_faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def send_the_fewest_faults(connection):
    kept = mo.keep_freed_memory()

    def fewest():  # of several: a small block may have taken part of the first
        return [min(count_page_faults(size) for _ in range(6)) for size in (1 << 24, 1 << 26)]

    with ThreadPoolExecutor(1) as pool:
        faults = {"first": fewest(), "in another thread": pool.submit(fewest).result()}
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.empty(1 << 50)
        faults["after an allocation that failed"] = fewest()
    connection.send((kept, faults))


def test_freed_memory_is_kept():
    """In a new process, since the setting lasts, and allocations of other tests may have failed in this one."""
    here, there = forkserver().Pipe()
    process = forkserver().Process(target=send_the_fewest_faults, args=(there,))
    process.start()
    there.close()
    kept, faults = here.recv()
    process.join()
    if not kept:
        pytest.skip("no glibc")
    assert max(map(max, faults.values())) < 16, faults  # else at least 32 and 128, with pages of 2 MiB

"""Memory of tensors on the CPU: outputs are ordinary tensors, huge pages, memory kept after it is freed."""

import mmap
import re
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ranks import forkserver

import megalodon_ops as mo
from megalodon_ops.ops.common import memory


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


def send_generated(connection):
    """Allow 600 MiB more, and generate 90 samples, then 360: each has a state of 1 MiB and a copy of it."""
    config = mo.MegalodonConfig(
        num_layers=1, model_dim=32, z_dim=256, value_dim=768, ffn_hidden_dim=32, chunk_size=256, vocab_size=9
    )
    model, prompt = mo.Megalodon(config).eval(), torch.tensor([[1, 2, 3]])
    model.generate(prompt, max_new_tokens=2, num_samples=2)
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * mmap.PAGESIZE + (600 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    assert len(model.generate(prompt, max_new_tokens=2, num_samples=90)) == 90
    for rows, samples in ((1, 360), (360, 1)):
        try:
            model.generate(prompt.repeat(rows, 1), max_new_tokens=2, num_samples=samples)
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


def test_samples_that_do_not_fit_beside_what_is_used_are_refused():
    """720 MiB do not fit into 600, although one copy of the states does, and both minus the memory in use do."""
    here, there = forkserver().Pipe()
    process = forkserver().Process(target=send_generated, args=(there,))
    process.start()
    there.close()
    words = "the state of 360 samples takes 0.7 GiB of memory, and there are 0."
    try:
        for fewer in ("`num_samples` must be less, got 360", "`prompt` must have fewer rows, got 360"):
            assert here.poll(60), "the process is stuck for lack of memory"
            assert here.recv().startswith(f"ValueError: generate: {fewer}: {words}")
    finally:
        process.kill()


def test_control_groups_limit_memory(tmp_path, monkeypatch):
    """Cached files do not count as used; "max" is no limit."""
    monkeypatch.setattr(memory, "_GROUP_FILES", dict.fromkeys(["", "memory"], (tmp_path, "max", "now", "cached")))
    for limit, now, cached, available in ((5000, 3000, 200, 2200), (5000, 7000, 0, 0), ("max", 3000, 0, None)):
        for name, text in {"max": limit, "now": now, "memory.stat": f"active 4\ncached {cached}\nother 1"}.items():
            (tmp_path / name).write_text(f"{text}\n")
        if available is None:
            assert memory.available_memory() > 5000
        else:
            assert (memory.machine_memory(), memory.available_memory()) == (limit, available)

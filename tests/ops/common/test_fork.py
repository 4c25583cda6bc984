"""Processes forked after ops ran on several threads, such as DataLoader workers, may use several threads, too."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, torch, megalodon_ops as mo
from torch.utils.data import DataLoader, Dataset
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
config = mo.MegalodonConfig(num_layers=1, model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=64, chunk_size=64,
                            norm_num_groups=4, vocab_size=50)
torch.manual_seed(0)
model = mo.Megalodon(config)
x = torch.randn(2, 200, 64, generator=generator)
q = torch.polar(torch.full((64, 4), 0.9), torch.rand(64, 4, generator=generator))
heads = x.view(2, 200, 1, 64)
tokens = torch.randint(50, (2, 500), generator=generator)


def kernels():  # small enough for torch to stay on one thread where it is asked for copies
    leaf = x.clone().requires_grad_()
    y = mo.timestep_norm(mo.cema(leaf, torch.ones(64, 4), q, q, torch.ones(64)), torch.zeros(64), torch.zeros(64), num_groups=4)
    attended = mo.chunked_attention(heads, heads, heads, chunk_size=256)
    y.backward(x)
    return [y.detach(), attended, leaf.grad]


def everything():
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    (gradient,) = torch.autograd.grad(loss, model.embed.weight)
    return [*kernels(), loss.detach(), gradient, model.generate(tokens[:1, :9], max_new_tokens=3, temperature=0.0), x[0] @ x[1].T]


compute = kernels if sys.argv[1] == "kernels" else everything
wanted = compute()
threads = int(sys.argv[2])


class Computed(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        found = compute()
        names = ("equal" if torch.equal(a, b) else str((a.float() - b.float()).abs().max()) for a, b in zip(found, wanted))
        return " ".join(names), torch.get_num_threads(), len(os.listdir("/proc/self/task"))


def start(worker):
    if threads:
        torch.set_num_threads(threads)


for _ in range(2):  # the parent continues, and forks again
    for shown in DataLoader(Computed(), None, num_workers=2, worker_init_fn=start, multiprocessing_context="fork"):
        print(*shown, flush=True)
    for a, b in zip(compute(), wanted):
        assert torch.equal(a, b)
assert torch.get_num_threads() == 2
if (child := os.fork()) == 0:  # a child of a child
    torch.set_num_threads(2)
    compute()
    if (grandchild := os.fork()) == 0:
        compute()
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
print("children", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def outcome(*arguments: object, **environment: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children, too
        raise
    assert process.returncode == 0, err[-2000:] + out
    return out.splitlines()


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "omp_pause_resource_all"),
    reason="this torch's OpenMP cannot end its threads: torch's own large ops hang in a child",
)
@pytest.mark.parametrize(
    "threads", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_forked_worker_gets_the_results_of_its_parent(threads):
    """Ops, a model with its gradient, generation and torch's products, on one, two and three threads."""
    *lines, children = outcome("everything", threads)
    assert children == "children 0" and len(lines) == 8
    for line in lines:
        *found, count, alive = line.split()
        assert found[:3] == ["equal"] * 3  # the kernels; the others may round otherwise
        assert all(word == "equal" or float(word) < 1e-3 for word in found[3:])
        assert int(count) == (threads or 1) and int(alive) >= int(count)


@pytest.mark.slow
def test_kernels_run_on_one_thread_where_openmp_cannot_end_its_threads(tmp_path):
    """As with libgomp of GCC 8, where large ops of torch itself would hang on two threads."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    Path(tmp_path / "old.c").write_text("int omp_pause_resource_all(int kind) { return -1; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "old.so", tmp_path / "old.c"], check=True)
    *lines, children = outcome("kernels", 2, LD_PRELOAD=str(tmp_path / "old.so"))
    assert children == "children 0" and len(lines) == 8
    for line in lines:
        *found, count, _ = line.split()
        assert found == ["equal"] * 3 and count == "2"

"""A recorded step has the bits of its module and leaves nothing out, whatever torch computes between kernels."""

import copy
import gc
import itertools
import pickle
import random
import threading
import warnings
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from assertions import every_case
from decoding import assert_same_bits
from models import TINY
from torch import nn

import megalodon_ops as mo
from megalodon_ops import _C

D = TINY["model_dim"]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Network(nn.Module):
    """Two blocks and a norm between two of torch's linear layers, with a state."""

    def __init__(self, config):
        super().__init__()
        self.input = nn.Linear(3, config.model_dim)
        self.output = nn.Linear(config.model_dim, 2)
        self.blocks = nn.ModuleList(mo.MegalodonBlock(config, i) for i in range(2))
        self.norm = mo.TimestepNorm(config.model_dim, config.norm_num_groups)

    def forward(self, x, state=(None, None, None)):
        h = self.input(x)
        after = []
        for block, before in zip(self.blocks, state):
            h, new = block(h, state=before, return_state=True)
            after.append(new)
        h, new = self.norm(h, state=state[-1], return_state=True)
        return self.output(h), (*after, new)


def assert_replays(module, inputs, state=None):
    """Assert that a recorded step has the results of a module; return the step, and the module's last state."""
    reference = copy.deepcopy(module)
    step = mo.record(module, inputs[0], state=state)
    with torch.no_grad():
        for x in inputs:
            if state is None:
                expected = reference(x)
            else:
                expected, state = reference(x, state=state)
            assert_same_bits(step(x), expected)
    return step, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_network_of_ones_own(dtype):
    """Inputs over more than one chunk; every kernel of a block, and torch's linear layers."""
    module = Network(mo.MegalodonConfig(**TINY)).to(dtype).eval()
    x = torch.randn(2, 3 * TINY["chunk_size"], 3, dtype=dtype)
    with torch.no_grad():
        _, state = module(x[:, :2])
    before = copy.deepcopy(state)
    inputs = [token.contiguous() for token in x[:, 2:].split(1, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step, after = assert_replays(module, inputs, state)
    assert_same_bits(state, before)
    for found, expected in zip(step.state[:-1], after[:-1]):
        assert_same_bits((found.norm, found.cema), (expected.norm, expected.cema))
        assert torch.equal(found.attention.position, expected.attention.position)
        rows = int(expected.attention.position[0])  # those after it are arbitrary
        for name in ("k", "v"):
            assert_same_bits(getattr(found.attention, name)[:, :rows], getattr(expected.attention, name)[:, :rows])
    assert_same_bits(step.state[-1], after[-1])


class Hidden(nn.Module):
    def forward(self, x):
        return mo.gated_silu(torch.cumsum(mo.rms_norm(x), -1))


def test_what_torch_computes_between_two_ops_is_called_and_named():
    with pytest.warns(UserWarning, match=r"record: functions run in Python .*: `cumsum` \(calls: 1\)") as caught:
        assert_replays(Hidden(), torch.randn(4, 2, D).unbind(0))
    assert [warning.filename for warning in caught] == [__file__]


BETWEEN_OPS = {
    "sum": lambda x, w: x + w,
    "difference": lambda x, w: x - w,
    "product": lambda x, w: w * x,
    "quotient": lambda x, w: x / w,
    "numbers": lambda x, w: (x * 3 - 0.5) * -0.7 + 2,
    "row": lambda x, w: x + w[0],
    "row first": lambda x, w: w[:1] - x,
    "in place": lambda x, w: x.clone().mul_(w).add_(1.5).sub_(w),
    "zero": lambda x, w: x * 0.0,
    "copy": lambda x, w: torch.empty_like(x).copy_(x) + w,
    "views": lambda x, w: (x + w).flatten()[3:] * 2,
}


def test_kernels_in_place_of_torch():
    """Sums, products and copies run as kernels: without a warning, with torch's bits, signs of zero included."""
    with every_case() as case, warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            w = torch.randn(3, 19, dtype=dtype)
            x = torch.randn(5, 3, 19, dtype=dtype)  # of five calls
            x[:, 0, :2] = torch.tensor([0.0, -0.0])
            for name, function in BETWEEN_OPS.items():
                with case(dtype, name):
                    step = mo.record(partial(function, w=w), x[0])
                    for one in x:
                        found, expected = step(one), function(one, w)
                        assert torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


@pytest.mark.filterwarnings("ignore:record")
def test_arguments_that_no_kernel_takes():
    weight = torch.randn(3, 19)
    assert_replays(lambda x: torch.add(x, weight, alpha=2), torch.randn(4, 3, 19).unbind(0))
    assert_replays(lambda x: x + torch.tensor(1 / 3), torch.randn(4, 3, 19).bfloat16().unbind(0))


def test_dtypes_that_meet():
    x, wide = torch.randn(4, 3, 19).bfloat16(), torch.randn(19)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_replays(lambda x: (wide * x).to(x.dtype) + (x.float() + wide).half(), x.unbind(0))


def test_embedding_refuses_tokens_outside():
    embedding = nn.Embedding(7, 5)
    step, _ = assert_replays(embedding, torch.randint(7, (3, 2, 4)).unbind(0))
    with pytest.raises(IndexError, match=r"embedding: `input` must be in \[0, 7\), got 7"):
        step(torch.full((2, 4), 7))
    with pytest.raises(RuntimeError, match="record: the state must be whole"):
        step(torch.zeros(2, 4, dtype=torch.int64))


class Running(nn.Module):
    """Writes a buffer in place, and reads it before and after."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(D))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        scale = self.total.exp()
        self.total += x
        self.count += 1
        return mo.rms_norm(x) * scale + self.total / self.count


@pytest.mark.filterwarnings("ignore:record")
def test_buffers_written_in_place_continue():
    module = Running()
    assert_replays(module, torch.randn(5, D).unbind(0))
    assert module.count == 5


def test_states_that_change_places():
    """States whose tensors move to another place: a delay of three, the last result, the norm's last state."""

    def delay(x, state):
        a, b, c = state
        return mo.rms_norm(c), (x, a, b)

    assert_replays(delay, torch.randn(7, D).unbind(0), state=tuple(torch.randn(3, D)))
    norm, x = mo.TimestepNorm(D, 2), torch.randn(5, 1, 1, D)

    def keep_last(x, state):
        y, after = norm(x, state=state[0], return_state=True)
        return y, (after, state[0])

    assert_replays(lambda x, state: (state, mo.rms_norm(x)), x.unbind(0), state=x[0])  # the result is the old state
    _, start = norm(x[0], return_state=True)
    step, state = assert_replays(keep_last, x.unbind(0), state=(start, start))
    assert_same_bits(step.state, state)


def test_a_sum_takes_float64_alone_or_not_at_all():
    numbers = {dtype: torch.ones(3, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    for a, b, y in itertools.product(numbers.values(), repeat=3):
        if len({a.dtype, b.dtype, y.dtype}) > 1:
            with pytest.raises(ValueError, match="`y` must be float64 if and only if `a` and `b` are"):
                _C.elementwise(a, b, "+", 1.0, -0.0, y.clone())


def change_later(x, state):
    """The copied tensor is written after the copy."""
    y, new = mo.rms_norm(x + state), x * 2
    state.copy_(new)
    new += 1
    return y * new, state


def write_early(x, state):
    """Temporary tensors come after the new state."""
    y = x + state
    state.copy_(mo.rms_norm(x))
    return mo.rms_norm(mo.rms_norm(y) * 2) * 3, state


def write_part(x, state):
    state[1].copy_(mo.rms_norm(x[0]))
    return state * 2, state


WRITES = {
    "sum from zero": lambda x, state: (torch.zeros(3, D).add_(x).add_(state) * 2, x),
    "the result is the new state": lambda x, state: (y := mo.rms_norm(x + state), y),
    "the old state is read later": lambda x, state: ((new := mo.rms_norm(x)) * state, new),
    "the old state is read by the same kernel": lambda x, state: (x, state + state[0]),
    "part of the new tensor": lambda x, state: (x, mo.rms_norm(torch.cat([x + state, x]))[:3]),
    "part of the state": write_part,
    "changed later": change_later,
    "early": write_early,
}


@pytest.mark.filterwarnings("ignore:record")
def test_writes_to_older_memory():
    """A step omits the copy of a new state to the old one's memory only where this changes no result."""
    with every_case() as case:
        for name, function in WRITES.items():
            with case(name):
                step, state = assert_replays(function, torch.randn(5, 3, D).unbind(0), state=torch.randn(3, D))
                assert_same_bits(step.state, state)


@pytest.mark.filterwarnings("ignore:record")
def test_lengths_that_a_module_computes():
    """Between the sums, their memory holds numbers from 100 on, which are no lengths."""

    def norm(x):
        lengths = x[..., 0].gt(0).sum(1).add(100).mul(1).sub(100)
        return mo.timestep_norm(x, torch.ones(D), torch.zeros(D), num_groups=2, lengths=lengths)

    assert_replays(norm, torch.randn(5, 3, 4, D).unbind(0))


def test_values_of_every_call_are_checked():
    """A step refuses lengths, offsets, spans and positions that would lead a kernel outside of its memory."""
    x = torch.randn(1, 4, D)
    norm = partial(mo.timestep_norm, weight=torch.ones(D), bias=torch.zeros(D), num_groups=2)
    caches = torch.randn(2, 1, 8, 1, D)

    def attend(x, position):
        state = mo.AttentionState(*caches, position)
        return mo.chunked_attention(*[x[:, :, None]] * 3, chunk_size=8, state=state)

    outside = r"`spans` .* in order, disjoint and within one row of 4 .* \[0, 5\) at 0"
    for function, good, wrong, message in (
        (lambda x, lengths: norm(x, lengths=lengths), [3], [5], r"timestep_norm: `lengths` .* \[0, 4\], got 5 at 0"),
        (lambda x, spans: norm(x, spans=spans), [[1, 3]], [[0, 5]], outside),
        (lambda x, ends: norm(x, cu_seqlens=ends), [0, 2, 4], [0, 3, 2], "`cu_seqlens` .* non-decreasing .* 2 at 2"),
        (attend, [3], [8], r"chunked_attention: `state.position` .* \[0, 8\), got 8 at 0"),
    ):
        # Lengths become spans by torch.stack, which runs in Python.
        with pytest.warns(UserWarning, match="`stack`") if "lengths" in message else nullcontext():
            step = mo.record(function, x, torch.tensor(good))
        assert torch.equal(step(x, torch.tensor(good)), function(x, torch.tensor(good)))
        with pytest.raises(ValueError, match=message):
            step(x, torch.tensor(wrong))


def test_parameters_are_read_and_what_is_computed_from_them_is_not():
    layer = mo.TimestepNorm(D, 2)
    x = torch.randn(1, 1, D)
    step = mo.record(layer, x)
    with torch.no_grad():
        layer.weight.add_(1)
        assert torch.equal(step(x), layer(x))


@pytest.mark.filterwarnings("ignore:record")
def test_refusals():
    step = mo.record(mo.rms_norm, torch.ones(D))
    for wrong in ((), (torch.ones(D + 1),), (torch.ones(D).double(),), (None,), (torch.ones(D), torch.ones(D))):
        with pytest.raises(ValueError, match="record: `inputs` must have the recorded shapes"):
            step(*wrong)
    with pytest.raises(TypeError, match="record: expected no copy"):
        copy.deepcopy(step)


class Held(nn.Module):
    """Calls a function of itself and x; holds values in various ways."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.n = 0
        self.values = {"list": [torch.zeros(D)]}
        self.box = SimpleNamespace(n=0)
        self.weight = nn.Parameter(torch.ones(D))
        self.register_buffer("total", torch.zeros(D))

    def forward(self, x):
        return self.function(self, x)

    def count(self, x):
        self.n += 1
        return x


def counter():
    """A function whose every fifth call computes something else."""
    n = 0

    def count(x):
        nonlocal n
        n += 1
        return x * (2 if n % 5 == 0 else 1)

    return count


def seeded(x):
    torch.manual_seed(1)
    return x + torch.rand(3, D)


FIXED = torch.randn(3, D)
DEFAULT = {"n": 0}


def two_tensors():
    return {"a": torch.zeros(3, D), "b": torch.ones(3, D)}


REPEATED = {
    "every second channel": lambda x: mo.rms_norm(x[:, ::2]),
    "part of a product": lambda x: mo.gated_silu(*(x * 2).chunk(2, -1)),
    "transposed": lambda x: mo.rms_norm(x.t()) + x.t().contiguous(),
    "tensor written": lambda x: torch.tensor([1.0] * D).add_(x[0]),
    "numpy written": lambda x: torch.from_numpy(np.ones(D, "f")).add_(x[0]),
    "negative view": lambda x: torch.complex(x, 2 * x).conj().imag * 3,
    "attention": lambda x: nn.functional.scaled_dot_product_attention(*[x[None]] * 3, is_causal=True),
    "gradients": torch.enable_grad()(lambda x: x * 2),
    "autocast": torch.autocast("cpu", torch.bfloat16)(lambda x: x @ FIXED.t()),
    "running mean": nn.BatchNorm1d(D),
    "no fraction": lambda x: (x * 0).neg() - 0,
    "in place": nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True)),
}
REPEATED_STATES = {
    "constant": (lambda x, state: ((c := FIXED * 2) * x + state, c), FIXED),
    "other order": (lambda x, state: (x + state["a"], {"b": state["a"] + x, "a": state["b"]}), two_tensors()),
    "number kept": (lambda x, state: (x * state[1] + state[0], (x, 3)), (FIXED, 3)),
    "aliases": (lambda x, state: (x * state[1], (x + state[0], state[0] * 2)), (FIXED, FIXED)),
}
REFUSED = {  # read numbers of tensors, keep numbers in Python or change what the module holds
    "item": lambda x: x * x.max().item(),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "tolist": lambda x: x * x.tolist()[0][0],
    "numpy": lambda x: x + torch.from_numpy(x.numpy()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)) * 2,
    "equal": lambda x: x * torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "object": lambda x: SimpleNamespace(y=x * 2),
    "sparse": lambda x: (x * 2).to_sparse(),
    "seed": seeded,
    "generator": lambda x: x + torch.rand(3, D, generator=torch.Generator().manual_seed(1)),
    "random": lambda x: x * random.random(),
    "input": lambda x: x.add_(1),
    "closure": counter(),
    "default": lambda x, held=DEFAULT: held.update(n=held["n"] + 1) or x,
    "attribute": Held(lambda self, x: setattr(self, "last", x) or x * 2),
    "list": Held(lambda self, x: self.values["list"].append(x) or x * 2),
    "object's number": Held(lambda self, x: setattr(self.box, "n", self.box.n + 1) or x * 2),
    "buffer": Held(lambda self, x: setattr(self, "total", self.total + x[0]) or x),
    "data": Held(lambda self, x: setattr(self.weight, "data", self.weight + 1) or x * self.weight),
    "parameter": Held(lambda self, x: x * self.weight.add_(1)),
    "partial": partial(Held(Held.count)),
    "bound method": Held(None).count,
}
REFUSED_STATES = {
    "number": (lambda x, state: (x, (state[0], state[1] + 1)), (FIXED, 0)),
    "keys": (lambda x, state: (x, {"a": x, "c": x}), two_tensors()),
    "list": (lambda x, state: (x, (x,)), [FIXED]),
    "no state": (lambda x, state: x, FIXED),
    "shape": (lambda x, state: (x, x[:1]), FIXED),
}


@pytest.mark.filterwarnings("ignore:record")
def test_what_is_repeated_and_what_is_refused():
    """Views, constants, aliases and structures are repeated; Python that may differ in the next call is refused."""
    inputs = torch.randn(4, 3, D).unbind(0)
    with every_case() as case:
        for name, function in REPEATED.items():
            with case(name):
                assert_replays(function, inputs)
        for name, (function, state) in REPEATED_STATES.items():
            with case("state", name):
                step, state = assert_replays(function, inputs, state=state)
                if isinstance(state, dict):
                    assert all(torch.equal(step.state[key], state[key]) for key in state)
        for name, function in REFUSED.items():
            refused = pytest.raises((NotImplementedError, ValueError), match="^record: `module` must")
            with case("refused", name), refused:
                mo.record(function, inputs[0])
        for name, (function, state) in REFUSED_STATES.items():
            with case("refused state", name), pytest.raises(ValueError, match="record: `module` must return a tuple"):
                mo.record(function, inputs[0], state=state)


def test_recording_leaves_the_module_and_random_numbers_as_they_were():
    x = torch.randn(3, D)
    module = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout())
    before, seed = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    with pytest.warns(UserWarning, match="record: functions run in Python"):
        mo.record(module, x)
    assert_same_bits(module.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), seed)


def test_random_numbers_are_drawn_anew():
    with pytest.warns(UserWarning, match="`native_dropout|`bernoulli_|`dropout"):
        step = mo.record(partial(nn.functional.dropout, p=0.5, training=True), torch.ones(1000))
    assert not torch.equal(step(torch.ones(1000)), step(torch.ones(1000)))
    with pytest.warns(UserWarning, match="record: functions run in Python .*: `rand`"):
        step = mo.record(lambda x: x + torch.rand(3), torch.ones(3))
    assert not torch.equal(step(torch.ones(3)), step(torch.ones(3)))


def test_results_and_autocast():
    """Results are new tensors, of any structure; autocast of the recorded call holds, that of later calls does not."""
    weight, x = torch.randn(4, D), torch.randn(2, 3, D)
    function = lambda x: {"y": nn.functional.linear(x, weight), "x": x, "n": None}  # noqa: E731
    step = mo.record(function, torch.ones(3, D))
    with torch.autocast("cpu", torch.bfloat16):
        first, second = step(x[0]), step(x[1])
    assert torch.equal(first["y"], nn.functional.linear(x[0], weight)) and torch.equal(second["x"], x[1])
    with torch.autocast("cpu", torch.bfloat16):
        step, expected = mo.record(function, x[0]), function(x[1])
    assert torch.equal(step(x[1])["y"], expected["y"])


def test_a_compiled_module_is_recorded():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(lambda x: x * 2 + 1, backend="eager")
        compiled(torch.ones(3))
        step = mo.record(compiled, torch.ones(3))
    assert torch.equal(step(torch.arange(3.0)), torch.arange(3.0) * 2 + 1)


def test_threads_wait_and_do_not_record_each_other():
    """Ops of another thread, before and while steps run, are not part of a step."""
    stop, x = threading.Event(), torch.randn(1, 1, D)

    def busy():
        while not stop.is_set():
            mo.rms_norm(torch.ones(D))

    other = threading.Thread(target=busy)
    other.start()
    try:
        norm = partial(mo.TimestepNorm(D, 2), return_state=True)
        steps = [mo.record(norm, x, state=norm(x)[1]) for _ in range(3)]
        threads = [threading.Thread(target=lambda: [steps[0](x) for _ in range(50)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        other.join()
    assert steps[0].state.count == 1 + 3 * 50  # the initial state's token, then three threads' calls


def test_memory_is_freed_with_the_last_reference():
    gc.disable()
    try:
        step = mo.record(mo.rms_norm, torch.ones(D))
        buffer = weakref.ref(step._inputs[0])
        del step
        assert buffer() is None
    finally:
        gc.enable()

"""linear_cross_entropy: blocks give torch's cross-entropy and never hold all logits."""

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_accurate_as, assert_bit_equal, assert_refuses
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backends import each_isa, isa
from megalodon_ops import _C
from megalodon_ops.ops.linear_cross_entropy import linear_cross_entropy as module
from megalodon_ops.ops.linear_cross_entropy.linear_cross_entropy import linear_cross_entropy

D, V = 24, 150
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROWS = 64  # tokens of the smallest block: three slabs of the weight's gradient
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 tokens, also for few logits."""
    monkeypatch.setattr(module, "_CPU_BLOCK", 1)


@pytest.fixture(params=["kernel", "torch"])
def block_code(request, monkeypatch):
    """The kernel of a block, and the torch code of other devices."""
    if request.param == "torch":
        monkeypatch.setattr(module, "has_cpu_kernel", lambda tensor: False)


def inputs(T: int, dtype=torch.float64, ignored: int = 0):
    gen = torch.Generator().manual_seed(T)
    hidden = torch.randn(T, D, generator=gen).to(dtype)
    weight = (torch.randn(V, D, generator=gen) / 4).to(dtype)
    targets = torch.randint(V, (T,), generator=gen)
    targets[torch.randperm(T, generator=gen)[:ignored]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def expected_loss(hidden, weight, targets, **options):
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, **options)


def results(function, hidden, weight, targets, **options):
    """The loss and its gradients; with reduction "none", each loss has another weight in their sum."""
    loss = function(hidden, weight, targets, **options)
    scales = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) if loss.dim() else 3.0
    dhidden, dweight = torch.autograd.grad((loss * scales).sum(), (hidden, weight))
    return {"loss": loss.detach(), "dhidden": dhidden, "dweight": dweight}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("T", [1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 7])
def test_equals_cross_entropy_at_the_edges_of_blocks(T, reduction, small_blocks, block_code):
    tensors = inputs(T, ignored=T // 5)
    found = results(linear_cross_entropy, *tensors, reduction=reduction)
    torch.testing.assert_close(found, results(expected_loss, *tensors, reduction=reduction), rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        loss = linear_cross_entropy(*tensors, reduction=reduction)
    torch.testing.assert_close(loss, found["loss"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_block_is_torchs(reduction):
    tensors = inputs(200, ignored=9)
    found = results(linear_cross_entropy, *tensors, reduction=reduction)
    torch.testing.assert_close(found, results(expected_loss, *tensors, reduction=reduction), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, small_blocks):
    hidden, weight, targets = inputs(ROWS + 3, ignored=5)
    torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction), (hidden, weight), fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_as_accurate_as_torch(dtype, reduction, small_blocks, block_code):
    hidden, weight, targets = inputs(5 * ROWS + 1, dtype, ignored=11)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    found = results(linear_cross_entropy, hidden, weight, targets, reduction=reduction)
    torchs = results(expected_loss, hidden, weight, targets, reduction=reduction)
    wanted = results(expected_loss, *exact, targets, reduction=reduction)
    assert found["loss"].dtype == torch.float32 and found["dweight"].dtype == dtype
    for name, value in found.items():
        assert_as_accurate_as(value, torchs[name], wanted[name], factor=2, floor=1, name=name)


def cross_entropy(logits, index, scales):
    logits = logits.clone()
    losses = module._cross_entropy(logits, index, scales)
    return {"loss": losses, "dlogits": logits}


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 63, 64, 65, 1000])
def test_kernel_of_a_block(name, dtype, classes, monkeypatch):
    """Losses from 0 to thousands, targets almost certain among them."""
    gen = torch.Generator().manual_seed(classes)
    spread = torch.logspace(-3, 3, 37, dtype=torch.float64)[:, None]
    logits = (torch.randn(37, classes, generator=gen, dtype=torch.float64) * spread - 5).to(dtype)
    index = torch.randint(classes, (37,), generator=gen)
    logits[::3].scatter_(1, index[::3, None], logits[::3].amax(1, keepdim=True) + 3)
    scales = torch.randn(37, generator=gen, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with isa(name):
        found = cross_entropy(logits, index, scales)
        unchanged = cross_entropy(logits, index, None)
    assert torch.equal(unchanged["loss"], found["loss"]) and torch.equal(unchanged["dlogits"], logits)
    monkeypatch.setattr(module, "has_cpu_kernel", lambda tensor: False)
    torchs = cross_entropy(logits, index, scales)
    wanted = cross_entropy(logits.double(), index, scales.double())
    for key, value in found.items():
        assert value.dtype == torchs[key].dtype
        assert_as_accurate_as(value, torchs[key], wanted[key], factor=2, floor=4, name=key)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_are_not_finite(name, dtype):
    """As in torch: a logit of minus infinity has probability 0; other non-finite logits give NaN."""
    inf, nan = float("inf"), float("nan")
    rows = [[0, -inf, 1], [-inf, 2, -inf], [inf, 0, 0], [-inf] * 3, [nan, 0, 0], [0, 0, nan], [3e4, -3e4, 0]]
    logits, index = torch.tensor(rows, dtype=dtype), torch.tensor([0, 1, 0, 0, 1, 0, 0])
    scales = torch.ones(7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with isa(name):
        found = cross_entropy(logits, index, scales)
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, index, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), exact)
    torch.testing.assert_close(found["loss"].double(), losses.detach(), equal_nan=True, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["dlogits"].double(), gradient, equal_nan=True, rtol=1e-2, atol=1e-12)


def test_errors_of_the_kernel():
    valid = dict(logits=torch.zeros(3, 5), targets=torch.tensor([0, 4, 2]), scales=torch.ones(3), losses=torch.ones(3))

    def refuses(error, argument, **wrong):
        assert_refuses(error, "cross_entropy", argument, lambda: _C.cross_entropy(*(valid | wrong).values()))

    refuses(ValueError, "logits", logits=valid["logits"][0])
    refuses(TypeError, "logits", logits=valid["logits"].int())
    refuses(ValueError, "targets", targets=valid["targets"][:2])
    refuses(TypeError, "targets", targets=valid["targets"].int())
    refuses(TypeError, "scales", scales=valid["scales"].double())
    refuses(ValueError, "losses", scales=None, losses=valid["losses"][:2])
    refuses(ValueError, "losses", losses=None)


def test_float16_gradients_under_a_loss_scale_do_not_vanish(small_blocks):
    hidden, _, targets = inputs(3 * ROWS, torch.float16)
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(0)).mul(1e-4).half()
    exact = hidden.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(expected_loss(exact, weight.double(), targets), exact)
    assert wanted.abs().max() < 1e-5  # float16 keeps a digit or two of these
    (found,) = torch.autograd.grad(65536 * linear_cross_entropy(hidden, weight, targets), hidden)
    assert (found.double() / 65536 - wanted).norm() < 2e-3 * wanted.norm()


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 999])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_targets(ignore_index, reduction, small_blocks):
    hidden, weight, targets = inputs(2 * ROWS)
    targets[::3] = ignore_index
    options = dict(reduction=reduction, ignore_index=ignore_index)
    found = results(linear_cross_entropy, hidden, weight, targets, **options)
    wanted = results(expected_loss, hidden, weight, targets, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert not found["dhidden"][targets == ignore_index].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("T", [0, ROWS + 1])
def test_no_targets(T, reduction, small_blocks):
    tensors = inputs(T, ignored=T)
    found = results(linear_cross_entropy, *tensors, reduction=reduction)
    torch.testing.assert_close(found, results(expected_loss, *tensors, reduction=reduction), equal_nan=True)
    assert found["loss"].isnan().all() if reduction == "mean" else not found["loss"].any()
    assert not found["dhidden"].any() and not found["dweight"].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_channels(reduction, small_blocks):
    hidden, weight, targets = torch.zeros(3 * ROWS, 0), torch.zeros(V, 0), torch.zeros(3 * ROWS, dtype=torch.int64)
    expected = F.cross_entropy(torch.zeros(3 * ROWS, V), targets, reduction=reduction)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, reduction=reduction), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batches_strides_and_integer_types(reduction, small_blocks):
    hidden, weight, targets = inputs(4 * ROWS)
    strided = hidden.detach().reshape(4, ROWS, D).transpose(0, 1).requires_grad_()
    index = targets.reshape(4, ROWS).t().int()

    def flattened(x, w, t, **options):
        losses = expected_loss(x.flatten(0, 1), w, t.flatten().long(), **options)
        return losses.reshape(t.shape if reduction == "none" else ())

    found = results(linear_cross_entropy, strided, weight, index, reduction=reduction)
    wanted = results(flattened, strided, weight, index, reduction=reduction)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operation returns, also inside our ops."""

    KERNELS = {module.linear_cross_entropy_fwd: module._fwd, module.linear_cross_entropy_sum: module._sum}

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.outputs = []

    @property
    def kernels(self):
        return [func for func, _ in self.outputs]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.KERNELS:
            with self:
                result = self.KERNELS[func](*args)
        else:
            result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if func in self.KERNELS:
            self.outputs.append((func, sizes))
        self.elements = max(self.elements, *sizes, 0)
        return result


def largest(function, *tensors, backward=True, **options) -> Largest:
    with Largest() as seen:
        loss = function(*tensors, **options).sum()
        if backward:
            loss.backward()
    return seen


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_never_holds_all_logits(reduction, small_blocks):
    T = 40 * ROWS
    tensors = inputs(T)
    bound = max(ROWS * V, T * D, V * D)
    seen = largest(linear_cross_entropy, *tensors, reduction=reduction)
    assert seen.elements <= bound < T * V
    assert seen.kernels.count(module.linear_cross_entropy_sum) == 1
    assert seen.kernels.count(module.linear_cross_entropy_fwd) == (reduction == "none")
    assert largest(expected_loss, *tensors, reduction=reduction).elements == T * V
    with torch.no_grad():
        seen = largest(linear_cross_entropy, *tensors, backward=False, reduction=reduction)
    assert seen.elements <= bound and seen.kernels == [module.linear_cross_entropy_fwd]


def test_few_logits_are_saved(monkeypatch):
    """Logits are kept instead of computed again: with gradients, up to a quarter of hidden's size, else one block."""
    monkeypatch.setattr(module, "_CPU_BLOCK", ROWS * V)
    hidden, weight, targets = torch.randn(2 * ROWS, 4 * V), torch.randn(V, 4 * V), torch.zeros(2 * ROWS).long()
    assert largest(linear_cross_entropy, hidden, weight, targets, backward=False).kernels
    hidden.requires_grad_()
    assert not largest(linear_cross_entropy, hidden, weight, targets).kernels
    assert largest(linear_cross_entropy, hidden[:, 1:], weight[:, 1:], targets).kernels
    assert not largest(linear_cross_entropy, hidden[:ROWS, 1:], weight[:, 1:], targets[:ROWS]).kernels


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", ["dhidden", "dweight"])
def test_frozen_inputs_cost_no_gradient(frozen, reduction, small_blocks):
    hidden, weight, targets = inputs(ROWS + 1)
    leaves = {"dhidden": hidden, "dweight": weight}
    wanted = results(linear_cross_entropy, hidden, weight, targets, reduction=reduction)
    leaves.pop(frozen).requires_grad_(False)
    ((name, leaf),) = leaves.items()
    with Largest() as seen:
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
        scales = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype) if loss.dim() else 3.0
        (grad,) = torch.autograd.grad((loss * scales).sum(), leaf)
    torch.testing.assert_close(grad, wanted[name])
    (sizes,) = [sizes for func, sizes in seen.outputs if func == module.linear_cross_entropy_sum]
    assert sizes == [1, *(0 if name == frozen else wanted[name].numel() for name in ("dhidden", "dweight"))]


def test_same_bits_on_every_run_and_a_second_backward(small_blocks, two_threads):
    tensors = inputs(5 * ROWS, torch.float32)
    assert_bit_equal(results(linear_cross_entropy, *tensors), results(linear_cross_entropy, *tensors))
    loss = linear_cross_entropy(*tensors)
    grads = [torch.autograd.grad(loss, tensors[:2], retain_graph=True) for _ in range(2)]
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_are_refused(reduction, small_blocks):
    hidden, weight, targets = inputs(ROWS + 1)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    grads = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
    for grad in grads:
        with pytest.raises(NotImplementedError, match="linear_cross_entropy: second derivatives"):
            grad.square().sum().backward(retain_graph=True)


def test_autocast(small_blocks):
    hidden, weight, targets = inputs(ROWS + 1, torch.float32)
    narrow = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        found = results(linear_cross_entropy, hidden, weight, targets)
        mixed = linear_cross_entropy(narrow[0], weight, targets)
    wanted = results(linear_cross_entropy, *narrow, targets)
    assert found["dhidden"].dtype == found["dweight"].dtype == torch.float32
    assert torch.equal(mixed.detach(), wanted["loss"])
    torch.testing.assert_close(found, {name: value.float() for name, value in wanted.items()}, rtol=0, atol=0)


@pytest.mark.parametrize(("blocks", "reduction"), [(True, "mean"), (True, "none"), (False, "sum")])
def test_compiles_to_one_graph(reduction, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(module, "_CPU_BLOCK", 1)
    tensors = inputs(ROWS + 1, torch.float32, ignored=4)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    found = results(compiled, *tensors, reduction=reduction)
    torch.testing.assert_close(found, results(linear_cross_entropy, *tensors, reduction=reduction))


def test_opcheck(small_blocks):
    hidden, weight, targets = inputs(ROWS + 1, torch.float32, ignored=4)
    torch.library.opcheck(module.linear_cross_entropy_fwd, (hidden, weight, targets, -100))
    scales, frozen = torch.ones(ROWS + 1), [t.detach() for t in (hidden, weight)]  # no second derivatives
    for wants in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(module.linear_cross_entropy_sum, (*frozen, targets.clamp(min=0), scales, *wants))


@pytest.mark.parametrize("target", [V, -1, -101])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("T", [5, ROWS + 1])
def test_targets_out_of_bounds(target, reduction, T, monkeypatch, block_code):
    monkeypatch.setattr(module, "_CPU_BLOCK", ROWS * V)
    hidden, weight, targets = inputs(T)
    targets[-1] = target
    with pytest.raises(IndexError, match=f"`targets` must be in .*, got {target}"):
        linear_cross_entropy(hidden, weight, targets, reduction=reduction)


X, W, Y = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("error", "argument", "arguments", "options"),
    [
        (ValueError, "hidden", (torch.tensor(1.0), W, Y), {}),
        (ValueError, "weight", (X, W[:, :3], Y), {}),
        (ValueError, "weight", (X, W[0], Y), {}),
        (ValueError, "targets", (X, W, Y.t()), {}),
        (ValueError, "reduction", (X, W, Y), {"reduction": "max"}),
        (TypeError, "hidden", (X.long(), W, Y), {}),
        (TypeError, "weight", (X, W.bfloat16(), Y), {}),
        (TypeError, "targets", (X, W, Y.float()), {}),
        (TypeError, "targets", (X, W, Y.bool()), {}),
    ],
)
def test_wrong_arguments(error, argument, arguments, options):
    assert_refuses(error, "linear_cross_entropy", argument, lambda: linear_cross_entropy(*arguments, **options))

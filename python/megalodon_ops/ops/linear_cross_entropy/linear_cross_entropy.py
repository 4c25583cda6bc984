"""Cross-entropy of logits from a matrix or another function, without the logits of all tokens in memory at once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..common.definition import autocast, call, contiguous_or_none, define_op, has_cpu_kernel
from ..common.states import accumulation_dtype
from ..common.definition import is_autocast_enabled, is_exporting, launch
from ..linear.linear import linear, put_product_
from ..common.checks import check_device, check_integer, check_tensor, describe

# Logits in a block. In float32, the CPU's block has just under 32 MiB: glibc returns larger freed memory to the system.
_CPU_BLOCK, _GPU_BLOCK = (1 << 23) - 1024, 1 << 26
_SLAB = 1 << 20  # elements of the weight's gradient that are computed, and then added, from the cache


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    r"""Cross-entropy of the logits z_t = W x_t, computed for a block of tokens at a time.

    .. math:: \ell_t = \log \sum_v e^{z_{tv}} - z_{t,\mathrm{target}_t}

    "mean" and "sum" compute their gradients in the same pass over the blocks, so logits are computed once and never
    kept. "none" does not know the gradients of its losses yet: its backward recomputes the logits.

    `torch.nn.functional.cross_entropy` computes the loss if all logits fit into one block, or if gradients are needed
    and the logits are at most a quarter of `hidden`. A program of torch.export always works in blocks, as it may run
    with other sizes than those of the export.

    Args:
        hidden: x, (..., D) float32, float64, bfloat16 or float16, arbitrary strides.
        weight: W, (V, D), dtype of `hidden`. Under torch.autocast both are cast as for a matrix product.
        targets: (...) integers in [0, V), or `ignore_index`.
        reduction: "mean" over the targets that count (NaN if none does), "sum", or "none".
        ignore_index: a target of this value has loss zero and gives no gradient; its row of `hidden` may hold NaN.

    Returns:
        The loss, float32 (float64 for float64): a scalar, or (...) for "none". Softmax, sums and the gradient of
        `weight` are accumulated in the loss's dtype.

    Raises:
        ValueError: a shape or `reduction` is wrong. TypeError: a dtype is wrong. IndexError: a target is out of bounds.
        NotImplementedError: second derivatives of more than one block are not supported.

    The backward keeps the gradients ("mean" and "sum") or the inputs ("none"). The op is deterministic.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> hidden, weight = torch.ones(2, 3, 4), torch.zeros(10, 4)
        >>> mo.linear_cross_entropy(hidden, weight, torch.tensor([[1, 2, 3], [4, -100, -100]]))  # log 10
        tensor(2.3026)
    """
    _check(hidden, weight, targets, reduction)
    ignore_index = check_integer(
        "linear_cross_entropy", "ignore_index", ignore_index, "an integer below 2^63", -(2**63)
    )
    try:
        return _linear_cross_entropy(hidden, weight, targets, reduction, ignore_index)
    except IndexError as error:
        raise _out_of_bounds(targets, weight.shape[0], ignore_index) or error from error


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, ignore_index: int) -> Tensor:
    hidden, weight = autocast(hidden, weight)
    x = hidden.reshape(targets.numel(), hidden.shape[-1])
    index = targets.reshape(-1).long()
    counted = index != ignore_index
    x = x.where(counted[:, None], 0)  # a row that does not count may hold NaN, and 0 times NaN is NaN
    (T, D), V = x.shape, weight.shape[0]
    needs_grad = [tensor.requires_grad and torch.is_grad_enabled() for tensor in (x, weight)]
    if not is_exporting() and (T * V <= _block(x.device) or (any(needs_grad) and 4 * V <= D)):
        logits = linear(x, weight).to(accumulation_dtype(x.dtype))
        loss = F.cross_entropy(logits, index, reduction=reduction, ignore_index=ignore_index)
        return loss.reshape(targets.shape) if reduction == "none" else loss
    if reduction != "none" and any(needs_grad):
        scales = counted.to(accumulation_dtype(x.dtype))
        loss, _, _ = linear_cross_entropy_sum(x, weight, index.where(counted, 0), scales, *needs_grad)
    else:
        losses = call(linear_cross_entropy_fwd, x, weight, index, ignore_index)
        loss = losses.reshape(targets.shape) if reduction == "none" else losses.sum()
    return _mean(loss, counted) if reduction == "mean" else loss


def blockwise_cross_entropy(
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    width: int,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of the logits that an arbitrary function computes from `hidden`, a block of positions at a time.

    Every tensor that the function reads has a gradient. With several blocks, the backward calls the function again. A
    program of torch.export has one block, as the number of blocks would depend on the sizes of the export.

    Args:
        hidden: (B, L, D).
        logits_of: function from (B, l, D), a block of l positions, to logits (B, l, `width`).
        width: number of classes.
        targets, reduction, ignore_index: as in :func:`linear_cross_entropy`.

    Returns:
        As :func:`linear_cross_entropy`.

    Example:
        >>> import torch
        >>> from megalodon_ops.ops.linear_cross_entropy.linear_cross_entropy import blockwise_cross_entropy
        >>> layer = torch.nn.Linear(4, 10)
        >>> hidden, targets = torch.ones(2, 3, 4), torch.tensor([[1, 2, 3], [4, -100, -100]])
        >>> blockwise_cross_entropy(hidden, layer, targets, width=10).backward()
    """
    check_reduction(reduction)
    hidden = hidden.where((targets != ignore_index)[..., None], 0)  # a row that does not count may hold NaN

    def losses_of(x: Tensor, index: Tensor) -> Tensor:
        logits = logits_of(x)
        logits = logits.to(accumulation_dtype(logits.dtype)).flatten(0, -2)
        losses = F.cross_entropy(logits, index.flatten(), reduction="none", ignore_index=ignore_index)
        return losses.view(index.shape)

    blocks = [(hidden, targets.long())]
    if not is_exporting():
        length = max(_block(hidden.device) // max(width * hidden.shape[0], 1), 1)
        blocks = list(zip(hidden.split(length, 1), targets.long().split(length, 1), strict=True))
    try:
        if torch.is_grad_enabled() and len(blocks) > 1:
            losses = torch.cat([checkpoint(losses_of, *block, use_reentrant=False) for block in blocks], 1)
        else:
            losses = torch.cat([losses_of(*block) for block in blocks], 1)
    except IndexError as error:
        raise _out_of_bounds(targets, width, ignore_index) or error from error
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else _mean(losses.sum(), targets != ignore_index)


def _out_of_bounds(targets: Tensor, classes: int, ignore_index: int) -> IndexError | None:
    """Return an error that names the first target out of bounds, or None."""
    outside = targets[((targets < 0) | (targets >= classes)) & (targets != ignore_index)]
    if len(outside) == 0:
        return None
    return IndexError(
        f"linear_cross_entropy: `targets` must be in [0, {classes}) or ignore_index = {ignore_index}, "
        f"got {outside[0].item()}."
    )


def _mean(total: Tensor, counted: Tensor) -> Tensor:
    """Return the mean over the targets that count; NaN, with gradients of zero, if none counts."""
    count = counted.sum()
    return (total / count.clamp(min=1)).where(count > 0, torch.nan)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> None:
    for argument, value in ("hidden", hidden), ("weight", weight), ("targets", targets):
        check_tensor("linear_cross_entropy", argument, value)

    def check(holds: bool, argument: str, expected: str, got: object, error: type[Exception] = ValueError) -> None:
        if not holds:
            raise error(f"linear_cross_entropy: `{argument}` must {expected}, got {got}.")

    check(hidden.dim() >= 1, "hidden", "have shape (..., D)", tuple(hidden.shape))
    *shape, D = hidden.shape
    check(weight.dim() == 2 and weight.shape[1] == D, "weight", f"have shape (V, {D})", tuple(weight.shape))
    check(targets.shape == hidden.shape[:-1], "targets", f"have shape {tuple(shape)}", tuple(targets.shape))
    check(hidden.is_floating_point(), "hidden", "be floating point", hidden.dtype, TypeError)
    cast = weight.is_floating_point() and is_autocast_enabled(hidden.device.type)
    check(weight.dtype == hidden.dtype or cast, "weight", f"be {hidden.dtype} as `hidden`", weight.dtype, TypeError)
    check(has_integers(targets), "targets", "be integers", targets.dtype, TypeError)
    check_device("linear_cross_entropy", "weight", weight, hidden)
    check_device("linear_cross_entropy", "targets", targets, hidden)
    check_reduction(reduction)


def has_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_reduction(reduction: str) -> None:
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f'linear_cross_entropy: `reduction` must be "mean", "sum" or "none", got {describe(reduction)}.'
        )


def _block(device: torch.device) -> int:
    return _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK


def _rows(width: int, values: int) -> int:
    """Return how many rows of `width` columns have about `values` elements: a multiple of 64, for fast products."""
    return max(values // width // 64, 1) * 64


def _cross_entropy(logits: Tensor, index: Tensor, scales: Tensor | None = None) -> Tensor:
    """Return losses (T,) of logits (T, V). With scales (T,), overwrite the logits by the gradient of sum scales_t loss_t."""
    if has_cpu_kernel(logits):
        losses = torch.empty_like(index, dtype=accumulation_dtype(logits.dtype))
        launch("cross_entropy", logits, index.contiguous(), contiguous_or_none(scales), losses)
        return losses
    log_probabilities = torch.log_softmax(logits, -1, dtype=accumulation_dtype(logits.dtype))
    losses = F.nll_loss(log_probabilities, index, reduction="none")
    if scales is not None:
        # scale (p - onehot), in the memory of log p; at the target p - 1 = expm1(-loss)
        dlogits = log_probabilities.exp_().scatter_(1, index[:, None], torch.expm1(-losses)[:, None])
        logits.copy_(dlogits.mul_(scales[:, None]))
    return losses


def _fwd(x, weight, index, ignore_index):
    counted = index != ignore_index
    index = index.where(counted, 0)
    rows = _rows(weight.shape[0], _block(x.device))
    blocks = zip(x.split(rows), index.split(rows), strict=True)
    return torch.cat([_cross_entropy(linear(x, weight), i) for x, i in blocks]).where(counted, 0)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.ignore_index = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dlosses):
    x, weight, index = ctx.saved_tensors
    counted, needs_grad = index != ctx.ignore_index, ctx.needs_input_grad[:2]
    index, scales = index.where(counted, 0), dlosses.where(counted, 0)
    _, dx, dweight = linear_cross_entropy_sum(x, weight, index, scales, *needs_grad)
    return dx.to(x.dtype) if needs_grad[0] else None, dweight.to(weight.dtype) if needs_grad[1] else None, None, None


def _sum(x, weight, index, scales, wants_dx, wants_dweight):
    """Return sum scales_t loss_t and its gradients in the accumulation dtype; a gradient without its flag is empty."""
    _, dx, dweight = _sum_fake(x, weight, index, scales, wants_dx, wants_dweight)
    rows = _rows(weight.shape[0], _block(x.device))
    slab = _rows(x.shape[1], _SLAB)
    losses = []
    for begin in range(0, x.shape[0], rows):
        block = slice(begin, begin + rows)
        dlogits = linear(x[block], weight)
        losses.append(_cross_entropy(dlogits, index[block], scales[block]))
        if wants_dx:
            put_product_(dx[block], dlogits, weight.t(), rows, add=False)
        if wants_dweight:
            put_product_(dweight, dlogits.t(), x[block].t(), slab, add=begin > 0)
        del dlogits  # before the next block's logits are allocated
    return torch.cat(losses).dot(scales), dx, dweight


def _sum_fake(x, weight, index, scales, wants_dx, wants_dweight):
    shapes = (), x.shape if wants_dx else (0,), weight.shape if wants_dweight else (0,)
    return tuple(map(scales.new_empty, shapes))


def _sum_setup_context(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _sum_backward(ctx, dtotal, *second):
    if any(grad is not None for grad in second):
        raise NotImplementedError(
            "linear_cross_entropy: second derivatives are not supported; do not use create_graph=True."
        )
    if dtotal is None:
        return (None,) * 6
    grads = zip(ctx.saved_tensors, ctx.needs_input_grad)
    return *((grad * dtotal).to(ctx.dtype) if needed else None for grad, needed in grads), None, None, None, None


linear_cross_entropy_fwd = define_op(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor index, int ignore_index) -> Tensor",
    kernel=_fwd,
    fake=lambda x, weight, index, _: x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype)),
    setup_context=_setup_context,
    backward=_backward,
    flops=lambda x, weight: 2 * x.numel() * weight.shape[0],
)
linear_cross_entropy_sum = define_op(
    "linear_cross_entropy_sum(Tensor x, Tensor weight, Tensor index, Tensor scales, bool wants_dx, bool wants_dweight) "
    "-> (Tensor total, Tensor dx, Tensor dweight)",
    kernel=_sum,
    fake=_sum_fake,
    setup_context=_sum_setup_context,
    backward=_sum_backward,
    flops=lambda x, weight, wants_dx, wants_dweight: 2 * x.numel() * weight.shape[0] * (1 + wants_dx + wants_dweight),
)

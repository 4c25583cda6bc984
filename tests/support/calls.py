"""Run a case on an implementation: with gradients, whole, in pieces or packed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from cases import OPS, Case, Tensors, generator, randn
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from megalodon_ops import TimestepNormState
from megalodon_ops.ops.common.spans import pairs_of

Function = Callable[..., Any]


def forward(function: Function, case: Case) -> Tensors:
    op = OPS[case.op]
    return op.call(function, [case.tensors[name] for name in op.tokens + op.parameters], case.tensors, case.options)


def evaluate(function: Function, case: Case, incoming: Callable[[str, Tensor], Tensor] | None = None) -> Tensors:
    """Return the outputs by name and the gradient of every tensor as "d<name>", given random incoming gradients.

    Padding holds `case.poison`. `incoming` may replace an incoming gradient: it gets the output's name and the random
    gradient.
    """
    op = OPS[case.op]
    tensors = {name: case.poisoned(x) if name in op.tokens else x for name, x in case.tensors.items()}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = forward(function, replace(case, tensors=leaves))
    gen = generator(1)
    grads = {name: _random_gradient(gen, y, case.dtype) for name, y in outputs.items() if y.requires_grad}
    grads = {name: case.poisoned(grad) if name in op.outputs else grad for name, grad in grads.items()}
    if incoming:
        grads = {name: incoming(name, grad) for name, grad in grads.items()}
    found = torch.autograd.grad(
        [outputs[name] for name in grads], list(leaves.values()), list(grads.values()), materialize_grads=True
    )
    results = {name: output.detach() for name, output in outputs.items()}
    return results | {f"d{name}": grad for name, grad in zip(leaves, found, strict=True)}


def _random_gradient(gen: torch.Generator, output: Tensor, rounding: torch.dtype) -> Tensor:
    parts = torch.view_as_real(output) if output.is_complex() else output
    grad = randn(gen, *parts.shape, dtype=rounding).to(parts.dtype)
    return torch.view_as_complex(grad) if output.is_complex() else grad


def invariant_results(op: str, results: Tensors) -> Tensors:
    """The results that do not change when a sequence is cut: all, but no gradients if none flows through the state."""
    names = [name for name in results if not (OPS[op].constant_state and name.startswith("d"))]
    return {name: results[name] for name in names}


def streamed(function: Function, op: str, pieces: Sequence[int]) -> Function:
    """A function like `function` that feeds the sequence in pieces of these lengths and passes the state on.

    Ops that return only an end state run on each piece alone; their states are merged.
    """
    count = len(OPS[op].tokens)

    def run(*inputs: Tensor, lengths: Tensor | None = None, **options: Any) -> Any:
        tokens, parameters = inputs[:count], inputs[count:]
        outputs, start = [], 0
        state = options.pop("state", None)
        position = options.pop("position", None)
        for size in pieces:
            part = [token[:, start : start + size] for token in tokens]
            ends = None if lengths is None else (lengths - start).clamp(0, size)
            if op == "normalized_qk":
                first = (0 if position is None else position) + torch.full((len(part[0]),), start)
                first = first % options["chunk_size"]
                outputs.append(function(*part, *parameters, lengths=ends, position=first, **options))
            elif not OPS[op].outputs:
                end_state = function(*part, *parameters, lengths=ends, **options)
                state = merge_states(op, parameters, state, end_state, size, ends)
            else:
                output, state = function(*part, *parameters, lengths=ends, state=state, **options)
                outputs.append(output)
            start += size
        if op == "normalized_qk":
            return tuple(torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
        return (torch.cat(outputs, dim=1), state) if outputs else state

    return run


def merge_states(op: str, parameters: Sequence[Tensor], before: Any, after: Any, size: int, ends: Tensor | None) -> Any:
    """Merge the end states of two pieces; the second has `size` positions, or `ends` by row; `before` may be None."""
    if before is None:
        return after
    if op == "cema_end_state":
        _, q = parameters
        lengths = torch.full((len(after),), size) if ends is None else ends
        return q ** lengths[:, None, None] * before + after
    count = before.count + after.count
    share = (after.count.to(before.mean.dtype) / count.clamp(min=1))[:, None]
    difference = after.mean - before.mean
    var = before.var + share * ((after.var - before.var) + (1 - share) * difference**2)
    return TimestepNormState(count, before.mean + share * difference, var)


def separate(function: Function, op: str) -> Function:
    """A function like `function` that runs each span in a call of its own, as a dense batch of one row."""
    count = len(OPS[op].tokens)

    def run(*inputs: Tensor, spans: Tensor, **options: Any) -> Any:
        tokens, parameters = inputs[:count], inputs[count:]
        results: list[Any] = []
        flat = [token.flatten(0, 1) for token in tokens]
        for s, (begin, end) in enumerate(pairs_of(spans).tolist()):
            own = dict(options)
            for name in options.keys() & {"state", "position"}:  # these have a row for each span
                own[name] = tree_map_only(Tensor, lambda t, s=s: t[s : s + 1], own[name])
            results.append(function(*(token[None, begin:end] for token in flat), *parameters, **own))
        if not OPS[op].outputs:
            return tree_map(lambda *parts: torch.cat(parts), *results)
        has_state = isinstance(results[0], tuple) and op != "normalized_qk"
        outputs = [result[0] if has_state else result for result in results]
        B, L = tokens[0].shape[:2]

        def spread(*parts: Tensor) -> Tensor:  # zeros between the spans
            rows, at = [], 0
            for (begin, end), part in zip(pairs_of(spans).tolist(), parts, strict=True):
                rows += [part.new_zeros(begin - at, *part.shape[2:]), part[0]]
                at = end
            return torch.cat([*rows, parts[0].new_zeros(B * L - at, *parts[0].shape[2:])]).unflatten(0, (B, L))

        whole = tree_map(spread, *outputs)
        if not has_state:
            return whole
        return whole, tree_map(lambda *parts: torch.cat(parts), *(state for _, state in results))

    return run


def packed(function: Function, op: str, before: int = 0, after: int = 0) -> Function:
    """A function like `function` that packs the rows into one, with cu_seqlens, and unpacks the result.

    `before` and `after` are numbers of padding tokens, NaN, at both ends of the packed row.
    """
    count = len(OPS[op].tokens)

    def run(*inputs: Tensor, lengths: Tensor | None = None, **options: Any) -> Any:
        tokens, parameters = inputs[:count], inputs[count:]
        B, L = tokens[0].shape[:2]
        ends = [L] * B if lengths is None else lengths.tolist()

        def pack(token: Tensor) -> Tensor:
            def padding(n: int) -> Tensor:
                return token.new_full((n, *token.shape[2:]), torch.nan)

            rows = [token[row, :end] for row, end in enumerate(ends)]
            return torch.cat([padding(before), *rows, padding(after)])[None]

        cu_seqlens = before + torch.tensor([0, *ends]).cumsum(0)

        def unpack(output: Tensor) -> Tensor:
            rows = [output[0, a:b] for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
            return torch.stack([torch.cat([row, row.new_zeros(L - len(row), *row.shape[1:])]) for row in rows])

        result = function(*map(pack, tokens), *parameters, cu_seqlens=cu_seqlens, **options)
        if isinstance(result, Tensor):
            return unpack(result) if OPS[op].outputs else result
        if op == "normalized_qk":
            return tuple(map(unpack, result))
        return (unpack(result[0]), result[1]) if OPS[op].outputs else result

    return run

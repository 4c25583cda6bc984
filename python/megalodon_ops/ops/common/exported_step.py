"""`record`: a call of a user's module as a step. torch.export lists its calls, and plain calls check the replays."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .attributes import Attributes, is_plain, is_same_bits
from .checks import check_tensor, describe
from .definition import check_runs_now
from .recorder import address_of, tensors_in, without_compiler
from .recording import Step, contiguous_copy

_export = getattr(torch.export, "export_for_training", torch.export.export)  # `export` of torch 2.5 decomposes


def record(module: Callable, *example: Tensor, state: Any = None) -> Step:
    """Record a call of a module on the CPU, as a CUDA graph does on a GPU; the step replays it without Python.

    A call of a small network spends most of its time in Python: a call of two blocks of width 64 takes twenty times as
    long as a replay. A replay runs the recorded kernels, in order, with bitwise equal results. It computes without
    gradients.

    This package's kernels, and torch's sums, differences, products, quotients, copies and embeddings of tensors, run
    without Python. Other functions of torch are called in Python between two kernels; a warning names them, except for
    matrix products, such as those of `torch.nn.Linear`. Each replay checks lengths, offsets and positions as the ops
    do; like a compiled program, it does not check that numbers are finite.

    `torch.export` lists the calls, in some seconds. The module is also called twice, and the step must repeat results,
    random numbers and writes to buffers bit for bit. Buffers and torch's random numbers are then as before. A module is
    refused if it

    - reads values in Python, or has shapes that depend on values
    - sets attributes, or parts of containers, closures and globals
    - writes inputs or parameters, or sets seeds

    Args:
        module: called as `module(*example)`, or `module(*example, state=state)`; `functools.partial` sets other arguments.
        example: tensors on the CPU. Calls of the step take tensors of the same shapes and dtypes.
        state: tensors, in containers that `torch.utils._pytree` knows, that the module reads. The module must return a
            tuple of its results and the new state, of the same structure, shapes and dtypes. The step copies `state`,
            and each call continues from the state after the last one. Buffers that the module writes in place keep
            their values between calls.

    Returns:
        A step: `step(*inputs)` returns the module's results as new tensors; `step.state` is the state. Calls from
        several threads wait for each other. A step cannot be copied or pickled.

    Raises:
        NotImplementedError: `torch.export` cannot follow the module, or a replay differs from a call. ValueError: the
        module returns a state of another structure, shape or dtype, sets attributes instead of writing their tensors in
        place, or writes inputs or parameters; or a tensor is not on the CPU. TypeError: an argument has a wrong type.

    The step keeps the addresses of parameters, so it sees values that are written there later. Results that depend on
    parameters alone, such as CEMA's coefficients, are computed once, in the recording. Hooks, too, run only then.
    Record another step after parameters move to other memory, or after modules or hooks change. The step copies inputs
    to contiguous memory, so strides and version counters of inputs, too, are those of the recording. `record` does not
    notice Python that changes its behaviour only after two calls and counts them in attributes of a class, in globals
    that a method or another function reads, in an iterator, by the clock or in files.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> class Smooth(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.cema, self.norm = mo.ComplexEMA(8, ndim=2), mo.TimestepNorm(8, num_groups=1)
        ...     def forward(self, x, state=(None, None)):
        ...         y, ema = self.cema(x, state=state[0], return_state=True)
        ...         y, norm = self.norm(x + y, state=state[1], return_state=True)
        ...         return y, (ema, norm)
        >>> module, x = Smooth(), torch.randn(1, 20, 8)
        >>> y, state = module(x[:, :10])
        >>> step = mo.record(module, x[:, 10:11], state=state)
        >>> last = [step(x[:, i : i + 1]) for i in range(10, 20)][-1]
        >>> torch.allclose(last, module(x)[0][:, -1:], atol=1e-6)
        True
    """
    check_runs_now("record", "call the module there")
    if not callable(module):
        raise TypeError(f"record: `module` must be a module or a function, got {describe(module)}.")
    for x in example:
        check_tensor("record", "example", x)
    if state is not None and not tensors_in(state):
        raise TypeError(f"record: `state` must hold tensors, or be None, got {describe(state)}.")
    for name, tensors in ("example", example), ("state", tensors_in(state)):
        for x in tensors:
            if not x.is_cpu:
                raise ValueError(
                    f"record: `{name}` must be on the CPU, got a tensor on {x.device}; move it there, or capture the call "
                    "with torch.cuda.graph on a GPU."
                )
    random_state = torch.get_rng_state()
    with torch.inference_mode(False), torch.no_grad():
        attributes = Attributes(module)
        try:
            step = _checked_step(module, contiguous_copy(example), state, attributes)
        finally:
            attributes.restore()
            torch.set_rng_state(random_state)
        for own, given in zip(tensors_in(step.state), tensors_in(state)):
            own.copy_(given)
    if step.in_python:
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(step.in_python))
        warnings.warn(
            f"record: functions run in Python between the kernels, which takes longer: {names} (calls: "
            f"{len(step.in_python)}).",
            stacklevel=2,
        )
    return step


def _checked_step(module: Callable, example: tuple[Tensor, ...], state: Any, attributes: Attributes) -> Step:
    """Return a step that repeats two calls of the module bit for bit."""
    start = torch.get_rng_state()
    states = [copy.deepcopy(tree_map_only(Tensor, Tensor.detach, state))]  # tensors share memory as before

    def observed(call: Callable[..., Any]) -> list[Any]:
        """Return the results, random state and written buffers of two calls; restore the buffers."""
        torch.set_rng_state(start)
        observations = []
        for factor in (1, 0.5):  # the second call with other numbers, which stay positive, or probabilities
            inputs = [x * factor if x.is_floating_point() else x.clone() for x in example]
            results = call(*inputs)
            observations.append(contiguous_copy((results, torch.get_rng_state(), [*attributes.written().values()])))
        attributes.restore()
        return observations

    def plain(*inputs: Tensor) -> Any:
        versions = [x._version for x in inputs]
        results = module(*inputs) if state is None else module(*inputs, state=states[0])
        if versions != [x._version for x in inputs]:
            raise ValueError(
                "record: `module` must not write its inputs, got a write in place; write a copy, x.clone()."
            )
        if state is not None:
            states[0] = _new_state(results, states[0])
            results = results[0]
        parameters = [name for name, tensor in attributes.written().items() if isinstance(tensor, nn.Parameter)]
        if name := attributes.rebound() or next(iter(parameters), None):
            raise ValueError(
                f"record: `module` must not set attributes nor write parameters, got another `{name}`; write a buffer in "
                "place, by copy_(), or keep what changes in `state`."
            )
        if not all(map(is_plain, tensors_in(results))):
            raise _refusal("a result without a storage")
        return results

    with without_compiler():
        expected, own_state = observed(plain), contiguous_copy(state)
        program = _program(module, example, own_state)  # tensors that share no memory, which would be one tensor there
    try:
        step = Step("record", program if state is None else _with_state(program, own_state), example, own_state)
    except Exception as error:
        raise _refusal_of(error) from error
    if step.left_out:
        raise _refusal(f"`{step.left_out[0]}`, which returns values in Python or a tensor without a storage")
    attributes.restore()
    for own, given in zip(tensors_in(own_state), tensors_in(state)):
        own.copy_(given)
    leaves, structure = tree_flatten(expected)
    found, found_structure = tree_flatten(observed(step))
    if structure != found_structure or not all(map(is_same_bits, leaves, found)):
        raise _refusal("results, random numbers or buffers that a replay does not repeat, as Python changes them")
    return step


def _program(module: Callable, example: tuple[Tensor, ...], state: Any) -> Callable:
    """Return the calls of torch's functions in a call of the module, as torch.export lists them."""
    wrapper = nn.Module()
    if isinstance(module, nn.Module):
        wrapper.module = module
    wrapper.forward = (
        (lambda *inputs: module(*inputs)) if state is None else (lambda *inputs, state: module(*inputs, state=state))
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = _export(wrapper, example, None if state is None else {"state": state}, strict=False).module()
    except Exception as error:
        raise _refusal_of(error) from error
    for part in program.modules():
        if not isinstance(part, torch.fx.GraphModule):
            continue
        for node in part.graph.nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                if node.target.name() not in _REGIONS:
                    raise _refusal(f"`{node.target.name()}`")
                node.target = _REGIONS[node.target.name()]
            for value in tree_leaves(node.meta.get("val")):
                sizes = value.shape if isinstance(value, Tensor) else (value,)
                if any(isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes):
                    raise _refusal(f"`{node.target}`, which reads values in Python")
        part.recompile()
    return program


def _with_gradients(enabled: bool, body: Callable, *args: Any) -> Any:
    return body(*args)


def _with_autocast(
    device: str, dtype: torch.dtype | None, enabled: bool, cache: bool | None, body: Callable, *args: Any
) -> Any:
    with torch.autocast(device, dtype, enabled, cache):
        return body(*args)


_REGIONS = {"wrap_with_set_grad_enabled": _with_gradients, "wrap_with_autocast": _with_autocast}
"""Functions in place of the operators by which torch.export runs a part under other settings"""


def _refusal(got: str) -> NotImplementedError:
    return NotImplementedError(
        f"record: `module` must repeat calls that torch.export can list, got {got}; choose between values of tensors by "
        "torch.where, keep what changes in `state`, and decode a Megalodon by Decoder."
    )


def _refusal_of(error: Exception) -> NotImplementedError:
    message = str(error).strip().partition("\n")[0].rstrip(".")
    return _refusal(f"{type(error).__name__}: {message}")


def _new_state(results: Any, old: Any) -> Any:
    """Return the module's new state in the structure of the old one, which it must have."""
    leaves, structure = tree_flatten(old)
    problem, found = None, []
    if not isinstance(results, tuple) or len(results) != 2:
        problem = describe(results)
    else:
        try:
            found = structure.flatten_up_to(results[1])  # dicts may have another order
        except ValueError as error:
            problem = f"another structure ({error})"
    for before, after in zip(leaves, found):
        before, after = ((str(x.dtype), *x.shape) if isinstance(x, Tensor) else x for x in (before, after))
        if type(before) is not type(after) or before != after:
            problem = f"{after} for {before}"
    if problem:
        raise ValueError(
            "record: `module` must return a tuple of its results and a state of the structure, shapes and dtypes of "
            f"`state`, in which tensors alone change, got {problem}."
        )
    return tree_unflatten(found, structure)


def _with_state(program: Callable, state: Any) -> Callable:
    """Return a function of the inputs that calls the program with `state` and writes the new state to its tensors."""
    old, memory = tensors_in(state), {address_of(tensor) for tensor in tensors_in(state)}

    def call(*inputs: Tensor) -> Any:
        results = program(*inputs, state=state)
        new = tensors_in(_new_state(results, state))
        new = [t.clone() if address_of(t) in memory and t is not own else t for own, t in zip(old, new)]
        result = tree_map_only(Tensor, lambda t: t.clone() if address_of(t) in memory else t, results[0])
        for own, t in zip(old, new):
            own.copy_(t)
        return result

    return call

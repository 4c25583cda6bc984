"""Registration of the ops with torch (schema, kernels, fake kernel, autograd), and the launch of kernels."""

import functools
import importlib
import importlib.util
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ... import _C
from .checks import refuse_arguments
from .cuda_driver import launch_problem
from .flops import register_formula

_library = torch.library.Library("megalodon_ops", "DEF")
OWN_TYPES = (Tensor, torch.nn.Parameter)
"""Tensor types whose memory holds their values; other subclasses may compute values differently"""


def define_op(
    schema: str,
    *,
    kernel: Callable | None = None,
    wrapper: Callable | None = None,
    fake: Callable | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    flops: Callable[..., int],
) -> Callable:
    """Define `megalodon_ops::<schema>` and return the op.

    Args:
        schema: torch's schema, with a name for each result. In the schema of a backward, the incoming gradients are
            named `d<result>`, the results `d<argument>`, and the other arguments as in the op's schema.
        kernel: by default, launches the binding of the op's name (:func:`_default_kernel`). Else a function that
            computes the op on the CPU, and on CUDA devices if the op has kernels for them.
        wrapper: called with the kernel and its arguments, in place of the kernel.
        fake: creates outputs of the right shapes for tracing. By default, a result `d<argument>` is like the argument,
            and every other result like the first argument.
        backward: the op that computes the gradients. The values that its schema names are saved for it
            (:func:`_autograd_by_names`). By default, as for backward ops, differentiation raises an error;
            forward-mode differentiation always does.
        setup_context: that of a torch.autograd.Function. `backward` is then such a function's backward, not an op.
        flops: function that returns the floating-point operations, for torch.utils.flop_counter. Its parameters have
            the names of arguments of the op.
    """
    name = schema.split("(")[0]
    qualified = f"megalodon_ops::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.megalodon_ops, name).default
    register_formula(op, flops)
    fake = fake or _default_fake(op)
    kernel = kernel or _default_kernel(op, fake)
    if wrapper is not None:
        kernel = functools.partial(wrapper, kernel)
    if "!" in schema:  # the op writes to an argument
        kernel = _with_version_counts(op, kernel)
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    torch.library.register_fake(qualified, _on_one_device(op, fake), lib=_library)
    if "!" not in schema:
        if isinstance(backward, torch._ops.OpOverload):
            setup_context, backward = _autograd_by_names(op, backward)
        function = _autograd_function(name, setup_context, backward or _no_derivative(name))
        _library.impl(name, _autograd_kernel(op, function), "Autograd", with_keyset=True)
    return op


def _names(values: Iterable[Any]) -> list[str]:
    return [value.name for value in values]


def _optional(op: Callable) -> set[str]:
    """Return the names of the op's arguments that may be None."""
    return {a.name for a in op._schema.arguments if "Optional" in str(a.type)}


def _listed(names: Iterable[str]) -> str:
    return "".join(f"{name}, " for name in names)


def _target(names: list[str]) -> str:
    """Return the source of a function's results: the name of one, a tuple of several."""
    return names[0] if len(names) == 1 else _listed(names)


def _generated(lines: Iterable[str | None], **names: Any) -> dict[str, Any]:
    """Execute the lines of source and return their functions, for which the names are global.

    Functions of an op are generated from its schema, like the methods of dataclasses, because loops over names would
    cost each call 2 us.
    """
    exec("\n".join(filter(None, lines)), names)
    return names


@functools.cache
def binding_names(name: str) -> tuple[list[str], list[str]]:
    """Return the names of the arguments and of the results of a binding, which its docstring lists."""
    arguments, _, results = getattr(_C, name).__doc__.partition(" -> ")
    return arguments.split(), results.split()


def _default_kernel(op: Callable, fake: Callable) -> Callable:
    """Generate the kernel that launches the binding of the op's name, on contiguous tensors, for results of `fake`.

    The source for `cema_bwd`::

        def kernel(dy, dstate_out, x, p, <and so on>, state, spans):
            x = x.contiguous()
            if state is not None: state = state.contiguous()
            <and so on>
            dx, dp, dq, dgamma, domega, dstate, = results = fake(dy, dstate_out, x, p, <and so on>, state, spans)
            launch("cema_bwd", x, p, <and so on>, dx, dp, dq, dgamma, domega, None if state is None else dstate)
            return results

    The binding takes the arguments and results of the schema that it names, in its own order. `spans` keep their
    strides, which tell their layout. A result that is not wanted is None for the binding: `d<argument>` of an argument
    that is None, `<name>` without the flag `return_<name>`, and `<name>_out` without `return_state`.
    """
    name, optional = op._schema.name.split("::")[1], _optional(op)
    arguments, results = _names(op._schema.arguments), _names(op._schema.returns)
    taken, written = binding_names(name)
    if written != results or not {*taken} <= {*arguments}:
        raise TypeError(
            f"define_op: the binding {name} must take arguments and results of {op}, got {taken} and {written}."
        )
    given = [*taken]
    for result in results:
        flag = "return_state" if result.endswith("_out") else f"return_{result}"
        if result[1:] in optional:
            given.append(f"None if {result[1:]} is None else {result}")
        else:
            given.append(f"{result} if {flag} else None" if flag in arguments else result)
    lines = [
        f"def kernel({_listed(arguments)}):",
        *(
            f"    {f'if {a.name} is not None: ' if a.name in optional else ''}{a.name} = {a.name}.contiguous()"
            for a in op._schema.arguments
            if "Tensor" in str(a.type) and a.name in taken and a.name != "spans"
        ),
        f"    {_target(results)} = results = fake({_listed(arguments)})",
        f"    launch({name!r}, {_listed(given)})",
        "    return results",
    ]
    return _generated(lines, fake=fake, launch=launch)["kernel"]


def _default_fake(op: Callable) -> Callable:
    """Generate a fake kernel: each `d<argument>` is like the argument, each other result like the first argument.

    The gradient of an argument that is None is empty, as torch's schemas have no optional results.
    """
    arguments, optional = _names(op._schema.arguments), _optional(op)
    like = [name[1:] if name[1:] in arguments else arguments[0] for name in _names(op._schema.returns)]
    empty = {name: f"{like[0]}.new_empty(0) if {name} is None else " for name in optional.intersection(like)}
    results = [f"{empty.get(name, '')}empty_like({name})" for name in like]
    lines = f"def fake({_listed(arguments)}):", f"    return {_target(results) if results else None}"
    return _generated(lines, empty_like=empty_like)["fake"]


def _autograd_by_names(op: Callable, backward_op: Callable) -> tuple[Callable, Callable]:
    """Generate `setup_context` and `backward` of an op from the names in its schema and in that of `backward_op`.

    The source for `cema_fwd`::

        def setup_context(ctx, inputs, output):
            x, p, q, gamma, omega, state, spans, return_state = inputs
            y, state_out = output
            if not return_state: ctx.mark_non_differentiable(state_out)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, p, q, gamma, omega, state, spans)
        def backward(ctx, dy, dstate_out):
            x, p, q, gamma, omega, state, spans = ctx.saved_tensors
            if dy is None: dy = torch.zeros_like(x)
            dx, dp, dq, dgamma, domega, dstate = call(backward_op, dy, dstate_out, x, p, <and so on>, spans)
            return dx, dp, dq, dgamma, domega, None if state is None else dstate, None, None

    All arguments of `backward_op` but the incoming gradients are saved, scalars apart from tensors. A result is
    differentiable if its gradient is an argument of `backward_op`. If one incoming gradient has the type `Tensor?`, a
    missing gradient is passed as None, or as zeros like the op's first argument if its type is `Tensor`.
    """
    arguments, results = _names(op._schema.arguments), _names(op._schema.returns)
    backward_arguments, gradients = _names(backward_op._schema.arguments), _names(backward_op._schema.returns)
    incoming = [f"d{name}" for name in results]
    optional = _optional(op) | _optional(backward_op)
    tensors = {a.name for a in op._schema.arguments if "Tensor" in str(a.type)} | {*results}
    saved = [name for name in backward_arguments if name not in incoming]
    if unknown := {*saved} - {*arguments, *results} | {*gradients} - {f"d{name}" for name in arguments}:
        raise TypeError(
            f"define_op: {backward_op} must name arguments and results of {op}, and gradients of them d<name>, "
            f"got {sorted(unknown)}; rename them in its schema."
        )
    saved_tensors, scalars = [n for n in saved if n in tensors], [n for n in saved if n not in tensors]
    constants = [name for name in results if f"d{name}" not in backward_arguments]  # not differentiable
    states = [name for name in results if name.endswith("_out") and name not in constants]
    may_be_missing = any(name in optional for name in incoming)
    required = [name for name in incoming if may_be_missing and name in backward_arguments and name not in optional]
    returned = {name: f"d{name}" if f"d{name}" in gradients else "None" for name in arguments}
    for name in arguments:  # `backward_op` returns an empty gradient for an argument that is None
        if name in optional and name in saved_tensors and returned[name] != "None":
            returned[name] = f"None if {name} is None else d{name}"
    has_flag = "return_state" in arguments
    lines = [
        "def setup_context(ctx, inputs, output):",
        f"    {_listed(arguments)} = inputs",
        f"    {_target(results)} = output",
        has_flag and f"    if not return_state: ctx.mark_non_differentiable({_listed(constants + states)})",
        # the `else` of the line before, if there is that line
        constants and f"    {'else' if has_flag else 'if True'}: ctx.mark_non_differentiable({_listed(constants)})",
        may_be_missing and "    ctx.set_materialize_grads(False)",
        f"    ctx.save_for_backward({_listed(saved_tensors)})",
        scalars and f"    ctx.scalars = {_listed(scalars)}",
        f"def backward(ctx, {_listed(incoming)}):",
        f"    {_listed(saved_tensors)} = ctx.saved_tensors",
        scalars and f"    {_listed(scalars)} = ctx.scalars",
        *(f"    if {name} is None: {name} = torch.zeros_like({arguments[0]})" for name in required),
        f"    {_target(gradients)} = call(backward_op, {_listed(backward_arguments)})",
        f"    return {_listed(returned.values())}",
    ]
    functions = _generated(lines, call=call, torch=torch, backward_op=backward_op)
    return functions["setup_context"], functions["backward"]


def _with_version_counts(op: Callable, kernel: Callable) -> Callable:
    """Return a function that calls `kernel` and increments the version of each tensor that the kernel writes.

    So autograd raises an error if a backward needs an overwritten value.
    """
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def counting_kernel(*args):
        kernel(*args)
        for i in written:
            torch.autograd.graph.increment_version(args[i])

    return counting_kernel


def _autograd_function(name: str, setup_context: Callable | None, backward: Callable) -> type[torch.autograd.Function]:
    """Return the op's autograd function. Its graph nodes are named after the op: `CemaBackward` for `cema_fwd`."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            *args, kernel = args
            result = kernel(*args)
            if setup_context is not None:
                setup_context(ctx, args, result)
            return result

        @staticmethod
        def backward(ctx, *grads):
            return *backward(ctx, *grads), None

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(
                f"{name}: forward-mode derivatives are not supported; use reverse mode, or megalodon_ops.reference."
            )

    title = "".join(word.capitalize() for word in name.removesuffix("_fwd").split("_"))
    return type(Function)(title, (Function,), {})


def _autograd_kernel(op: Callable, function: type[torch.autograd.Function]) -> Callable:
    """Return the kernel of torch.library.register_autograd, minus steps that no op here needs.

    These steps cost more than a short call.
    """

    def kernel(keyset, *args):
        def below(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        needs_grad = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if needs_grad or in_forward_mode():
            return function.apply(*args, below)
        return below(*args)

    return kernel


def call(op: Callable, *args):
    """Call the op. If an argument is not a tensor and should be one, the error names the argument."""
    try:
        return op(*args)
    except (RuntimeError, TypeError, AttributeError) as error:  # AttributeError: None instead of a tensor
        refuse_arguments(op, args)
        if torch._C._are_functorch_transforms_active():
            public = op._schema.name.split("::")[1].removesuffix("_fwd")
            raise NotImplementedError(
                f"{public}: expected a call outside of torch.func's transformations, got one inside; differentiate with "
                "torch.autograd, or transform the function of that name in megalodon_ops.reference."
            ) from error
        raise


_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # new in torch 2.7


def is_exporting() -> bool:
    """Return True if torch.export is tracing. A choice that depends on sizes must then be made inside an op."""
    return _is_exporting()


def check_runs_now(function: str, instead: str) -> None:
    """Raise inside torch.func's transformations and torch.export, whose tensors have no memory for kernels to read."""
    in_transformation = torch._C._are_functorch_transforms_active()
    for tracer, active in ("torch.func's transformations", in_transformation), ("torch.export", is_exporting()):
        if active:
            raise NotImplementedError(f"{function}: expected a call outside of {tracer}, got one inside; {instead}.")


def in_forward_mode() -> bool:
    """Return True if tensors may have forward-mode tangents; torch propagates them under no_grad, too."""
    return forward_ad._current_level >= 0


def _on_one_device(op: Callable, fake: Callable) -> Callable:
    """Return a fake kernel that checks the devices; torch calls it as soon as one tensor is on the meta device."""

    def checked(*args):
        devices = [(a.name, value.device) for a, value in zip(op._schema.arguments, args) if isinstance(value, Tensor)]
        expected, _ = Counter(device for _, device in devices).most_common(1)[0]
        for name, device in devices:
            if device != expected:
                public = op._schema.name.split("::")[1].removesuffix("_fwd").removesuffix("_bwd")
                raise ValueError(
                    f"{public}: `{name}` must be on {expected} as the others, got device {device}; move it there."
                )
        return fake(*args)

    return checked


def has_cpu_kernel(x: Tensor) -> bool:
    """Return True if an op without CUDA kernels has a kernel for `x`; otherwise torch's functions compute the op."""
    return x.is_cpu and x.is_floating_point()


def has_kernel(x: Tensor) -> bool:
    """The same for an op with CUDA kernels that torch's functions replace in a build without them."""
    return x.is_floating_point() and (x.is_cpu or x.is_meta or (x.is_cuda and _HAS_CUDA_KERNELS))


class _Observer(threading.local):
    """The recorder of the step that this thread records, if any. It is told of each launch on the CPU before it runs."""

    recorder: Any = None


observer = _Observer()


def launch(name: str, *args) -> None:
    """Run a kernel on contiguous tensors, some of which it writes. The first argument is a tensor."""
    if args[0].is_cuda:
        return _launch_cuda(name, args)
    if observer.recorder is not None:
        observer.recorder.note_launch(name, args)
    getattr(_C, name)(*args)


_HAS_CUDA_KERNELS = importlib.util.find_spec("megalodon_ops._cuda") is not None


def has_cuda_kernels() -> bool:
    return _HAS_CUDA_KERNELS


@functools.cache
def cuda_extension() -> ModuleType:
    """Module of the CUDA kernels, imported at the first call."""
    if not has_cuda_kernels():
        raise NotImplementedError(
            "megalodon_ops: expected tensors on the CPU, got CUDA tensors, and this build has no CUDA kernels; move the "
            "tensors with .cpu(), or install again where nvcc is on the PATH."
        )
    return importlib.import_module("megalodon_ops._cuda")


def _launch_cuda(name: str, args: tuple) -> None:
    """Run a CUDA kernel on the tensors' device and its current stream, with scratch memory from torch's allocator."""
    device = args[0].device
    for tensor in args:
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise ValueError(f"{name}: all tensors must be on {device}, got one on {tensor.device}; move it there.")
    kernels = cuda_extension()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        try:
            allocate = functools.partial(torch.empty, dtype=torch.uint8, device=device)
            getattr(kernels, name)(device.index, stream, allocate, *args)
        except RuntimeError as error:
            built_for, capability = kernels.build_info()["architectures"], torch.cuda.get_device_capability(device)
            problem = launch_problem(str(error), *kernels.cuda_versions(), built_for, capability)
            if problem is None:
                raise
            raise RuntimeError(f"{error}: {problem}.") from error


def _no_derivative(name: str) -> Callable:
    def raise_error(ctx, *grads):
        raise NotImplementedError(f"{name}: second derivatives are not supported; do not use create_graph=True.")

    return raise_error


def int64_or_none(tensor: Tensor | None) -> Tensor | None:
    """Return counts or positions as the kernels read them: int32 becomes int64; the kernels refuse other dtypes."""
    return tensor.long() if isinstance(tensor, Tensor) and tensor.dtype == torch.int32 else tensor


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised, contiguous tensor with the shape, dtype and device of `x`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def contiguous_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def is_autocast_enabled(device: str) -> bool:
    """Return True if torch.autocast is on for the device type; the meta device has no autocast."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Cast the tensors as torch.autocast does for a matrix product; float64 and None stay as they are."""
    device = tensors[0].device.type
    if not is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)

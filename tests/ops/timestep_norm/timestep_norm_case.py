"""Calls of timestep_norm."""

from typing import Any

import torch
from case import Case, CudaSizes, Op, Tensors, count_sequences, generator, randn, real_dtype, sequence_options, uniform
from drawing import DTYPES, KINDS, SEEDS, lengths_around, sequences
from hypothesis import strategies as st

from megalodon_ops import TimestepNormState


def timestep_norm_case(
    B=2, L=9, G=3, width=4, *, dtype=torch.float32, seed=0, mean=0.5, std=1.0, eps=1e-5, count=None, **rows
) -> Case:
    """G groups of `width` channels around `mean`; with `count`, a state of about as many positions."""
    D = G * width
    gen, real = generator(seed), real_dtype(dtype)
    tensors = {
        "x": (mean + std * randn(gen, B, L, D)).to(dtype),
        "weight": randn(gen, D, dtype=real) / 2,
        "bias": randn(gen, D, dtype=real),
    }
    options = {"num_groups": G, "eps": eps, **sequence_options(**rows)}
    if count is not None:
        S = count_sequences(B, **rows)
        tensors["mean"] = (mean + std * randn(gen, S, G) / 4).to(real)
        tensors["var"] = (std**2 * uniform(gen, 0.5, 1.5, S, G)).to(real)
        options["count"] = count + torch.arange(S)
        half_units = torch.stack([tensors["mean"], tensors["var"]], 1) * torch.finfo(real).eps / 2
        options["residual"] = half_units * uniform(gen, -1, 1, S, 2, G).to(real)
    # Gradients have the factor 1 / sqrt(var + eps). It is largest at a first position, whose variance is that of
    # `width` numbers: zero for one, and perhaps a hundredth of std**2 for more.
    least_var = 0.0 if width == 1 else std**2 / 100
    rstd = 1 / max(eps, least_var) ** 0.5
    return Case("timestep_norm", tensors, options, dtype, terms=rstd, mean_terms=0.1 * std)


@st.composite
def timestep_norm_sizes(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype], kinds: tuple[str, ...]
) -> dict[str, Any]:
    """Means that dwarf the spread; groups of one channel."""
    dtype = draw(dtypes)
    values = [(0.0, 1.0), (3.0, 0.5), (0.0, 30.0)]
    if dtype == torch.float32:  # 16-bit types lose the spread; float64 has no better reference
        values += [(1e4, 1e-2), (-1e3, 1.0), (0.0, 1e-4)]
    mean, std = draw(st.sampled_from(values))
    rows = draw(sequences(lengths_around(32), kinds))
    G = draw(st.sampled_from([1, 2, 3, 5, 8]))
    width = draw(st.sampled_from([1, 2, 3, 8, 16, 17, 33]))
    return dict(**rows, G=G, width=width, mean=mean, std=std, dtype=dtype, seed=draw(SEEDS))


@st.composite
def timestep_norm_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    """Fresh states and states of long sequences."""
    sizes = draw(timestep_norm_sizes(dtypes, kinds))
    count = draw(st.sampled_from([None, 0, 1, 1000, 10**6]))
    return timestep_norm_case(**sizes, count=count, eps=draw(st.sampled_from([1e-5, 1e-3])))


def _with_state(tensors: Tensors, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with a state put together from its parts."""
    options = dict(options)
    count, residual = options.pop("count", None), options.pop("residual", None)
    state = None if count is None else TimestepNormState(count, tensors["mean"], tensors["var"], residual)
    return options | {"state": state}


def call(function, inputs: list, tensors: Tensors, options: dict[str, Any]) -> Tensors:
    y, state = function(*inputs, return_state=True, **_with_state(tensors, options))
    return {"y": y, "mean": state.mean, "var": state.var, "count": state.count}


def gradients(backward, case: Case, inputs: list, incoming: Tensors) -> Tensors:
    # Gradients of mean and var are not given where they need none: empty sequences without a state.
    given = [incoming.get(name) for name in ("y", "mean", "var")]
    grads = backward(*given, *inputs, **_with_state(case.tensors, case.options))
    return dict(zip(("dx", "dweight", "dbias", "dmean", "dvar"), grads, strict=True))


OP = Op(
    "timestep_norm",
    timestep_norm_case,
    timestep_norm_cases,
    tokens=("x",),
    parameters=("weight", "bias"),
    call=call,
    gradients=gradients,
    with_state={"count": 2},
    without_elements=({"width": 0},),
    threads={
        "one": dict(B=1, L=3001, G=3, width=13),
        "many": dict(B=7, L=211, G=5, width=16, count=3),
        "packed": dict(B=1, L=1501, G=2, width=33, cu_seqlens=[1, 400, 400, 1499]),
    },
    cuda=CudaSizes(
        aligned=(dict(B=1, L=66, G=1, width=16, count=2),),
        sanitized=(
            *(dict(G=G, width=width, count=3) for G, width in ((1, 1), (3, 4), (2, 32), (1, 257))),
            dict(L=150, G=2, width=8),
            dict(B=1, L=23, cu_seqlens=[0, 9, 9, 20], count=0),
            dict(lengths=[9, 4]),
        ),
        smallest=dict(G=1, width=2),
        odd=dict(G=3, width=8),
    ),
)

"""Calls of the ops as data, so that one piece of code (calls.py) can run any op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from megalodon_ops.ops.common.states import AttentionState

Tensors = dict[str, Tensor]


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(gen: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values, drawn in float64 whatever the dtype, then rounded."""
    if dtype.is_complex:
        return torch.complex(randn(gen, *shape), randn(gen, *shape)).to(dtype)
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)


def uniform(gen: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=gen, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One call: `tensors` take gradients, `options` are the other arguments."""

    op: str
    tensors: Tensors
    options: dict[str, Any]
    dtype: torch.dtype  # of the tokens; incoming gradients are rounded to it
    terms: float = 0.1  # size of the terms whose sums make a gradient: terms that cancel leave their rounding
    mean_terms: float = 0.0  # and of those whose sum makes a mean
    poison: float = torch.nan  # the value of tokens, and of incoming gradients, that are in no sequence

    def double(self) -> Case:
        """The case with its values in float64."""

        def widen(value: Any) -> Any:
            if isinstance(value, tuple):
                return type(value)(*map(widen, value))
            if isinstance(value, Tensor) and (value.is_complex() or value.is_floating_point()):
                return value.to(torch.complex128 if value.is_complex() else torch.float64)
            return value

        tensors = {name: widen(tensor) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, options={name: widen(value) for name, value in self.options.items()})

    def poisoned(self, tokens: Tensor) -> Tensor:
        """The tokens (B, L, ...), or gradients of an output, with the case's poison where no sequence is."""
        if "lengths" in self.options:
            ends = self.options["lengths"]
            begins = torch.zeros_like(ends)
        elif "cu_seqlens" in self.options:
            begins, ends = self.options["cu_seqlens"][:1], self.options["cu_seqlens"][-1:]
        else:
            return tokens
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        inside = (steps >= begins[:, None]) & (steps < ends[:, None])
        return tokens.where(inside.view(*inside.shape, *[1] * (tokens.dim() - 2)), self.poison)

    def with_tensors(self, **tensors: Tensor) -> Case:
        return replace(self, tensors=self.tensors | tensors)

    def with_options(self, **options: Any) -> Case:
        return replace(self, options=self.options | options)

    def converted(self, convert: Callable[[Tensor], Any]) -> Case:
        """The case with something else for each of its tensors, inside states, too."""
        tensors, options = tree_map_only(Tensor, convert, (self.tensors, self.options))
        return replace(self, tensors=tensors, options=options)


def cema_case(
    B: int = 2, L: int = 9, D: int = 5, N: int = 4, *, dtype: torch.dtype = torch.float32, seed: int = 0,
    radius: tuple[float, float] = (0.5, 0.99), angle: tuple[float, float] = (-3.0, 3.0), state: bool = False,
    cu_seqlens: Sequence[int] | None = None, lengths: Sequence[int] | None = None,
) -> Case:  # fmt: skip
    """Poles q with modulus in `radius` and phase in `angle`."""
    gen, real = generator(seed), real_dtype(dtype)
    complex_ = torch.complex128 if real == torch.float64 else torch.complex64
    tensors = {
        "x": randn(gen, B, L, D, dtype=dtype),
        "p": uniform(gen, 0.1, 0.9, D, N).to(real),
        "q": torch.polar(uniform(gen, *radius, D, N), uniform(gen, *angle, D, N)).to(complex_),
        "gamma": (randn(gen, D, N, dtype=torch.complex128) / N**0.5).to(complex_),
        "omega": randn(gen, D, dtype=real),
    }
    options = _sequences(cu_seqlens, lengths)
    if state:
        tensors["state"] = randn(gen, _count(B, cu_seqlens), D, N, dtype=complex_)
    return Case("cema", tensors, options, dtype)


def timestep_norm_case(
    B: int = 2, L: int = 9, G: int = 3, width: int = 4, *, dtype: torch.dtype = torch.float32, seed: int = 0,
    mean: float = 0.5, std: float = 1.0, eps: float = 1e-5, count: int | None = None,
    cu_seqlens: Sequence[int] | None = None, lengths: Sequence[int] | None = None,
) -> Case:  # fmt: skip
    """G groups of `width` channels around `mean`; a state of about `count` steps if given."""
    gen, real, D = generator(seed), real_dtype(dtype), G * width
    tensors = {
        "x": (mean + std * randn(gen, B, L, D)).to(dtype),
        "weight": randn(gen, D, dtype=real) / 2,
        "bias": randn(gen, D, dtype=real),
    }
    options = {"num_groups": G, "eps": eps, **_sequences(cu_seqlens, lengths)}
    if count is not None:
        S = _count(B, cu_seqlens)
        tensors["mean"] = (mean + std * randn(gen, S, G) / 4).to(real)
        tensors["var"] = (std**2 * uniform(gen, 0.5, 1.5, S, G)).to(real)
        options["count"] = count + torch.arange(S)
        halves = torch.stack([tensors["mean"], tensors["var"]], 1) * torch.finfo(real).eps / 2
        options["residual"] = halves * uniform(gen, -1, 1, S, 2, G).to(real)
    rstd = 1 / max(eps, std**2 / 100 if width > 1 else 0.0) ** 0.5  # of a first step, whose variance may be small
    return Case("timestep_norm", tensors, options, dtype, terms=rstd, mean_terms=0.1 * std)


def sequence_norm_case(**sizes: Any) -> Case:
    """The inputs that `timestep_norm_case` has for these sizes."""
    return replace(timestep_norm_case(**sizes), op="sequence_norm")


def bidirectional_cema_case(**sizes: Any) -> Case:
    """The inputs that `cema_case` has for these sizes, and coefficients of the other direction."""
    case, other = cema_case(**sizes), cema_case(**sizes | {"seed": sizes.get("seed", 0) + 1})
    both = {name: torch.cat([case.tensors[name], other.tensors[name]]) for name in ("p", "q", "gamma")}
    # domega is a sum of products of x and dy, of size 1, which may cancel
    return replace(case.with_tensors(**both), op="bidirectional_cema", terms=1.0)


def cema_end_state_case(**sizes: Any) -> Case:
    """The inputs that `cema_case` has for these sizes, less what only an output needs."""
    case = cema_case(**sizes)
    return replace(case, op="cema_end_state", tensors={name: case.tensors[name] for name in ("x", "p", "q")})


def timestep_norm_end_state_case(**sizes: Any) -> Case:
    """The inputs that `timestep_norm_case` has for these sizes, less what only an output needs."""
    case = timestep_norm_case(**sizes)
    options = {name: value for name, value in case.options.items() if name != "eps"}
    return Case("timestep_norm_end_state", {"x": case.tensors["x"]}, options, case.dtype, mean_terms=case.mean_terms)


def normalized_qk_case(
    B: int = 2, L: int = 9, H: int = 2, K: int = 6, C: int = 4, *, dtype: torch.dtype = torch.float32, seed: int = 0,
    size: float = 1.0, rope_base: float = 10000.0, eps: float = 1e-5, position: bool = False,
    cu_seqlens: Sequence[int] | None = None, lengths: Sequence[int] | None = None,
) -> Case:  # fmt: skip
    gen, real = generator(seed), real_dtype(dtype)
    tensors = {
        "z": (size * randn(gen, B, L, H * K)).to(dtype),
        "gamma": randn(gen, 2, H * K, dtype=real) / 2,
        "beta": randn(gen, 2, H * K, dtype=real) / 4,
    }
    options = {"num_heads": H, "chunk_size": C, "rope_base": rope_base, "eps": eps, **_sequences(cu_seqlens, lengths)}
    if position:
        options["position"] = torch.randint(C, (_count(B, cu_seqlens),), generator=gen)
    return Case("normalized_qk", tensors, options, dtype, terms=0.1 / max(size, eps**0.5))


def chunked_attention_case(
    B: int = 2, L: int = 9, H: int = 2, K: int = 3, V: int = 5, C: int = 4, *, dtype: torch.dtype = torch.float32,
    seed: int = 0, causal: bool = True, visible_chunks: int = 1, scale: float = 1.0, dropkey: float = 0.0,
    state: bool = False, cu_seqlens: Sequence[int] | None = None, lengths: Sequence[int] | None = None,
) -> Case:  # fmt: skip
    gen = generator(seed)
    tensors = {name: randn(gen, B, L, H, size, dtype=dtype) for name, size in (("q", K), ("k", K), ("v", V))}
    options = {"chunk_size": C, "scale": scale, **_sequences(cu_seqlens, lengths), **_mask(causal, dropkey, seed)}
    if visible_chunks > 1:
        options["visible_chunks"] = visible_chunks
    if state:
        options["state"] = _attention_state(gen, _count(B, cu_seqlens), visible_chunks * C, H, K, V, dtype)
    return Case("chunked_attention", tensors, options, dtype)


def normalized_attention_case(
    B: int = 2, L: int = 9, H: int = 2, K: int = 4, V: int = 5, C: int = 4, *, dtype: torch.dtype = torch.float32,
    seed: int = 0, causal: bool = True, dropkey: float = 0.0, state: bool = False,
    cu_seqlens: Sequence[int] | None = None, lengths: Sequence[int] | None = None,
) -> Case:  # fmt: skip
    gen = generator(seed)
    qk = normalized_qk_case(B, L, H, K, C, dtype=dtype, seed=seed, cu_seqlens=cu_seqlens, lengths=lengths)
    tensors = {"z": qk.tensors["z"], "v": randn(gen, B, L, H * V, dtype=dtype)}
    tensors |= {"gamma": qk.tensors["gamma"] * 4, "beta": qk.tensors["beta"] * 4}
    options = qk.options | _mask(causal, dropkey, seed)
    if state:
        options["state"] = _attention_state(gen, _count(B, cu_seqlens), C, H, K, V, dtype)
    return Case("normalized_attention", tensors, options, dtype)


def adaptive_working_memory_case(
    B: int = 2, L: int = 9, H: int = 2, K: int = 3, V: int = 5, C: int = 4, *, dtype: torch.dtype = torch.float32,
    seed: int = 0, size: float = 1.0, visible_chunks: int = 1, state: bool = False,
    cu_seqlens: Sequence[int] | None = None, lengths: Sequence[int] | None = None,
) -> Case:  # fmt: skip
    """Queries and keys of `size`; a state whose memory is of many steps, or of none, in turn."""
    gen, real = generator(seed), real_dtype(dtype)
    tensors = {
        name: (scale * randn(gen, B, L, H, of)).to(dtype)
        for name, scale, of in (("q", size, K), ("k", size, K), ("v", 1, V))
    }
    options = {"chunk_size": C, "visible_chunks": visible_chunks, **_sequences(cu_seqlens, lengths)}
    if state:
        S = _count(B, cu_seqlens)
        kept = _attention_state(gen, S, visible_chunks * C, H, K, V, dtype)
        chunks = torch.arange(S) % 3 * (kept.position >= (visible_chunks - 1) * C)
        written = (chunks > 0)[:, None, None]
        tensors["memory"] = (randn(gen, S, H, K, V) * written[..., None]).to(real)
        tensors["mass"] = ((randn(gen, S, H, K) + 2) * written).to(real)
        options["kept"] = kept._replace(position=kept.position + C * chunks)
    return Case("adaptive_working_memory", tensors, options, dtype, terms=1.0)


def _sequences(cu_seqlens: Sequence[int] | None, lengths: Sequence[int] | None) -> dict[str, Tensor]:
    named = {"cu_seqlens": cu_seqlens, "lengths": lengths}
    return {name: torch.tensor(values) for name, values in named.items() if values is not None}


def _count(B: int, cu_seqlens: Sequence[int] | None) -> int:
    return B if cu_seqlens is None else len(cu_seqlens) - 1


def _mask(causal: bool, dropkey: float, seed: int) -> dict[str, Any]:
    options: dict[str, Any] = {} if causal else {"causal": False}
    if dropkey:
        options |= {"dropkey": dropkey, "dropkey_seed": torch.tensor([seed * 0x9E3779B97F4A7C15 % 2**63])}
    return options


def _attention_state(
    gen: torch.Generator, S: int, rows: int, H: int, K: int, V: int, dtype: torch.dtype
) -> AttentionState:
    """A state with every possible position in turn; rows beyond a position hold NaN, which nobody may read."""
    position = (torch.arange(S) * 5 + rows - 1) % rows
    k, v = randn(gen, S, rows, H, K, dtype=dtype), randn(gen, S, rows, H, V, dtype=dtype)
    for s, end in enumerate(position.tolist()):
        k[s, end:] = v[s, end:] = torch.nan
    return AttentionState(k, v, position)


BUILDERS = {
    "cema": cema_case,
    "timestep_norm": timestep_norm_case,
    "cema_end_state": cema_end_state_case,
    "timestep_norm_end_state": timestep_norm_end_state_case,
    "normalized_qk": normalized_qk_case,
    "chunked_attention": chunked_attention_case,
    "normalized_attention": normalized_attention_case,
    "adaptive_working_memory": adaptive_working_memory_case,
    "sequence_norm": sequence_norm_case,
    "bidirectional_cema": bidirectional_cema_case,
}

# What a builder is given for a state to start from.
WITH_STATE = {
    "cema": {"state": True},
    "timestep_norm": {"count": 2},
    "normalized_qk": {"position": True},
    "chunked_attention": {"state": True},
    "normalized_attention": {"state": True},
    "adaptive_working_memory": {"state": True},
}

# A small call of each op, with a state.
SMALL = {
    op: build(**WITH_STATE.get(op, {}), **({"dropkey": 0.3} if "attention" in op else {}))
    for op, build in BUILDERS.items()
}

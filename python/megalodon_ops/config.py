"""The configuration of a model, with the released fields and presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MegalodonConfig:
    """Sizes and options of a :class:`Megalodon` model; fields and defaults are those of the released `config.json`.

    Example:
        >>> import megalodon_ops as mo
        >>> mo.MegalodonConfig.preset("mega200M", vocab_size=32000).num_layers
        12
    """

    num_layers: int = 8
    model_dim: int = 1024
    """D"""
    z_dim: int = 256
    """H * K, the shared queries and keys"""
    value_dim: int = 2048
    """H * V"""
    num_heads: int = 1
    """H"""
    ffn_hidden_dim: int = 2048
    cema_ndim: int = 16
    """N, complex states a channel"""
    chunk_size: int = 2048
    """C, steps an attention chunk"""
    init_mode: str = "he"
    """initialisation of the linear layers; "he" is the one that exists"""
    vocab_size: int = 32000
    output_size: int = -1
    """logits a step; -1: vocab_size"""
    norm_num_groups: int = 32
    """G, groups of the timestep norms"""
    norm_affine: bool = True
    """False: the RMS norm and the FFN's layer norm have no parameters (the timestep norms keep theirs)"""
    norm_eps: float = 1e-5
    rope_base: float | None = None
    """None: 10000"""
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    """probability of DropKey"""
    swiglu: bool = False
    rescale_nffn: bool = False
    """a learned gain on each FFN's output, starting at 0.1 * 0.5^layer"""
    scale_emb: bool = False
    """multiply embeddings by sqrt(D)"""
    share_emb: bool = False
    """the output matrix is the embedding"""
    layerwise_ckpt: bool = False
    """recompute each layer in the backward (training only): memory of one layer instead of all"""

    def __post_init__(self) -> None:
        def check(holds: bool, field: str, expected: str) -> None:
            if not holds:
                raise ValueError(f"MegalodonConfig: `{field}` must be {expected}, got {getattr(self, field)}.")

        for field in ("num_layers", "model_dim", "z_dim", "value_dim", "num_heads", "ffn_hidden_dim", "cema_ndim",
                      "chunk_size", "vocab_size", "norm_num_groups"):  # fmt: skip
            value = getattr(self, field)
            check(isinstance(value, int) and value > 0, field, "a positive integer")
        for field in ("dropout", "hidden_dropout", "attention_dropout"):
            check(0 <= getattr(self, field) < 1, field, "a probability in [0, 1)")
        check(self.z_dim % (2 * self.num_heads) == 0, "z_dim", f"a multiple of 2 * num_heads = {2 * self.num_heads}")
        check(self.value_dim % self.num_heads == 0, "value_dim", f"a multiple of num_heads = {self.num_heads}")
        check(
            self.model_dim % self.norm_num_groups == 0, "norm_num_groups", f"a divisor of model_dim = {self.model_dim}"
        )
        check(self.norm_eps >= 0, "norm_eps", "at least 0")
        check(self.rope_base is None or self.rope_base > 0, "rope_base", "positive or None")
        size = self.output_size
        check(isinstance(size, int) and (size > 0 or size == -1), "output_size", "a positive integer or -1")
        check(self.init_mode == "he", "init_mode", '"he"')
        if self.share_emb:
            check(self.output_size in (-1, self.vocab_size), "output_size", "-1 or vocab_size where share_emb is set")

    @property
    def num_outputs(self) -> int:
        """Logits a step."""
        return self.vocab_size if self.output_size == -1 else self.output_size

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by."""
        return math.sqrt(self.model_dim) if self.scale_emb else 1.0

    @property
    def rotary_base(self) -> float:
        return self.rope_base or 10000.0

    @staticmethod
    def presets() -> tuple[str, ...]:
        """Names that :meth:`preset` knows."""
        return tuple(_PRESETS)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> MegalodonConfig:
        """The released configuration `name`, with single fields replaced."""
        if name not in _PRESETS:
            raise ValueError(f"MegalodonConfig: preset must be one of {', '.join(_PRESETS)}, got {name}.")
        return cls(**{**_PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MegalodonConfig:
        """From the `model` object of a released `config.json` or from :meth:`to_dict`; an unknown field raises."""
        ignored = {"efficient_attn"}  # chooses between equal kernels in the released code
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)} - ignored
        if unknown:
            raise ValueError(f"MegalodonConfig: unknown field {', '.join(sorted(unknown))}.")
        return cls(**{name: value for name, value in values.items() if name not in ignored})


_MEGA_1_3B = dict(num_layers=24, model_dim=2048, z_dim=512, value_dim=4096, num_heads=2, norm_num_groups=64)
_MEGA_7B = dict(num_layers=32, model_dim=4096, z_dim=1024, value_dim=8192, num_heads=4, norm_num_groups=64)
_PRESETS: dict[str, dict[str, Any]] = {
    "mega200M": dict(num_layers=12, model_dim=1024, z_dim=256, value_dim=2048, num_heads=1, ffn_hidden_dim=2560),
    "mega1.3B": dict(**_MEGA_1_3B, ffn_hidden_dim=4864),
    "mega1.3B_pg19": dict(**_MEGA_1_3B, ffn_hidden_dim=3584, swiglu=True, scale_emb=True, share_emb=True),
    "mega7.1B": dict(**_MEGA_7B, ffn_hidden_dim=11264),
    "mega7.3B": dict(**_MEGA_7B, ffn_hidden_dim=8192, swiglu=True),
    "paper7B": dict(**_MEGA_7B, ffn_hidden_dim=8192, swiglu=True, chunk_size=4096, rope_base=1e5),
}

"""The configuration of a model, with the released fields and presets."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..ops.common.checks import as_float, describe, did_you_mean, is_integer_between, short_text

Kind = TypeVar("Kind")


def suggest_fields(kind: type[Kind]) -> type[Kind]:
    """Make a dataclass's constructor suggest the nearest field when it gets an unknown one."""
    construct, names = kind.__init__, [field.name for field in dataclasses.fields(kind)]

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        for name in values:
            if name not in names:
                fix = did_you_mean(name, names) or "."
                raise TypeError(f"{kind.__name__}: `{name}` must be left out, as there is no such field{fix}")
        construct(self, *args, **values)

    kind.__init__ = __init__
    return kind


@suggest_fields
@dataclass(frozen=True)
class MegalodonConfig:
    """Sizes and options of a :class:`Megalodon` model; fields and defaults are those of the released `config.json`.

    Example:
        >>> import megalodon_ops as mo
        >>> mo.MegalodonConfig.preset("mega200M", vocab_size=32000).num_layers
        12
    """

    causal: ClassVar[bool] = True
    """True: a position sees itself and earlier ones; False, for encoders: all positions"""
    model_type: ClassVar[str] = "megalodon"
    architecture: ClassVar[str] = "MegalodonForCausalLM"
    num_layers: int = 8
    model_dim: int = 1024
    """D, channels"""
    z_dim: int = 256
    """H * K, width of the projection that queries and keys share"""
    value_dim: int = 2048
    """H * V, width of the values"""
    num_heads: int = 1
    """H, attention heads"""
    ffn_hidden_dim: int = 2048
    cema_ndim: int = 16
    """N, complex states a channel"""
    chunk_size: int = 2048
    """C, positions in an attention chunk"""
    init_mode: str = "he"
    """initialisation of the linear layers; only "he" exists"""
    vocab_size: int = 32000
    output_size: int = -1
    """logits per position; -1: vocab_size"""
    norm_num_groups: int = 32
    """G, groups of the timestep norms"""
    norm_affine: bool = True
    """False: the RMS norm and the FFN's layer norm have no parameters (the timestep norms keep theirs)"""
    norm_eps: float = 1e-5
    rope_base: float | None = None
    """base of the rotary angles; None: 10000"""
    dropout: float = 0.0
    """dropout of each half block's output"""
    hidden_dropout: float = 0.0
    """dropout of activations inside of each half block"""
    attention_dropout: float = 0.0
    """probability that a key is hidden from a query (DropKey)"""
    swiglu: bool = False
    """gate the FFN: silu(fc1 n) * fc3 n instead of silu(fc1 n)"""
    rescale_nffn: bool = False
    """a learned gain on each FFN's output, starting at 0.1 * 0.5^layer"""
    scale_emb: bool = False
    """multiply embeddings by sqrt(D)"""
    share_emb: bool = False
    """the output matrix is the embedding"""
    layerwise_ckpt: bool = False
    """recompute each layer in the backward (training only), to hold the activations of one layer instead of all"""
    eos_token_id: int | None = None
    """token that ends a document and stops `generate`, or None; not a field of the released code"""
    working_memory: bool = False
    """each block also reads an :func:`adaptive_working_memory` of the chunks that attention does not see; the released
    code has neither this field nor the next"""
    visible_chunks: int = 1
    """chunks that attention sees, including the position's own: 1 or 2"""
    num_features: int | None = None
    """F, numbers per position of continuous input; None: the input is tokens"""
    scale_inputs: bool = True
    """standardise each of the F numbers by its mean and deviation over the sequence up to the position; in an encoder,
    over the whole sequence"""
    missing_values: bool = False
    """NaN among the F numbers is a missing value: the model reads the mean and a flag; needs scale_inputs"""

    def __post_init__(self) -> None:
        def check(field: str, is_valid: bool, expected: str, kind: type | None = None) -> None:
            """Raise unless the field is valid; convert a NumPy number to Python's `kind`, for JSON."""
            value = getattr(self, field)
            if not is_valid:
                raise ValueError(f"{type(self).__name__}: `{field}` must be {expected}, got {short_text(value)}.")
            if kind is not None:
                object.__setattr__(self, field, kind(value))

        sizes = "num_layers model_dim z_dim value_dim num_heads ffn_hidden_dim cema_ndim chunk_size vocab_size norm_num_groups"
        for field in sizes.split():
            check(field, is_integer_between(getattr(self, field), 1, 2**31 - 1), "a positive integer below 2^31", int)
        for field in ("dropout", "hidden_dropout", "attention_dropout"):
            check(field, 0 <= as_float(getattr(self, field)) < 1, "a probability in [0, 1)", float)
        flags = "norm_affine swiglu rescale_nffn scale_emb share_emb layerwise_ckpt working_memory scale_inputs missing_values"
        for field in flags.split():
            check(field, isinstance(getattr(self, field), bool), "True or False")
        heads, groups, base = self.num_heads, self.norm_num_groups, self.rope_base
        check("z_dim", self.z_dim % (2 * heads) == 0, f"a multiple of 2 * num_heads = {2 * heads}")
        check("value_dim", self.value_dim % heads == 0, f"a multiple of num_heads = {heads}")
        check("norm_num_groups", self.model_dim % groups == 0, f"a divisor of model_dim = {self.model_dim}")
        eps_fits = 0 <= as_float(self.norm_eps) <= _LARGEST_FLOAT32
        check("norm_eps", eps_fits, "at least 0 and finite in float32", float)
        if base is not None:
            check("rope_base", 0 < as_float(base) <= _LARGEST_FLOAT32, "positive or None, and finite in float32", float)
        if self.num_features is None:
            most_outputs = self.vocab_size
            expected = f"a positive integer of at most vocab_size = {self.vocab_size}, or -1"
        else:
            most_outputs = 2**31 - 1
            expected = "a positive integer below 2^31, or -1"
            is_size = is_integer_between(self.num_features, 1, 2**31 - 1)
            check("num_features", is_size, "a positive integer below 2^31, or None", int)
            check("share_emb", not self.share_emb, "False with num_features: there is no embedding of tokens")
            check("eos_token_id", self.eos_token_id is None, "None with num_features: there are no tokens")
        is_scaled = self.num_features is not None and self.scale_inputs
        check("missing_values", is_scaled or not self.missing_values, "False without num_features and scale_inputs")
        is_size = is_integer_between(self.output_size, -1, most_outputs) and self.output_size != 0
        check("output_size", is_size, expected, int)
        if self.share_emb:
            check("output_size", self.output_size in (-1, self.vocab_size), "-1 or vocab_size where share_emb is set")
        check("working_memory", self.causal or not self.working_memory, "False for an encoder")
        check("visible_chunks", is_integer_between(self.visible_chunks, 1, 2), "1 or 2", int)
        if self.visible_chunks == 2:
            sees_two = self.causal and not self.attention_dropout
            check("visible_chunks", sees_two, "1 for an encoder and with attention_dropout")
        check("init_mode", self.init_mode == "he", '"he"')
        if self.eos_token_id is not None:
            expected = f"a token that the model can predict, in [0, {self.num_outputs}), or None"
            check("eos_token_id", is_integer_between(self.eos_token_id, 0, self.num_outputs - 1), expected, int)

    @property
    def num_outputs(self) -> int:
        """Outputs per position: logits or, with `num_features`, numbers."""
        if self.output_size != -1:
            return self.output_size
        return self.vocab_size if self.num_features is None else self.num_features

    @property
    def embedding_scale(self) -> float:
        """Factor on the embeddings."""
        return math.sqrt(self.model_dim) if self.scale_emb else 1.0

    @property
    def num_cached_positions(self) -> int:
        """Positions for which a state holds keys and values."""
        return self.visible_chunks * self.chunk_size

    @property
    def rotary_base(self) -> float:
        return self.rope_base or 10000.0

    def parameter_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of every parameter in the model's order, without building the model.

        Example:
            >>> import megalodon_ops as mo
            >>> next(mo.MegalodonConfig(vocab_size=256).parameter_shapes())
            ('embed.weight', (256, 1024))
        """
        yield from self._input_shapes().items()
        layer_shapes = self._layer_shapes()
        for layer in range(self.num_layers):
            for name, shape in layer_shapes.items():
                yield f"layers.{layer}.{name}", shape
        yield from self._output_shapes().items()

    def num_parameters(self) -> int:
        """Number of a model's parameters, computed without building the model.

        Example:
            >>> import megalodon_ops as mo
            >>> f"{mo.MegalodonConfig.preset('mega7.1B', vocab_size=32000).num_parameters():,}"
            '7,117,381,632'
        """
        layer, others = self._layer_shapes(), self._input_shapes() | self._output_shapes()
        layer_size, other_size = (sum(map(math.prod, shapes.values())) for shapes in (layer, others))
        return self.num_layers * layer_size + other_size  # in no time even for a typo of 10^12 layers

    @property
    def input_width(self) -> int:
        """Numbers per position that the input layer reads: F, and F flags with `missing_values`."""
        return (self.num_features or 0) * (1 + self.missing_values)

    def _input_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.num_features is None:
            return {"embed.weight": (self.vocab_size, self.model_dim)}
        return {"embed.weight": (self.model_dim, self.input_width), "embed.bias": (self.model_dim,)}

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        D, N, z_dim, value_dim, hidden = self.model_dim, self.cema_ndim, self.z_dim, self.value_dim, self.ffn_hidden_dim
        R = D if self.causal else 2 * D  # an encoder has channels for both directions
        maps = 4 if self.working_memory else 2  # of queries and keys: the attention's, then the memory's
        shapes = {"mega.gamma": (maps, z_dim), "mega.beta": (maps, z_dim)}
        shapes |= {"mega.timenorm.weight": (D,), "mega.timenorm.bias": (D,)}
        shapes |= {"mega.cema.alpha": (R, N, 1), "mega.cema.delta": (R, N, 1), "mega.cema.theta": (R, 1, 1)}
        shapes |= {"mega.cema.gamma": (R, N, 2), "mega.cema.omega": (D, 1), "mega.rmsnorm.weight": (D,)}
        for name, outputs in (("wv", value_dim), ("wz", z_dim), ("wr", value_dim), ("wh1", D)):
            shapes |= {f"mega.{name}.weight": (outputs, D), f"mega.{name}.bias": (outputs,)}
        shapes |= {"mega.wh2.weight": (D, value_dim), "nffn.alpha": (D,)}
        shapes |= {"nffn.norm.weight": (D,), "nffn.norm.bias": (D,)}
        shapes |= {"nffn.fc1.weight": (hidden, D), "nffn.fc2.weight": (D, hidden), "nffn.fc3.weight": (hidden, D)}
        absent = set() if self.norm_affine else {"mega.rmsnorm.weight", "nffn.norm.weight", "nffn.norm.bias"}
        absent |= set() if self.rescale_nffn else {"nffn.alpha"}
        absent |= set() if self.swiglu else {"nffn.fc3.weight"}
        return {name: shape for name, shape in shapes.items() if name not in absent}

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        D = self.model_dim
        shapes = {"output.final_norm.weight": (D,), "output.final_norm.bias": (D,)}
        return shapes if self.share_emb else {**shapes, "output.output.weight": (self.num_outputs, D)}

    @staticmethod
    def presets() -> tuple[str, ...]:
        """Names for :meth:`preset`."""
        return tuple(_PRESETS)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> MegalodonConfig:
        """Return the configuration `name`, with some fields replaced.

        Args:
            name: one of :meth:`presets`: a released configuration; "paper7B", that of the paper; or "small", a model
                of bytes, the default of the command `train`.

        Raises:
            ValueError: there is no such name. TypeError: there is no such field.
        """
        if not isinstance(name, str) or name not in _PRESETS:
            got = short_text(name) + (did_you_mean(name, _PRESETS) or ".")
            raise ValueError(f"MegalodonConfig: `name` must be one of {', '.join(_PRESETS)}, got {got}")
        return cls(**{**_PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types, which :meth:`from_dict` reads."""
        return dataclasses.asdict(self)

    def meaning(self) -> dict[str, Any]:
        """Return the fields that affect a trained model's outputs and states; dropout, for instance, does not."""
        return {name: value for name, value in self.to_dict().items() if name not in _FIELDS_WITHOUT_EFFECT}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MegalodonConfig:
        """Build a configuration from a released config's `model` object or :meth:`to_dict`; an unknown field raises."""
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__}: `values` must be a dictionary of fields, got {short_text(values)}.")
        field_names = {field.name for field in dataclasses.fields(cls)}
        # `efficient_attn` chooses between two kernels of the released code with equal results
        fields = {name: value for name, value in values.items() if name != "efficient_attn"}
        if unknown := [name for name in fields if name not in field_names]:
            fix = did_you_mean(unknown[0], field_names) or "."
            raise ValueError(f"{cls.__name__}: unknown field {', '.join(map(short_text, unknown))}{fix}")
        return cls(**fields)


def check_config(
    module: str, config: object, kind: type[MegalodonConfig] = MegalodonConfig, *, accept_encoder: bool = False
) -> None:
    """Raise a TypeError unless `config` is a `kind` or, with `accept_encoder`, an encoder's configuration."""
    if not isinstance(config, kind) or not (accept_encoder or config.causal == kind.causal):
        raise TypeError(f"{module}: `config` must be a {kind.__name__}, got {describe(config)}.")


def config_of_sizes(module: str, config: object, sizes: dict[str, Any]) -> object:
    """Return a module's configuration: `config` itself or, if it is a width D, a new one with the fields `sizes`."""
    if not isinstance(config, int) or isinstance(config, bool):
        if sizes:
            raise TypeError(f"{module}: `{min(sizes)}` must be set in `config`, got it as an argument beside `config`.")
        return config
    default_groups = math.gcd(config, MegalodonConfig.norm_num_groups)
    return MegalodonConfig(model_dim=config, **{"norm_num_groups": default_groups, **sizes})


CLIENT_NAMES = {
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_hidden_dim",
}
"""Fields by their names in transformers, under which other programs read them from a `config.json`"""
_FIELDS_WITHOUT_EFFECT = set("init_mode dropout hidden_dropout attention_dropout layerwise_ckpt eos_token_id".split())
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
# For a run of minutes on a few cores: docs/training.md.
_SMALL = dict(num_layers=3, model_dim=128, z_dim=64, value_dim=256, num_heads=1, ffn_hidden_dim=192, cema_ndim=8)
_SMALL |= dict(chunk_size=256, norm_num_groups=8, swiglu=True, vocab_size=257)
_MEGA_1_3B = dict(num_layers=24, model_dim=2048, z_dim=512, value_dim=4096, num_heads=2, norm_num_groups=64)
_MEGA_7B = dict(num_layers=32, model_dim=4096, z_dim=1024, value_dim=8192, num_heads=4, norm_num_groups=64)
_PRESETS: dict[str, dict[str, Any]] = {
    "small": _SMALL,
    "mega200M": dict(num_layers=12, model_dim=1024, z_dim=256, value_dim=2048, num_heads=1, ffn_hidden_dim=2560),
    "mega1.3B": dict(**_MEGA_1_3B, ffn_hidden_dim=4864),
    "mega1.3B_pg19": dict(**_MEGA_1_3B, ffn_hidden_dim=3584, swiglu=True, scale_emb=True, share_emb=True),
    "mega7.1B": dict(**_MEGA_7B, ffn_hidden_dim=11264),
    "mega7.3B": dict(**_MEGA_7B, ffn_hidden_dim=8192, swiglu=True),
    "paper7B": dict(**_MEGA_7B, ffn_hidden_dim=8192, swiglu=True, chunk_size=4096, rope_base=1e5),
}

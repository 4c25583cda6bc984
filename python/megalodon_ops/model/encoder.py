"""MEGALODON as an encoder: embedding or linear map, bidirectional blocks, features, a classification head."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .blocks import MegalodonBlock, at_least_float32
from .config import MegalodonConfig, check_config, suggest_fields
from .inputs import check_inputs, check_not_empty, embed_numbers, embed_tokens, input_layer
from .layers import Linear, SequenceNorm, check_no_state, reset_all_parameters
from .model_state import CallOptions
from .sequences import Sequences, pooled
from ..ops.gated_silu.gated_silu import gated_silu
from ..ops.common.checks import check_flag, check_rank, check_size


@suggest_fields
@dataclass(frozen=True)
class MegalodonEncoderConfig(MegalodonConfig):
    """Sizes and options of a :class:`MegalodonEncoder`: a :class:`MegalodonConfig` with fields for inputs and classes.

    If no row is longer than `chunk_size`, attention sees whole rows. `output_size`, `share_emb` and `eos_token_id` keep
    their defaults: an encoder predicts no tokens.

    Example:
        >>> import megalodon_ops as mo
        >>> sizes = dict(num_layers=4, model_dim=128, z_dim=64, value_dim=256, ffn_hidden_dim=256, norm_num_groups=8)
        >>> text = mo.MegalodonEncoderConfig(**sizes, vocab_size=256, num_classes=2)
        >>> sound = mo.MegalodonEncoderConfig(**sizes, num_features=1, num_classes=10)
        >>> sound.num_parameters() - text.num_parameters()  # a linear map of one number, not 256 embeddings; 8 more classes
        -31480
    """

    causal: ClassVar[bool] = False
    model_type: ClassVar[str] = "megalodon_encoder"
    architecture: ClassVar[str] = "MegalodonEncoder"
    num_classes: int | None = None
    """None: the model has no head, and a call returns the features"""
    scale_emb: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.num_classes is not None:
            object.__setattr__(self, "num_classes", check_size(name, "num_classes", self.num_classes))
        for field, value in (("output_size", -1), ("share_emb", False), ("eos_token_id", None)):
            if (given := getattr(self, field)) != value:
                raise ValueError(f"{name}: `{field}` must be {value}, got {given}; an encoder predicts no tokens.")

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        D, classes = self.model_dim, self.num_classes
        shapes = {"final_norm.weight": (D,), "final_norm.bias": (D,)}
        if classes is not None:
            shapes |= {"classifier.proj.weight": (D, D), "classifier.proj.bias": (D,)}
            shapes |= {"classifier.classes.weight": (classes, D), "classifier.classes.bias": (classes,)}
        return shapes


_TIED_GAIN = 0.9
"""Initial gain of the final norm, up to the sign: :meth:`MegalodonEncoderBase.init_tied_head`. With 1.0, the initial
loss is 10 % above that of uniform probabilities; with 0.8 or less, models learn more slowly"""


class _Head(nn.Module):
    """Classification head: the logits are a linear map of the mean of silu(W h + b + h) over a sequence."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.proj = Linear(dim, dim)
        self.classes = Linear(dim, num_classes)

    def forward(self, h: Tensor, **offsets: Tensor | None) -> Tensor:
        return self.classes(MegalodonEncoderBase.pool(gated_silu(self.proj(h) + h), **offsets))


class MegalodonEncoderBase(nn.Module):
    """The network: parameters and calls. :class:`megalodon_ops.MegalodonEncoder` adds files."""

    config_type: ClassVar[type[MegalodonConfig]] = MegalodonEncoderConfig
    block_type: ClassVar[type[MegalodonBlock]] = MegalodonBlock

    def __init__(self, config: MegalodonEncoderConfig) -> None:
        check_config("MegalodonEncoder", config, MegalodonEncoderConfig)
        super().__init__()
        self.config = config
        self.embed = input_layer(config)
        self.layers = nn.ModuleList(self.block_type(config, layer) for layer in range(config.num_layers))
        self.final_norm = SequenceNorm(config.model_dim, config.norm_num_groups, config.norm_eps)
        self.classifier = None  # peft trains and saves a head of this name
        if config.num_classes is not None:
            self.classifier = _Head(config.model_dim, config.num_classes)

    def reset_parameters(self) -> None:
        """Initialise every parameter, for instance of an encoder that was built on the device `meta`."""
        reset_all_parameters(self)

    @torch.no_grad()
    def init_tied_head(self) -> None:
        """Initialise the final norm, before training, for logits that are products of features and embeddings.

        The gains alternate between 0.9 and -0.9, so a new model's loss is near ln(vocab_size). With equal gains it would
        be far above: features resemble the embedding of their own token, at a masked position that of the mask token,
        whose logit would be near sqrt(D). :class:`megalodon_ops.hf.MegalodonEncoderForMaskedLM` calls this method.

        Example:
            >>> import math, torch, megalodon_ops as mo
            >>> config = mo.MegalodonEncoderConfig(num_layers=1, model_dim=64, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=99)
            >>> encoder, hidden = mo.MegalodonEncoder(config), torch.full((8, 50), 98)  # 98 is the mask token
            >>> encoder.init_tied_head()
            >>> loss = mo.linear_cross_entropy(encoder.features(hidden), encoder.embed.weight, torch.randint(98, (8, 50)))
            >>> bool(loss < 1.15 * math.log(99))
            True
        """
        self.final_norm.weight.fill_(_TIED_GAIN - 1)  # the gain is 1 + weight
        self.final_norm.weight[1::2] = -_TIED_GAIN - 1

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        inputs: Tensor,
        *,
        features: bool = False,
        state: None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> Tensor:
        """Compute the class logits of every row; with `features` or without a head, the features of every position.

        Args:
            inputs: (B, L) integers, the tokens; with `num_features` (B, L, F) floating-point numbers of any type.
            features: return the features, as :meth:`features` does.
            state, return_state: None and False, as an encoder has no state.
            cu_seqlens, lengths, starts, spans: sequences as in :meth:`Megalodon.forward`. None may be empty (not checked on
                a GPU or in a compiled program).

        Returns:
            logits (S, num_classes) of the S sequences, float32 (float64 for a float64 encoder), or the features.

        Raises:
            ValueError, TypeError: an argument is wrong. IndexError: a token is outside of the vocabulary.
        """
        check_flag("MegalodonEncoder", "features", features)
        check_no_state("MegalodonEncoder", state, return_state)
        where = dict(cu_seqlens=cu_seqlens, lengths=lengths, starts=starts, spans=spans)
        sequences = Sequences.of("MegalodonEncoder", inputs, **where)
        check_inputs("MegalodonEncoder", "inputs", inputs, self, sequences)
        x = self._hidden(self._embed(inputs, sequences), sequences)
        check_not_empty("MegalodonEncoder", "inputs", x, sequences)  # the ops have checked offsets and lengths
        return x if features or self.classifier is None else at_least_float32(self.classifier(x, spans=sequences.spans))

    def _hidden(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Return the features of embeddings (B, L, D)."""
        options = CallOptions(sequences=sequences)
        for layer in self.layers:
            x = layer(x, options=options)
        return self.final_norm(x, spans=sequences.spans)

    def features(self, inputs: Tensor, *, pool: str | None = None, **options: Any) -> Tensor:
        """Features (B, L, D) of every position: the final norm's output, zero at padding.

        This is `self(inputs, features=True, ...)`, for a head of your own; with `pool` "mean", "max" or "last", a vector
        (S, D) of each sequence.

        Example:
            >>> import torch, megalodon_ops as mo
            >>> config = mo.MegalodonEncoderConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
            >>> encoder, rows = mo.MegalodonEncoder(config), dict(lengths=torch.tensor([20, 13]))
            >>> encoder.features(torch.randint(9, (2, 20)), pool="mean", **rows).shape
            torch.Size([2, 32])
        """
        return pooled("MegalodonEncoder.features", self(inputs, features=True, **options), pool, options)

    @staticmethod
    def pool(
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> Tensor:
        """Mean (S, D) of x (B, L, D) over each sequence, summed in float64; zero for an empty sequence."""
        check_rank("MegalodonEncoder.pool", "x", x, "(B, L, D)", 3)
        where = dict(cu_seqlens=cu_seqlens, lengths=lengths, starts=starts, spans=spans)
        return pooled("MegalodonEncoder.pool", x, "mean", where)

    def _embed(self, inputs: Tensor, sequences: Sequences) -> Tensor:
        """Embed the inputs as (B, L, D), in the dtype that the encoder computes in."""
        if self.config.num_features is None:
            return embed_tokens("MegalodonEncoder", "inputs", inputs, self)
        return embed_numbers("MegalodonEncoder", "inputs", inputs, self, CallOptions((), sequences=sequences))[0]

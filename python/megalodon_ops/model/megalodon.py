"""The MEGALODON language model: embedding, blocks, final timestep norm, logits, loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import MegalodonBlock, Output, at_least_float32
from .config import MegalodonConfig, check_config
from .inputs import check_inputs, check_reads_tokens, embed_numbers, embed_tokens, input_layer, own_weight
from .layers import StateSlot, is_plain_linear, reset_all_parameters
from .model_state import BlockState, CallOptions, MegalodonStateBase, MemoryBlockState, check_state, scales_inputs
from .scale import running_scale
from .sequences import Sequences, pooled
from ..ops.linear_cross_entropy.linear_cross_entropy import blockwise_cross_entropy, has_integers, linear_cross_entropy
from ..ops.common.checks import check_flag, check_integer, check_tensor
from ..ops.common.spans import argument_of, num_sequences


class Wanted(NamedTuple):
    """Result that a call of a model returns: features, or the loss if there are `targets`, or else logits."""

    features: bool = False
    targets: Tensor | None = None
    reduction: str = "mean"
    ignore_index: int = -100


class MegalodonBase(nn.Module):
    """The network: parameters and calls. :class:`megalodon_ops.Megalodon` adds files and generation."""

    config_type: ClassVar[type[MegalodonConfig]] = MegalodonConfig
    state_type: ClassVar[type[MegalodonStateBase]] = MegalodonStateBase
    block_type: ClassVar[type[MegalodonBlock]] = MegalodonBlock
    _reads_pieces = False
    """True where ranks hold pieces of the sequences that a call's arguments describe"""

    def __init__(self, config: MegalodonConfig) -> None:
        check_config("Megalodon", config)
        super().__init__()
        self.config = config
        self.embed = input_layer(config)
        self.layers = nn.ModuleList(self.block_type(config, layer) for layer in range(config.num_layers))
        self.output = Output(config)
        self.tie_weights()

    def reset_parameters(self) -> None:
        """Initialise every parameter, for instance of a model that was built on the device `meta`.

        Example:
            >>> import torch, megalodon_ops as mo
            >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
            >>> with torch.device("meta"):
            ...     model = mo.Megalodon(config)
            >>> model.to_empty(device="cpu").reset_parameters()
            >>> model(torch.tensor([[1, 2, 3]])).shape
            torch.Size([1, 3, 9])
        """
        reset_all_parameters(self)

    def tie_weights(self) -> None:
        """Use the embedding as the output matrix if the configuration says so."""
        if self.config.share_emb:
            self._share_embedding()

    def _share_embedding(self) -> None:
        self.output.output.weight = self.embed.weight
        if self.quantization:
            self.output.output.scale = self.embed.scale

    @property
    def quantization(self) -> str | None:
        """Kind of a quantised model's weights, "int8" or "int4"; None: floating point. See :func:`quantize`."""
        return getattr(self.layers[0].mega.wz, "kind", None)

    @property
    def activations(self) -> str | None:
        """ "int8" if a quantised model may round activations to 8 bits, else None. See :func:`quantize`."""
        return getattr(self.layers[0].mega.wz, "activations", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move or cast all parameters; a shared embedding stays shared, also after a move from the device `meta`."""
        embedding = own_weight(self.embed)
        shared = embedding is not None and embedding is own_weight(self.output.output)
        super()._apply(fn, recurse)
        if shared:
            self._share_embedding()
        return self

    def alone(self) -> MegalodonBase:
        """Return a model that runs in one process, on whole sequences.

        A model of :func:`megalodon_ops.distributed.parallelize` returns a model with all parameters, whose calls
        exchange nothing with other ranks. Any other model returns itself.
        """
        return self

    def num_parameters(self) -> int:
        """Number of parameters; a quantised model has as many as before :func:`quantize`."""
        if self.quantization:
            return self.config.num_parameters()
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        features: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        state: MegalodonStateBase | None = None,
        return_state: bool = False,
        inplace_state: bool = False,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MegalodonStateBase]:
        """Compute the logits of the next token at every position; with `targets`, the loss, as :meth:`loss` does.

        Args:
            tokens: (B, L) integers or, with the configuration's `num_features`, (B, L, F) floating-point numbers.
            features: return the features instead, as :meth:`features` does.
            targets, reduction, ignore_index: as in :meth:`loss`. Without `targets`, the call returns logits.
            state: the state that an earlier call returned; None: the tokens begin their sequences.
            return_state: also return the state after the last token. Up to rounding, the logits are the same however a
                sequence is split into calls.
            inplace_state: overwrite parts of `state`, such as the attention's, to save copies in generation. The old
                state is lost.
            cu_seqlens: (S + 1,) offsets of documents packed into one row (B = 1). The last one is the row's length.
            lengths: (B,) tokens in each right-padded row.
            starts: (B,) first position of each left-padded row; with `lengths`, rows have padding on both sides.
            spans: (S, 2) first and last-plus-one position of each document in the flattened batch (B * L), in order,
                disjoint, each within one row; for documents packed into several rows.

        Returns:
            the logits or, with `num_features`, the predicted numbers: (B, L, num_outputs), float32 (float64 for a
            float64 model), with arbitrary values at padding. With `targets` the loss; with `features` the features.
            With `return_state` also the state, a :class:`MegalodonState`.

        Raises:
            ValueError, TypeError: an argument is wrong, or two arguments exclude each other. IndexError: a token is
            outside of the vocabulary.
        """
        where = dict(cu_seqlens=cu_seqlens, lengths=lengths, starts=starts, spans=spans)
        sequences = Sequences.of("Megalodon", tokens, **where, is_piece=self._reads_pieces)
        check_flag("Megalodon", "return_state", return_state)
        self._check("Megalodon", "tokens", tokens, state, sequences)
        check_flag("Megalodon", "inplace_state", inplace_state)
        check_flag("Megalodon", "features", features)
        if targets is not None:
            check_reads_tokens("Megalodon.loss", self.config)
            ignore_index = check_targets(tokens, targets, ignore_index)
            if features:
                raise ValueError("Megalodon: `targets` must be None where features are wanted, got a tensor.")
            if inplace_state and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
                fix = "a backward reads the states that it overwrites; use torch.no_grad(), or leave it out"
                raise ValueError(f"Megalodon.loss: `inplace_state` must be False with gradients, got True: {fix}.")
        wanted = Wanted(features, targets, reduction, ignore_index)
        result, state = self._compute(tokens, wanted, CallOptions(state, return_state, inplace_state, sequences))
        return (result, state) if return_state else result

    def _compute(
        self, tokens: Tensor, wanted: Wanted, options: CallOptions
    ) -> tuple[Tensor, MegalodonStateBase | None]:
        """Compute features, logits or the loss, and the state, from checked arguments."""
        if self.config.num_features is None:
            x, scale_state = self._embed(tokens), ()
        else:
            past = () if options.state is None else options.state.inputs
            x, scale_state = embed_numbers("Megalodon", "tokens", tokens, self, options._replace(state=past))
        hidden, state = self._hidden(x, options)
        if options.return_state:
            state = replace(state, inputs=scale_state)
        if wanted.features:
            return hidden, state
        if wanted.targets is None:
            return at_least_float32(self.output.output(hidden)), state
        return self._cross_entropy(hidden, wanted, options.sequences), state

    def features(
        self, tokens: Tensor, *, pool: str | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, MegalodonStateBase]:
        """Features of every token: the final norm's output, from which logits are computed.

        This is `self(tokens, features=True, ...)`, for a head of your own: a probe, a classifier, a search.

        Args:
            tokens: (B, L) integers.
            pool: "mean", "max" or "last", to reduce each of the S sequences of the call to one vector; None where ranks
                hold pieces of sequences.
            state, return_state, inplace_state, cu_seqlens, lengths, starts, spans: as in :meth:`forward`.

        Returns:
            features (B, L, D), in the dtype that the model computes in, with arbitrary values at padding; with `pool`
            vectors (S, D), zero for an empty sequence; with `return_state` also the state. All are differentiable.

        Raises:
            as :meth:`forward` does.

        Example:
            >>> import torch, megalodon_ops as mo
            >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
            >>> model, tokens = mo.Megalodon(config), torch.randint(9, (2, 20))
            >>> features, state = model.features(tokens, return_state=True)
            >>> features.shape, state.num_sequences
            (torch.Size([2, 20, 32]), 2)
            >>> torch.equal(model.output.output(features), model(tokens))
            True
            >>> model.features(tokens, pool="mean", lengths=torch.tensor([20, 7])).shape
            torch.Size([2, 32])
        """
        if pool is not None and self._reads_pieces:
            raise ValueError("Megalodon.features: `pool` must be None where ranks hold pieces of sequences.")
        result = self(tokens, features=True, **options)
        features, *state = result if isinstance(result, tuple) else (result,)
        vectors = pooled("Megalodon.features", features, pool, options)
        return (vectors, *state) if state else vectors

    def loss(self, tokens: Tensor, targets: Tensor, **options: Any) -> Tensor | tuple[Tensor, MegalodonStateBase]:
        """Cross-entropy of the logits with `targets`, computed for one block of tokens at a time.

        This is `self(tokens, targets, ...)`, so hooks on a call of the model, such as those of FSDP2, run for the loss,
        too. Padding is ignored, whatever its target is.

        Args:
            tokens: (B, L) integers.
            targets: (B, L) integers, the token after each token, or `ignore_index`.
            reduction: "mean", "sum" or "none", as in :func:`megalodon_ops.linear_cross_entropy`.
            ignore_index: positions with this target are left out of the loss.
            state, return_state, inplace_state, cu_seqlens, lengths, starts, spans: as in :meth:`forward`.

        Returns:
            the loss, reduced by `reduction`, float32 (float64 for a float64 model); with `return_state` also the state.

        Example:
            >>> import torch, megalodon_ops as mo
            >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
            >>> model, tokens = mo.Megalodon(config), torch.randint(9, (2, 21))
            >>> model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        """
        check_tensor("Megalodon", "targets", targets)
        return self(tokens, targets, **options)

    @torch.no_grad()
    def input_scale(self, inputs: Tensor, *, state: MegalodonStateBase | None = None) -> tuple[Tensor, Tensor]:
        """Mean and deviation by which a model with `num_features` and `scale_inputs` standardises each position.

        If outputs are standardised in the same way, `mean + deviation * output` converts them to the data's units.

        Args:
            inputs: (B, L, F), the inputs of a call of the model.
            state: the initial state of that call.

        Returns:
            mean and deviation (B, L, F), float64, of the values up to and including each position. Missing values do not
            count. The mean is NaN before the first value and the deviation before the second. The deviation is 1e-15
            where all values so far, of at least two, are equal.

        Raises:
            as :meth:`forward` does; ValueError: the model does not scale its inputs.

        Example:
            >>> import torch, megalodon_ops as mo
            >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, num_features=1)
            >>> mean, deviation = mo.Megalodon(config).input_scale(torch.tensor([[[1.0], [3.0], [5.0]]]))
            >>> mean[0, 1:, 0], deviation[0, 1:, 0]
            (tensor([2., 3.], dtype=torch.float64), tensor([1.0000, 1.6330], dtype=torch.float64))
        """
        if not scales_inputs(self.config):
            raise ValueError("Megalodon.input_scale: the model must have num_features and scale_inputs.")
        self._check("Megalodon.input_scale", "inputs", inputs, state)
        return running_scale(inputs, self.config, () if state is None else state.inputs)

    def _cross_entropy(self, hidden: Tensor, wanted: Wanted, sequences: Sequences) -> Tensor:
        """Compute the loss of the final norm's output (B, L, D)."""
        targets = masked_targets(wanted.targets, wanted.ignore_index, sequences)
        output, options = self.output.output, dict(reduction=wanted.reduction, ignore_index=wanted.ignore_index)
        if is_plain_linear(output) and output.bias is None:
            return linear_cross_entropy(hidden, output.weight, targets, **options)
        return blockwise_cross_entropy(hidden, output, targets, width=self.config.num_outputs, **options)

    def _check(
        self,
        op: str,
        argument: str,
        tokens: Tensor,
        state: MegalodonStateBase | None,
        sequences: Sequences = Sequences(),
    ) -> None:
        """Raise an error, naming `op` and `argument`, unless `tokens` and the initial state fit the model."""
        check_inputs(op, argument, tokens, self, sequences)
        if state is not None:
            spans = sequences.spans
            if spans is not None and spans.dim() != 3:  # the sequences are not the rows of `tokens`
                argument, _ = argument_of(spans)
            check_state(op, state, self.config, num_sequences(tokens.shape[0], spans), argument)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens as (B, L, D)."""
        return embed_tokens("Megalodon", "tokens", tokens, self)

    def _hidden(self, x: Tensor, options: CallOptions) -> tuple[Tensor, MegalodonStateBase | None]:
        """Return the final norm's output (B, L, D) and the new state."""
        state, return_state, inplace_state, sequences = options
        layer_states = []
        past_states = (None,) * len(self.layers) if state is None else state.layers
        for layer, past in zip(self.layers, past_states, strict=True):
            new_state = StateSlot() if return_state else None
            x = layer(x, options=CallOptions(past, return_state, inplace_state, sequences), new_state=new_state)
            if return_state:
                x, layer_state = self._tied(x, new_state.state)
                layer_states.append(layer_state)
        norm, new_state = self.output.final_norm, StateSlot()
        norm_state = sequences.norm_state(norm.num_groups, x, None if state is None else state.norm)
        x = norm(x, state=norm_state, new_state=new_state, spans=sequences.spans)
        return x, (self.state_type(tuple(layer_states), new_state.state) if return_state else None)

    def _tied(self, x: Tensor, state: BlockState | MemoryBlockState) -> tuple[Tensor, BlockState | MemoryBlockState]:
        """Return a block's output and new state. A parallel model makes gradients of the state reach x, too."""
        return x, state


def masked_targets(targets: Tensor, ignore_index: int, sequences: Sequences) -> Tensor:
    """Return the targets (B, L) as int64, with `ignore_index` outside of sequences."""
    targets = targets.long()
    return targets if sequences.spans is None else targets.where(sequences.mask(targets), ignore_index)


def check_targets(tokens: Tensor, targets: Tensor, ignore_index: int) -> int:
    """Check the targets and `ignore_index`; return `ignore_index` as an integer."""
    check_tensor("Megalodon", "targets", targets)
    if not has_integers(targets):
        raise TypeError(f"Megalodon: `targets` must be integers, got {targets.dtype}.")
    if targets.shape != tokens.shape:
        raise ValueError(
            f"Megalodon: `targets` must have shape {tuple(tokens.shape)} as `tokens`, got {tuple(targets.shape)}."
        )
    return check_integer("Megalodon", "ignore_index", ignore_index, "an integer below 2^63", -(2**63))

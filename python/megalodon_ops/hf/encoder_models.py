"""Encoders for the Auto classes: features, sequence classification and masked-token prediction."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from ..model.blocks import at_least_float32
from ..public_models import MegalodonEncoder
from ..model.inputs import check_inputs, check_not_empty
from ..model.layers import Linear
from ..model.sequences import Sequences
from .arguments import IGNORED, Batch, check_labels, map_columns, read_batch, select
from .configuration import MegalodonEncoderHFConfig
from .pretrained import EncoderCore, MegalodonPreTrainedModel


class MegalodonEncoderPreTrainedModel(MegalodonPreTrainedModel):
    """Base of the encoders: computes the features of rows."""

    config_class = MegalodonEncoderHFConfig
    _core_class = MegalodonEncoder
    _trunk = ("embed", "layers", "final_norm")
    _keys_to_ignore_on_load_unexpected = [r"^classifier\.", r"^output\.weight$", r"^score\."]  # heads of other classes

    def __init__(self, config: MegalodonEncoderHFConfig, num_classes: int | None = None) -> None:
        config.num_classes = num_classes
        super().__init__(config)
        self.main_input_name = "input_ids" if config.num_features is None else "input_values"

    def _read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        input_values: Tensor | None = None,
        **arguments: Any,
    ) -> Batch:
        inputs = dict(input_ids=input_ids, input_values=input_values)
        return read_batch(self, inputs.pop(self.main_input_name), attention_mask, **inputs, **arguments)


class MegalodonEncoderModel(MegalodonEncoderPreTrainedModel):
    """An encoder without a head: `AutoModel`.

    Example:
        >>> import torch, megalodon_ops.hf as hf
        >>> config = hf.MegalodonEncoderHFConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, num_features=1)
        >>> sound, mask = torch.randn(2, 50, 1), torch.tensor([[1] * 50, [1] * 32 + [0] * 18])
        >>> hf.MegalodonEncoderModel(config)(input_values=sound, attention_mask=mask).last_hidden_state.shape
        torch.Size([2, 50, 32])
    """

    _prefix = ""

    def __init__(self, config: MegalodonEncoderHFConfig, core: MegalodonEncoder | None = None) -> None:
        super().__init__(config, None if core is None else core.config.num_classes)
        core = EncoderCore(config.to_megalodon()) if core is None else core
        self.embed, self.layers, self.final_norm = core.embed, core.layers, core.final_norm
        self.__dict__["_core"] = core
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        batch: Batch | None = None,
        **arguments: Any,
    ) -> BaseModelOutput:
        """Return features (B, L, D), zero at padding.

        Arguments are those of :meth:`MegalodonEncoderForSequenceClassification.forward`.

        A model with a head passes `batch`, the arguments that it has read. The features are then those of the columns
        read, (B, W, D).
        """
        has_head, encoder = batch is not None, self.megalodon
        if batch is None:
            batch = self._read(input_ids, attention_mask, input_values, **arguments)
        op, x, sequences = type(self).__name__, batch.without_padding(), Sequences(batch.spans)
        if not batch.holds_embeddings:
            check_inputs(op, batch.name, x, encoder, sequences)
            x = encoder._embed(x, sequences)
        elif self.main_input_name == "input_ids":
            x = x * encoder.config.embedding_scale
        with self._record_layers(output_hidden_states, batch) as layers:
            features = encoder._hidden(x, sequences)
        check_not_empty(op, batch.name, x, sequences)
        if not has_head:
            features = features if batch.positions is None else select(features, batch.positions)
            features = batch.zero_padding(features)
        return BaseModelOutput(last_hidden_state=features, hidden_states=layers and tuple(layers))


class MegalodonEncoderForSequenceClassification(MegalodonEncoderPreTrainedModel):
    """An encoder that classifies rows: `AutoModelForSequenceClassification`.

    The head `classifier` is that of :class:`megalodon_ops.MegalodonEncoder`, with `config.num_labels` classes. Each of
    the two classes reads the other's folders. If a folder has no head, a new one is initialized.

    Example:
        >>> import torch, megalodon_ops.hf as hf
        >>> config = hf.MegalodonEncoderHFConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32,
        ...                                      vocab_size=9, num_labels=3)
        >>> model = hf.MegalodonEncoderForSequenceClassification(config)
        >>> output = model(torch.tensor([[1, 2, 3], [4, 5, 6]]), labels=torch.tensor([0, 2]))
        >>> output.logits.shape, output.loss.shape
        (torch.Size([2, 3]), torch.Size([]))
    """

    _head = {"classifier": "classifier"}

    def __init__(self, config: MegalodonEncoderHFConfig) -> None:
        super().__init__(config, num_classes=config.num_labels)
        core = EncoderCore(config.to_megalodon())
        self.model, self.classifier = MegalodonEncoderModel(config, core), core.classifier
        self.post_init()

    @classmethod
    def from_megalodon(cls, model: MegalodonEncoder) -> MegalodonEncoderForSequenceClassification:
        """Create a model for transformers that shares the modules of `model`."""
        if isinstance(model, MegalodonEncoder) and model.classifier is None:
            raise ValueError(
                f"{cls.__name__}: `model` must have a head, got `num_classes` None; from_pretrained(folder, num_labels=...) "
                "makes one for the encoder in a folder."
            )
        return super().from_megalodon(model)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **arguments: Any,
    ) -> SequenceClassifierOutput:
        """Return class logits (B, num_labels) of every row, and the loss.

        Args:
            input_ids: (B, L) integers.
            attention_mask: (B, L): 1 for a position, 0 for padding, in arbitrary columns.
            input_values: (B, L, F) floating-point numbers instead of `input_ids`, for a model with `num_features`.
            labels: (B,) integers, each row's class; or (B, num_labels) floating-point numbers, 1 for each class of
                the row; or, with one label, values to regress. `config.problem_type` or else the first labels decide.
            output_hidden_states: also return `hidden_states`, num_layers + 1 tensors (B, L, D): each layer's input, and
                the features.
            arguments: `inputs_embeds` (B, L, D), from `get_input_embeddings()`, instead of the inputs; `cu_seq_lens_q`,
                `position_ids` or `seq_idx`, for S sequences packed into one row, which are classified one by one; and
                the arguments that :class:`MegalodonForCausalLM` ignores.

        Raises:
            ValueError: an empty row; a state (`use_cache`, `cache`, `past_key_values`). TypeError: an unknown argument.
        """
        batch = self._read(input_ids, attention_mask, input_values, **arguments)
        output = self.model(batch=batch, output_hidden_states=output_hidden_states, return_dict=True)
        logits = at_least_float32(self.classifier(output.last_hidden_state, spans=batch.spans))
        loss = None if labels is None else self._class_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)


class MegalodonEncoderForMaskedLM(MegalodonEncoderPreTrainedModel):
    """An encoder for masked-token prediction: `AutoModelForMaskedLM`.

    Logits are products of features and embeddings, so the head has no parameters of its own. With
    `tie_word_embeddings=False`, the head has a matrix, `output.weight`, which the other classes do not load.

    Example:
        >>> import torch, megalodon_ops.hf as hf
        >>> config = hf.MegalodonEncoderHFConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> tokens, labels = torch.tensor([[1, 8, 3]]), torch.tensor([[-100, 2, -100]])  # 8 is the mask token
        >>> output = hf.MegalodonEncoderForMaskedLM(config)(tokens, labels=labels)
        >>> output.logits.shape, output.loss.shape
        (torch.Size([1, 3, 9]), torch.Size([]))
    """

    accepts_loss_kwargs = True
    _tied_weights_keys = {"output.weight": "model.embed.weight"}

    def __init__(self, config: MegalodonEncoderHFConfig) -> None:
        if config.num_features is not None:
            raise ValueError(
                f"{type(self).__name__}: `num_features` must be None, got {config.num_features}; there are no tokens."
            )
        super().__init__(config)
        self.model = MegalodonEncoderModel(config)
        tied, embed = config.tie_word_embeddings, self.model.embed
        with torch.device("meta") if tied else nullcontext():
            self.output = Linear(config.model_dim, config.vocab_size, bias=False, token_rows=True)
        if tied:
            self.output.weight = embed.weight
            self.megalodon.init_tied_head()
        self.post_init()
        self.output._is_hf_initialized = tied or not embed.weight.is_meta  # by the constructor

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.output = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **arguments: Any,
    ) -> MaskedLMOutput:
        """Return logits (B, L, vocab_size) of the token at every position, and the loss.

        Args:
            labels: (B, L), the token at each masked position, -100 elsewhere. The loss ignores padding.
            num_items_in_batch: divides the summed loss, instead of the number of labels; Trainer passes it.

        Other arguments as in :meth:`MegalodonEncoderForSequenceClassification.forward`.
        """
        batch = self._read(input_ids, attention_mask, **arguments)
        output = self.model(batch=batch, output_hidden_states=output_hidden_states, return_dict=True)
        logits, loss = at_least_float32(map_columns(self.output, output.last_hidden_state, batch.positions)), None
        if labels is not None:
            check_labels(type(self).__name__, labels, batch.shape)
            if batch.present is not None:
                labels = labels.masked_fill(~batch.present.to(labels.device), IGNORED)
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)

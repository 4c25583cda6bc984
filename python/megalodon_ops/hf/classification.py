"""Models that classify rows (causal models) or tokens (causal models and encoders)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.utils import can_return_tuple

from ..model.blocks import at_least_float32
from ..model.layers import Linear
from ..ops.common.spans import pairs_of
from .arguments import IGNORED, check_labels, read_batch
from .cache import CACHE
from .causal_lm import MegalodonCausalModel, MegalodonModel
from .configuration import MegalodonHFConfig
from .encoder_models import MegalodonEncoderModel, MegalodonEncoderPreTrainedModel
from .pretrained import MegalodonPreTrainedModel


class MegalodonForSequenceClassification(MegalodonCausalModel):
    """A language model that classifies rows: `AutoModelForSequenceClassification`.

    The head `score`, a matrix (num_labels, D), reads the features of each row's last token. A model loaded from
    a language model's folder gets a new head.

    Example:
        >>> import torch, megalodon_ops.hf as hf
        >>> config = hf.MegalodonHFConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9,
        ...                               num_labels=3)
        >>> model = hf.MegalodonForSequenceClassification(config)
        >>> output = model(torch.tensor([[1, 2, 3], [4, 5, 6]]), labels=torch.tensor([0, 2]))
        >>> output.logits.shape, output.loss.shape
        (torch.Size([2, 3]), torch.Size([]))
    """

    def __init__(self, config: MegalodonHFConfig) -> None:
        super().__init__(config)
        self.model = MegalodonModel(config)
        self.score = Linear(config.model_dim, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool | None = None,
        **arguments: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Return class logits (B, num_labels) of every row, and the loss.

        Args:
            input_ids: (B, L) integers.
            attention_mask: (B, L): 1 for a token, 0 for padding. `pad_token_id` does not mark padding.
            labels: as in :meth:`MegalodonEncoderForSequenceClassification.forward`.
            use_cache: return a cache.
            output_hidden_states, arguments: as in :meth:`MegalodonForCausalLM.forward`; a packed document is a row.

        Raises:
            ValueError: a row without a token. Otherwise as :meth:`MegalodonForCausalLM.forward`.
        """
        op = type(self).__name__
        batch = read_batch(self, input_ids, attention_mask, use_cache=use_cache, **arguments)
        spans, last = batch.spans, torch.tensor([batch.width - 1], device=batch.inputs.device)
        if spans is not None:
            begins, ends = pairs_of(spans).unbind(1)
            if not (torch.compiler.is_compiling() or bool((begins < ends).all())):
                raise ValueError(f"{op}: there must be a token in every row, got a row without one.")
            last = None if batch.is_packed else (ends - 1 - begins // batch.width * batch.width)[:, None]
        output = self.model(batch=batch, positions=last, output_hidden_states=output_hidden_states, return_dict=True)
        hidden = output.last_hidden_state.flatten(0, 1)
        logits = at_least_float32(self.score(hidden if last is not None else hidden[ends - 1]))
        loss = None if labels is None else self._class_loss(logits, labels)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states, **{CACHE: batch.cache}
        )


class _TokenClassification(MegalodonPreTrainedModel):
    """Base of the token classifiers: a linear layer reads the features of every token."""

    _model: type[MegalodonModel] | type[MegalodonEncoderModel]

    def __init__(self, config: MegalodonHFConfig) -> None:
        super().__init__(config)
        self.model = self._model(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = Linear(config.model_dim, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **arguments: Any,
    ) -> TokenClassifierOutput:
        """Return class logits (B, L, num_labels) of every token, and the mean cross-entropy.

        Args:
            labels: (B, L) integers, the class of each token. The loss ignores the label -100 and padding.

        Other arguments as in the forward of :class:`MegalodonForCausalLM`, without a cache, or of
        :class:`MegalodonEncoderForSequenceClassification`.
        """
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, input_values=input_values)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        output = self.model(
            **inputs, **arguments, use_cache=False, output_hidden_states=output_hidden_states, return_dict=True
        )
        logits, loss = at_least_float32(self.score(self.dropout(output.last_hidden_state))), None
        if labels is not None:
            check_labels(type(self).__name__, labels, tuple(logits.shape[:2]))
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask == 0, IGNORED)
            loss = self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)


class MegalodonForTokenClassification(_TokenClassification, MegalodonCausalModel):
    """A language model that classifies tokens, each from itself and those before it: `AutoModelForTokenClassification`.

    Example:
        >>> import torch, megalodon_ops.hf as hf
        >>> config = hf.MegalodonHFConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9,
        ...                               id2label={0: "name", 1: "place", 2: "other"})
        >>> hf.MegalodonForTokenClassification(config)(torch.tensor([[1, 2, 3, 4]])).logits.shape
        torch.Size([1, 4, 3])
    """

    _model = MegalodonModel


class MegalodonEncoderForTokenClassification(_TokenClassification, MegalodonEncoderPreTrainedModel):
    """An encoder that classifies tokens, or positions of numbers: `AutoModelForTokenClassification`.

    Example:
        >>> import torch, megalodon_ops.hf as hf
        >>> config = hf.MegalodonEncoderHFConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32,
        ...                                      vocab_size=9, num_labels=3)
        >>> hf.MegalodonEncoderForTokenClassification(config)(torch.tensor([[1, 2, 3, 4]])).logits.shape
        torch.Size([1, 4, 3])
    """

    _model = MegalodonEncoderModel

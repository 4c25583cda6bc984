"""Configurations of the models in transformers: our fields and transformers' in one file."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .. import _C
from ..storage.folder import FORMAT, auto_map, write_module
from ..model.config import CLIENT_NAMES, MegalodonConfig, check_config
from ..model.inputs import check_reads_tokens
from ..model.encoder import MegalodonEncoderConfig
from ..ops.common.checks import short_text


class MegalodonHFConfig(PreTrainedConfig):
    """Configuration of :class:`MegalodonForCausalLM`, with all fields of :class:`megalodon_ops.MegalodonConfig`.

    transformers' names `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `intermediate_size` and
    `tie_word_embeddings` are aliases of `model_dim`, `num_layers`, `num_heads`, `ffn_hidden_dim` and `share_emb`, also in
    `to_dict()` and `config.json`. `max_position_embeddings` is absent unless given, as a text's length is unlimited.

    Args:
        use_cache: default of the argument `use_cache` in calls outside training.
        fields: fields of MegalodonConfig, with its defaults, and of PreTrainedConfig.

    Raises ValueError as MegalodonConfig does, and where a field and its alias differ.

    Example:
        >>> import megalodon_ops as mo, megalodon_ops.hf as hf
        >>> config = hf.MegalodonHFConfig(num_layers=2, model_dim=32, z_dim=16, value_dim=32, vocab_size=9)
        >>> config.hidden_size, config.to_megalodon().model_dim
        (32, 32)
        >>> hf.MegalodonHFConfig.from_megalodon(mo.MegalodonConfig.preset("mega200M")).num_hidden_layers
        12
    """

    model_type = MegalodonConfig.model_type
    _core_config = MegalodonConfig
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {**CLIENT_NAMES, "tie_word_embeddings": "share_emb"}

    def __init__(self, *, use_cache: bool = True, **fields: Any) -> None:
        for name in self.attribute_map.keys() & fields.keys():
            field_name, value = self.attribute_map[name], fields.pop(name)
            if fields.setdefault(field_name, value) != value:
                expected = f"`{name}` must be `{field_name}` = {short_text(fields[field_name])}"
                raise ValueError(f"{type(self).__name__}: {expected}, got {short_text(value)}; give one of them.")
        for field in dataclasses.fields(self._core_config):
            setattr(self, field.name, fields.pop(field.name, field.default))
        self.use_cache = use_cache
        self.format, self.megalodon_ops_version = FORMAT, _C.build_info()["version"]
        super().__init__(eos_token_id=self.eos_token_id, **fields)
        config = self.to_megalodon()
        if config.causal:
            check_reads_tokens(type(self).__name__, config)

    def __eq__(self, other: object) -> bool:
        """Compare all fields; transformers' comparison ignores those of MegalodonConfig."""
        return isinstance(other, MegalodonHFConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # fields are mutable

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, also by transformers' names, and `auto_map`."""
        aliases = {name: getattr(self, name) for name in self.attribute_map}
        return {**super().to_dict(), **aliases, "auto_map": auto_map(self.model_type)}

    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> None:
        """Write `config.json`, and the module that its `auto_map` names."""
        super().save_pretrained(save_directory, **options)
        write_module(Path(save_directory))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing. transformers calls this to copy this file into folders, but the file needs the whole package."""

    @classmethod
    def from_megalodon(cls, config: MegalodonConfig, **others: Any) -> MegalodonHFConfig:
        """Create a configuration with the same fields; `others` are fields of transformers."""
        check_config(cls.__name__, config, cls._core_config)
        return cls(**config.to_dict(), **others)

    def to_megalodon(self) -> MegalodonConfig:
        """Return the fields that determine the model."""
        names = {field.name for field in dataclasses.fields(self._core_config)}
        names -= set() if self._core_config.causal else {"eos_token_id"}  # Trainer sets it from the tokenizer
        return self._core_config(**{name: getattr(self, name) for name in names})


class MegalodonEncoderHFConfig(MegalodonHFConfig):
    """Configuration of an encoder, with all fields of :class:`megalodon_ops.MegalodonEncoderConfig`.

    `num_labels`, or the length of `id2label`, sets a classifier's `num_classes`. `eos_token_id`, which Trainer copies
    from a tokenizer, is stored but unused. Otherwise as :class:`MegalodonHFConfig`, without a cache.

    Example:
        >>> import megalodon_ops.hf as hf
        >>> sizes = dict(num_layers=2, model_dim=32, z_dim=16, value_dim=32)
        >>> hf.MegalodonEncoderHFConfig(**sizes, num_features=1, num_classes=10).num_labels
        10
        >>> hf.MegalodonEncoderHFConfig(**sizes, vocab_size=9, id2label={0: "no", 1: "maybe", 2: "yes"}).num_labels
        3
    """

    model_type = MegalodonEncoderConfig.model_type
    _core_config = MegalodonEncoderConfig
    attribute_map = {name: field for name, field in MegalodonHFConfig.attribute_map.items() if field != "share_emb"}
    tie_word_embeddings = True  # of the masked-token head; unrelated to `share_emb`

    def __init__(self, **fields: Any) -> None:
        if fields.get("num_labels") is None and fields.get("id2label") is None and fields.get("num_classes"):
            fields["num_labels"] = fields["num_classes"]
        super().__init__(**{**fields, "use_cache": False})

    __eq__ = MegalodonHFConfig.__eq__  # transformers would define another one for each class

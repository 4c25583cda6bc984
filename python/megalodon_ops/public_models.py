"""The public models and their state: the networks of `model`, with files and generation."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

from .storage.files import FileError, as_path
from .model.config import MegalodonConfig, check_config
from .model.encoder import MegalodonEncoderBase
from .storage.folder import check_dtype, load_model, save_model
from .inference.generation import generate, stream
from .model.megalodon import MegalodonBase
from .model.model_state import MegalodonStateBase, as_pytree
from .storage.official import read_official
from .storage.state_file import load_state, save_state
from .inference.parameters import empty_model
from .ops.common.checks import as_device


@as_pytree
class MegalodonState(MegalodonStateBase):
    """State that a call of the model passes on to the next call; its size does not depend on the length of the past.

    A state is a frozen dataclass and a pytree of tensors whose first dimension is S, the number of sequences in a
    batch. `state[rows]` selects sequences by an integer, a slice, a list or a 1-D tensor of integers or bools; integers
    may be in arbitrary order and repeat. No method changes the state it is called on, and results of `clone`, `reset`,
    `cat` and `state[rows]` share no memory with it.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(num_layers=2, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> _, state = mo.Megalodon(config)(torch.tensor([[1, 2, 3], [4, 5, 6]]), return_state=True)
        >>> state
        MegalodonState(2 sequences, 2 layers, torch.float32 keys and values on cpu, 1,592,400 bytes)
        >>> len(state.layers), state.norm.count
        (2, tensor([3, 3]))
        >>> state[1].num_sequences, state[[1, 1, 0]].num_sequences, state.reset([0]).norm.count
        (1, 3, tensor([0, 3]))
    """

    def save(self, path: str | os.PathLike, config: MegalodonConfig) -> None:
        """Write the state to one safetensors file, atomically.

        Args:
            path: the file; an existing file is replaced.
            config: the configuration of the state's model; :meth:`load` requires the same one.

        Raises:
            ValueError: the state is of another configuration or has invalid values, such as NaN. OSError: the file
            cannot be written. After an error, an existing file is unchanged.

        Example:
            >>> import tempfile, torch, megalodon_ops as mo
            >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
            >>> _, state = mo.Megalodon(config)(torch.tensor([[1, 2, 3]]), return_state=True)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     state.save(f"{folder}/state.safetensors", config)
            ...     mo.MegalodonState.load(f"{folder}/state.safetensors", config).norm.count
            tensor([3])
        """
        check_config("MegalodonState.save", config)
        save_state(self, Path(path), config)

    @classmethod
    def load(
        cls, path: str | os.PathLike, config: MegalodonConfig, *, device: torch.device | str = "cpu"
    ) -> MegalodonState:
        """Load a state that :meth:`save` wrote for a model of this configuration.

        Raises:
            FileNotFoundError: there is no such file. ValueError: :meth:`save` did not write the file, or wrote it for
            another configuration; or the file is damaged or has invalid values, such as NaN.
        """
        check_config("MegalodonState.load", config)
        return load_state(cls, Path(path), config).to(device)


class Megalodon(MegalodonBase):
    """A MEGALODON language model.

    Parameters have the names of the released checkpoints. In a 16-bit model, the parameters of CEMA, the norms and the
    attention's affine map stay float32, and so do all recurrent states.

    Source: arXiv 2404.08801 and the released code.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(num_layers=2, model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=96,
        ...                             chunk_size=16, vocab_size=256)
        >>> model = mo.Megalodon(config)
        >>> tokens = torch.randint(256, (1, 50))
        >>> model(tokens).shape
        torch.Size([1, 50, 256])
        >>> logits, state = model(tokens[:, :20], return_state=True)
        >>> rest = model(tokens[:, 20:], state=state)
        >>> torch.allclose(rest, model(tokens)[:, 20:], atol=1e-4)
        True
    """

    state_type = MegalodonState

    @classmethod
    def load(
        cls, directory: str | os.PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Megalodon:
        """Load a model from a folder that :meth:`save`, `megalodon-ops train` or transformers wrote.

        On the CPU the weights are memory-mapped: a tensor is read from the disk at its first use and is not copied.
        Changes to the weights are not written to the files. Do not truncate or overwrite the files of a loaded model.
        Replacing the folder by :meth:`save` is safe: the old files stay on the disk as long as the model exists.

        Args:
            directory: holds `config.json` and `model.safetensors`, or shards that `model.safetensors.index.json` names.
            dtype: dtype of the linear layers and the embedding; None: the folder's. The parameters of
                :func:`wide_parameters` stay float32 under a 16-bit dtype.
            device: the device of the parameters.

        Returns:
            the model, in evaluation mode.

        Raises:
            FileNotFoundError: the folder or a file in it is missing. ValueError: a file is damaged, or not what
            :meth:`save` writes, or the model is larger than the machine's memory. The message names the file and the
            fault. No code in a file is run.
        """
        return load_model(cls, directory, dtype=dtype, device=device)

    def save(self, directory: str | os.PathLike, *, tokenizer: Any = None, max_shard_bytes: int = 4 << 30) -> None:
        """Write the model to a folder that :meth:`load` and transformers' `from_pretrained` read.

        Args:
            directory: a new or empty folder, or one with a checkpoint, which is replaced. Files that this method does
                not write are kept, and so is the folder's tokenizer if `tokenizer` is None.
            tokenizer: saved with the model; has a method `save(folder)`, as those of :mod:`megalodon_ops.tokenizers`.
            max_shard_bytes: largest size of a weight file. Larger weights are split into several files with an index.
                No parameter is split, even if it is larger.

        The write is atomic: the folder is written under another name, flushed to the disk and renamed. If the process
        is killed while it replaces a checkpoint, or if several processes save there at once, the folder holds one
        whole checkpoint. A file system that cannot exchange two folders may leave the old one in
        `.<name>.draft-...`.

        Raises:
            ValueError: the model's parameters are not those of its configuration (merge adapters first), or are not
            finite, or the folder has other contents than a checkpoint. OSError: the folder cannot be written; then no
            part of the checkpoint is left.

        Example:
            >>> import tempfile, torch, megalodon_ops as mo
            >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     mo.Megalodon(config).save(f"{folder}/model")
            ...     mo.Megalodon.load(f"{folder}/model", dtype=torch.bfloat16).config == config
            True
        """
        save_model(self, directory, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)

    def _reference(self) -> Megalodon:
        """Return an unmodified model of this configuration on `meta`; :class:`Decoder` compares this model with it."""
        return shared_empty_model(Megalodon, self.config, torch.float32, self.quantization, self.activations)

    stream = stream
    generate = generate


shared_empty_model = functools.lru_cache(maxsize=8)(empty_model)


class MegalodonEncoder(MegalodonEncoderBase):
    """A MEGALODON encoder: every position sees its whole row; the output is the class of a row, or features.

    The blocks are those of :class:`Megalodon` with :func:`sequence_norm`, :func:`bidirectional_cema` and attention to
    the whole chunk. An encoder has no state and does not stream.

    Source: arXiv 2404.08801, section 4.5, and the code in which the paper's encoders were developed. No encoder with
    the final version of the block was released.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonEncoderConfig(num_layers=2, model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=96,
        ...                                    chunk_size=16, num_features=1, num_classes=10)
        >>> encoder, sound = mo.MegalodonEncoder(config), torch.randn(2, 50, 1)
        >>> encoder(sound, lengths=torch.tensor([50, 32])).shape
        torch.Size([2, 10])
        >>> encoder.features(sound).shape
        torch.Size([2, 50, 64])
    """

    @classmethod
    def load(
        cls, directory: str | os.PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> MegalodonEncoder:
        """Load an encoder in evaluation mode from a folder of :meth:`save`, as :meth:`Megalodon.load` does."""
        return load_model(cls, directory, dtype=dtype, device=device)

    def save(self, directory: str | os.PathLike, *, tokenizer: Any = None, max_shard_bytes: int = 4 << 30) -> None:
        """Write the encoder to a folder that :meth:`load` reads, atomically, as :meth:`Megalodon.save` does.

        Example:
            >>> import tempfile, torch, megalodon_ops as mo
            >>> config = mo.MegalodonEncoderConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     mo.MegalodonEncoder(config).save(f"{folder}/encoder")
            ...     mo.MegalodonEncoder.load(f"{folder}/encoder", dtype=torch.bfloat16).config == config
            True
        """
        save_model(self, directory, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)


def load_official(
    directory: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Megalodon:
    """Load a model, in evaluation mode, from a folder that the released code wrote.

    Args:
        directory: holds `config.json` ({"model": {...}}) and `consolidated.pth`, or the shards
            `consolidated.00.pth`, `consolidated.01.pth`, ... of a model-parallel run, which are joined.
        dtype: the dtype of the linear layers and the embedding. Wide parameters stay float32 under a 16-bit dtype.
        device: the device of the parameters.

    Raises:
        FileNotFoundError: the folder or a file in it is missing. ValueError: a file is damaged or not what the released
        code writes, or the model is larger than the machine's memory. The message names the file and the fault.

    Files are unpickled with `weights_only=True`, after a test of their checksums.
    """
    check_dtype("load_official", dtype)
    directory, device = as_path("load_official", "directory", directory), as_device("load_official", device)
    try:
        return read_official(Megalodon, directory, dtype or torch.float32, device)
    except (FileNotFoundError, FileError) as error:
        raise type(error)(f"load_official: {error}") from error

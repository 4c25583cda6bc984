"""A model whose parameters are sharded or replicated by FSDP2: accumulation, generation, saving."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..model.generation import TokenStream
from ..model.model import Megalodon
from ..model.states import MegalodonState
from .fsdp import forget_call, gathered, whole_model
from .model import ParallelMegalodon, become_parallel
from .tensor import TensorMegalodon
from .vote import agree


class ShardedMegalodon(ParallelMegalodon):
    """A :class:`ParallelMegalodon` whose parameters are DTensors, as :func:`parallelize` makes it."""

    _param_dtype: torch.dtype | None

    def forward(self, *args: Any, **options: Any) -> Tensor | tuple[Tensor, MegalodonState]:
        """As :meth:`ParallelMegalodon.forward`. After an error in all ranks, such as one of their arguments, calls go on."""
        try:
            return super().forward(*args, **options)
        except Exception:
            forget_call(self)
            raise

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of backwards inside stay in their ranks; the first backward after it exchanges the sum of all.

        This is for accumulation: all micro-batches but the last run inside. A rank keeps the gradients of all
        parameters, not of its shards, meanwhile.
        """
        self.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.set_requires_gradient_sync(True)

    def stream(self, prompt: Tensor, **options: Any) -> TokenStream:
        """The continuation of this rank's own prompts, as :meth:`megalodon_ops.Megalodon.stream`.

        All parameters are gathered once, when this is called, and are freed with the stream: no rank waits for another
        then, and each may stop at any token. Every rank must call this. On a mesh that splits sequences, the prompt is a
        piece, as for :meth:`ParallelMegalodon.stream`.
        """
        return self._gathered().stream(prompt, **options)

    def generate(self, prompt: Tensor, **options: Any) -> Tensor | tuple[Tensor | MegalodonState, ...]:
        """Continues this rank's own prompts, as :meth:`megalodon_ops.Megalodon.generate`; every rank must call this."""
        return self._gathered().generate(prompt, **options)

    def _gathered(self) -> Megalodon:
        """A model of plain parameters, all of them, which reads sequences that are split over ranks with these ranks."""
        model = gathered(self, self._param_dtype)
        if self._parallel.ranks > 1:
            become_parallel(model, self._parallel.of(model))
        return model

    def save(self, directory: str | os.PathLike, **options: Any) -> None:
        """Writes the whole model as :meth:`megalodon_ops.Megalodon.save` does, by rank 0; the others wait.

        Every rank must call this. Where rank 0 cannot write, every rank raises.
        """
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        values = get_model_state_dict(self, options=whole)
        error = None
        if dist.get_rank() == 0:
            try:
                whole_model(self, values).save(directory, **options)
            except Exception as raised:
                error = raised
        try:
            agree(dist.group.WORLD, {}, None if error is None else str(error), op="save")
        except ValueError:
            if error is not None:
                raise error from None
            raise


class ShardedTensorMegalodon(ShardedMegalodon, TensorMegalodon):
    """A :class:`ShardedMegalodon` whose layers are split over ranks, too."""

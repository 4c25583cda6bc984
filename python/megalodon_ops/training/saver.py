"""Writes the checkpoints of a run: one process at once, several together while the run goes on."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import save_checkpoint
from .parts import optimizer_tensors, random_states
from .record import new_record, write_record
from .run_folder import checkpoint_folder, keep_newest
from ..model.checkpoint import as_path, check_tokenizer, write_config
from ..model.files import one_line, remove_drafts, write_folder_atomically
from ..model.model import Megalodon
from ..model.states import MegalodonState, as_real, complete, named_tensors
from ..model.weights import DISTRIBUTED
from ..ops.memory import is_finite
from ..ops.values import check_integer

if TYPE_CHECKING:
    from .team import Team


class Saver:
    """Writes checkpoints into a run's folder and keeps the newest of them.

    One process writes a folder as :func:`save_checkpoint` does. Several copy what each holds, at once, and write the copies
    in a thread while the run goes on; a folder appears under its name when all is on the disk. At most one is on its way:
    the next :meth:`save` waits for it, and so does :meth:`wait`. All processes call both alike, and where one has failed,
    all raise.

    Example:
        >>> import tempfile, torch, megalodon_ops as mo
        >>> from megalodon_ops.training import Saver, load_checkpoint
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> model = mo.Megalodon(config)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     saver = Saver(run)                              # of several processes: Saver(run, team)
        ...     saver.save(7, model, record={"position": 3})
        ...     saver.wait()
        ...     load_checkpoint(run).step
        7
    """

    def __init__(self, run: str | os.PathLike, team: Team | None = None, *, keep: int = 2):
        self.run = as_path("Saver", "run", run)
        self.keep = check_integer("Saver", "keep", keep, "a positive integer", 1)
        self.team = team if team is not None and team.size > 1 else None
        self._group = None if self.team is None else self.team.new_group()  # of the threads that write
        self._thread = None if self.team is None else ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self,
        step: int,
        model: Megalodon,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        state: MegalodonState | None = None,
        tokenizer: Any = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint; arguments as in :func:`save_checkpoint`, `state` that of this process's own rows.

        Of several processes, what the first gives as `tokenizer` and `record` counts.
        """
        if self.team is None:
            save_checkpoint(
                self.run,
                step,
                model,
                optimizer=optimizer,
                state=state,
                tokenizer=tokenizer,
                record=record,
                keep=self.keep,
            )
            return
        self.wait()
        step = check_integer("save_checkpoint", "step", step, "an integer of at least 0, below 2^63", 0)
        with ExitStack() as stack:
            draft = self.team.tell(self._begin(stack, step, model, tokenizer))
            tensors = self.team.together(self._tensors, model, optimizer, state)
            content = self.team.in_first(new_record, step, optimizer, record)
            self._writing = self._write(stack.pop_all(), draft, tensors, content, step)

    def wait(self) -> None:
        """Returns once no checkpoint is on its way; raises where it could not be written."""
        if self.team is None or self._writing is None:
            return
        writing, self._writing = self._writing, None
        self.team.together(writing.result)

    def close(self) -> None:
        """Waits for a checkpoint on its way, whatever becomes of it; for a process that is about to end."""
        if self._writing is not None:
            self._writing.exception()
        if self._thread is not None:
            self._thread.shutdown()

    def _begin(self, stack: ExitStack, step: int, model: Megalodon, tokenizer: Any) -> Path | None:
        """The draft of the folder, made by the first process with what it alone writes."""

        def begin() -> Path:
            check_tokenizer("save_checkpoint", tokenizer)
            remove_drafts(self.run / "checkpoints", "step-*")
            draft = stack.enter_context(write_folder_atomically(checkpoint_folder(self.run, step)))
            write_config(model.config, model.embed.weight.dtype, draft)
            if tokenizer is not None:
                tokenizer.save(draft)
            return draft

        return self.team.in_first(begin)

    def _tensors(
        self, model: Megalodon, optimizer: torch.optim.Optimizer | None, state: MegalodonState | None
    ) -> dict[str, Tensor]:
        """What this process holds, under `<part>/<name>`."""
        from ..distributed.checkpoint import as_rows, local

        tensors = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
        for name, parameter in tensors.items():
            if not is_finite(local(parameter)):
                raise ValueError(f"save_checkpoint: `{name}` must be finite, got NaN or infinity.")
        if optimizer is not None:
            tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(optimizer, model).items()}
        if state is not None:
            for name, tensor in named_tensors(complete(state)).items():
                tensors[f"state/{name}"] = as_rows(as_real(tensor.detach()), self.team.mesh)
        random = random_states(model)
        return tensors | {f"random/{self.team.reader}/{name}": tensor for name, tensor in random.items()}

    def _write(
        self, stack: ExitStack, draft: Path, tensors: dict[str, Tensor], content: dict[str, Any] | None, step: int
    ) -> Future[None]:
        from torch.distributed.checkpoint import async_save

        from ..distributed.checkpoint import ArchiveWriter

        writer = ArchiveWriter(draft)
        writing = async_save(tensors, storage_writer=writer, process_group=self._group)

        def finish() -> None:
            with stack:
                _done(writing, draft)
                if content is not None:
                    facts = {f"{DISTRIBUTED}/{name}": of_file for name, of_file in sorted(writer.facts.items())}
                    write_record(draft, {**content, "mesh": self.team.sizes()}, facts)
            if content is not None:
                keep_newest(self.run / "checkpoints", checkpoint_folder(self.run, step), self.keep)

        return self._thread.submit(finish)


def _done(writing: Future, folder: Path) -> None:
    """Waits until all processes have written; what torch raises where one could not becomes an OSError."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        writing.result()
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else one_line(cause)
        raise OSError(f"rank {rank}: {reason}") from cause

"""Write the checkpoints of a run: in one process synchronously, in several in the background."""

from __future__ import annotations

import os
import uuid
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .run_checkpoint import checkpoint_folder, keep_newest, local_tensor, remove_old_drafts
from .run_checkpoint import save_checkpoint, training_tensors
from .record import new_record, write_record
from ..storage.folder import DISTRIBUTED, write_config
from ..storage.files import as_path, draft_path, one_line, write_atomically
from ..public_models import Megalodon, MegalodonState
from ..ops.common.memory import is_finite
from ..ops.common.checks import check_integer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Saver:
    """Write checkpoints into a run's folder and keep the newest: `saver.save(step, model, ...)`, `saver.wait()`.

    A single process writes synchronously, as :func:`save_checkpoint` does. Each process of a mesh copies its tensors
    and writes the copies in a thread while training continues; the folder appears under its name when all is on the
    disk. At most one checkpoint is in flight: the next :meth:`save` waits for it, and so does :meth:`wait`. All
    processes must call both methods; if one process cannot write, all raise an OSError that names its rank.

    Example:
        >>> import tempfile
        >>> from megalodon_ops.training import Saver
        >>> saver = Saver(tempfile.mkdtemp(), keep=2)               # in several processes: Saver(run, mesh)
    """

    def __init__(self, run: str | os.PathLike, mesh: DeviceMesh | None = None, *, keep: int = 2) -> None:
        """mesh: spans the default process group."""
        self.run = as_path("Saver", "run", run)
        self.keep = check_integer("Saver", "keep", keep, "a positive integer", 1)
        self.mesh = mesh
        self._writing: tuple[Future, Path, ExitStack] | None = None
        if mesh is not None:
            from ..distributed.mesh import check_mesh  # here: it loads torch.distributed

            check_mesh("Saver", mesh)
            if dist.get_rank() == 0:
                remove_old_drafts(self.run)
            self._group = dist.new_group(backend="gloo")  # for the writing threads
            tokens = [uuid.uuid4().hex[:8]]  # names the draft, in all processes
            dist.broadcast_object_list(tokens, group=self._group)
            (self._token,) = tokens

    def save(
        self,
        step: int,
        model: Megalodon,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        state: MegalodonState | None = None,
        tokenizer: Any = None,
        record: dict[str, Any] | None = None,
        best: bool = False,
    ) -> None:
        """Write a checkpoint; arguments as in :func:`save_checkpoint`. `state` holds this process's own rows.

        In several processes, `tokenizer` and `record` of rank 0 are written.
        """
        if self.mesh is None:
            others = dict(optimizer=optimizer, state=state, tokenizer=tokenizer, record=record, best=best)
            save_checkpoint(self.run, step, model, keep=self.keep, **others)
            return
        from torch.distributed.checkpoint import async_save  # here: it takes long to load

        from ..storage.sharded_tensors import ArchiveWriter

        self.wait()
        content = new_record(step, optimizer, record, self.mesh)
        kinds = {"model": dict(model.named_parameters()), **training_tensors(model, optimizer, state, self.mesh)}
        for name, parameter in kinds["model"].items():
            if not is_finite(local_tensor(parameter)):
                raise ValueError(f"save_checkpoint: `{name}` must be finite, got NaN or infinity.")
        tensors = {f"{kind}/{name}": tensor.detach() for kind in kinds for name, tensor in kinds[kind].items()}
        folder = checkpoint_folder(self.run, step, best)
        draft, draft_ends = draft_path(Path(os.path.realpath(folder)), self._token), ExitStack()

        def begin() -> None:
            draft_ends.enter_context(write_atomically(folder, folder=True, token=self._token))

        def finish() -> None:
            write_config(model.config, model.embed.weight.dtype, draft, tokenizer)
            write_record(draft, content)
            draft_ends.close()
            if not best:
                keep_newest(self.run, folder, self.keep)

        writer = ArchiveWriter(draft / DISTRIBUTED, begin, finish)
        self._writing = async_save(tensors, storage_writer=writer, process_group=self._group), folder, draft_ends

    def wait(self) -> None:
        """Wait until no checkpoint is in flight; raise, in all processes, if it could not be written."""
        if self._writing is None:
            return
        from torch.distributed.checkpoint import CheckpointException

        (writing, folder, draft_ends), self._writing = self._writing, None
        try:
            writing.result()
        except CheckpointException as error:
            with suppress(OSError), draft_ends:  # remove the draft: it may fill the disk
                raise OSError from error
            rank, (cause, _) = next(iter(error.failures.items()))
            reason = (isinstance(cause, OSError) and cause.strerror) or one_line(cause)
            raise OSError(f"{folder}: could not be written: rank {rank}: {reason}") from cause

"""How the processes that a launcher has started find each other."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def start(backend: str, timeout: timedelta | None = None) -> None:
    """Starts the default process group from the environment that `torchrun` sets.

    A torchrun that starts its processes again may keep the store in which they find each other, and with it the addresses
    of processes that are gone; so each start has names of its own in the store.

    Raises what `torch.distributed.init_process_group` raises.
    """
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    store, rank, world_size = next(dist.rendezvous("env://", **options))
    if timeout is not None:
        store.set_timeout(timeout)
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"start-{count}", store), rank=rank, world_size=world_size, **options
    )

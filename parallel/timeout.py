"""Timeouts of process groups."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d


def set_timeout(timeout: timedelta, group: dist.ProcessGroup | None) -> None:
    """Set the timeout of all later collectives of `group` (None: of the world)."""
    # Public from torch 2.14 on; before, the private name alone does it for a group that exists.
    public = getattr(dist, "set_timeout", None)
    (public or distributed_c10d._set_pg_timeout)(timeout, group)

"""How long a group's collectives may take."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d


def set_timeout(timeout: timedelta, group: dist.ProcessGroup | None) -> None:
    """Let every later collective of `group` (None: of the world) fail that takes longer than `timeout`."""
    # Public from torch 2.14 on; before, the private name alone does it for a group that exists.
    public = getattr(dist, "set_timeout", None)
    (public or distributed_c10d._set_pg_timeout)(timeout, group)

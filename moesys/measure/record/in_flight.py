"""Collectives of torch that have started, until their results are waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from moesys.measure.record.cuda_streams import Streams
from moesys.measure.record.purpose import starter
from moesys.parallel import comm
from moesys.parallel.comm import CollectiveRecord, Time, now

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class InFlight:
    """Collectives that were started and not waited for.

    Attributes:
        works: by the `Work` that waits for them; several if they were started as one (`_start_coalescing`).
        batches: collectives of each group's open batch.
        tensors: by the address of the result.
        streams: what the streams of a GPU have waited for; None without one.
    """

    def __init__(self) -> None:
        self.works: WeakKeyDictionary[Any, list[CollectiveRecord]] = WeakKeyDictionary()
        self.batches: dict[str, list[CollectiveRecord]] = {}
        self.tensors: dict[int, CollectiveRecord] = {}
        self.streams: Streams | None = None

    def start(self, kind: str, size: int, begin: Time, group: dist.ProcessGroup, **facts: Any) -> CollectiveRecord:
        """Record a collective that started now."""
        ranks = facts.pop("ranks", None) or tuple(dist.get_process_group_ranks(group))
        by = starter() or ""
        event = CollectiveRecord(kind, size, begin, begin, begin, group=group.group_name, ranks=ranks, by=by, **facts)
        comm.add(event)
        return event

    def arrived(self, events: Sequence[CollectiveRecord], before: Time) -> None:
        """Note that the current thread has waited for the collectives since `before`."""
        for event in events:
            if self.streams is None or isinstance(before, float):
                event.waited, event.end = before, now(CPU)
            else:
                self.streams.arrived(event, before)

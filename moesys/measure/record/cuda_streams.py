"""Finds when the computing stream of a GPU waited for a collective, through whichever other streams.

FSDP2 waits for weights on a stream of its own. This costs the step nothing until the computing stream waits for that
stream. CUDA events carry the dependency: an event recorded on a stream stands for all collectives that the stream has
waited for, and a stream that waits for the event has waited for them too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from moesys.parallel import comm
from moesys.parallel.comm import CollectiveRecord, now

_CUDA = torch.device("cuda")


def _key(stream: Any) -> tuple[int, int]:
    """A key that is the same for all objects of one stream."""
    return stream.device_index, stream.stream_id


class Streams:
    """The collectives that other streams have waited for, and the computing stream has not.

    The computing stream is the current one when this object is made.
    """

    def __init__(self) -> None:
        self._compute = _key(torch.cuda.current_stream())
        self._behind: dict[tuple[int, int], dict[int, CollectiveRecord]] = defaultdict(dict)
        self._marked: WeakKeyDictionary[Any, dict[int, CollectiveRecord]] = WeakKeyDictionary()
        self._open: dict[int, CollectiveRecord] = {}

    def arrived(self, event: CollectiveRecord, before: comm.Time) -> None:
        """Note that the current stream has waited for the collective since `before`."""
        event.waited, event.end = before, now(_CUDA)
        stream = _key(torch.cuda.current_stream())
        if stream != self._compute:
            event.waited = event.end
            self._behind[stream][id(event)] = self._open[id(event)] = event

    def record(self, original: Callable[..., Any], marker: Any, stream: Any = None) -> Any:
        """`torch.cuda.Event.record`: the event now stands for what its stream has waited for."""
        key = _key(torch.cuda.current_stream() if stream is None else stream)
        behind = self._still_open(self._behind[key])
        self._behind[key] = dict(behind)
        if behind:
            self._marked[marker] = behind
        else:
            self._marked.pop(marker, None)
        return original(marker, stream)

    def wait(self, original: Callable[..., Any], marker: Any, stream: Any = None) -> Any:
        """`torch.cuda.Event.wait`: the stream now has waited for what the event stands for."""
        behind = self._still_open(self._marked.get(marker, {}))
        key = _key(torch.cuda.current_stream() if stream is None else stream)
        if not behind or key != self._compute:
            self._behind[key].update(behind)
            return original(marker, stream)
        before = _marker_on(stream)
        done = original(marker, stream)
        after = _marker_on(stream)
        for number, event in behind.items():
            event.waited, event.end = before, after
            del self._open[number]
        return done

    def _still_open(self, behind: dict[int, CollectiveRecord]) -> dict[int, CollectiveRecord]:
        return {number: event for number, event in behind.items() if number in self._open}


def _marker_on(stream: Any) -> torch.cuda.Event:
    """A new event with time, recorded on `stream`, or on the current one."""
    marker = torch.cuda.Event(enable_timing=True)
    marker.record(stream)
    return marker


@contextmanager
def followed(streams: Streams) -> Iterator[None]:
    """A context in which `streams` gets every CUDA event that is recorded or waited for."""
    record, wait = torch.cuda.Event.record, torch.cuda.Event.wait

    def recorded(marker: Any, stream: Any = None) -> Any:
        return streams.record(record, marker, stream)

    def waited(marker: Any, stream: Any = None) -> Any:
        return streams.wait(wait, marker, stream)

    owner: Any = torch.cuda.Event
    owner.record, owner.wait = recorded, waited
    try:
        yield
    finally:
        owner.record, owner.wait = record, wait

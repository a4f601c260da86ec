"""When the computation on a GPU waited for a collective, whichever stream waited for it first.

A collective's result may be waited for on a stream of its own (FSDP2 gathers weights ahead like this). It costs the
step nothing until the stream that computes waits for that stream. So what each stream has waited for is followed
through events: an event that is recorded on a stream stands for all collectives that this stream has behind it, and a
stream that waits for the event has them behind it, too. When that is the computing stream, they were needed then.
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
    """The same for all objects that stand for one stream."""
    return stream.device_index, stream.stream_id


class Streams:
    """Collectives that streams have behind them, and the computing stream does not yet.

    The stream that is current when this is made is the one that computes.
    """

    def __init__(self) -> None:
        self._compute = _key(torch.cuda.current_stream())
        self._behind: dict[tuple[int, int], dict[int, CollectiveRecord]] = defaultdict(dict)
        self._marked: WeakKeyDictionary[Any, dict[int, CollectiveRecord]] = WeakKeyDictionary()
        self._open: dict[int, CollectiveRecord] = {}

    def arrived(self, event: CollectiveRecord, before: comm.Time) -> None:
        """The current stream has waited for the collective since `before`."""
        event.waited, event.end = before, now(_CUDA)
        stream = _key(torch.cuda.current_stream())
        if stream != self._compute:
            event.waited = event.end
            self._behind[stream][id(event)] = self._open[id(event)] = event

    def record(self, original: Callable[..., Any], marker: Any, stream: Any = None) -> Any:
        """`Event.record`: the marker stands for what its stream has behind it now."""
        key = _key(torch.cuda.current_stream() if stream is None else stream)
        behind = self._still_open(self._behind[key])
        self._behind[key] = dict(behind)
        if behind:
            self._marked[marker] = behind
        else:
            self._marked.pop(marker, None)
        return original(marker, stream)

    def wait(self, original: Callable[..., Any], marker: Any, stream: Any = None) -> Any:
        """`Event.wait`: the stream gets behind it what the marker stands for."""
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
    """When `stream`, or the current one, gets here."""
    marker = torch.cuda.Event(enable_timing=True)
    marker.record(stream)
    return marker


@contextmanager
def followed(streams: Streams) -> Iterator[None]:
    """Inside, `streams` sees every event of a GPU that is recorded and waited for."""
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

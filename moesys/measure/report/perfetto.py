"""Writes recorded steps as a trace for Perfetto and chrome://tracing, all ranks in one file."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moesys.files import json_text
from moesys.measure.explain.attribution import attributions
from moesys.measure.explain.intervals import union, without
from moesys.measure.step import CollectiveSpan, RankStep, Step

TRACKS = ("compute", "all-to-all", "other communication")


def write(steps: Sequence[Step], path: Path) -> None:
    """Write the trace as JSON, compressed if the name ends in .gz."""
    text = json_text({"traceEvents": list(events(steps)), "displayTimeUnit": "ms"})
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def events(steps: Sequence[Step]) -> Iterator[dict[str, Any]]:
    """Events of the trace: a process for each rank, with tracks for compute, all-to-all and other communication.

    A collective is drawn from its start to its end; its arguments have the exposed part. Recorded steps follow one
    another
    without gaps.
    """
    for r in steps[0].ranks:
        yield {"ph": "M", "name": "process_name", "pid": r.rank, "args": {"name": f"rank {r.rank} · {r.host}"}}
        for track, name in enumerate(TRACKS):
            yield {"ph": "M", "name": "thread_name", "pid": r.rank, "tid": track, "args": {"name": name}}
    start = 0.0
    for step in steps:
        taken = attributions(step)
        for r in step.ranks:
            shift = start - min(x.begin for x in step.ranks)
            yield _span(f"step {step.number}", r.rank, 0, r.begin + shift, r.end + shift, {})
            for begin, end in _computing(r):
                yield _span("compute", r.rank, 0, begin + shift, end + shift, {})
            for item in taken[r.rank]:
                t = item.span
                causes = {name: seconds * 1e3 for name, seconds in vars(item.causes).items()}
                facts = {"bytes": t.bytes, "exposed ms": sum(causes.values())} | {
                    f"{k} ms": v for k, v in causes.items()
                }
                more = {"group": list(t.ranks), "purpose": t.purpose, "bytes to each": list(t.sent)}
                track = 1 if t.purpose == "expert" else 2
                yield _span(_name(t), r.rank, track, t.begin + shift, t.end + shift, facts | more)
        start += step.seconds


def _computing(r: RankStep) -> list[tuple[float, float]]:
    if r.compute is not None:
        return union(r.compute)
    return without([(r.begin, r.end)], union(i for t in r.collectives for i in t.exposed))


def _name(t: CollectiveSpan) -> str:
    return " ".join(filter(None, (t.layer, t.part, "backward" * t.backward, t.kind, t.level)))


def _span(name: str, rank: int, track: int, begin: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    times = {"ts": begin * 1e6, "dur": max(0.0, end - begin) * 1e6}
    return {"ph": "X", "name": name, "cat": "moesys", "pid": rank, "tid": track, **times, "args": args}

"""The steps of one rank's trace: their marks, their collectives and their compute."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesys.measure.explain.foreign_trace.chrome_json import TraceError, TraceEvent
from moesys.measure.explain.foreign_trace.kernels import (
    DEEP_EP,
    ProcessGroups,
    is_communication,
    kind_of,
    purpose_of,
    size_of,
)
from moesys.measure.step import DEEP_EP as DEEP_EP_KIND
from moesys.measure.step import CollectiveSpan, RankStep

KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a GPU's work."""

STEP = re.compile(r"^ProfilerStep#(\d{1,15})(?!\d)")
"""The profiler's mark of a step."""

WRAPPER = re.compile(r"(c10d|_c10d_functional|record_param_comms)")
"""Operators that only start communication, or wait for it."""

SHORTEST_S = 1e-9
"""Shortest length of a step: shares need a length."""

UNMARKED = 0
"""Number of the step that stands for a whole trace."""


@dataclass(frozen=True)
class RankTrace:
    """The trace of one rank.

    Attributes:
        base: zero of time in nanoseconds; None if unknown.
        all_to_all: kernels without metadata that count as all-to-all.
    """

    path: Path
    rank: int
    host: str
    base: float | None
    groups: ProcessGroups
    events: list[TraceEvent]
    all_to_all: re.Pattern[str] | None = None


def rank_steps(trace: RankTrace, offset: float, given: Sequence[int]) -> Iterator[tuple[int, tuple[RankStep, bool]]]:
    """(number, (step, marked)) of each step. `given`: ranks whose traces compare; empty if clocks do not."""
    kernels = [e for e in trace.events if e.category in KERNELS]
    on_gpu = bool(kernels)
    if not on_gpu:
        kernels = [e for e in trace.events if e.name.startswith("gloo:") or e.category == "cpu_op"]
    if not kernels:
        raise TraceError(f"{trace.path} holds no kernels: record it with ProfilerActivity.CUDA, or CPU for gloo")
    moving = [e for e in kernels if _moves(e, trace)]
    computing = [e for e in kernels if not _moves(e, trace) and not _is_wrapper(e)]
    spans = _annotated(trace.events, kernels, on_gpu)
    for number_, begin, end in spans or [(UNMARKED, min(k.begin for k in kernels), max(k.end for k in kernels))]:
        inside = [e for e in moving if begin <= e.begin < end or (not spans and e.begin == end)]
        collectives = tuple(_spans(inside, trace, offset, given))
        compute = tuple((e.begin + offset, e.end + offset) for e in computing if begin <= e.begin < end)
        last = max([end, begin + SHORTEST_S, *(e.end for e in inside if not on_gpu)])
        step = RankStep(trace.rank, trace.host, begin + offset, last + offset, collectives, compute)
        yield number_, (step, bool(spans))


def _annotated(
    events: Sequence[TraceEvent], kernels: Sequence[TraceEvent], on_gpu: bool
) -> list[tuple[int, float, float]]:
    """(number, begin, end) of each marked step. GPU marks are preferred, if the trace has them."""
    steps = [(int(m.group(1)), e) for e in events if (m := STEP.match(e.name))]
    seen = [(n, e) for n, e in steps if e.category == "gpu_user_annotation"]
    chosen = seen if on_gpu and seen else [(n, e) for n, e in steps if e.category != "gpu_user_annotation"]
    # Every stream has its own mark of a step.
    spans: dict[int, tuple[float, float]] = {}
    for n, e in chosen:
        begin, end = spans.get(n, (e.begin, e.end))
        spans[n] = min(begin, e.begin), max(end, e.end)
    ordered = sorted((begin, end, n) for n, (begin, end) in spans.items())
    if not ordered:
        return []
    # The last kernels of a step run after the next step began on the host, so a step ends where the next begins.
    last = max([ordered[-1][1], *(k.end for k in kernels if k.begin >= ordered[-1][0])])
    ends = [*(begin for begin, _, _ in ordered[1:]), last]
    return [(n, begin, end) for (begin, _, n), end in zip(ordered, ends, strict=True)]


def _spans(
    events: Sequence[TraceEvent], trace: RankTrace, offset: float, given: Sequence[int]
) -> Iterator[CollectiveSpan]:
    """The collectives among `events`, in the order of their begins."""
    numbers: Counter[tuple[object, ...]] = Counter()
    for e in sorted(events, key=lambda e: e.begin):
        kind = kind_of(e.name, e.facts, trace.all_to_all)
        description = trace.groups.descriptions.get(str(e.facts.get("Process Group Name")), "")
        purpose = purpose_of(kind, e.name, e.facts, description)
        deep = bool(DEEP_EP.search(e.name))
        ranks = (trace.groups.members(e.facts, given) if given and not deep else ()) or (trace.rank,)
        key = (purpose, ranks, kind == "send")
        numbers[key] += 1
        begin, end = e.begin + offset, e.end + offset
        part = "dispatch" if "dispatch" in e.name else "combine" if "combine" in e.name else ""
        yield CollectiveSpan(
            DEEP_EP_KIND if deep else kind or "collective", purpose, ranks, numbers[key] - 1, begin, begin, end,
            size_of(kind, e.facts), layer="", part=part, level="flat" if purpose == "expert" else "",
        )  # fmt: skip


def _moves(e: TraceEvent, trace: RankTrace) -> bool:
    """Whether an event is communication, by its name or by the option."""
    named = trace.all_to_all is not None and e.category in KERNELS and trace.all_to_all.search(e.name)
    return bool(named) or is_communication(e.name)


def _is_wrapper(e: TraceEvent) -> bool:
    """Whether an operator only starts communication, or waits for it."""
    return e.category == "cpu_op" and bool(WRAPPER.match(e.name))

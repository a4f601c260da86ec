"""Reads traces of torch's profiler (Kineto, Chrome JSON) of any framework's run as recorded steps.

One file for each rank, gzipped or not. On CPU, gloo's annotations take the place of kernels, and operators that of
computation.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moesys.measure.explain.foreign_trace import chrome_json
from moesys.measure.explain.foreign_trace.chrome_json import TraceError, TraceEvent, count, number
from moesys.measure.explain.foreign_trace.kernels import (
    DEEP_EP,
    ProcessGroups,
    is_communication,
    is_nameless,
    is_unnamed,
    kind_of,
    purpose_of,
    size_of,
)
from moesys.measure.step import DEEP_EP as DEEP_EP_KIND
from moesys.measure.step import CollectiveSpan, RankStep, Step
from moesys.words import plural

KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
STEP = re.compile(r"^ProfilerStep#(\d{1,15})(?!\d)")
WRAPPER = re.compile(r"(c10d|_c10d_functional|record_param_comms)")
"""Operators that only start, or wait for, communication."""

SHORTEST_S = 1e-9
"""Steps are at least as long: what has no length has no shares."""


@dataclass(frozen=True)
class Traces:
    """Steps that all traces have, and what a reader must know of how they were read."""

    steps: list[Step]
    notes: list[str]


@dataclass(frozen=True)
class _RankTrace:
    """One file: its rank, host, zero of time in nanoseconds (None if it does not tell), groups and events.

    `all_to_all`: kernels without metadata that are taken for all-to-all.
    """

    path: Path
    rank: int
    host: str
    base: float | None
    groups: ProcessGroups
    events: list[TraceEvent]
    all_to_all: re.Pattern[str] | None = None


def read(
    paths: Sequence[Path], tell: Callable[[str], object] = lambda text: None, all_to_all: str | None = None
) -> Traces:
    """The steps that all of the traces have, as annotated by the profiler; else one that spans each trace.

    Waits for late ranks are told only where all ranks of a collective are among the traces and their clocks
    can be compared (traces that tell their zero of time).

    Args:
        tell: gets a line for each file that is being read.
        all_to_all: pattern of names of kernels that are all-to-all where no metadata say so; "none": none is.
            None: inferred from the groups that the traces name.

    Raises:
        TraceError: a file cannot be read, holds no kernels, or two are of the same rank.
    """
    notes: list[str] = []
    loaded = sorted((_load(path, i, tell, notes) for i, path in enumerate(paths)), key=lambda t: t.rank)
    ranks = [t.rank for t in loaded]
    if len(set(ranks)) < len(ranks):
        raise TraceError(f"two of the traces are of rank {Counter(ranks).most_common(1)[0][0]}: give one of each rank")
    traces = _with_all_to_all(loaded, all_to_all, notes)
    if len({t.host for t in traces}) > 1:
        notes.append("The traces are of several hosts, whose clocks are taken to agree.")
    comparable = all(t.base is not None for t in traces)
    if len(traces) > 1 and not comparable:
        notes.append(
            "The traces do not tell when they began (baseTimeNanoseconds): waiting for late ranks is not told."
        )
    zero = min((t.base or 0) for t in traces)
    rows = {}
    for t in traces:
        offset = ((t.base or 0) - zero) / 1e9 if comparable else 0.0
        rows[t.rank] = dict(_steps(t, offset, ranks if comparable else ()))
    shared = sorted(set.intersection(*(set(row) for row in rows.values())))
    if not shared:
        raise TraceError("the traces have no step in common: record the same steps on all ranks")
    found = [_joined(number, [rows[rank][number] for rank in ranks]) for number in shared]
    if unequal := [step.number for step, equal in found if not equal]:
        where = "" if unequal == [UNMARKED] else f" in {plural(len(unequal), 'step')}"
        notes.append(f"Traces have unequal numbers of collectives{where}: waiting in them is not told.")
    return Traces([step for step, _ in found], notes)


def _load(path: Path, place: int, tell: Callable[[str], object], notes: list[str]) -> _RankTrace:
    tell(f"reading {path} …")
    document = chrome_json.read(path)
    if document.damage:
        notes.append(f"{path.name}: {document.damage}.")
    about = document.about
    told = about.get("distributedInfo")
    info = told if isinstance(told, dict) else {}
    named = re.search(r"rank[-_]?(\d{1,9})", path.name)
    rank = count(info.get("rank"))
    if rank is None or rank >= 2**31:
        rank = int(named.group(1)) if named else place
    host = next((str(about[key]) for key in ("hostname", "host_name") if isinstance(about.get(key), str)), "")
    base = number(about.get("baseTimeNanoseconds"))
    return _RankTrace(path, rank, host, base, ProcessGroups.of(info, rank), document.events)


def _with_all_to_all(traces: Sequence[_RankTrace], asked: str | None, notes: list[str]) -> list[_RankTrace]:
    """The traces with what is taken for all-to-all where no metadata tell; says so in `notes`."""
    unnamed = sum(is_unnamed(e.name, e.facts) for t in traces for e in t.events)
    if asked is not None:
        if asked == "none":
            return list(traces)
        try:
            pattern = re.compile(asked)
        except re.error as error:
            raise TraceError(f"--all-to-all-kernels {asked}: {error}\n    remedy: give a regular expression") from None
        return [replace(t, all_to_all=pattern) for t in traces]
    names = [e.name for t in traces for e in t.events if e.category in KERNELS and is_nameless(e.name, e.facts)]
    if names:
        notes.append(
            f"Taken for data parallelism's, since nothing tells their collective: {plural(len(names), 'kernel')} "
            f"as {names[0][:60]}; --all-to-all-kernels REGEX says which are all-to-all."
        )
    if not unnamed:
        return list(traces)
    kernels = f"{plural(unnamed, 'kernel')} named SendRecv, without metadata"
    decides = "--all-to-all-kernels REGEX, or none, decides otherwise"
    if piped := next(filter(None, (t.groups.piped() for t in traces)), ""):
        notes.append(f"Taken for messages, since there is a pipeline's group ({piped}): {kernels}; {decides}.")
        return list(traces)
    notes.append(f"Taken for all-to-all, since no group is named as a pipeline's: {kernels}; {decides}.")
    return [replace(t, all_to_all=re.compile(r"(?i)send_?recv")) for t in traces]


UNMARKED = 0
"""Number of the step that spans a trace which marks none."""


def _steps(trace: _RankTrace, offset: float, given: Sequence[int]) -> Iterator[tuple[int, tuple[RankStep, bool]]]:
    """Number, and a step with whether the trace marks it; `given`: ranks whose traces can be compared, or none."""
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
    """Number, begin and end of each step, none if none is marked; on a GPU as it sees them, where the trace tells."""
    steps = [(int(m.group(1)), e) for e in events if (m := STEP.match(e.name))]
    seen = [(n, e) for n, e in steps if e.category == "gpu_user_annotation"]
    chosen = seen if on_gpu and seen else [(n, e) for n, e in steps if e.category != "gpu_user_annotation"]
    # A step is marked on every stream.
    spans: dict[int, tuple[float, float]] = {}
    for n, e in chosen:
        begin, end = spans.get(n, (e.begin, e.end))
        spans[n] = min(begin, e.begin), max(end, e.end)
    ordered = sorted((begin, end, n) for n, (begin, end) in spans.items())
    if not ordered:
        return []
    # The last kernels of a step run when the next one has begun on the host: a step ends where the next begins.
    last = max([ordered[-1][1], *(k.end for k in kernels if k.begin >= ordered[-1][0])])
    ends = [*(begin for begin, _, _ in ordered[1:]), last]
    return [(n, begin, end) for (begin, _, n), end in zip(ordered, ends, strict=True)]


def _spans(
    events: Sequence[TraceEvent], trace: _RankTrace, offset: float, given: Sequence[int]
) -> Iterator[CollectiveSpan]:
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


def _moves(e: TraceEvent, trace: _RankTrace) -> bool:
    """Whether it is communication, by its name or because the user says so."""
    named = trace.all_to_all is not None and e.category in KERNELS and trace.all_to_all.search(e.name)
    return bool(named) or is_communication(e.name)


def _is_wrapper(e: TraceEvent) -> bool:
    return e.category == "cpu_op" and bool(WRAPPER.match(e.name))


def _joined(number_: int, parts: Sequence[tuple[RankStep, bool]]) -> tuple[Step, bool]:
    """The step of all ranks, its times from the first begin, and whether ranks of a group made as many collectives.

    Where they did not, some are missing, and nobody knows which belong together.
    """
    start = min(r.begin for r, _ in parts)
    made: dict[_Key, Counter[int]] = defaultdict(Counter)
    for r, _ in parts:
        for t in r.collectives:
            made[_group(t)][r.rank] += 1
    present = {r.rank for r, _ in parts}
    unequal = {
        key for key, by_rank in made.items() if len({by_rank.get(rank, 0) for rank in key[0] if rank in present}) > 1
    }
    ranks = tuple(_shifted(r, start, unequal) for r, _ in parts)
    return Step(number_, ranks, marked=all(marked for _, marked in parts)), not unequal


_Key = tuple[tuple[int, ...], str, bool]
"""What collectives are counted by: ranks, purpose, and whether it is a message."""


def _group(t: CollectiveSpan) -> _Key:
    return t.ranks, t.purpose, t.kind == "send"


def _shifted(r: RankStep, start: float, unequal: Collection[_Key]) -> RankStep:
    """The step with its times from `start`, and collectives of `unequal` groups without their group."""
    collectives = tuple(
        replace(
            t, begin=t.begin - start, waited=t.waited - start, end=t.end - start,
            ranks=(r.rank,) if _group(t) in unequal else t.ranks,
        )
        for t in r.collectives
    )  # fmt: skip
    compute = None if r.compute is None else tuple((a - start, b - start) for a, b in r.compute)
    return RankStep(r.rank, r.host, r.begin - start, r.end - start, collectives, compute)

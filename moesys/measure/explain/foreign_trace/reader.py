"""Reads traces of torch's profiler (Kineto, Chrome JSON) from any framework's run as recorded steps.

Each rank has one file, gzipped or not. On CPU, annotations of gloo stand for communication kernels, and operators for
compute kernels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moesys.measure.explain.foreign_trace import chrome_json
from moesys.measure.explain.foreign_trace.chrome_json import TraceError, count, number
from moesys.measure.explain.foreign_trace.joined_steps import joined
from moesys.measure.explain.foreign_trace.kernels import ProcessGroups, is_nameless, is_unnamed
from moesys.measure.explain.foreign_trace.rank_steps import KERNELS, UNMARKED, RankTrace, rank_steps
from moesys.measure.step import Step
from moesys.words import plural


@dataclass(frozen=True)
class Traces:
    """The steps that all traces have, and notes for the reader."""

    steps: list[Step]
    notes: list[str]


def read(
    paths: Sequence[Path], tell: Callable[[str], object] = lambda text: None, all_to_all: str | None = None
) -> Traces:
    """The steps that all traces have, as the profiler marked them; one step for each whole trace without marks.

    A wait for a late rank is known if all ranks of the collective are among the traces, and the traces' clocks compare
    (`baseTimeNanoseconds`).

    Args:
        tell: called with a line for each file.
        all_to_all: pattern of kernel names that are all-to-all without metadata; "none" for no such kernels. None:
            inferred
            from the groups in the traces.

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
        notes.append("The traces do not say when they began (baseTimeNanoseconds): waiting for late ranks is unknown.")
    zero = min((t.base or 0) for t in traces)
    rows = {}
    for t in traces:
        offset = ((t.base or 0) - zero) / 1e9 if comparable else 0.0
        rows[t.rank] = dict(rank_steps(t, offset, ranks if comparable else ()))
    shared = sorted(set.intersection(*(set(row) for row in rows.values())))
    if not shared:
        raise TraceError("the traces have no step in common: record the same steps on all ranks")
    found = [joined(number, [rows[rank][number] for rank in ranks]) for number in shared]
    if unequal := [step.number for step, equal in found if not equal]:
        where = "" if unequal == [UNMARKED] else f" in {plural(len(unequal), 'step')}"
        notes.append(f"Traces have unequal numbers of collectives{where}: waiting in them is unknown.")
    return Traces([step for step, _ in found], notes)


def _load(path: Path, place: int, tell: Callable[[str], object], notes: list[str]) -> RankTrace:
    tell(f"reading {path} …")
    document = chrome_json.read(path)
    if document.damage:
        notes.append(f"{path.name}: {document.damage}.")
    about = document.about
    given = about.get("distributedInfo")
    info = given if isinstance(given, dict) else {}
    named = re.search(r"rank[-_]?(\d{1,9})", path.name)
    rank = count(info.get("rank"))
    if rank is None or rank >= 2**31:
        rank = int(named.group(1)) if named else place
    host = next((str(about[key]) for key in ("hostname", "host_name") if isinstance(about.get(key), str)), "")
    base = number(about.get("baseTimeNanoseconds"))
    return RankTrace(path, rank, host, base, ProcessGroups.of(info, rank), document.events)


def _with_all_to_all(traces: Sequence[RankTrace], asked: str | None, notes: list[str]) -> list[RankTrace]:
    """The traces with a decision on kernels without metadata; `notes` gets its reason."""
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
            f"Counted as data parallelism, since their collective is unknown: {plural(len(names), 'kernel')} "
            f"as {names[0][:60]}; --all-to-all-kernels REGEX says which are all-to-all."
        )
    if not unnamed:
        return list(traces)
    kernels = f"{plural(unnamed, 'kernel')} named SendRecv, without metadata"
    decides = "--all-to-all-kernels REGEX, or none, decides otherwise"
    if piped := next(filter(None, (t.groups.piped() for t in traces)), ""):
        notes.append(f"Counted as messages, since there is a pipeline group ({piped}): {kernels}; {decides}.")
        return list(traces)
    notes.append(f"Counted as all-to-all, since no group is named a pipeline's: {kernels}; {decides}.")
    return [replace(t, all_to_all=re.compile(r"(?i)send_?recv")) for t in traces]

"""Reads traces of torch's profiler (Kineto, Chrome JSON) of any framework's run as recorded steps.

One file for each rank, gzipped or not. Communication is told by kernels' names (NCCL, RCCL, DeepEP) and by
NCCL's metadata where torch wrote it; what it is for by the collective, and by the name of its group. On CPU,
gloo's annotations take the place of kernels, and operators that of computation.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesys.errors import MoesysError
from moesys.measure.step import Purpose, RankStep, Step, Travel

KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
COMMUNICATION = re.compile(r"^(nccl|rccl|mscclpp|ncclDev)|ncclKernel|ncclDevKernel|mscclKernel", re.IGNORECASE)
DEEP_EP = re.compile(
    r"deep_ep|(intranode|internode(_ll)?|low_latency|hybrid)[:_]*.*(dispatch|combine|notify)", re.IGNORECASE
)
STEP = re.compile(r"^ProfilerStep#(\d+)")
KINDS = (
    ("all_to_all", re.compile(r"all_?to_?all", re.IGNORECASE)),
    ("all_gather", re.compile(r"all_?gather", re.IGNORECASE)),
    ("reduce_scatter", re.compile(r"reduce_?scatter", re.IGNORECASE)),
    ("all_reduce", re.compile(r"all_?reduce", re.IGNORECASE)),
    ("broadcast", re.compile(r"broadcast", re.IGNORECASE)),
    ("send", re.compile(r"send|recv", re.IGNORECASE)),
)
GROUPS: tuple[tuple[Purpose, re.Pattern[str]], ...] = (
    ("data", re.compile(r"(^|[^a-z])(e?dp|expert_dp|fsdp|data|hsdp|shard|replicate)", re.IGNORECASE)),
    ("expert", re.compile(r"(^|[^a-z])(ep|moe|expert)", re.IGNORECASE)),
    ("tensor", re.compile(r"(^|[^a-z])(e?tp|tensor|model_parallel|sp)($|[^a-z])", re.IGNORECASE)),
    ("context", re.compile(r"(^|[^a-z])(cp|context|ring)", re.IGNORECASE)),
    ("pipeline", re.compile(r"(^|[^a-z])(pp|pipe)", re.IGNORECASE)),
)


class TraceError(MoesysError):
    """A file is no trace that tells of communication."""

    exit_code = 2


@dataclass(frozen=True)
class _Trace:
    """One file: its rank, host, zero of time in nanoseconds (None if it does not tell), and complete events."""

    path: Path
    rank: int
    world: int
    host: str
    base: int | None
    events: list[dict[str, Any]]


def read(paths: Sequence[Path], tell: Callable[[str], object] = lambda text: None) -> list[Step]:
    """The steps that all of the traces have, as annotated by the profiler; else one that spans each trace.

    Waits for late ranks are told only where all ranks of a collective are among the traces and their clocks
    can be compared (traces that tell their zero of time).

    Raises:
        TraceError: a file cannot be read, holds no kernels, or two are of the same rank.
    """
    traces = sorted((_load(path, i, tell) for i, path in enumerate(paths)), key=lambda t: t.rank)
    ranks = [t.rank for t in traces]
    if len(set(ranks)) < len(ranks):
        raise TraceError(f"two of the traces are of rank {Counter(ranks).most_common(1)[0][0]}: give one of each rank")
    comparable = all(t.base is not None for t in traces)
    if len(traces) > 1 and not comparable:
        tell("the traces do not tell when they began (baseTimeNanoseconds): waiting for late ranks is not told")
    zero = min((t.base or 0) for t in traces)
    rows = {
        t.rank: dict(_steps(t, ((t.base or 0) - zero) / 1e9 if comparable else 0.0, len(traces) == 1 or not comparable))
        for t in traces
    }
    shared = sorted(set.intersection(*(set(row) for row in rows.values())))
    if not shared:
        raise TraceError("the traces have no step in common: record the same steps on all ranks")
    found = []
    for number in shared:
        start = min(rows[rank][number].begin for rank in ranks)
        found.append(Step(number, tuple(_shifted(rows[rank][number], start) for rank in ranks)))
    return found


def _load(path: Path, place: int, tell: Callable[[str], object]) -> _Trace:
    tell(f"reading {path} …")
    try:
        raw = path.read_bytes()
        value = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    except (ValueError, EOFError, gzip.BadGzipFile):
        raise TraceError(f"{path} is no JSON trace, or was cut short") from None
    events = value if isinstance(value, list) else value.get("traceEvents", [])
    about = {} if isinstance(value, list) else value
    info = about.get("distributedInfo") or {}
    complete = [e for e in events if isinstance(e, dict) and e.get("ph") == "X" and "ts" in e]
    named = re.search(r"rank[-_]?(\d+)", path.name)
    rank = info.get("rank", int(named.group(1)) if named else place)
    host = str(about.get("hostname") or about.get("host_name") or "")
    base = about.get("baseTimeNanoseconds")
    return _Trace(path, int(rank), int(info.get("world_size", 0)), host, base, complete)


def _steps(trace: _Trace, offset: float, alone: bool) -> Iterator[tuple[int, RankStep]]:
    """Number and step; `alone`: its travels cannot be compared with other ranks'."""
    kernels = [e for e in trace.events if e.get("cat", "").lower() in KERNELS]
    on_gpu = bool(kernels)
    if not on_gpu:
        kernels = [e for e in trace.events if _is_gloo(e) or e.get("cat") == "cpu_op"]
    if not kernels:
        raise TraceError(f"{trace.path} holds no kernels: record it with ProfilerActivity.CUDA, or CPU for gloo")
    moving = [e for e in kernels if is_communication(e)]
    computing = [e for e in kernels if not is_communication(e) and not _is_wrapper(e)]
    spans = _annotated(trace.events, kernels, on_gpu)
    for number, begin, end in spans:
        travels = _travels([e for e in moving if begin <= _begin(e) < end], trace.rank, offset, alone)
        compute = tuple((_begin(e) + offset, _end(e) + offset) for e in computing if begin <= _begin(e) < end)
        last = max([end, *(_end(e) for e in moving if begin <= _begin(e) < end)]) if not on_gpu else end
        yield number, RankStep(trace.rank, trace.host, begin + offset, last + offset, tuple(travels), compute)


def _annotated(
    events: list[dict[str, Any]], kernels: list[dict[str, Any]], on_gpu: bool
) -> list[tuple[int, float, float]]:
    """Number, begin and end of each step; on a GPU as it sees them, where the trace tells."""
    steps = [(int(m.group(1)), e) for e in events if (m := STEP.match(str(e.get("name", ""))))]
    seen = [(n, e) for n, e in steps if e.get("cat") == "gpu_user_annotation"]
    chosen = seen if on_gpu and seen else [(n, e) for n, e in steps if e.get("cat") != "gpu_user_annotation"]
    if not chosen:
        return [(0, min(map(_begin, kernels)), max(map(_end, kernels)) + 1e-9)]
    ordered = sorted((_begin(e), _end(e), n) for n, e in chosen)
    # The last kernels of a step run when the next one has begun on the host: a step ends where the next begins.
    ends = [b for b, _, _ in ordered[1:]] + [
        max(ordered[-1][1], *(_end(k) for k in kernels if _begin(k) >= ordered[-1][0]), 0.0)
    ]
    return [(n, begin, end) for (begin, _, n), end in zip(ordered, ends, strict=True)]


def _travels(events: list[dict[str, Any]], rank: int, offset: float, alone: bool) -> Iterator[Travel]:
    numbers: Counter[tuple[Any, ...]] = Counter()
    for e in sorted(events, key=_begin):
        facts, name = e.get("args", {}), str(e.get("name", ""))
        kind = kind_of(name, facts)
        ranks = (rank,) if alone else _ranks(facts) or (rank,)
        purpose = purpose_of(kind, name, facts)
        key = (purpose, ranks, kind == "send")
        numbers[key] += 1
        begin, end = _begin(e) + offset, _end(e) + offset
        size = int(facts.get("In msg nelems", 0) or 0) * _width(facts)
        part = "dispatch" if "dispatch" in name else "combine" if "combine" in name else ""
        yield Travel(
            "all_to_all" if kind == "" else kind, purpose, ranks, numbers[key] - 1, begin, begin, end, size,
            layer="", part=part, level="flat" if purpose == "expert" else "",
        )  # fmt: skip


def is_communication(e: dict[str, Any]) -> bool:
    """Whether an event is the transfer of a collective or a message."""
    name = str(e.get("name", ""))
    return bool(_is_gloo(e) or COMMUNICATION.search(name) or DEEP_EP.search(name))


def kind_of(name: str, facts: dict[str, Any]) -> str:
    """The collective: as NCCL's metadata tells, else as the name does; "" if neither does."""
    for text in (str(facts.get("Collective name", "")), name):
        for kind, pattern in KINDS:
            if pattern.search(text):
                return kind
    return ""


def purpose_of(kind: str, name: str, facts: dict[str, Any]) -> Purpose:
    """What a collective is for: what its group is called, else what such collectives mostly are for."""
    if DEEP_EP.search(name):
        return "expert"
    group = " ".join(str(facts.get(key, "")) for key in ("Process Group Description", "Process Group Name"))
    for purpose, pattern in GROUPS:
        if pattern.search(group):
            return purpose
    return "expert" if kind == "all_to_all" else "pipeline" if kind == "send" else "data"


def _is_gloo(e: dict[str, Any]) -> bool:
    return str(e.get("name", "")).startswith("gloo:")


def _is_wrapper(e: dict[str, Any]) -> bool:
    """An operator that only starts, or waits for, communication."""
    return e.get("cat") == "cpu_op" and bool(
        re.match(r"(c10d|_c10d_functional|record_param_comms)", str(e.get("name")))
    )


def _ranks(facts: dict[str, Any]) -> tuple[int, ...]:
    """The ranks of the group; empty if they are not told, or were cut short."""
    told = facts.get("Process Group Ranks")
    try:
        ranks = json.loads(told) if isinstance(told, str) else told
        return tuple(int(r) for r in ranks) if ranks else ()
    except (ValueError, TypeError):
        return ()


WIDTHS = {"float": 4, "float32": 4, "bfloat16": 2, "half": 2, "float16": 2, "double": 8, "long": 8, "int": 4, "byte": 1}


def _width(facts: dict[str, Any]) -> int:
    return WIDTHS.get(str(facts.get("dtype", "")).lower(), 1)


def _begin(e: dict[str, Any]) -> float:
    return float(e["ts"]) / 1e6


def _end(e: dict[str, Any]) -> float:
    return (float(e["ts"]) + float(e.get("dur", 0.0))) / 1e6


def _shifted(r: RankStep, start: float) -> RankStep:
    """The step with its times from `start`."""
    travels = tuple(
        Travel(**{**vars(t), "begin": t.begin - start, "waited": t.waited - start, "end": t.end - start})
        for t in r.travels
    )
    compute = None if r.compute is None else tuple((a - start, b - start) for a, b in r.compute)
    return RankStep(r.rank, r.host, r.begin - start, r.end - start, travels, compute)

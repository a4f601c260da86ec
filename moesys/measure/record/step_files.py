"""The files of recorded steps in a run's folder: summaries of all ranks, and collectives of single ranks.

    measure/summary.jsonl      summaries: one JSON object a line, written by rank 0
    measure/rank-00003.npy     one rank's collectives: three numpy arrays for each step, one after another
    measure/steps.jsonl        all ranks' collectives, as older versions wrote them

Every rank writes its own file, and none reads another's while the run goes on. With more than `DETAILED` ranks, a
sample of as many ranks writes one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from moesys.files import json_objects, json_text, write_whole
from moesys.measure.explain.step_selection import RecordedStep
from moesys.measure.explain.step_summary import DETAILED, Summary
from moesys.measure.step import RankStep, Step, checked, from_nan, step_of, to_nan

NAMES = ("kind", "purpose", "layer", "part", "level")
"""Fields of a collective that are words. Files store their index in a list of words."""

RECORD = np.dtype([
    *((name, "u2") for name in NAMES), ("group", "u4"), ("number", "u4"), ("backward", "?"),
    ("begin", "f8"), ("waited", "f8"), ("end", "f8"), ("met", "f8"), ("bytes", "i8"), ("parts", "u4"),
    ("arrived", "f8"), ("last", "u4"), ("whole", "?"), ("computed", "f8"), ("last_bytes", "i8"), ("evenness", "f8"),
    ("least", "f8"),
])  # fmt: skip
"""A collective and its group arrival; NaN stands for None. `parts`: its number of values in the array of `sent`."""


def folder_of(run_dir: Path) -> Path:
    """The folder of a run's records."""
    return run_dir / "measure"


def steps_file(run_dir: Path) -> Path:
    """The file in which older versions kept recorded steps."""
    return folder_of(run_dir) / "steps.jsonl"


def summary_file(run_dir: Path) -> Path:
    """The file of a run's summaries."""
    return folder_of(run_dir) / "summary.jsonl"


def rank_file(run_dir: Path, rank: int) -> Path:
    """The file of a rank's collectives."""
    return folder_of(run_dir) / f"rank-{rank:05d}.npy"


def sample(world: int) -> list[int]:
    """The ranks that keep their collectives: all, or `DETAILED` of them, one from each run of neighbours.

    The place in the run of neighbours varies, so that the sample has every place in a node and in groups of neighbours.
    """
    if world <= DETAILED:
        return list(range(world))
    edges = [i * world // DETAILED for i in range(DETAILED + 1)]
    golden = 0.6180339887498949
    return [a + int((i * golden % 1) * (b - a)) for i, (a, b) in enumerate(pairwise(edges))]


def append(path: Path, number: int, r: RankStep, layout: str, audit: bool) -> None:
    """Add a rank's step, with its group arrivals, to the rank's file."""
    names: dict[str, int] = {}
    groups: dict[tuple[int, ...], int] = {}
    assert r.arrivals is not None
    rows = []
    for t, m in zip(r.collectives, r.arrivals, strict=True):
        words = (names.setdefault(getattr(t, name), len(names)) for name in NAMES)
        group = groups.setdefault(t.ranks, len(groups))
        times = t.begin, t.waited, t.end, to_nan(t.met)
        arrival = m.arrived, m.last, m.whole, to_nan(m.computed), m.bytes, m.evenness, to_nan(m.least)
        rows.append((*words, group, t.number, t.backward, *times, t.bytes, len(t.sent), *arrival))
    head = {
        "step": number, "rank": r.rank, "host": r.host, "begin": r.begin, "end": r.end, "layout": layout,
        "audit": audit, "names": list(names), "groups": list(groups),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        np.save(file, np.frombuffer(json_text(head, compact=True).encode(), dtype=np.uint8))
        np.save(file, np.array(rows, dtype=RECORD))
        np.save(file, np.array([size for t in r.collectives for size in t.sent], dtype=np.int64))


def forget_after(run_dir: Path, step: int, rank: int, world: int) -> None:
    """Remove the records of steps after `step`. A run that ended after its last checkpoint left them.

    Each rank cuts its own file. Rank 0 also cuts the files of all ranks, and of ranks that do not record now.
    """
    mine = {rank_file(run_dir, rank)}
    if rank == 0:
        folder_of(run_dir).mkdir(parents=True, exist_ok=True)
        for path, key in ((steps_file(run_dir), "number"), (summary_file(run_dir), "number")):
            kept = [value for value in json_objects(path) if isinstance(n := value.get(key), int) and n <= step]
            if path.exists():
                write_whole(path, "".join(json_text(value, compact=True) + "\n" for value in kept))
        others = {rank_file(run_dir, other) for other in sample(world)}
        mine |= set(folder_of(run_dir).glob("rank-*.npy")) - others
    for path in mine:
        if path.exists():
            _cut(path, step)


def _cut(path: Path, step: int) -> None:
    with path.open("r+b") as file:
        end = 0
        for head, _, _ in _frames(file):
            if head["step"] > step:
                break
            end = file.tell()
        file.truncate(end)


def _frames(file: BinaryIO) -> Iterator[tuple[dict[str, Any], NDArray[Any], NDArray[Any]]]:
    """Head, collectives and sent bytes of each step. Ends where the file is damaged or cut short."""
    with suppress(Exception):  # numpy's header parser raises SyntaxError, tokenize.TokenError, MemoryError, …
        while True:
            head, collectives, sent = (np.load(file, allow_pickle=False) for _ in range(3))
            value = json.loads(head.tobytes())
            if not isinstance(value["step"], int) or collectives.dtype != RECORD or sent.dtype != np.int64:
                return
            yield value, collectives, sent


@cache
def _schema() -> TypeAdapter[RankStep]:
    return TypeAdapter(RankStep)


def _rank_step(head: dict[str, Any], collectives: NDArray[Any], sent: NDArray[Any]) -> RankStep:
    """The inverse of `append`. Raises ValueError and others if the arrays contradict each other."""
    made, met = [], []
    at, names = 0, head["names"]
    for row in collectives:
        one = dict(zip(RECORD.names or (), row.item(), strict=True))
        parts = sent[at : at + one["parts"]].tolist()
        at += one["parts"]
        words = {name: names[one[name]] for name in NAMES}
        plain = {key: one[key] for key in ("number", "backward", "begin", "waited", "end", "bytes")}
        group = head["groups"][one["group"]]
        made.append({**words, **plain, "ranks": group, "met": from_nan(one["met"]), "sent": parts})
        met.append({
            **{key: one[key] for key in ("arrived", "last", "whole", "evenness")}, "bytes": one["last_bytes"],
            "computed": from_nan(one["computed"]), "least": from_nan(one["least"]),
        })  # fmt: skip
    facts = {key: head[key] for key in ("rank", "host", "begin", "end")}
    return _schema().validate_python({**facts, "collectives": made, "arrivals": met})


def read_steps(run_dir: Path) -> list[Step]:
    """The recorded steps of a run, with the ranks that kept their collectives. Damaged records are left out."""
    found = _old(run_dir)
    ranks: dict[int, dict[int, RankStep]] = defaultdict(dict)
    heads: dict[int, dict[str, Any]] = {}
    for path in sorted(folder_of(run_dir).glob("rank-*.npy")):
        with path.open("rb") as file:
            for head, collectives, sent in _frames(file):
                with suppress(ValidationError, ValueError, KeyError, TypeError, IndexError):
                    r = _rank_step(head, collectives, sent)
                    ranks[head["step"]][r.rank] = r
                    heads[head["step"]] = head
    loads = {s.number: s.load for s in summaries(run_dir)}
    for number, by_rank in sorted(ranks.items()):
        with suppress(ValueError):
            mine = tuple(by_rank[rank] for rank in sorted(by_rank))
            step = Step(number, mine, loads.get(number, {}))
            head = heads[number]
            found.append(checked(replace(step, audit=bool(head.get("audit")), layout=str(head.get("layout", "")))))
    return found


def _old(run_dir: Path) -> list[Step]:
    found = []
    for value in json_objects(steps_file(run_dir)):
        with suppress(ValueError):
            found.append(step_of(value))
    return found


def summaries(run_dir: Path) -> list[Summary]:
    """The summaries that a run wrote. Damaged lines are left out."""
    found = []
    for value in json_objects(summary_file(run_dir)):
        with suppress(ValueError):
            found.append(Summary.of_json(value))
    return found


def recorded(run_dir: Path) -> Sequence[RecordedStep]:
    """All recorded steps of a run, in order: those of older versions, then summaries."""
    return [*_old(run_dir), *summaries(run_dir)]

"""A recorded training step: what each rank sent and waited for, on one clock.

Written one JSON object a line to runs/NAME/measure/steps.jsonl, and read back from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from moesys.files import json_text

Purpose = Literal["expert", "data", "tensor", "context", "pipeline", "step"]
"""What a collective is for: a dimension of parallelism, or what all ranks of a step share."""

PURPOSES: tuple[Purpose, ...] = ("expert", "data", "tensor", "context", "pipeline", "step")


@dataclass(frozen=True)
class Travel:
    """One collective, or one message, of one rank. Times are seconds since the step began on rank 0.

    Attributes:
        kind: "all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send", "recv", ….
        purpose: the dimension of parallelism that it serves.
        ranks: its group, in group order; of a message the sender and the receiver.
        number: it is the number-th of its group in the step, from 0: the same on all its ranks.
        begin, waited, end: when it was started, when its result was needed, and when that was there.
            Between `begin` and `waited` this rank did something else; from `waited` to `end` nothing.
        bytes: what this rank contributes, its own part included.
        sent: how many of them go to each of `ranks`, where that is known.
        layer: the MoE layer ("layers.3") that it belongs to, or "".
        part: "dispatch" to the experts (counts, rows, weights), "combine" back from them, or "".
        backward: whether gradients travel.
        level: "flat", "inter" nodes or "intra" a node for rows to experts and back; else "".
        met: in an audit, when all ranks had arrived, before anything travelled.
    """

    kind: str
    purpose: Purpose
    ranks: tuple[int, ...]
    number: int
    begin: float
    waited: float
    end: float
    bytes: int
    sent: tuple[int, ...] = ()
    layer: str = ""
    part: str = ""
    backward: bool = False
    level: str = ""
    met: float | None = None

    @property
    def exposed(self) -> tuple[tuple[float, float], ...]:
        """When its rank did nothing else."""
        arrival = () if self.met is None else ((self.begin, self.met),)
        return (*arrival, (self.waited, self.end))

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"


@dataclass(frozen=True)
class RankStep:
    """One rank's step: it lasted from `begin` to `end` on the same clock as its travels."""

    rank: int
    host: str
    begin: float
    end: float
    travels: tuple[Travel, ...]
    compute: tuple[tuple[float, float], ...] | None = None
    """When it computed, where that was seen (traces of a GPU); None: whenever it did not wait."""

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Step:
    """One training step of all ranks, in their order.

    Attributes:
        load: assignments per MoE layer and expert, over all ranks.
        audit: whether a barrier before each collective kept its wait and its transfer apart.
    """

    number: int
    ranks: tuple[RankStep, ...]
    load: dict[str, list[float]] = field(default_factory=dict)
    audit: bool = False

    @property
    def seconds(self) -> float:
        """From the first rank's begin to the last one's end."""
        return max(r.end for r in self.ranks) - min(r.begin for r in self.ranks)

    def to_json(self) -> str:
        """One line; travels as lists in the order of `Travel`'s fields."""
        ranks = [{**_shallow(r), "travels": [list(_shallow(t).values()) for t in r.travels]} for r in self.ranks]
        return json_text({**_shallow(self), "ranks": ranks}, compact=True)

    @classmethod
    def from_json(cls, line: str) -> Step:
        """Inverse of `to_json`; ValueError, KeyError or TypeError if the line is no such object."""
        value = json.loads(line)
        ranks = tuple(RankStep(**{**r, **_rank_fields(r)}) for r in value.pop("ranks"))
        return cls(ranks=ranks, **value)


def _shallow(x: Any) -> dict[str, Any]:
    return {f.name: getattr(x, f.name) for f in fields(x)}


def _rank_fields(value: dict[str, Any]) -> dict[str, Any]:
    compute = value.get("compute")
    return {
        "travels": tuple(_travel(t) for t in value["travels"]),
        "compute": None if compute is None else tuple((a, b) for a, b in compute),
    }


def _travel(values: list[Any]) -> Travel:
    kind, purpose, ranks, number, begin, waited, end, size, sent, *rest = values
    return Travel(kind, purpose, tuple(ranks), number, begin, waited, end, size, tuple(sent), *rest)


def steps_file(run_dir: Path) -> Path:
    """Where a run keeps its recorded steps."""
    return run_dir / "measure" / "steps.jsonl"


def read_steps(run_dir: Path) -> list[Step]:
    """The recorded steps of a run, none if it recorded none; a line cut short by a crash is left out."""
    path = steps_file(run_dir)
    return list(_whole(path.read_text().splitlines())) if path.exists() else []


def _whole(lines: Iterable[str]) -> Iterable[Step]:
    for line in lines:
        try:
            yield Step.from_json(line)
        except (ValueError, KeyError, TypeError):
            continue

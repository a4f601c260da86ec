"""A recorded training step: what each rank sent and waited for, on one clock."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from math import isnan, nan
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from moesys.files import json_text

Purpose = Literal["expert", "data", "tensor", "context", "pipeline", "step"]
"""What a collective is for: a dimension of parallelism, or what all ranks of a step share."""

DEEP_EP = "deep_ep"
"""Kind of collectives in traces that are DeepEP's kernels: their group is not known, and they wait inside themselves."""

Seconds = Annotated[float, Field(allow_inf_nan=False, ge=-1e10, le=1e10)]
Size = Annotated[int, Field(ge=0, le=2**60)]
"""Bytes."""
Rank = Annotated[int, Field(ge=0, le=2**31)]

PURPOSES: tuple[Purpose, ...] = ("expert", "data", "tensor", "context", "pipeline", "step")


@dataclass(frozen=True)
class CollectiveSpan:
    """One collective, or one message, of one rank. Times are seconds since the step began on rank 0.

    Attributes:
        kind: "all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send", "recv", ….
        purpose: the dimension of parallelism that it serves.
        ranks: its group, in group order; of a message the sender and the receiver.
        number: it is the number-th of its group in the step, from 0: the same on all its ranks.
        begin, waited, end: when it was started, when its result was needed, and when that was there.
            Between `begin` and `waited` this rank did something else; from `waited` to `end` nothing.
        bytes: S of nccl-tests: what this rank contributes, its own part included (the gathered size of an all-gather
            or a reduce-scatter; what is reduced in an all-reduce); of a message its size.
        sent: how many of them go to each of `ranks`, where that is known.
        layer: the MoE layer ("layers.3") that it belongs to, or "".
        part: "dispatch" to the experts (counts, rows, weights), "combine" back from them, or "".
        backward: whether gradients span.
        level: "flat", "inter" nodes or "intra" a node for rows to experts and back; else "".
        met: in an audit, when all ranks had arrived, before anything travelled.
    """

    kind: str
    purpose: Purpose
    ranks: tuple[Rank, ...]
    number: int
    begin: Seconds
    waited: Seconds
    end: Seconds
    bytes: Size
    sent: tuple[Size, ...] = ()
    layer: str = ""
    part: str = ""
    backward: bool = False
    level: str = ""
    met: Seconds | None = None

    @property
    def exposed(self) -> tuple[tuple[float, float], ...]:
        """When its rank did nothing else."""
        arrival = () if self.met is None else ((self.begin, self.met),)
        return (*arrival, (self.waited, self.end))

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"


@dataclass(frozen=True)
class GroupArrival:
    """What the ranks of a collective have told each other about it.

    Attributes:
        arrived: when the `last` of them began.
        whole: whether all of them were seen.
        computed: seconds that the last one's experts had computed before, None if it does not follow them.
        bytes: of the last one.
        evenness: bytes that a rank moves to and from others, mean over the group / most of any rank; 1 if unknown.
        least: in an audit, the shortest that any of them took to meet the others.
    """

    arrived: Seconds
    last: Rank
    whole: bool
    computed: Seconds | None
    bytes: Size
    evenness: float
    least: Seconds | None


@dataclass(frozen=True)
class RankStep:
    """One rank's step: it lasted from `begin` to `end` on the same clock as its collectives.

    `arrivals` has what other ranks told of each collective while the run went on; None: it is found by matching their
    collectives.
    """

    rank: Rank
    host: str
    begin: Seconds
    end: Seconds
    collectives: tuple[CollectiveSpan, ...]
    compute: tuple[tuple[Seconds, Seconds], ...] | None = None
    """When it computed, where that was seen (traces of a GPU); None: whenever it did not wait."""
    arrivals: tuple[GroupArrival, ...] | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Step:
    """One training step of all ranks, in their order.

    Attributes:
        load: assignments per MoE layer and expert, over all ranks.
        audit: whether a barrier before each collective kept its wait and its transfer apart.
        layout: degrees of parallelism and sizes of batches that it ran with; "" of old records and of traces.
        marked: False if this is a whole trace, of however many steps, that does not tell where steps begin.
    """

    number: int
    ranks: tuple[RankStep, ...]
    load: dict[str, list[Annotated[float, Field(allow_inf_nan=False, ge=0)]]] = field(default_factory=dict)
    audit: bool = False
    layout: str = ""
    marked: bool = True

    @property
    def seconds(self) -> float:
        """From the first rank's begin to the last one's end."""
        return max(r.end for r in self.ranks) - min(r.begin for r in self.ranks)

    def to_json(self) -> str:
        """One line; collectives as lists in the order of `CollectiveSpan`'s fields."""
        ranks = [{**_shallow(r), "travels": [list(_shallow(t).values()) for t in r.collectives]} for r in self.ranks]
        for r in ranks:
            del r["arrivals"], r["collectives"]
        return json_text({**_shallow(self), "ranks": ranks}, compact=True)

    @classmethod
    def from_json(cls, line: str) -> Step:
        """Inverse of `to_json`; ValueError if the line is no such object."""
        return step_of(json.loads(line))

    @property
    def members(self) -> list[int]:
        """Numbers of its ranks."""
        return [r.rank for r in self.ranks]


def to_nan(value: float | None) -> float:
    """`value` for a table of numbers, which knows no None."""
    return nan if value is None else value


def from_nan(value: float) -> float | None:
    """Inverse of `to_nan`."""
    return None if isnan(value) else value


def _shallow(x: Any) -> dict[str, Any]:
    return {f.name: getattr(x, f.name) for f in fields(x)}


FIELDS = tuple(f.name for f in fields(CollectiveSpan))


@cache
def _schema() -> TypeAdapter[Step]:
    return TypeAdapter(Step)


def step_of(value: Mapping[str, Any]) -> Step:
    """A step from JSON; ValueError if it is none, or contradicts itself."""
    try:
        ranks = [
            {**r, "collectives": [dict(zip(FIELDS, t, strict=False)) for t in r["travels"]]} for r in value["ranks"]
        ]
        step = _schema().validate_python({**value, "ranks": ranks})
    except (ValidationError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from None
    return checked(step)


def checked(step: Step) -> Step:
    """The step; ValueError if it contradicts itself."""
    if not step.ranks or len({r.rank for r in step.ranks}) < len(step.ranks):
        raise ValueError("no ranks, or one twice")
    for r in step.ranks:
        if r.end <= r.begin or any(
            r.rank not in t.ranks or len(t.sent) not in (0, len(t.ranks)) for t in r.collectives
        ):
            raise ValueError(f"rank {r.rank}: times or groups that cannot be")
        if r.arrivals is not None and len(r.arrivals) != len(r.collectives):
            raise ValueError(f"rank {r.rank}: {len(r.arrivals)} arrivals of {len(r.collectives)} travels")
    return step

"""A recorded training step: the collectives of every rank as spans of time on one clock."""

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
"""The dimension of parallelism that a collective serves; "step": work that all ranks share."""

DEEP_EP = "deep_ep"
"""Kind of a span that is a DeepEP kernel in a trace. Its group is unknown, and its wait is part of the kernel."""

Seconds = Annotated[float, Field(allow_inf_nan=False, ge=-1e10, le=1e10)]
Size = Annotated[int, Field(ge=0, le=2**60)]
"""Bytes."""
Rank = Annotated[int, Field(ge=0, le=2**31)]

PURPOSES: tuple[Purpose, ...] = ("expert", "data", "tensor", "context", "pipeline", "step")


@dataclass(frozen=True)
class CollectiveSpan:
    """One collective, or one point-to-point message, of one rank. Times are seconds since the step began on rank 0.

    Attributes:
        kind: "all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send", "recv", ….
        purpose: the dimension of parallelism that it serves.
        ranks: its group, in group order; sender and receiver of a message.
        number: its place among the collectives of its group in the step, from 0; the same on all its ranks.
        begin, waited, end: times of its start, of the first need for its result, and of the result.
            Between `begin` and `waited` this rank did something else; from `waited` to `end` it did nothing.
        bytes: S of nccl-tests: the bytes that this rank contributes, its own part included (the gathered size of an
            all-gather or a reduce-scatter; the reduced size of an all-reduce); the size of a message.
        sent: the bytes to each of `ranks`; empty if unknown.
        layer: its MoE layer ("layers.3"), or "".
        part: "dispatch" to the experts (counts, rows, weights), "combine" back from them, or "".
        backward: whether it moves gradients span.
        level: level of a dispatch or combine: "flat", "inter" nodes or "intra" a node; else "".
        met: end of the barrier before it, in an audit: all ranks had arrived, and no byte had moved.
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
        """The intervals in which its rank did nothing else."""
        arrival = () if self.met is None else ((self.begin, self.met),)
        return (*arrival, (self.waited, self.end))

    @property
    def direction(self) -> str:
        """ "backward" or "forward"."""
        return "backward" if self.backward else "forward"


@dataclass(frozen=True)
class GroupArrival:
    """The last arrival at a collective, as all its ranks get to know it.

    Attributes:
        arrived: time at which the last rank began.
        last: that rank.
        whole: whether all ranks of the group recorded it.
        computed: seconds that the last rank's experts computed before it; None if it does not follow experts.
        bytes: bytes of the last rank.
        evenness: bytes that a rank moves to and from others, mean over the group / most of any rank; 1 if unknown.
        least: the shortest time of any rank in the barrier, in an audit.
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
    """One rank's step, from `begin` to `end` on the clock of its collectives.

    Attributes:
        compute: the intervals in which it computed, from traces of a GPU; None: whenever it did not wait.
        arrivals: the group arrival of each collective, exchanged in the run; None: match the collectives of all ranks.
    """

    rank: Rank
    host: str
    begin: Seconds
    end: Seconds
    collectives: tuple[CollectiveSpan, ...]
    compute: tuple[tuple[Seconds, Seconds], ...] | None = None
    arrivals: tuple[GroupArrival, ...] | None = None

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.begin


@dataclass(frozen=True)
class Step:
    """One training step of all ranks, in their order.

    Attributes:
        load: assignments of each MoE layer and expert, over all ranks.
        audit: whether a barrier before each collective separated its wait from its transfer.
        layout: degrees of parallelism and batch sizes; "" in old records and traces.
        marked: False for a whole trace without marks of its steps.
    """

    number: int
    ranks: tuple[RankStep, ...]
    load: dict[str, list[Annotated[float, Field(allow_inf_nan=False, ge=0)]]] = field(default_factory=dict)
    audit: bool = False
    layout: str = ""
    marked: bool = True

    @property
    def seconds(self) -> float:
        """Seconds from the first rank's begin to the last rank's end."""
        return max(r.end for r in self.ranks) - min(r.begin for r in self.ranks)

    def to_json(self) -> str:
        """One line of JSON. Collectives ("travels") are lists in the order of `CollectiveSpan`'s fields."""
        ranks = [{**_shallow(r), "travels": [list(_shallow(t).values()) for t in r.collectives]} for r in self.ranks]
        for r in ranks:
            del r["arrivals"], r["collectives"]
        return json_text({**_shallow(self), "ranks": ranks}, compact=True)

    @classmethod
    def from_json(cls, line: str) -> Step:
        """The inverse of `to_json`. Raises ValueError if the line is no step."""
        return step_of(json.loads(line))

    @property
    def members(self) -> list[int]:
        """The numbers of its ranks."""
        return [r.rank for r in self.ranks]


def to_nan(value: float | None) -> float:
    """`value` for a table of numbers: NaN stands for None."""
    return nan if value is None else value


def from_nan(value: float) -> float | None:
    """The inverse of `to_nan`."""
    return None if isnan(value) else value


def _shallow(x: Any) -> dict[str, Any]:
    return {f.name: getattr(x, f.name) for f in fields(x)}


FIELDS = tuple(f.name for f in fields(CollectiveSpan))


@cache
def _schema() -> TypeAdapter[Step]:
    return TypeAdapter(Step)


def step_of(value: Mapping[str, Any]) -> Step:
    """The step that JSON holds. Raises ValueError if it is no step or contradicts itself."""
    try:
        ranks = [
            {**r, "collectives": [dict(zip(FIELDS, t, strict=False)) for t in r["travels"]]} for r in value["ranks"]
        ]
        step = _schema().validate_python({**value, "ranks": ranks})
    except (ValidationError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from None
    return checked(step)


def checked(step: Step) -> Step:
    """The step itself. Raises ValueError if it contradicts itself."""
    if not step.ranks or len({r.rank for r in step.ranks}) < len(step.ranks):
        raise ValueError("no ranks, or a rank twice")
    for r in step.ranks:
        if r.end <= r.begin or any(
            r.rank not in t.ranks or len(t.sent) not in (0, len(t.ranks)) for t in r.collectives
        ):
            raise ValueError(f"rank {r.rank}: times or groups are impossible")
        if r.arrivals is not None and len(r.arrivals) != len(r.collectives):
            raise ValueError(f"rank {r.rank}: {len(r.arrivals)} arrivals for {len(r.collectives)} collectives")
    return step

"""The summary of a recorded step of all ranks, without their single collectives.

Its size grows with ranks and with layers, not with their product, and not with the bytes moved. Runs write one JSON
object a line to runs/NAME/measure/summary.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import ceil
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from moesys.files import json_text
from moesys.measure.explain.breakdown import OTHERS
from moesys.measure.explain.explanation import Breakdown
from moesys.measure.explain.layer_sums import LAYER_COLUMNS, PHASE_COLUMNS, Key
from moesys.measure.step import Rank, Seconds

DETAILED = 64
"""Most ranks with full detail. With more, a sample keeps its collectives, and bytes are between blocks of ranks."""

COLUMNS = (
    "step", "compute", "exposed", *OTHERS, "bubble", "idle", "hidden",
    "transfer", "late", "uneven", "unattributed", "experts", "counts",
)  # fmt: skip
"""A summary's columns for each rank, in seconds: `Breakdown`, `Causes`, computing of experts, exchange of counts."""

OLD_KEYS = {"legs": "phases", "leg_causes": "phase_causes", "untold": "unattributed"}
"""Keys of summaries of older versions, and their names now."""

Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e30, le=1e30)]
Row = list[Number]


@dataclass(frozen=True)
class Summary:
    """One recorded training step of all ranks.

    Attributes:
        number, load, audit, layout, marked: as `Step`.
        members, hosts: all ranks, and the node of each.
        recorded: the ranks whose single collectives are on file.
        seconds: from the first rank's begin to the last rank's end.
        by_rank: `COLUMNS` of each rank; None for a value that does not exist or was not recorded.
        waited_for: seconds that all other ranks together waited for each rank.
        phases: layer, part and whether backward, with sums over ranks (`layer_sums.phase_sums`).
        phase_causes: causes of each phase and rank; empty for more than `DETAILED` ranks.
        layers: names, with sums over ranks (`layer_sums.layer_sums`).
        most: most rows of any rank in each layer, and that rank.
        bytes: from each block of ranks to each; a block has `block` ranks.
        unattributed: the reason for unattributed time; "" if there is none.
    """

    number: int
    members: list[Rank]
    hosts: list[str]
    seconds: Seconds
    by_rank: list[list[Seconds | None]]
    waited_for: Row
    phases: list[tuple[Key, Row]]
    phase_causes: list[list[Row]]
    layers: list[tuple[str, Row]]
    most: list[tuple[Number, Rank]]
    bytes: list[Row]
    block: Annotated[int, Field(ge=1, le=2**31)] = 1
    load: dict[str, list[Annotated[float, Field(allow_inf_nan=False, ge=0)]]] = field(default_factory=dict)
    recorded: list[Rank] = field(default_factory=list)
    audit: bool = False
    layout: str = ""
    marked: bool = True
    unattributed: str = ""

    def to_json(self) -> str:
        """One line of JSON."""
        return json_text(vars(self), compact=True)

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Summary:
        """The inverse of `to_json`, from parsed JSON. Raises ValueError if it is no summary or contradicts itself."""
        renamed = {OLD_KEYS.get(key, key): content for key, content in value.items()}
        try:
            found = _schema().validate_python(renamed)
        except ValidationError as error:
            raise ValueError(str(error)) from None
        found._check()
        return found

    def _check(self) -> None:
        ranks, blocks = len(self.members), ceil(len(self.members) / self.block)
        detailed = len(self.phases) if self.phase_causes else 0
        fits = (
            ranks > 0 and len(set(self.members)) == ranks and len(self.hosts) == len(self.waited_for) == ranks
            and len(self.by_rank) == ranks and all(len(row) == len(COLUMNS) for row in self.by_rank)
            and all((row[0] or 0) > 0 for row in self.by_rank) and self.seconds > 0
            and all(len(row) == PHASE_COLUMNS and row[4] > 0 for _, row in self.phases)
            and all(len(row) == LAYER_COLUMNS and row[2] > 0 for _, row in self.layers)
            and len(self.most) == len(self.layers) and len(self.phase_causes) == detailed
            and all(len(phase) == ranks and all(len(row) == 4 for row in phase) for phase in self.phase_causes)
            and len(self.bytes) == blocks and all(len(row) == blocks for row in self.bytes)
        )  # fmt: skip
        if not fits:
            raise ValueError("sizes or times are impossible")


@cache
def _schema() -> TypeAdapter[Summary]:
    return TypeAdapter(Summary)


def breakdown_of(row: Sequence[float]) -> Breakdown:
    """The breakdown in the first of `COLUMNS`. NaN stands for a value that does not exist."""
    value = dict(zip(COLUMNS, row, strict=True))
    others: dict[str, float] = {name: value[name] for name in OTHERS if value[name] == value[name]}
    hidden = None if value["hidden"] != value["hidden"] else value["hidden"]
    return Breakdown(value["step"], value["compute"], value["exposed"], others, value["bubble"], value["idle"], hidden)

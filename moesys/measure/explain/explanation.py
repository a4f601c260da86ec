"""The figures that explain recorded steps, as in summary.json and in every report.

All seconds are per step, means over ranks and recorded steps, unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Breakdown:
    """The seconds of a step by use. All but `hidden` and `step` add up to `step`.

    Attributes:
        step: length of the step.
        compute: the rank computed, or did anything else that is no communication.
        exposed: it waited for dispatch or combine of an MoE layer, and did nothing else.
        others: the same for other communication, by purpose ("data", "tensor", "context", "pipeline").
        bubble: it waited for a pipeline neighbour that still computed.
        idle: it waited for other ranks in work that all ranks share, or (in traces of a GPU) did nothing.
        hidden: dispatch or combine ran while the rank computed; part of `compute`. None without a record of the time of
            computing. A run's own record is none: it has the times of start and need, not of what the rank did between.
    """

    step: float
    compute: float
    exposed: float
    others: dict[str, float]
    bubble: float
    idle: float
    hidden: float | None

    @property
    def parts(self) -> dict[str, float]:
        """The parts that add up to `step`, by name, in the order of a stacked bar."""
        others = {f"{name} communication": seconds for name, seconds in self.others.items()}
        head = {"compute": self.compute, "exposed all-to-all": self.exposed}
        return {**head, **others, "pipeline bubble": self.bubble, "idle": self.idle}


@dataclass(frozen=True)
class Causes:
    """Exposed seconds of all-to-all by cause.

    Attributes:
        transfer: all ranks had arrived, and bytes moved.
        late: another rank had not arrived, for a reason other than its experts.
        uneven: another rank had not arrived because its experts had more tokens than this rank's.
        unattributed: one of the three, in traces that lack ranks of the group. 0 in runs of this project.
    """

    transfer: float = 0.0
    late: float = 0.0
    uneven: float = 0.0
    unattributed: float = 0.0

    @property
    def exposed(self) -> float:
        """All exposed seconds."""
        return self.transfer + self.waiting + self.unattributed

    @property
    def waiting(self) -> float:
        """Seconds of waiting for late ranks and for uneven experts."""
        return self.late + self.uneven

    @property
    def parts(self) -> dict[str, float]:
        """All causes by name; without `unattributed` if it is 0."""
        parts = asdict(self)
        return parts if self.unattributed > 0 else {k: v for k, v in parts.items() if k != "unattributed"}

    def __add__(self, other: Causes) -> Causes:
        return Causes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def scaled(self, factor: float) -> Causes:
        """All causes times `factor`."""
        return Causes(*(value * factor for value in astuple(self)))


@dataclass(frozen=True)
class LayerPhase:
    """One phase of one MoE layer: dispatch or combine, forward or backward.

    Attributes:
        causes: causes of its exposed seconds.
        bytes_inter, bytes_intra: bytes per step of all ranks together, between nodes and inside nodes, without the
            bytes
            that a rank keeps.
        bandwidth: most bytes that any rank sent to others / seconds from the last arrival to the end; None if nothing
            moved.
        by_rank: causes of each rank; empty for many ranks.
        each, inside, between: means over its collectives of rows: seconds from the last arrival to the end, most bytes
            that
            a rank moves inside its node, most bytes that a node moves to or from others. None and 0 if not recorded.
    """

    layer: str
    part: str
    backward: bool
    causes: Causes
    bytes_inter: int
    bytes_intra: int
    bandwidth: float | None
    by_rank: list[Causes] = field(default_factory=list)
    each: float | None = None
    inside: float = 0.0
    between: float = 0.0


@dataclass(frozen=True)
class Layer:
    """One MoE layer.

    Attributes:
        seconds: from the start of dispatch to the end of combine, forward and backward together.
        even_seconds: an estimate of `seconds` with equally many tokens for every expert.
        rank_imbalance: tokens of the busiest rank of a step / mean over ranks; mean over steps.
        expert_imbalance: tokens of the busiest expert of a step / mean over experts; mean over steps. None if unknown.
            Its mean over layers is the metric `imbalance` of these steps.
        busiest_rank: the rank that most often had the most tokens, by their number; None if unknown.
        busiest_expert: the expert with most tokens in all steps together; None if unknown.
    """

    name: str
    seconds: float
    even_seconds: float
    rank_imbalance: float
    expert_imbalance: float | None
    busiest_rank: int | None
    busiest_expert: int | None


@dataclass(frozen=True)
class Explanation:
    """The explanation of the recorded steps of a run.

    Attributes:
        steps: numbers of the recorded steps.
        sentence: the explanation in plain words.
        total: mean over ranks and steps.
        by_step, by_rank: breakdown of each recorded step (mean over ranks) and of each rank (mean over steps).
        causes: causes of all exposed dispatch and combine.
        phases, layers: figures of each MoE layer.
        ranks: numbers of the ranks: the order of `by_rank`, `waited_for`, `hosts`, `bytes`, and `by_rank` of each
            phase.
        waited_for: seconds per step that others waited for each rank.
        hosts: node of each rank.
        bytes: [sender][receiver] bytes per step of dispatch and combine, 0 from a rank to itself. Many ranks form
            blocks of
            `block` neighbours, and the bytes are between blocks.
        load: [recorded step] of [layer][expert] assignments.
        recorded: the ranks whose single collectives are on file: a sample of many.
        audit: whether barriers separated wait from transfer.
        marked: False for whole traces without marks of their steps.
        unattributed_because: the reason for unattributed time, as "this is the trace of one rank"; "" if there is none.
    """

    steps: list[int]
    sentence: str
    total: Breakdown
    by_step: list[Breakdown]
    by_rank: list[Breakdown]
    causes: Causes
    phases: list[LayerPhase]
    layers: list[Layer]
    ranks: list[int]
    waited_for: list[float]
    hosts: list[str]
    bytes: list[list[int]]
    load: list[dict[str, list[float]]]
    block: int = 1
    recorded: list[int] = field(default_factory=list)
    audit: bool = False
    marked: bool = True
    unattributed_because: str = ""

    @property
    def unit(self) -> str:
        """The span that all seconds refer to: "step", or "trace" without marks of steps."""
        return "step" if self.marked else "trace"

    @property
    def exposed_share(self) -> float:
        """Exposed all-to-all / step."""
        return self.total.exposed / self.total.step

    @property
    def hidden_share(self) -> float | None:
        """Hidden all-to-all / step; None if not recorded."""
        return None if self.total.hidden is None else self.total.hidden / self.total.step

    @property
    def wait_share(self) -> float | None:
        """Waiting (late and uneven) / attributed exposed all-to-all.

        0 if nothing is exposed; None if all of it is unattributed.
        """
        known = self.causes.exposed - self.causes.unattributed
        if known > 0:
            return self.causes.waiting / known
        return None if self.causes.unattributed > 0 else 0.0

    @property
    def shares(self) -> dict[str, float | None]:
        """`exposed_share`, `wait_share`, and `hidden_share` if recorded."""
        hidden = {} if self.hidden_share is None else {"hidden_share": self.hidden_share}
        return {"exposed_share": self.exposed_share, "wait_share": self.wait_share, **hidden}

    def as_json(self) -> dict[str, Any]:
        """All figures, with the shares."""
        return self.shares | asdict(self)

    def headline(self) -> dict[str, Any]:
        """The part that summary.json keeps: the shares, the parts of the step, and causes of each layer."""
        hidden = {} if self.total.hidden is None else {"hidden all-to-all": self.total.hidden}
        return {
            "sentence": self.sentence,
            "steps": self.steps,
            **self.shares,
            "seconds": {"step": self.total.step, **hidden, **self.total.parts},
            "causes": asdict(self.causes),
            "layers": [asdict(layer) for layer in self.layers],
            "phases": [{k: v for k, v in asdict(phase).items() if k != "by_rank"} for phase in self.phases],
            "audit": self.audit,
        }

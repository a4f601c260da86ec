"""What recorded steps say: figures only, as they stand in summary.json and in every report.

All seconds are per step, means over ranks and recorded steps unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Breakdown:
    """Where the seconds of a step go. All but `hidden` and `step` add up to `step`.

    Attributes:
        step: length of the step.
        compute: the rank computed, or did anything else that is not communication.
        exposed: it waited for dispatch or combine of an MoE layer, and did nothing else.
        others: the same for other communication, by purpose ("data", "tensor", "context", "pipeline").
        bubble: it waited for a pipeline neighbour that was not done computing.
        idle: it waited for other ranks in what all ranks of a step share, or (in traces of a GPU) did nothing.
        hidden: dispatch or combine was on its way while the rank computed: part of `compute`. None where nobody saw
            when it computed: a run's own record has when bytes set off and when they were needed, not what was done
            meanwhile, nor whether they had arrived long before.
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
        """What adds up to `step`, by name, in the order of a stacked bar."""
        others = {f"{name} communication": seconds for name, seconds in self.others.items()}
        head = {"compute": self.compute, "exposed all-to-all": self.exposed}
        return {**head, **others, "pipeline bubble": self.bubble, "idle": self.idle}


@dataclass(frozen=True)
class Causes:
    """Causes of exposed all-to-all: they add up to the exposed seconds.

    Attributes:
        transfer: every rank had arrived, and bytes moved.
        late: another rank had not arrived yet, for a reason other than its experts.
        uneven: another rank had not arrived yet because its experts had more tokens than this rank's.
        unattributed: one of the three, in traces that lack ranks of the group. 0 in runs of this project.
    """

    transfer: float = 0.0
    late: float = 0.0
    uneven: float = 0.0
    unattributed: float = 0.0

    @property
    def exposed(self) -> float:
        return self.transfer + self.waiting + self.unattributed

    @property
    def waiting(self) -> float:
        return self.late + self.uneven

    @property
    def parts(self) -> dict[str, float]:
        """All by name; `unattributed` only if there is any."""
        parts = asdict(self)
        return parts if self.unattributed > 0 else {k: v for k, v in parts.items() if k != "unattributed"}

    def __add__(self, other: Causes) -> Causes:
        return Causes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def scaled(self, factor: float) -> Causes:
        return Causes(*(value * factor for value in astuple(self)))


@dataclass(frozen=True)
class LayerPhase:
    """One way of one MoE layer: dispatch or combine, forward or backward.

    Attributes:
        causes: of its exposed seconds.
        bytes_inter, bytes_intra: bytes per step, of all ranks together, between nodes and inside
            them; what a rank keeps for itself is in neither.
        bandwidth: bytes per second: the most bytes that any rank sent to others, over the seconds from
            the last rank's arrival to the end; None if nothing moved.
        by_rank: causes of each rank; none where there are many.
        each, inside, between: of one collective of rows, means: seconds from the last arrival to the end, most bytes
            that a rank moves inside its node, and that a node moves to or from others. None and 0 if not seen.
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
        seconds: from dispatch's start to combine's end, forward and backward together.
        even_seconds: an estimate of the same if every expert had received equally many tokens.
        rank_imbalance: tokens that the busiest rank of a step received / mean over ranks, mean over steps.
        expert_imbalance: tokens of the busiest expert of a step / mean over experts, mean over steps; None if not
            known. The mean of it over layers is what metrics of these steps call `imbalance`.
        busiest_rank: who had most tokens in those steps in which nobody had more, None if not known.
        busiest_expert: who had most in all steps together, None if not known.
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
    """What the recorded steps of a run say.

    Attributes:
        steps: numbers of the recorded steps.
        sentence: the summary in plain words.
        total: means over ranks and steps.
        by_step, by_rank: the same per recorded step (mean over ranks) and per rank (mean over steps).
        causes: of all exposed dispatch and combine.
        phases, layers: per MoE layer.
        ranks: numbers of the ranks, in the order of `by_rank`, `waited_for`, `hosts`, `bytes` and each phase's `by_rank`.
        waited_for: seconds per step that others waited for each rank.
        hosts: of each rank.
        bytes: [sender][receiver] per step of dispatch and combine; a rank's own part is 0. Of many ranks, between
            blocks of `block` ranks that follow one another.
        load: [recorded step] of [layer][expert] assignments.
        recorded: the ranks whose single collectives are on file: of many a sample.
        audit: whether barriers kept wait and transfer apart.
        marked: False if a "step" is a whole trace that does not tell where its steps begin.
        unattributed_because: why some waiting cannot be told, as "this is the trace of one rank"; "" if all of it can.
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
        """The span that all seconds are of: "step", or "trace" if steps cannot be told apart."""
        return "step" if self.marked else "trace"

    @property
    def exposed_share(self) -> float:
        """Exposed all-to-all / step."""
        return self.total.exposed / self.total.step

    @property
    def hidden_share(self) -> float | None:
        """Hidden all-to-all / step, where it was seen."""
        return None if self.total.hidden is None else self.total.hidden / self.total.step

    @property
    def wait_share(self) -> float | None:
        """Waiting, for late ranks or for uneven experts, / exposed all-to-all of which waiting can be told.

        0 if none is exposed, None if it cannot be told of any.
        """
        known = self.causes.exposed - self.causes.unattributed
        if known > 0:
            return self.causes.waiting / known
        return None if self.causes.unattributed > 0 else 0.0

    @property
    def shares(self) -> dict[str, float | None]:
        """`exposed_share` and `wait_share`, and `hidden_share` where it was seen."""
        hidden = {} if self.hidden_share is None else {"hidden_share": self.hidden_share}
        return {"exposed_share": self.exposed_share, "wait_share": self.wait_share, **hidden}

    def as_json(self) -> dict[str, Any]:
        """Everything, with the shares."""
        return self.shares | asdict(self)

    def headline(self) -> dict[str, Any]:
        """What summary.json keeps: the shares, the parts of the step, and causes per layer."""
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

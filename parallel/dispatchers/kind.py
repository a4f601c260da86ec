"""The base of the descriptions of dispatchers. Needs no torch.

The schema takes its words from here, so nothing here imports the schema but for types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from moesys.config.registry import DISPATCHERS, Described, kinds
from moesys.errors import Problem

if TYPE_CHECKING:
    from moesys.config.schema import Config, DispatchConfig
    from moesys.parallel.cost import StepShape
    from moesys.parallel.degrees import Degrees
    from moesys.parallel.dispatchers.base import ExpertParallelDispatcher
    from moesys.parallel.dispatchers.ranks import ExpertRanks


@dataclass(frozen=True)
class Transfer:
    """Rows that a dispatcher moves to experts by one collective, and back by its reverse.

    Attributes:
        there: kind of the collective that moves rows to experts, and gradients of results.
        back: kind of the collective that moves results, and gradients of rows.
        rows: rows of the collective's buffer per token of this rank.
        level: "inter" nodes or "intra" a node; "" where there are no levels.
        inner: whether experts compute right after it, not after another level.
    """

    there: str
    back: str
    rows: float
    level: str = ""
    inner: bool = True


@dataclass(frozen=True)
class Beside:
    """A collective that moves what is needed beside rows: counts, ids, routing weights.

    Attributes:
        kind: its kind in records.
        bytes: bytes of one call, or of all chunks together.
        chunked: whether each chunk has a call of its own.
        back: kind of the collective of the gradients of routing weights; "" where there are none.
        back_bytes: bytes of that, as `bytes`.
        level: as for `Transfer`.
    """

    kind: str
    bytes: float
    chunked: bool = True
    back: str = ""
    back_bytes: float = 0.0
    level: str = ""


@dataclass(frozen=True)
class DispatcherKind(Described):
    """A kind of dispatcher of expert parallelism.

    Attributes:
        dispatch: the section `parallel.dispatch`.
        for_nodes: whether it sends fewer bytes between nodes than all-to-all: predictions propose it there.
    """

    dispatch: DispatchConfig

    decides_by_default: ClassVar[str] = "RUNNING"
    for_nodes: ClassVar[bool] = False

    def check(self, config: Config, degrees: Degrees) -> list[Problem]:
        """The rules that `config` breaks, beside those of every dispatcher."""
        return []

    def transfers(self, shape: StepShape) -> Iterator[Transfer]:
        """The transfers of one chunk, in their order."""
        raise NotImplementedError

    def beside(self, shape: StepShape) -> Iterator[Beside]:
        """What moves beside the rows of one pass."""
        yield from ()

    def kept_rows(self, shape: StepShape) -> float:
        """Received rows that experts keep for backward, per token of this rank."""
        raise NotImplementedError

    def build(self, ranks: ExpertRanks) -> Callable[[int], ExpertParallelDispatcher]:
        """A function that makes the dispatcher of a layer of so many experts. Collective over `ranks.group`."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options that all dispatchers take, by argument of `ExpertParallelDispatcher`."""
        d = self.dispatch
        return {"chunks": d.chunks, "overlap_shared": d.overlap_shared, "payload": d.payload}


COUNT, WEIGHT, ID = 8, 4, 8
"""Bytes of a count, of a routing weight, and of an assignment's id."""


def assignments(shape: StepShape) -> float:
    """Assignments of one pass to experts' slices, on average over ranks that drop none."""
    moe, d, ranks = shape.config.model.moe, shape.degrees, shape.degrees.cp * shape.degrees.tp
    assert moe is not None
    tokens = shape.sequence_tokens // ranks
    return moe.router.assignments(tokens, ranks, shape.config.train.seq_len) * d.etp


def places(shape: StepShape) -> int:
    """Slices of experts, over all ranks of a group."""
    moe = shape.config.model.moe
    assert moe is not None
    return moe.experts * shape.degrees.etp


def describe(dispatch: DispatchConfig) -> DispatcherKind:
    """The description of the dispatcher that a configuration names."""
    made: DispatcherKind = kinds(DISPATCHERS)[dispatch.kind](dispatch)
    return made

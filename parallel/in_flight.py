"""The order in which a rank of a pipeline runs its stages, and the most that it holds meanwhile. Needs no torch.

The orders are those of torch's schedules: GPipe, 1F1B, interleaved 1F1B (arXiv 2104.04473), and the interleaved
zero-bubble schedule (ZB1P, arXiv 2401.10241), which splits backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Literal

Pass = Literal["forward", "backward", "inputs", "weights"]
"""A pass through a stage; "inputs" and "weights" are the parts of a split backward, for gradients of either."""

Action = tuple[Pass, int]
"""A pass, and the number of the stage among those of the rank."""


def actions(schedule: str, pp: int, virtual: int, count: int, rank: int) -> Iterator[Action]:
    """The passes of pipeline rank `rank` of `pp` in a step of `count` micro-batches, through `virtual` stages."""
    if schedule in ("gpipe", "1f1b"):
        ahead = count if schedule == "gpipe" else min(count, pp - rank)
        yield from repeat(("forward", 0), ahead)
        for _ in range(count - ahead):
            yield from (("backward", 0), ("forward", 0))
        yield from repeat(("backward", 0), ahead)
        return
    split = schedule == "zero-bubble"
    each = count // max(
        1, count // pp
    )  # micro-batches that pass a stage before the next stage of the rank has its turn
    ahead = min((virtual - 1) * each + (1 if split else 2) * (pp - 1 - rank), count * virtual)
    waiting: list[int] = []
    for number in range(count * virtual + ahead):
        if number < count * virtual:
            yield "forward", number // each % virtual
        if number >= ahead:
            stage = virtual - 1 - (number - ahead) // each % virtual
            yield ("inputs" if split else "backward"), stage
            waiting += [stage] * split
            if split and number - ahead >= rank:
                yield "weights", waiting.pop(0)
    yield from (("weights", stage) for stage in waiting)


@dataclass(frozen=True)
class StageBytes:
    """Bytes of one micro-batch on one stage.

    Attributes:
        kept: from forward until backward has ended.
        gradients: between both parts of a split backward.
        sent: from backward until the end of the step.
    """

    kept: float
    gradients: float = 0.0
    sent: float = 0.0


def fullest(order: Iterable[Action], stages: Sequence[StageBytes]) -> float:
    """Bytes at the fullest moment between passes, of the stages of a rank that runs them in this order."""
    held = most = 0.0
    for name, number in order:
        stage = stages[number]
        if name == "forward":
            held += stage.kept
        elif name == "inputs":
            held += stage.gradients
        else:
            held += stage.sent - stage.kept - (stage.gradients if name == "weights" else 0.0)
        most = max(most, held)
    return most

"""Counts skipped steps, whose numbers are not finite, and ends a run that has too many."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moesys.config.schema import SkipsConfig
from moesys.errors import TrainingError
from moesys.train.backlog import StepMeasurements
from moesys.train.engine import Engine
from moesys.train.finite import place


@dataclass(frozen=True)
class Skip:
    """A step that updated nothing.

    Attributes:
        gradients: parameters whose gradients are not finite, in the model's order. Empty if only the loss is not
            finite, or if the gradients' squares overflow.
        state: weights, buffers and "NAME/SLOT" of the optimizer that are not finite, in the model's order.
    """

    step: int
    loss: float
    norm: float
    gradients: list[str]
    state: list[str]

    def __str__(self) -> str:
        found = f"loss {self.loss:.6g}, norm of the gradients {self.norm:.6g}"
        if self.gradients:
            found += f", first in the gradient of {named(self.gradients)}"
        return found


class Guard:
    """Counts the skipped steps of a run, and decides when it must end.

    Attributes:
        consecutive: skipped steps since the last one that updated.
        total: skipped steps of the run.
        last: the latest of them in this process.
        over: the reason why the run must end, from the first step that was one too many; "" while it may go on.
    """

    def __init__(self, allowed: SkipsConfig):
        self.allowed = allowed
        self.consecutive = self.total = 0
        self.last: Skip | None = None
        self.over = ""

    def take(self, measured: StepMeasurements, engine: Engine) -> Skip | None:
        """Count a step; returns the facts of a skipped one. Collective if it was skipped, and only then."""
        if not measured.skipped:
            self.consecutive = 0
            return None
        gradients, state = gathered(measured.bad(), engine.nonfinite())
        self.consecutive, self.total = self.consecutive + 1, self.total + 1
        self.last = Skip(measured.step, measured.values["loss"], measured.norm, gradients, state)
        self.over = self.over or self._verdict(self.last)
        return self.last

    def _verdict(self, skip: Skip) -> str:
        """The reason why a skipped step is one too many; "" if it is not."""
        a = self.allowed
        if skip.state:
            return f"step {skip.step}: not finite: {named(skip.state)}; {skip}"
        if self.consecutive > a.consecutive:
            rule = f"{self.consecutive} in a row, and train.skips.consecutive is {a.consecutive}"
        elif self.total > a.total:
            rule = f"{self.total} in this run, and train.skips.total is {a.total}"
        else:
            return ""
        return f"step {skip.step}: skipped because it is not finite, {rule}: {skip}"

    def check(self, newest: Path | None = None) -> None:
        """Raise if a step was one too many; `newest` is the newest checkpoint, for the message.

        Raises:
            TrainingError: more steps were skipped than `train.skips` allows, or weights are not finite, which no
                later step repairs.
        """
        if self.over:
            raise TrainingError(f"{self.over}{remedy(newest)}")

    def as_json(self) -> dict[str, int]:
        """The counts for a checkpoint."""
        return {"consecutive": self.consecutive, "total": self.total}

    def restore(self, kept: dict[str, Any]) -> None:
        """Continue the counts in a checkpoint, or start from 0 without one."""
        self.consecutive, self.total = (int(kept.get(key, 0)) for key in ("consecutive", "total"))
        self.over = ""


def demand_finite(engine: Engine, what: str, remedy: str) -> None:
    """Raise if a weight, a gate's buffer or optimizer state is not finite on any rank. Collective.

    Raises:
        TrainingError: "`what`: not finite: NAME", and `remedy`.
    """
    (found,) = gathered(engine.nonfinite())
    if found:
        raise TrainingError(f"{what}: not finite: {named(found)}\n    remedy: {remedy}")


def demand_numbers(record: dict[str, Any], what: str) -> None:
    """Raise if a training step that will be compared or timed was not finite.

    Raises:
        TrainingError: names the step.
    """
    bad = [key for key in ("loss", "grad_norm") if not isfinite(record[key])]
    if bad:
        found = ", ".join(f"{key} is {record[key]}" for key in bad)
        raise TrainingError(f"{what}: step {record['step']} is not finite: {found}{remedy(None)}")


def gathered(*names: list[str]) -> list[list[str]]:
    """The union of each list over all ranks, in the model's order. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, names)
    return [sorted({name for rank in everyone for name in rank[i]}, key=place) for i in range(len(names))]


def named(names: list[str]) -> str:
    """The first of several tensors, and how many more there are."""
    more = len(names) - 1
    return names[0] + (f" (and {more} other tensor{'s' * (more > 1)})" if more else "")


def remedy(newest: Path | None) -> str:
    """The remedy of a run whose numbers are no longer finite."""
    where = f"; the run goes on from {newest}, or from further back if you remove that" if newest else ""
    return f"\n    remedy: lower train.optimizer.lr, lengthen its warm-up, or clip more (train.optimizer.clip){where}"

"""Selects the recorded steps to explain: one rule for the end of a run, its reports, traces and predictions.

A run folder may hold steps of several layouts: a run can resume on another number of ranks. Steps of different layouts
cannot be averaged, so the layout of the last recorded step counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from moesys.measure.explain.step_summary import Summary
from moesys.measure.step import Step
from moesys.words import plural

RecordedStep = Step | Summary
"""A recorded step: all ranks' collectives, or their summary."""

WARM = 2
"""Warm-up steps among the recorded ones. They are left out if there are more than twice as many steps."""


AnyStep = TypeVar("AnyStep", bound=RecordedStep)


@dataclass(frozen=True)
class StepSelection(Generic[AnyStep]):
    """Selected steps, all of one layout, and a sentence about steps of other layouts."""

    steps: list[AnyStep]
    note: str = ""


def newest_layout(steps: Sequence[AnyStep]) -> StepSelection[AnyStep]:
    """The steps of the layout that recorded last, in order."""
    if not steps:
        return StepSelection([])
    same = [step for step in steps if same_layout(step, steps[-1])]
    others = [step for step in steps if not same_layout(step, steps[-1])]
    return StepSelection(same, _note(same, others) if others else "")


def steps_to_explain(steps: Sequence[AnyStep]) -> StepSelection[AnyStep]:
    """`newest_layout` without warm-up steps."""
    choice = newest_layout(steps)
    few = len(choice.steps) <= 2 * WARM
    return choice if few else StepSelection(choice.steps[WARM:], choice.note)


def same_layout(a: RecordedStep, b: RecordedStep) -> bool:
    """Whether both steps have the same ranks, audit and layout, as far as the records say."""
    return a.members == b.members and a.audit == b.audit and (a.layout == b.layout or not (a.layout and b.layout))


def _note(same: Sequence[RecordedStep], others: Sequence[RecordedStep]) -> str:
    """A sentence that names the differences between the layouts."""
    every = [_facts(step) for step in (same[-1], *others)]
    shared = set.intersection(*map(set, every))
    names = [", ".join(fact for fact in facts if fact not in shared) or "an older record" for facts in every]
    verb = "is" if len(others) == 1 else "are"
    left_out = f"{plural(len(others), 'recorded step')} with {' and with '.join(dict.fromkeys(names[1:]))}"
    return f"This is of {names[0]}; {left_out} {verb} left out."


def _facts(step: RecordedStep) -> list[str]:
    """The layout in words, one item for each fact."""
    words = re.split(r" \(|, |\)$", step.layout or plural(len(step.members), "rank"))
    return [*filter(None, words), *(["audited"] * step.audit)]

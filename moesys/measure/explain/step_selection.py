"""The choice of recorded steps to explain: one rule for the end of a run, its reports, traces and predictions.

A run folder may hold steps of several layouts: a run can be resumed on another number of ranks. They cannot be
averaged, so the layout that recorded last counts.
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
"""A recorded step: every rank's collectives, or what they come to."""

WARM = 2
"""RecordedStep steps that warm up what later ones find warm: left out where there are more than twice as many."""


Kind = TypeVar("Kind", bound=RecordedStep)


@dataclass(frozen=True)
class StepSelection(Generic[Kind]):
    """RecordedStep steps, all of one layout, and a sentence about those that were left out for being of another."""

    steps: list[Kind]
    note: str = ""


def newest_layout(steps: Sequence[Kind]) -> StepSelection[Kind]:
    """The steps of the layout that recorded last, in order; none of none."""
    if not steps:
        return StepSelection([])
    same = [step for step in steps if same_layout(step, steps[-1])]
    others = [step for step in steps if not same_layout(step, steps[-1])]
    return StepSelection(same, _note(same, others) if others else "")


def steps_to_explain(steps: Sequence[Kind]) -> StepSelection[Kind]:
    """`newest`, without those that warm up."""
    choice = newest_layout(steps)
    few = len(choice.steps) <= 2 * WARM
    return choice if few else StepSelection(choice.steps[WARM:], choice.note)


def same_layout(a: RecordedStep, b: RecordedStep) -> bool:
    """Whether both were recorded of the same ranks in the same way, as far as the records tell."""
    return a.members == b.members and a.audit == b.audit and (a.layout == b.layout or not (a.layout and b.layout))


def _note(same: Sequence[RecordedStep], others: Sequence[RecordedStep]) -> str:
    """Names what the layouts differ in."""
    every = [_facts(step) for step in (same[-1], *others)]
    shared = set.intersection(*map(set, every))
    names = [", ".join(fact for fact in facts if fact not in shared) or "an older record" for facts in every]
    verb = "is" if len(others) == 1 else "are"
    left_out = f"{plural(len(others), 'recorded step')} with {' and with '.join(dict.fromkeys(names[1:]))}"
    return f"This is of {names[0]}; {left_out} {verb} left out."


def _facts(step: RecordedStep) -> list[str]:
    """The layout in words, one for each thing that it says."""
    told = re.split(r" \(|, |\)$", step.layout or plural(len(step.members), "rank"))
    return [*filter(None, told), *(["audited"] * step.audit)]

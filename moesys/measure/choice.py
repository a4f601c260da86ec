"""Which recorded steps are explained: one rule for the end of a run, its reports, traces and predictions.

A run folder may hold steps of several layouts: a run can be resumed on another number of ranks. They cannot be
averaged, so the layout that recorded last counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesys.measure.step import Step
from moesys.words import plural

WARM = 2
"""Recorded steps that warm up what later ones find warm: left out where there are more than twice as many."""


@dataclass(frozen=True)
class Choice:
    """Recorded steps, all of one layout, and a sentence about those that were left out for being of another."""

    steps: list[Step]
    note: str = ""


def newest(steps: Sequence[Step]) -> Choice:
    """The steps of the layout that recorded last, in order; none of none."""
    if not steps:
        return Choice([])
    same = [step for step in steps if step.alike(steps[-1])]
    others = [step for step in steps if not step.alike(steps[-1])]
    return Choice(same, _note(same, others) if others else "")


def explained(steps: Sequence[Step]) -> Choice:
    """`newest`, without those that warm up."""
    choice = newest(steps)
    few = len(choice.steps) <= 2 * WARM
    return choice if few else Choice(choice.steps[WARM:], choice.note)


def _note(same: Sequence[Step], others: Sequence[Step]) -> str:
    names = list(dict.fromkeys(map(_name, others)))
    left_out = plural(len(others), "recorded step")
    verb = "is" if len(others) == 1 else "are"
    return f"This is of {_name(same[-1])}; {left_out} with {' and with '.join(names)} {verb} left out."


def _name(step: Step) -> str:
    """The layout in words."""
    return (step.layout or plural(len(step.ranks), "rank")) + (", audited" if step.audit else "")

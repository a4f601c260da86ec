"""The choice of recorded steps to explain: one rule for the end of a run, its reports, traces and predictions.

A run folder may hold steps of several layouts: a run can be resumed on another number of ranks. They cannot be
averaged, so the layout that recorded last counts.
"""

from __future__ import annotations

import re
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
    """Names what the layouts differ in."""
    every = [_facts(step) for step in (same[-1], *others)]
    shared = set.intersection(*map(set, every))
    names = [", ".join(fact for fact in facts if fact not in shared) or "an older record" for facts in every]
    verb = "is" if len(others) == 1 else "are"
    left_out = f"{plural(len(others), 'recorded step')} with {' and with '.join(dict.fromkeys(names[1:]))}"
    return f"This is of {names[0]}; {left_out} {verb} left out."


def _facts(step: Step) -> list[str]:
    """The layout in words, one for each thing that it says."""
    told = re.split(r" \(|, |\)$", step.layout or plural(len(step.ranks), "rank"))
    return [*filter(None, told), *(["audited"] * step.audit)]

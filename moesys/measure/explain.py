"""From recorded steps to what is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moesys.measure import legs
from moesys.measure.attribute import costs
from moesys.measure.breakdown import breakdown, mean
from moesys.measure.explanation import Causes, Explanation
from moesys.measure.sentence import sentence
from moesys.measure.step import Step


def explain(steps: Sequence[Step]) -> Explanation:
    """What `steps`, at least one and all of the same ranks, say."""
    taken = [costs(step) for step in steps]
    broken = [[breakdown(r, c[r.rank]) for r in step.ranks] for step, c in zip(steps, taken, strict=True)]
    world = len(steps[0].ranks)
    expert = [c for by_rank in taken for mine in by_rank.values() for c in mine if c.travel.purpose == "expert"]
    share = 1 / (len(steps) * world)
    waited_for = [0.0] * world
    for cost in expert:
        if cost.last is not None:
            waited_for[cost.last] += cost.wait * share
    explanation = Explanation(
        steps=[step.number for step in steps],
        sentence="",
        total=mean(b for row in broken for b in row),
        by_step=[mean(row) for row in broken],
        by_rank=[mean(row[rank] for row in broken) for rank in range(world)],
        causes=sum((cost.causes for cost in expert), Causes()).scaled(share),
        legs=legs.legs(steps, taken),
        layers=legs.layers(steps, taken),
        waited_for=waited_for,
        hosts=[r.host for r in steps[0].ranks],
        bytes=legs.matrix(steps),
        load=[step.load for step in steps],
        audit=any(step.audit for step in steps),
    )
    return replace(explanation, sentence=sentence(explanation))

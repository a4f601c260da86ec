"""From recorded steps to what is told of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from moesys.measure import legs
from moesys.measure.attribute import Cost, costs
from moesys.measure.breakdown import breakdown, mean
from moesys.measure.choice import explained
from moesys.measure.explanation import Causes, Explanation
from moesys.measure.sentence import sentence
from moesys.measure.step import DEEP_EP, Step


def of_run(steps: Sequence[Step]) -> Explanation | None:
    """The explanation of those recorded steps of a run's folder that `choice.explained` takes; None of none."""
    choice = explained(steps)
    return explain(choice.steps, [choice.note] if choice.note else []) if choice.steps else None


def explain(steps: Sequence[Step], notes: Sequence[str] = ()) -> Explanation:
    """The explanation of `steps`, at least one and all of the same ranks; `notes` are told after the sentence."""
    taken = [costs(step) for step in steps]
    broken = [[breakdown(r, c[r.rank]) for r in step.ranks] for step, c in zip(steps, taken, strict=True)]
    ranks = [r.rank for r in steps[0].ranks]
    expert = [c for by_rank in taken for mine in by_rank.values() for c in mine if c.travel.purpose == "expert"]
    share = 1 / (len(steps) * len(ranks))
    waited_for: dict[int, float] = defaultdict(float)
    for cost in expert:
        if cost.last is not None:
            waited_for[cost.last] += cost.wait * share
    explanation = Explanation(
        steps=[step.number for step in steps],
        sentence="",
        total=mean(b for row in broken for b in row),
        by_step=[mean(row) for row in broken],
        by_rank=[mean(row[place] for row in broken) for place in range(len(ranks))],
        causes=sum((cost.causes for cost in expert), Causes()).scaled(share),
        legs=legs.legs(steps, taken),
        layers=legs.layers(steps, taken),
        ranks=ranks,
        waited_for=[waited_for[rank] for rank in ranks],
        hosts=[r.host for r in steps[-1].ranks],
        bytes=legs.matrix(steps),
        load=[step.load for step in steps],
        audit=any(step.audit for step in steps),
        marked=all(step.marked for step in steps),
        untold_because=_untold_because(expert, ranks),
    )
    return replace(explanation, sentence=" ".join([sentence(explanation), *notes]))


def _untold_because(costs: Sequence[Cost], ranks: Sequence[int]) -> str:
    """The reason that waiting cannot be told from moving bytes in some of the costs; "" if it can in all."""
    untold = [cost.travel for cost in costs if cost.untold > 0]
    absent = sorted({rank for t in untold for rank in t.ranks} - set(ranks))
    if not untold:
        return ""
    if len(ranks) == 1:
        return "this is the trace of one rank"
    if any(t.kind == DEEP_EP for t in untold):
        return "DeepEP's kernels wait inside themselves and do not tell their group"
    if absent:
        names = ", ".join(map(str, absent[:4])) + ", …" * (len(absent) > 4)
        return f"the traces of other ranks of its groups ({names}) are missing"
    return "the traces do not tell the ranks of its groups, or when they began"

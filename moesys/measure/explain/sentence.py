"""Says in a few plain words how much time a run spent on all-to-all."""

from __future__ import annotations

from moesys.measure.explain.explanation import Explanation, Layer

NOTEWORTHY = 1.2
"""Least imbalance at which the sentence names a layer's busiest expert."""


def sentence(e: Explanation) -> str:
    """One to three sentences: the share of all-to-all, its exposed part, the causes, and the slowest rank."""
    whole = _whole(e)
    if not e.phases and e.total.exposed + (e.total.hidden or 0) == 0:
        if e.total.hidden is None:
            return f"No all-to-all: every expert is where its tokens are, in steps of {_time(e.total.step)}."
        return f"No all-to-all was seen in {whole}."
    if e.hidden_share is None or e.hidden_share < 0.005:
        text = f"Exposed all-to-all is {_percent(e.exposed_share)} of {whole}."
    else:
        text = f"All-to-all is {_percent(e.exposed_share + e.hidden_share)} of {whole}: "
        text += f"{_percent(e.exposed_share)} exposed, {_percent(e.hidden_share)} hidden behind computation."
    return f"{text} {_why(e)}" if e.exposed_share >= 0.005 else text


def _whole(e: Explanation) -> str:
    """The whole that the shares refer to: "the step of 1.1 s (mean of 18 recorded steps)"."""
    if not e.marked:
        return f"the trace of {_time(e.total.step)}, which does not mark its steps"
    mean = f" (mean of {len(e.steps)} recorded steps)" if len(e.steps) > 1 else ""
    return f"the step of {_time(e.total.step)}{mean}"


def _why(e: Explanation) -> str:
    unattributed = e.causes.unattributed / e.causes.exposed if e.causes.exposed > 0 else 0.0
    if unattributed < 0.02:
        return f"{_cause(e, 'the exposed time')}."
    cannot = f"cannot be divided into waiting and moving bytes: {e.unattributed_because}"
    if unattributed > 0.98:
        return f"The exposed time {cannot}."
    return f"{_percent(unattributed)} of the exposed time {cannot}. {_cause(e, 'the rest')}."


def _cause(e: Explanation, what: str) -> str:
    c, share = e.causes, e.wait_share or 0.0
    if share < 1 / 3:
        return f"{_fraction(1 - share)} of {what} is moving bytes"
    slow = max(range(len(e.waited_for)), key=lambda place: e.waited_for[place])
    mostly = e.waited_for[slow] > 0.5 * sum(e.waited_for)
    whom = f"for rank {e.ranks[slow]}" if mostly else f"for other ranks, most for rank {e.ranks[slow]}"
    text = f"{_fraction(share)} of {what} is waiting {whom}"
    layer = _uneven(e)
    if c.uneven >= c.late and layer is not None:
        return f"{text}, because experts are uneven: {layer}"
    if c.uneven >= 0.2 * (c.uneven + c.late) and layer is not None:
        return f"{text}, in part because experts are uneven: {layer}"
    return f"{text}, which arrives late"


def _uneven(e: Explanation) -> str | None:
    """The most uneven layer with its busiest rank and expert."""
    found = max(e.layers, key=lambda layer: layer.rank_imbalance, default=None)
    if found is None or found.busiest_rank is None:
        return None
    ranks = f"in {found.name} the busiest rank gets {found.rank_imbalance:.3g} times the mean"
    return f"{ranks} (mostly rank {found.busiest_rank}){_expert(found)}"


def _expert(layer: Layer) -> str:
    if layer.busiest_expert is None or layer.expert_imbalance is None or layer.expert_imbalance < NOTEWORTHY:
        return ""
    return f", and the busiest expert {layer.expert_imbalance:.3g} times (mostly expert {layer.busiest_expert})"


def _fraction(x: float) -> str:
    """The share in words where a word is exact enough."""
    words = ((0.97, "Nearly all"), (0.72, "Three quarters"), (0.63, "Two thirds"), (0.46, "Half"), (0.29, "A third"))
    for least, word in words:
        if least <= x < least + 0.07:
            return word
    return _percent(x)


def _percent(x: float) -> str:
    return f"{x:.1%}" if x < 0.095 else f"{x:.0%}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

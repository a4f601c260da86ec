"""What all-to-all cost a run, in a few plain words."""

from __future__ import annotations

from moesys.measure.explanation import Explanation, Layer

NOTEWORTHY = 1.2
"""Imbalance from which a layer's busiest expert is worth naming."""


def sentence(e: Explanation) -> str:
    """One to three sentences: how much, how much of it is seen, what it is spent on, and who is waited for."""
    if not e.legs and e.total.exposed + e.total.hidden == 0:
        return f"No all-to-all: every expert is where its tokens are, in steps of {_time(e.total.step)}."
    share = e.exposed_share + e.hidden_share
    text = f"All-to-all is {_percent(share)} of the step of {_time(e.total.step)}: {_percent(e.exposed_share)} exposed"
    text += f", {_percent(e.hidden_share)} hidden behind computation." if e.hidden_share >= 0.005 else "."
    return f"{text} {_why(e)}" if e.exposed_share >= 0.005 else text


def _why(e: Explanation) -> str:
    c = e.causes
    if e.wait_share < 1 / 3:
        return f"{_fraction(c.transfer / c.exposed)} of what is exposed is moving bytes."
    slow = max(range(len(e.waited_for)), key=lambda rank: e.waited_for[rank])
    mostly = e.waited_for[slow] > 0.5 * sum(e.waited_for)
    whom = f"for rank {slow}" if mostly else f"for other ranks, most for rank {slow}"
    text = f"{_fraction(e.wait_share)} of what is exposed is waiting {whom}"
    layer = _uneven(e)
    if c.uneven >= c.late and layer is not None:
        return f"{text}, because experts are uneven: {layer}."
    if c.uneven >= 0.2 * (c.uneven + c.late) and layer is not None:
        return f"{text}, in part because experts are uneven: {layer}."
    return f"{text}, which arrives late."


def _uneven(e: Explanation) -> str | None:
    """The most uneven layer and who is busiest in it."""
    found = max(e.layers, key=lambda layer: layer.rank_imbalance, default=None)
    if found is None or found.busiest_rank is None:
        return None
    return f"in {found.name} rank {found.busiest_rank} gets {found.rank_imbalance:.2g} times the mean{_expert(found)}"


def _expert(layer: Layer) -> str:
    if layer.busiest_expert is None or layer.expert_imbalance is None or layer.expert_imbalance < NOTEWORTHY:
        return ""
    return f", and expert {layer.busiest_expert} {layer.expert_imbalance:.2g} times"


def _fraction(x: float) -> str:
    """The share in words where words are exact enough."""
    words = ((0.97, "Nearly all"), (0.72, "Three quarters"), (0.63, "Two thirds"), (0.46, "Half"), (0.29, "A third"))
    for least, word in words:
        if least <= x < least + 0.07:
            return word
    return _percent(x)


def _percent(x: float) -> str:
    return f"{x:.1%}" if x < 0.095 else f"{x:.0%}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

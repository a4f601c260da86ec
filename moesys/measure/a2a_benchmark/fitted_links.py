"""Fits the link model to what the benchmark measured. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from moesys.measure.a2a_benchmark.result import CollectiveResult
from moesys.measure.predict.links import LinkModel, fit


def lines(results: Sequence[CollectiveResult]) -> dict[str, LinkModel]:
    """The link model of every collective and group with more than one size, fitted to transfers.

    Models without a bandwidth are left out: see `flat`.
    """
    return {name: line for name, line in _fitted(results).items() if line.per_byte > 0}


def flat(results: Sequence[CollectiveResult]) -> dict[str, LinkModel]:
    """The models without a bandwidth (β = ∞): larger messages took no longer than small ones."""
    return {name: line for name, line in _fitted(results).items() if line.per_byte <= 0}


def _fitted(results: Sequence[CollectiveResult]) -> dict[str, LinkModel]:
    found: dict[str, list[tuple[float, float]]] = {}
    for r in results:
        if r.kind != "all_to_all_uneven" and not r.kind.startswith("dispatch"):
            size = r.limit if r.kind in ("all_to_all", "send_recv") else r.bytes
            for name in (r.group, *r.also):
                found.setdefault(f"{r.kind} {name}", []).append((size, r.transfer))
    return {name: fit(points) for name, points in found.items() if len({b for b, _ in points}) > 1}

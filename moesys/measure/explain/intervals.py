"""Arithmetic of time intervals: sorted lists of (begin, end) that do not overlap."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The time that any of the intervals covers. Empty and reversed intervals cover nothing."""
    merged: list[Interval] = []
    for begin, end in sorted(i for i in intervals if i[1] > i[0]):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def common(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """The time that both lists cover. Each is a result of `union`."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if end > begin:
            found.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """The time that a covers and b does not. Each is a result of `union`."""
    left, j = [], 0
    for begin, end in a:
        while j < len(b) and b[j][1] <= begin:
            j += 1
        k = j
        while k < len(b) and b[k][0] < end:
            if b[k][0] > begin:
                left.append((begin, b[k][0]))
            begin = max(begin, b[k][1])
            k += 1
        if end > begin:
            left.append((begin, end))
    return left


def length(intervals: Iterable[Interval]) -> float:
    """The sum of their lengths."""
    return sum(end - begin for begin, end in intervals)

"""Bytes that limit an exchange: those of the busiest rank inside its node, and those of the busiest node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def limits(sent: Any, nodes: Sequence[object]) -> tuple[float, float]:
    """Most bytes that any rank moves inside its node, and most bytes that any node moves to or from others.

    sent: [sender][receiver] bytes, an array or lists. nodes: the node of each rank.
    """
    if not len(nodes):
        return 0.0, 0.0
    matrix = np.array(sent, dtype=float)
    numbers = {node: i for i, node in enumerate(dict.fromkeys(nodes))}
    member = np.eye(len(numbers))[[numbers[node] for node in nodes]]
    between = member.T @ matrix @ member
    np.fill_diagonal(between, 0)
    np.fill_diagonal(matrix, 0)
    inside = matrix * (member @ member.T)
    return float(max(inside.sum(0).max(), inside.sum(1).max())), float(max(between.sum(0).max(), between.sum(1).max()))

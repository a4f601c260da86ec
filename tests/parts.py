"""A micro-batch in parts without processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moesys.moe.routing import MicroBatch


class Part(MicroBatch):
    """One of the parts; what it says to the others is known from earlier rounds of `together`."""

    def __init__(self, number: int, said: list[list[Tensor]]):
        self.number, self.said, self.size = number, said, len(said)
        self.mine_now: list[Tensor] = []

    def _everybody(self, x: Tensor) -> list[Tensor]:
        place = len(self.mine_now)
        self.mine_now.append(x)
        return [part[place] if place < len(part) else x for part in self.said]

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._everybody(x)).sum(0)

    def gather(self, x_T: Tensor) -> Tensor:
        return torch.cat(self._everybody(x_T))

    def mine(self, rows: int) -> slice:
        return slice(self.number * rows, (self.number + 1) * rows)


def together(parts: int, work: Callable[[int, MicroBatch], Any]) -> list[Any]:
    """What `work(part, scope)` returns for each part, when they all run at the same time."""
    said: list[list[Tensor]] = [[] for _ in range(parts)]
    while True:
        scopes = [Part(n, said) for n in range(parts)]
        results = [work(n, scope) for n, scope in enumerate(scopes)]
        heard = [[x.detach() for x in scope.mine_now] for scope in scopes]
        if len(said[0]) == len(heard[0]) and all(
            torch.equal(a, b) for old, new in zip(said, heard, strict=True) for a, b in zip(old, new, strict=True)
        ):
            return results
        said = heard

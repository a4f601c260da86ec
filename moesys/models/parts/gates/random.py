"""Routing by the token's number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moesys.models.parts.axes import Weight
from moesys.models.parts.gates.kind import NOT_LEARNED, ForceKeys, GateKind

if TYPE_CHECKING:
    from moesys.moe.gates import Gate


class Random(GateKind):
    """Experts at random, the same for a token in every pass."""

    kind = "random"
    summary = "by the token's number"
    keys = ForceKeys
    ignores = NOT_LEARNED
    seeded = True

    def weights(self, hidden: int) -> Iterator[Weight]:
        """Nothing is learned."""
        yield from ()

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe import noise
        from moesys.moe.gates.random import RandomGate

        return RandomGate(self.moe.experts, self.moe.top_k, noise.key(layer, f"choice/{self.moe.gate.seed}"))

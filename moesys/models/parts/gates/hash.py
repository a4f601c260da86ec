"""Routing by the token's id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from moesys.models.parts.axes import Weight
from moesys.models.parts.gate import NOT_LEARNED, ForceKeys, GateKind

if TYPE_CHECKING:
    from moesys.moe.gates import Gate


class HashKeys(ForceKeys):
    """Keys of hash layers."""

    table: Literal["random", "balanced"] = "random"
    """hash: the experts of an id. random: drawn. balanced: each expert has as many of the training data's tokens."""


class Hash(GateKind):
    """Each id has its experts (hash layers, arXiv 2106.04426)."""

    kind = "hash"
    summary = "by the token's id"
    keys = HashKeys
    ignores = NOT_LEARNED
    seeded = True

    def weights(self, hidden: int) -> Iterator[Weight]:
        """Nothing is learned."""
        yield from ()

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe import noise
        from moesys.moe.gates.hashed import HashGate

        m = self.moe
        return HashGate(m.experts, m.top_k, noise.key(layer, f"choice/{m.gate.seed}"), m.gate.table == "balanced")

"""Routing by the token's id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from moesys.models.parts.axes import Weight
from moesys.models.parts.gates.kind import NOT_LEARNED, ForceKeys, GateKind

if TYPE_CHECKING:
    import torch

    from moesys.data.corpus import Corpus
    from moesys.moe.gates import Gate


class HashKeys(ForceKeys):
    """Keys of hash layers."""

    table: Literal["random", "balanced"] = "random"
    """The experts of an id. random: drawn. balanced: each expert has as many of the training data's tokens."""


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
        from moesys.moe.gates.hash import HashGate

        m = self.moe
        return HashGate(m.experts, m.top_k, noise.key(layer, f"choice/{m.gate.seed}"), m.gate.table == "balanced")

    def prepare(self, gates: Mapping[int, Gate], corpus: Corpus, device: torch.device) -> None:
        """Balanced tables follow from the frequencies of ids in the training data."""
        import torch

        from moesys.moe.gates.hash import HashGate

        if self.moe.gate.table != "balanced":
            return
        count_V = torch.from_numpy(corpus.frequencies()).to(device)
        for gate in gates.values():
            assert isinstance(gate, HashGate)  # as it was built
            gate.fit(count_V)

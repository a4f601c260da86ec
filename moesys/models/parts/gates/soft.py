"""Experts that compute mixtures of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moesys.config.section import Dim, Section
from moesys.models.parts.axes import Axis, Kept, Weight
from moesys.models.parts.gates.kind import NOT_LEARNED, SCORE, GateKind, experts_apart

if TYPE_CHECKING:
    from moesys.moe.gates import Gate


class SoftKeys(Section):
    """Keys of Soft MoE."""

    slots: Dim = 1
    """Slots per expert and sequence."""


class Soft(GateKind):
    """Each expert computes slots, mixtures of a sequence's tokens (Soft MoE, arXiv 2308.00951)."""

    kind = "soft"
    summary = "experts compute mixtures of a sequence's tokens (Soft MoE); not causal"
    aliases = ("soft_moe",)
    keys = SoftKeys
    ignores = frozenset({"top_k"}) | NOT_LEARNED
    even = True
    counted = False
    whole = dict.fromkeys(("cp", "tp"), "computes over whole sequences")

    @property
    def slots(self) -> int:
        """Slots of a sequence, over all experts."""
        return self.moe.experts * self.moe.gate.slots

    @property
    def choices(self) -> int:
        """Each slot has its expert."""
        return 1

    @property
    def active(self) -> float:
        """Slots are made of every token: all experts compute for each."""
        return 1.0

    @property
    def even_rows(self) -> bool:
        """Each expert has as many slots."""
        return True

    def rows_per_token(self, seq_len: int) -> float:
        """Slots, as many for every sequence."""
        return self.slots / seq_len

    def multiply_adds(self, weight: Weight, seq_len: int) -> float:
        """Each slot passes one expert."""
        share = self.rows_per_token(seq_len) * self.mean_choices / self.moe.experts
        return share if weight.routed else 1.0

    def kept(self, hidden: int, shape: Any) -> Iterator[Kept]:
        """Shares of tokens in slots, and of slots in tokens, and copies in the type of the run; rows of slots.

        Experts that are elsewhere get rows that are not kept here.
        """
        d, rows = shape.degrees, self.rows_per_token(shape.config.train.seq_len)
        yield Kept(2 * self.slots, "tokens", selective=True, width=SCORE)
        if shape.width < SCORE:
            yield Kept(2 * self.slots, "tokens", selective=experts_apart(shape))
        yield Kept(self.slots, "tokens", plain=False, selective=True, width=SCORE)
        yield Kept((2 if d.ep * d.etp == 1 else 1) * rows * hidden, "tokens", selective=True)

    def flops(self, hidden: int) -> float:
        """From tokens to slots and back."""
        return 4 * self.slots * hidden

    def weights(self, hidden: int) -> Iterator[Weight]:
        """One direction per slot."""
        yield Weight("projection.weight", (Axis("candidate", self.slots), Axis("hidden", hidden)))

    @property
    def token_by_token(self) -> bool:
        """Slots are mixtures of all tokens."""
        return False

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe.gates.soft import SoftGate

        return SoftGate(hidden, self.moe.experts, self.moe.gate.slots)

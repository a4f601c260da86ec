"""One expert per sequence, merged from all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moesys.models.parts.axes import Kept, Weight
from moesys.models.parts.gates.kind import NOT_LEARNED, SCORE, GateKind, experts_apart

if TYPE_CHECKING:
    from moesys.moe.gates import Gate


class Smear(GateKind):
    """One expert per sequence, whose weights are mixtures of all (SMEAR, arXiv 2306.03745)."""

    kind = "smear"
    summary = "one expert per sequence, merged from all (SMEAR); not causal"
    ignores = frozenset({"top_k"}) | NOT_LEARNED
    even = True
    counted = False
    whole = dict.fromkeys(("cp", "tp"), "computes over whole sequences") | dict.fromkeys(
        ("ep", "etp"), "merges the weights of all experts"
    )

    @property
    def choices(self) -> int:
        """The merged expert."""
        return 1

    @property
    def active(self) -> float:
        """The merged expert is made of all."""
        return 1.0

    def multiply_adds(self, weight: Weight, seq_len: int) -> float:
        """A token passes one expert; merging, and the gate, are once for a sequence."""
        once = 1 / seq_len
        return self.mean_choices / self.moe.experts + once if weight.routed else once

    @property
    def token_by_token(self) -> bool:
        """The merged expert is made by all tokens."""
        return False

    def kept(self, hidden: int, shape: Any) -> Iterator[Kept]:
        """The merged expert of each sequence.

        Selective recomputation keeps what merges it, in float32; with experts apart it repeats nothing.
        """
        m = self.moe
        merged = ((2 if m.gated else 1) + 1) * m.ffn_hidden * hidden / shape.config.train.seq_len
        apart = experts_apart(shape)
        yield Kept(merged, "tokens", selective=apart)
        if not apart:
            yield Kept(merged, "tokens", plain=False, selective=True, width=SCORE)

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe.gates.smear import SmearGate

        return SmearGate(hidden, self.moe.experts)

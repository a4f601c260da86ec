"""The orders in which files hold routed experts' matrices. Ours: fc1 [E, H, 2, F] with gate before up, fc2 [E, F, H].

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from moesys.hub.mapping import Stored, whole


class ExpertLayout(Protocol):
    """How a family's files hold routed experts."""

    def stored(self, name: str, shape: Sequence[int], prefix: str) -> list[Stored]:
        """The tensors of the weight `name` of `moesys.moe.Experts`. `prefix`: of the block's tensors.

        Raises:
            KeyError: the files have no such weight.
        """
        ...


@dataclass(frozen=True)
class PerExpert:
    """One matrix per expert and product, [out, in] as `nn.Linear` has them: most families.

    Attributes:
        prefix: of an expert's tensors within the block; {expert} is its number.
        gate, up, down: names of the matrices; no gate: the activation has none.
    """

    prefix: str
    gate: str
    up: str
    down: str

    def stored(self, name: str, shape: Sequence[int], prefix: str) -> list[Stored]:
        """See `ExpertLayout`."""
        found = []
        parts = {"fc1": (self.gate, self.up)[-shape[2] :] if name == "fc1" else (), "fc2": (self.down,)}[name]
        for expert in range(shape[0]):
            for place, matrix in enumerate(parts):
                full = f"{prefix}{self.prefix.format(expert=expert)}{matrix}.weight"
                box = list(whole(shape))
                box[0] = (expert, expert + 1)
                if name == "fc1":
                    box[2] = (place, place + 1)
                found.append(Stored(full, tuple(box), ((3,), (1,)) if name == "fc1" else ((2,), (1,))))
        return found


@dataclass(frozen=True)
class Fused:
    """All experts in one tensor per product.

    Attributes:
        names: their name of each weight of ours within the block.
        dims: by our weight, the weight's dims that each dim of theirs runs over.
    """

    names: Mapping[str, str]
    dims: Mapping[str, tuple[tuple[int, ...], ...]]

    def stored(self, name: str, shape: Sequence[int], prefix: str) -> list[Stored]:
        """See `ExpertLayout`."""
        return [Stored(prefix + self.names[name], whole(shape), self.dims[name])]


TRANSPOSED = {"fc1": ((0,), (2, 3), (1,)), "fc2": ((0,), (2,), (1,))}
"""[E, 2F, H] with all gate rows first, and [E, H, F]: Granite, Qwen3.5."""
ALTERNATING = {
    "fc1": ((0,), (1,), (3, 2)),
    "fc2": ((0,), (1,), (2,)),
    "fc1_bias": ((0,), (2, 1)),
    "fc2_bias": ((0,), (1,)),
}
"""[E, H, 2F] with gate and up in turns, [E, F, H], and biases: GPT-OSS."""

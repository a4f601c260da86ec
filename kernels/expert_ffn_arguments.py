"""Arguments of the experts' feed-forward, for each of its implementations on CPU and GPU."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """The inputs of the operation `moesys::expert_ffn`, in its order.

    `x_TH` are tokens whose rows `index_N` names, or the rows themselves [N, H] where that is None; `row_N` and
    `offsets_T1` are the rows of each token, as in `Permutation`, None where they are not needed. fc1 [E, H, G, F],
    fc2 [E, F, H], bias1 [E, G, F], `counts_E` int64, `weight_N` float32 or wider.
    """

    x_TH: Tensor
    fc1: Tensor
    fc2: Tensor
    counts_E: Tensor
    weight_N: Tensor | None
    bias1: Tensor | None
    index_N: Tensor | None
    row_N: Tensor | None
    offsets_T1: Tensor | None
    kind: str

    @property
    def rows(self) -> int:
        """N."""
        return len(self.x_TH if self.index_N is None else self.index_N)

"""Dispatch of tokens to experts and combine of the results, on one device: a permutation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from moesys.kernels.permute import Permutation, sort_by_expert


class ExpertsFunction(Protocol):
    """The signature of `Experts.forward`: rows sorted by expert, or tokens and their permutation, → outputs alike."""

    def __call__(
        self,
        x_NH: Tensor,
        tokens_per_expert: Tensor,
        weight_N: Tensor | None = None,
        p: Permutation | None = None,
        /,
    ) -> Tensor: ...


@dataclass
class Assignments:
    """Assignments of tokens to experts.

    `token_A` (ascending) and `expert_A` are int64 indices (the token's row in x [T, H]; the expert's
    global number); `weight_A` (float32) multiplies the expert's output. One token may appear any number
    of times, zero included: a token without assignments contributes nothing to the layer's output.

    `rows`: the number of assignments of each expert on every device, where all are equal; None: that is not known.
    """

    token_A: Tensor
    expert_A: Tensor
    weight_A: Tensor
    rows: int | None = field(default=None, kw_only=True)


class Dispatcher:
    """Runs the experts on their tokens, and forms each token's weighted sum.

    Expert parallelism swaps in a subclass that sends tokens to the devices of their experts; nothing else
    in the layer changes.

    Attributes:
        communicates: whether tokens are sent to other devices; the host must know how many, and no graph spans that.
        overlapped_work: work that needs no routed token; a dispatcher that communicates may call it while its
            collectives run.
    """

    communicates = False

    def __init__(self, experts: int):
        self.experts = experts
        self.overlapped_work: Callable[[], object] | None = None

    @contextmanager
    def overlapping(self, work: Callable[[], object] | None) -> Iterator[None]:
        """Let passes inside overlap their communication with `work`; it is forgotten afterwards."""
        self.overlapped_work = work
        try:
            yield
        finally:
            self.overlapped_work = None

    def __call__(self, x_TH: Tensor, routing: Assignments, experts: ExpertsFunction) -> Tensor:
        """Σ over a token's assignments of weight · expert(x): [T, H] in the type of x."""
        p = sort_by_expert(routing.token_A, routing.expert_A, len(x_TH), self.experts)
        # The experts gather, weigh and sum rows themselves, so that none is kept for backward.
        return experts(x_TH, p.counts_E, routing.weight_A.index_select(0, p.order_A), p)

    def run(self, rows_AH: Tensor, counts_E: Tensor, experts: ExpertsFunction, each: int | None = None) -> Tensor:
        """Outputs of the experts for rows [A, H] sorted by expert, `counts_E` int64 [E] of them each.

        `each`: the count of every expert on every device, where all are equal and the host knows it.
        """
        return experts(rows_AH, counts_E)

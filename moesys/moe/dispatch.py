"""Moving tokens to experts and results back, on one device: a permutation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from moesys.kernels.permute import Permutation, sort_by_expert
from moesys.moe.routing import Routing


class ExpertsFunction(Protocol):
    """`Experts.forward`: rows sorted by expert, or tokens with their permutation, → outputs of the same shape."""

    def __call__(
        self,
        x_NH: Tensor,
        tokens_per_expert: Tensor,
        weight_N: Tensor | None = None,
        p: Permutation | None = None,
        /,
    ) -> Tensor: ...


class Dispatcher:
    """Runs the experts on their tokens, and forms each token's weighted sum.

    Expert parallelism swaps in a subclass that sends tokens to the devices of their experts; nothing else
    in the layer changes.

    Attributes:
        travels: whether tokens are sent to other devices; the host must know how many, and no graph spans that.
        meanwhile: work that needs nothing of what travels; a dispatcher that sends tokens may call it while
            they are on their way.
    """

    travels = False

    def __init__(self, experts: int):
        self.experts = experts
        self.meanwhile: Callable[[], object] | None = None

    @contextmanager
    def beside(self, work: Callable[[], object] | None) -> Iterator[None]:
        """Inside, `work` is what may be done meanwhile; nothing of it is kept, however this ends."""
        self.meanwhile = work
        try:
            yield
        finally:
            self.meanwhile = None

    def __call__(self, x_TH: Tensor, routing: Routing, experts: ExpertsFunction) -> Tensor:
        """Σ over a token's assignments of weight · expert(x): [T, H] in the type of x."""
        p = sort_by_expert(routing.token_A, routing.expert_A, len(x_TH), self.experts)
        # Gathered, weighed and summed by the experts themselves, rows need not be kept for backward.
        return experts(x_TH, p.counts_E, routing.weight_A.index_select(0, p.order_A), p)

    def run(self, rows_AH: Tensor, counts_E: Tensor, experts: ExpertsFunction, each: int | None = None) -> Tensor:
        """Outputs of the experts for rows [A, H] sorted by expert, `counts_E` int64 [E] of them each.

        `each`: all of these, on every device, where the host knows it.
        """
        return experts(rows_AH, counts_E)

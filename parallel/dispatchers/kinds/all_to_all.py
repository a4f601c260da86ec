"""The description of dispatch by uneven all-to-alls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moesys.parallel.dispatchers.kind import COUNT, WEIGHT, Beside, DispatcherKind, Transfer, assignments, places

if TYPE_CHECKING:
    from moesys.parallel.cost import StepShape
    from moesys.parallel.dispatchers.base import ExpertParallelDispatcher
    from moesys.parallel.dispatchers.ranks import ExpertRanks


class AllToAll(DispatcherKind):
    """Each row to the ranks that hold its expert (GShard, arXiv 2006.16668)."""

    kind = "all_to_all"
    summary = "each row to the ranks of its expert"
    aliases = ("alltoall", "a2a", "all2all")

    def transfers(self, shape: StepShape) -> Iterator[Transfer]:
        """One row for each choice of a token, and for each slice of its expert."""
        yield Transfer("all_to_all", "all_to_all", self.kept_rows(shape))

    def beside(self, shape: StepShape) -> Iterator[Beside]:
        """Counts of every place, unless all ranks send as many to each, and weights with the rows."""
        moe = shape.config.model.moe
        assert moe is not None
        if not moe.router.even_rows or self.dispatch.chunks > 1:
            yield Beside("all_to_all_counts", COUNT * self.dispatch.chunks * places(shape), chunked=False)
        if moe.router.weighted:
            sent = WEIGHT * assignments(shape)
            yield Beside("all_to_all_weights", sent, True, "all_to_all_weights" if moe.router.learned else "", sent)

    def kept_rows(self, shape: StepShape) -> float:
        """As many as are received, on average."""
        moe, d, t = shape.config.model.moe, shape.degrees, shape.config.train
        assert moe is not None
        rows = shape.sequence_tokens / (d.cp * d.tp) * moe.router.rows_per_token(t.seq_len)
        return assignments(shape) / rows

    def build(self, ranks: ExpertRanks) -> Callable[[int], ExpertParallelDispatcher]:
        """An `AllToAllDispatcher` for each layer."""
        from moesys.parallel.dispatchers.all_to_all import AllToAllDispatcher

        return lambda experts: AllToAllDispatcher(experts, ranks.group, ranks.ep, ranks.etp, **self.options())

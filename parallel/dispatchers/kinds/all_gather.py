"""The description of dispatch by all-gather."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moesys.parallel.dispatchers.kind import COUNT, ID, WEIGHT, Beside, DispatcherKind, Transfer, assignments, places

if TYPE_CHECKING:
    from moesys.parallel.cost import StepShape
    from moesys.parallel.dispatchers.base import ExpertParallelDispatcher
    from moesys.parallel.dispatchers.ranks import ExpertRanks


class AllGather(DispatcherKind):
    """Every rank gets all tokens of its expert group; sums are reduce-scattered."""

    kind = "all_gather"
    summary = "every rank sees all tokens of its expert group (small groups, many experts per token)"
    aliases = ("allgather",)

    def transfers(self, shape: StepShape) -> Iterator[Transfer]:
        """Every token of the group once."""
        yield Transfer("all_gather", "reduce_scatter", self.kept_rows(shape))

    def beside(self, shape: StepShape) -> Iterator[Beside]:
        """Counts of every place and of tokens; then ids and weights of all assignments."""
        moe, ranks = shape.config.model.moe, shape.degrees.ep * shape.degrees.etp
        assert moe is not None
        yield Beside("all_gather_counts", COUNT * ranks * (self.dispatch.chunks * places(shape) + 1), chunked=False)
        every = ranks * assignments(shape)
        yield Beside("all_gather_names", ID * every)
        if moe.router.weighted:
            back = "reduce_scatter_weights" if moe.router.learned else ""
            yield Beside("all_gather_weights", WEIGHT * every, True, back, WEIGHT * every)

    def kept_rows(self, shape: StepShape) -> float:
        """As many as the group has ranks."""
        return shape.degrees.ep * shape.degrees.etp

    def build(self, ranks: ExpertRanks) -> Callable[[int], ExpertParallelDispatcher]:
        """An `AllGatherDispatcher` for each layer."""
        from moesys.parallel.dispatchers.all_gather import AllGatherDispatcher

        options = {"wide": ranks.wide, **self.options()}
        return lambda experts: AllGatherDispatcher(experts, ranks.group, ranks.ep, ranks.etp, **options)

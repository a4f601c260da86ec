"""A dispatcher from outside of moesys, in one file: all-gathers of the tokens and of a table of routing weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from moesys.errors import Problem
from moesys.parallel.dispatchers.kind import DispatcherKind, Transfer

if TYPE_CHECKING:
    from moesys.config.schema import Config
    from moesys.parallel.cost import StepShape
    from moesys.parallel.degrees import Degrees
    from moesys.parallel.dispatchers.ranks import ExpertRanks


class Table(DispatcherKind):
    """Every rank gets all tokens, and their weights as a table [T, places]. It knows no chunks."""

    kind = "table"
    summary = "every rank gets all tokens and a table of their routing weights"
    aliases = ("tabular",)

    def check(self, config: Config, degrees: Degrees) -> list[Problem]:
        if self.dispatch.chunks == 1:
            return []
        rule = f"({self.dispatch.chunks}) must be 1: dispatch table sends a micro-batch at once"
        return [Problem("parallel.dispatch.chunks", rule, "remove it")]

    def transfers(self, shape: StepShape) -> Iterator[Transfer]:
        yield Transfer("all_gather", "reduce_scatter", self.kept_rows(shape))

    def kept_rows(self, shape: StepShape) -> float:
        return shape.degrees.ep * shape.degrees.etp

    def build(self, ranks: ExpertRanks) -> Callable[[int], Any]:
        return lambda experts: _dispatcher()(experts, ranks.group, ranks.ep, ranks.etp, **self.options())


def _dispatcher() -> type[Any]:
    """The dispatcher's class; torch is imported here alone."""
    from moesys.parallel.async_collectives import all_gather_autograd, reduce_scatter_autograd
    from moesys.parallel.dispatchers.base import ExpertParallelDispatcher, compute_experts, in_progress

    class TableDispatcher(ExpertParallelDispatcher):
        """Every rank has as many tokens."""

        def chunk_steps(self, x_TH, token_A, place_A, weight_A, chunks, experts, each=None):
            return [self._chunk(x_TH, token_A, place_A, weight_A, experts)]

        def _chunk(self, x_TH, token_A, place_A, weight_A, experts):
            table_TP = weight_A.new_zeros(len(x_TH), self.places).index_put((token_A, place_A), weight_A)
            rows = all_gather_autograd(x_TH, self.group, tag=self.tag("dispatch"))
            weights = all_gather_autograd(table_TP, self.group, "_weights", self.tag("dispatch"))
            yield from in_progress(rows, weights)
            every_TH, start = rows.wait(), self.group.rank() * self.local
            own_TE = weights.wait()[:, start : start + self.local]
            token, expert = own_TE.detach().nonzero().unbind(1)
            sums = compute_experts(every_TH, token, expert, own_TE[token, expert], self.local, experts)
            reduced = reduce_scatter_autograd(sums, self.group, self.tag("combine"))
            yield from in_progress(reduced)
            return reduced.wait()

    return TableDispatcher

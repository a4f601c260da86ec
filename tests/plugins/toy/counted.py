"""A dispatcher that says on standard error that it was built, and works as all-to-all does."""

from __future__ import annotations

import sys
from collections.abc import Callable

from moesys.parallel.dispatchers.all_to_all import AllToAllDispatcher
from moesys.parallel.dispatchers.base import ExpertParallelDispatcher
from moesys.parallel.dispatchers.kinds.all_to_all import AllToAll
from moesys.parallel.dispatchers.ranks import ExpertRanks


class Counted(AllToAll):
    """All-to-all that is counted."""

    kind = "counted"
    summary = "all_to_all, and a word about it"
    aliases = ()

    def build(self, ranks: ExpertRanks) -> Callable[[int], ExpertParallelDispatcher]:
        """A dispatcher for each layer."""

        def make(experts: int) -> ExpertParallelDispatcher:
            print(f"counted dispatch of {experts} experts", file=sys.stderr, flush=True)
            return AllToAllDispatcher(experts, ranks.group, ranks.ep, ranks.etp, **self.options())

        return make

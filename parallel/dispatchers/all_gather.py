"""Dispatch by all-gather: every rank gets all tokens, computes its experts, and sums are reduce-scattered."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from moesys.moe.dispatch import ExpertsFunction
from moesys.parallel import comm
from moesys.parallel.async_collectives import all_gather_autograd, reduce_scatter_autograd
from moesys.parallel.dispatchers.base import ChunkSteps, ExpertParallelDispatcher, compute_experts, in_progress
from moesys.parallel.dispatchers.chunks import chunk_bounds, chunk_of


@dataclass(eq=False, repr=False)
class AllGatherDispatcher(ExpertParallelDispatcher):
    """Gathers the tokens of all ranks, and reduce-scatters the outputs of each rank's experts.

    For small groups or many experts per token: a rank sends and receives every token once, however many
    experts it has. Assignments may be uneven. Where tokens are too, each chunk is padded to the most of any
    rank. Every rank splits its own tokens into chunks, so no rank needs the others' sizes before the counts arrive.

    Args:
        wide: sum over the ranks in float32, as Megatron-Core does, for twice the bytes of combine. Sums of narrower
            numbers depend on the order of the ranks, which differs from rank to rank: equal tokens have equal outputs
            only if they are on one rank.
    """

    wide: bool = False

    def chunk_steps(
        self,
        x_TH: Tensor,
        token_A: Tensor,
        place_A: Tensor,
        weight_A: Tensor | None,
        chunks: int,
        experts: ExpertsFunction,
        each: int | None = None,
    ) -> list[ChunkSteps]:
        tokens, ranks, rank = len(x_TH), self.group.size(), self.group.rank()
        key_A = chunk_of(token_A, tokens, chunks) * self.places + place_A
        count = torch.zeros(chunks * self.places + 1, dtype=torch.int64, device=key_A.device)
        count.scatter_add_(0, key_A, torch.ones_like(key_A))
        count[-1] = tokens
        table = (
            comm.start_all_gather(count, self.group, "all_gather_counts", self.tag("dispatch")).wait().view(ranks, -1)
        )
        count_RCP = table[:, :-1].view(ranks, chunks, ranks, self.local)
        # The one synchronisation: assignments of each rank and chunk, and those for this rank's experts.
        counts = torch.stack((count_RCP.sum((2, 3)), count_RCP[:, :, rank].sum(2)), 1).flatten(1)
        sizes = torch.cat((counts, table[:, -1:]), 1).tolist()
        assigned, mine = [s[:chunks] for s in sizes], [s[chunks:-1] for s in sizes]
        starts = chunk_bounds(tokens, chunks)
        padded = _most([s[-1] for s in sizes], chunks)
        ends = [0, *accumulate(assigned[rank])]
        result = []
        for c in range(chunks):
            rows = x_TH[starts[c] : starts[c + 1]]
            chosen = slice(ends[c], ends[c + 1])
            packed_A = (token_A[chosen] - starts[c]) * self.places + place_A[chosen]
            weight = None if weight_A is None else weight_A[chosen]
            room = max(s[c] for s in assigned), sum(s[c] for s in mine)
            own = len(rows)
            rows = rows if own == padded[c] else pad(rows, (0, 0, 0, padded[c] - own))
            result.append(self._chunk(rows, own, packed_A, weight, room, experts))
        return result

    def _chunk(
        self,
        x_TH: Tensor,
        tokens: int,
        packed_A: Tensor,
        weight_A: Tensor | None,
        room: tuple[int, int],
        experts: ExpertsFunction,
    ) -> ChunkSteps:
        """The steps of a chunk of `tokens` and padding, x [T, H].

        `packed_A`: token · places + place; `room`: the most assignments of a rank, and those for this one.
        """
        most, mine = room
        tag = self.tag("dispatch")
        rows = all_gather_autograd(x_TH, self.group, tag=tag, codec=self.codec(x_TH))
        fill = (0, most - len(packed_A))
        ids = comm.start_all_gather(pad(packed_A, fill, value=-1), self.group, "all_gather_names", tag)
        weights = None
        if weight_A is not None:
            weights = all_gather_autograd(pad(weight_A, fill), self.group, "_weights", tag)
        yield from in_progress(rows, ids, weights)
        every_TH, packed, weight = rows.wait(), ids.wait(), None if weights is None else weights.wait()
        rank, place = self.group.rank(), packed % self.places
        chosen = torch.nonzero_static((packed >= 0) & (place // self.local == rank), size=mine).squeeze(1)
        token = chosen // most * len(x_TH) + packed[chosen] // self.places
        if weight is not None:
            weight = weight.index_select(0, chosen)
        sums = compute_experts(every_TH, token, place[chosen] - rank * self.local, weight, self.local, experts)
        wide = torch.promote_types(sums.dtype, torch.float32) if self.wide else sums.dtype
        reduced = reduce_scatter_autograd(sums.to(wide), self.group, self.tag("combine"))
        yield from in_progress(reduced)
        return reduced.wait()[:tokens].to(sums.dtype)


def _most(tokens: list[int], chunks: int) -> list[int]:
    """The most tokens of any rank in each chunk; `tokens`: how many each rank has."""
    cuts = [chunk_bounds(count, chunks) for count in tokens]
    return [max(ends[c + 1] - ends[c] for ends in cuts) for c in range(chunks)]

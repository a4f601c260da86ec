"""Dispatch by uneven all-to-alls: counts first, then one row per assignment; results return the same way."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from moesys.kernels.permute import Permutation, permute, sort_by_expert, unpermute
from moesys.moe.dispatch import ExpertsFunction
from moesys.parallel import comm
from moesys.parallel.dispatchers.travelling import Journey, TravellingDispatcher, aloft, bounds, chunk_of, cut
from moesys.parallel.flight import fly


class AllToAllDispatcher(TravellingDispatcher):
    """Sends each row to the ranks that hold its expert (GShard, arXiv 2006.16668).

    Routing weights travel with the rows, so that experts weigh their results before they return, and
    nothing that returned need be kept for the weights' gradients.
    """

    def journeys(
        self,
        x_TH: Tensor,
        token_A: Tensor,
        place_A: Tensor,
        weight_A: Tensor | None,
        chunks: int,
        experts: ExpertsFunction,
    ) -> list[Journey]:
        tokens, ranks = len(x_TH), self.group.size()
        key_A = place_A if chunks == 1 else chunk_of(token_A, tokens, chunks) * self.places + place_A
        p = sort_by_expert(token_A, key_A, tokens, chunks * self.places)
        sent_RCE = p.counts_E.view(chunks, ranks, self.local).transpose(0, 1)
        counts = comm.start_counts(sent_RCE, self.group, self.way("dispatch"))
        # What can be done meanwhile; the rows of chunks are not known yet.
        weight_A = None if weight_A is None else weight_A.index_select(0, p.order_A)
        whole = permute(x_TH, p) if chunks == 1 else None
        received_RCE = counts.wait()
        # The one synchronisation of the layer: split sizes are needed on the host.
        send, receive = torch.stack((sent_RCE.sum(2), received_RCE.sum(2))).mT.tolist()
        rows = [sum(sizes) for sizes in send]
        starts = bounds(tokens, chunks)
        x = x_TH.split([b - a for a, b in pairwise(starts)])
        pieces = cut(p, starts, [0, *accumulate(rows)])
        weights = [None] * chunks if weight_A is None else weight_A.split(rows)
        return [
            self._journey(x[c], whole, pieces[c], weights[c], send[c], receive[c], received_RCE[:, c], experts)
            for c in range(chunks)
        ]

    def _journey(
        self,
        x_TH: Tensor,
        rows_AH: Tensor | None,
        p: Permutation,
        weight_A: Tensor | None,
        send: list[int],
        receive: list[int],
        received_RE: Tensor,
        experts: ExpertsFunction,
    ) -> Journey:
        rows_AH = permute(x_TH, p) if rows_AH is None else rows_AH
        way = self.way("dispatch")
        rows = fly(rows_AH, send, receive, self.group, way=way, codec=self.codec(x_TH))
        del rows_AH
        weights = None
        if weight_A is not None:
            weights = fly(weight_A, send, receive, self.group, "all_to_all_weights", way)
        order = None if self.local == 1 else by_expert(received_RE, sum(receive))
        yield from aloft(rows, weights)
        weight = None if weights is None else weights.wait()
        if weight is not None and order is not None:
            weight = weight.index_select(0, order.token_A)
        out = experts(rows.wait(), received_RE.sum(0), weight, order)
        back = fly(out, receive, send, self.group, way=self.way("combine"))
        yield from aloft(back)
        return unpermute(back.wait(), p)


def by_expert(received_RE: Tensor, rows: int) -> Permutation:
    """Sorts by expert what arrived by source rank, then expert: whole blocks change places."""
    blocks_ER = received_RE.t().contiguous()
    here_RE = _starts(received_RE)
    there_ER = _starts(blocks_ER)
    row = torch.arange(rows, device=received_RE.device)

    def moved(by: Tensor, counts: Tensor) -> Tensor:
        return row + by.flatten().repeat_interleave(counts.flatten(), output_size=rows)

    source = moved(here_RE.t() - there_ER, blocks_ER)
    target = moved(there_ER.t() - here_RE, received_RE)
    ones = torch.arange(rows + 1, device=received_RE.device)
    return Permutation(source, target, ones, source, received_RE.sum(0))


def _starts(counts: Tensor) -> Tensor:
    """Where each block begins when all lie one after another."""
    flat = counts.flatten()
    return (flat.cumsum(0) - flat).view_as(counts)

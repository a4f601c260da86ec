"""Dispatch by uneven all-to-alls: counts first, then one row per assignment; results return the same way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from moesys.kernels.choose import choose
from moesys.kernels.permute import Permutation, permute, sort_by_expert, unpermute
from moesys.moe.dispatch import ExpertsFunction
from moesys.parallel import comm
from moesys.parallel.dispatchers.travelling import Journey, TravellingDispatcher, aloft, bounds, chunk_of, cut
from moesys.parallel.flight import fly

Blocks = Sequence[Sequence[int]]
"""Rows from each rank for each of this rank's experts."""


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
        each: int | None = None,
    ) -> list[Journey]:
        tokens, ranks = len(x_TH), self.group.size()
        key_A = place_A if chunks == 1 else chunk_of(token_A, tokens, chunks) * self.places + place_A
        p = sort_by_expert(token_A, key_A, tokens, chunks * self.places)
        sent_RCE = p.counts_E.view(chunks, ranks, self.local).transpose(0, 1)
        sizes = self._even(each) if chunks == 1 else []
        counts = None if sizes else comm.start_counts(sent_RCE, self.group, self.way("dispatch"))
        # What can be done meanwhile; the rows of chunks are not known yet.
        weight_A = None if weight_A is None else weight_A.index_select(0, p.order_A)
        whole = permute(x_TH, p) if chunks == 1 else None
        received_RCE = sent_RCE if counts is None else counts.wait()
        if not sizes:
            # The one synchronisation of the layer: split sizes are needed on the host.
            sizes = torch.cat((sent_RCE.sum(2, keepdim=True), received_RCE), 2).transpose(0, 1).tolist()
        send = [[source[0] for source in chunk] for chunk in sizes]
        blocks = [[source[1:] for source in chunk] for chunk in sizes]
        rows = [sum(chunk) for chunk in send]
        starts = bounds(tokens, chunks)
        x = x_TH.split([b - a for a, b in pairwise(starts)])
        pieces = cut(p, starts, [0, *accumulate(rows)])
        weights = [None] * chunks if weight_A is None else weight_A.split(rows)
        return [
            self._journey(x[c], whole, pieces[c], weights[c], send[c], blocks[c], received_RCE[:, c], experts)
            for c in range(chunks)
        ]

    def _even(self, each: int | None) -> list[list[list[int]]]:
        """For each source of the one chunk: rows that go there, and that come for each expert; [] if nobody knows."""
        return [] if each is None else [[[self.local * each, *[each] * self.local]] * self.group.size()]

    def _journey(
        self,
        x_TH: Tensor,
        rows_AH: Tensor | None,
        p: Permutation,
        weight_A: Tensor | None,
        send: list[int],
        blocks: list[list[int]],
        received_RE: Tensor,
        experts: ExpertsFunction,
    ) -> Journey:
        rows_AH = permute(x_TH, p) if rows_AH is None else rows_AH
        way, receive = self.way("dispatch"), [sum(source) for source in blocks]
        rows = fly(rows_AH, send, receive, self.group, way=way, codec=self.codec(x_TH))
        del rows_AH
        weights = None
        if weight_A is not None:
            weights = fly(weight_A, send, receive, self.group, "all_to_all_weights", way)
        by_index = self.local > 1 and choose(x_TH, "permute") == "triton"
        order = by_expert(received_RE, sum(receive)) if by_index else None
        yield from aloft(rows, weights)
        weight = None if weights is None else weights.wait()
        if order is not None:
            weight = None if weight is None else weight.index_select(0, order.token_A)
            out = experts(rows.wait(), received_RE.sum(0), weight, order)
        else:
            # Where nothing gathers rows as it multiplies, whole blocks are moved faster than one row at a time.
            weight = None if weight is None else turned(weight, blocks)
            out = experts(turned(rows.wait(), blocks), received_RE.sum(0), weight)
            out = turned(out, list(zip(*blocks, strict=True)))
        back = fly(out, receive, send, self.group, way=self.way("combine"))
        yield from aloft(back)
        return unpermute(back.wait(), p)


def turned(rows: Tensor, blocks: Blocks) -> Tensor:
    """Rows in blocks of these sizes, a matrix of blocks row by row, with the blocks of its transpose."""
    return rows if min(len(blocks), len(blocks[0])) == 1 else _Turned.apply(rows, blocks)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, blocks):  # type: ignore[override]
        ctx.back = list(zip(*blocks, strict=True))
        parts = rows.split([size for row in blocks for size in row])
        return torch.cat([part for column in range(len(ctx.back)) for part in parts[column :: len(ctx.back)]])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return _Turned.apply(grad, ctx.back), None


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

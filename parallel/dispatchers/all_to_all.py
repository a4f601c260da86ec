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
from moesys.parallel.async_collectives import all_to_all_autograd
from moesys.parallel.dispatchers.base import ChunkSteps, ExpertParallelDispatcher, in_progress
from moesys.parallel.dispatchers.chunks import chunk_bounds, chunk_of, split_by_chunk

Blocks = Sequence[Sequence[int]]
"""Rows from each rank for each of this rank's experts."""


class AllToAllDispatcher(ExpertParallelDispatcher):
    """Sends each row to the ranks that hold its expert (GShard, arXiv 2006.16668).

    Routing weights are sent with the rows, so that experts weigh their outputs before they return. Returned rows
    need not be kept for the weights' gradients.
    """

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
        tokens, ranks = len(x_TH), self.group.size()
        key_A = place_A if chunks == 1 else chunk_of(token_A, tokens, chunks) * self.places + place_A
        p = sort_by_expert(token_A, key_A, tokens, chunks * self.places)
        sent_RCE = p.counts_E.view(chunks, ranks, self.local).transpose(0, 1)
        sizes = self._even(each) if chunks == 1 else []
        counts = None if sizes else comm.start_all_to_all_counts(sent_RCE, self.group, self.tag("dispatch"))
        # This overlaps with the counts; the rows of several chunks are not known yet.
        weight_A = None if weight_A is None else weight_A.index_select(0, p.order_A)
        whole = permute(x_TH, p) if chunks == 1 else None
        received_RCE = sent_RCE if counts is None else counts.wait()
        if not sizes:
            # The one synchronisation of the layer: split sizes are needed on the host.
            sizes = torch.cat((sent_RCE.sum(2, keepdim=True), received_RCE), 2).transpose(0, 1).tolist()
        send = [[source[0] for source in chunk] for chunk in sizes]
        blocks = [[source[1:] for source in chunk] for chunk in sizes]
        rows = [sum(chunk) for chunk in send]
        starts = chunk_bounds(tokens, chunks)
        x = x_TH.split([b - a for a, b in pairwise(starts)])
        pieces = split_by_chunk(p, starts, [0, *accumulate(rows)])
        weights = [None] * chunks if weight_A is None else weight_A.split(rows)
        return [
            self._chunk(x[c], whole, pieces[c], weights[c], send[c], blocks[c], received_RCE[:, c], experts)
            for c in range(chunks)
        ]

    def _even(self, each: int | None) -> list[list[list[int]]]:
        """Rows to each source of the one chunk, and rows from it for each expert; [] if unknown."""
        return [] if each is None else [[[self.local * each, *[each] * self.local]] * self.group.size()]

    def _chunk(
        self,
        x_TH: Tensor,
        rows_AH: Tensor | None,
        p: Permutation,
        weight_A: Tensor | None,
        send: list[int],
        blocks: list[list[int]],
        received_RE: Tensor,
        experts: ExpertsFunction,
    ) -> ChunkSteps:
        rows_AH = permute(x_TH, p) if rows_AH is None else rows_AH
        tag, receive = self.tag("dispatch"), [sum(source) for source in blocks]
        rows = all_to_all_autograd(rows_AH, send, receive, self.group, tag=tag, codec=self.codec(x_TH))
        del rows_AH
        weights = None
        if weight_A is not None:
            weights = all_to_all_autograd(weight_A, send, receive, self.group, "all_to_all_weights", tag)
        by_index = self.local > 1 and choose(x_TH, "permute") == "triton"
        order = by_expert(received_RE, sum(receive)) if by_index else None
        yield from in_progress(rows, weights)
        weight = None if weights is None else weights.wait()
        if order is not None:
            weight = None if weight is None else weight.index_select(0, order.token_A)
            out = experts(rows.wait(), received_RE.sum(0), weight, order)
        else:
            # No kernel here gathers rows as it multiplies: moving whole blocks is faster than one row at a time.
            weight = None if weight is None else transpose_blocks(weight, blocks)
            out = experts(transpose_blocks(rows.wait(), blocks), received_RE.sum(0), weight)
            out = transpose_blocks(out, list(zip(*blocks, strict=True)))
        back = all_to_all_autograd(out, receive, send, self.group, tag=self.tag("combine"))
        yield from in_progress(back)
        return unpermute(back.wait(), p)


def transpose_blocks(rows: Tensor, blocks: Blocks) -> Tensor:
    """Block transpose: rows that lie in a matrix of blocks of these sizes, row by row, in the order of its columns.

    `rows` [N, …].
    """
    return rows if min(len(blocks), len(blocks[0])) == 1 else _TransposeBlocks.apply(rows, blocks)


class _TransposeBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, blocks):  # type: ignore[override]
        ctx.back = list(zip(*blocks, strict=True))
        parts = rows.split([size for row in blocks for size in row])
        return torch.cat([part for column in range(len(ctx.back)) for part in parts[column :: len(ctx.back)]])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return _TransposeBlocks.apply(grad, ctx.back), None


def by_expert(received_RE: Tensor, rows: int) -> Permutation:
    """The permutation that sorts by expert the rows that were received by source rank, then expert."""
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
    """First row of each block when all lie one after another."""
    flat = counts.flatten()
    return (flat.cumsum(0) - flat).view_as(counts)

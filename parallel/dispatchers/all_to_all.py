"""Dispatch by two uneven all-to-alls: counts first, then rows; results return the same way."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.kernels.permute import Permutation, permute, unpermute
from moesys.moe.dispatch import Dispatcher, ExpertsFunction
from moesys.parallel import comm


class AllToAllDispatcher(Dispatcher):
    """Sends each row to the ranks that hold its expert (GShard, arXiv 2006.16668).

    Args:
        experts: E of the layer.
        group: ep · etp ranks; rank i·etp + j holds slice j of the experts i·E/ep … (i+1)·E/ep − 1.
        ep, etp: how many ways the experts, and each expert's inner size, are split.

    An expert split `etp` ways along its inner size is the sum of `etp` smaller experts, so a row goes
    to each of them and the partial results are added where it came from: the numbers of a smaller
    expert need no collective of their own, and ranks may hold any number of rows, none included.
    """

    def __init__(self, experts: int, group: dist.ProcessGroup, ep: int, etp: int):
        super().__init__(experts)
        self.group, self.ep, self.etp = group, ep, etp

    def combine(self, x_TH: Tensor, p: Permutation, weight_A: Tensor, experts: ExpertsFunction) -> Tensor:
        return unpermute(self.run(permute(x_TH, p), p.counts_E, experts), p, weight_A)

    def run(self, rows_AH: Tensor, counts_E: Tensor, experts: ExpertsFunction) -> Tensor:
        local = self.experts // self.ep
        sent_RE = counts_E.view(self.ep, local).repeat_interleave(self.etp, dim=0)
        received_RE = comm.exchange_counts(sent_RE, self.group)
        # The one synchronisation of the layer: split sizes are needed on the host.
        send, receive = torch.stack((sent_RE.sum(1), received_RE.sum(1))).tolist()
        copies = self._copies(counts_E)
        outgoing = rows_AH if copies is None else rows_AH.index_select(0, copies)
        arrived = comm.all_to_all(outgoing, send, receive, self.group)
        by_expert = _by_expert(received_RE)
        out = experts(arrived.index_select(0, by_expert), received_RE.sum(0))
        back = comm.all_to_all(out.index_select(0, by_expert.argsort()), receive, send, self.group)
        return back if copies is None else torch.zeros_like(rows_AH).index_add(0, copies, back)

    def _copies(self, counts_E: Tensor) -> Tensor | None:
        """Which row each outgoing one is a copy of: every rank's block `etp` times; None if once."""
        if self.etp == 1:
            return None
        blocks = counts_E.view(self.ep, -1).sum(1).tolist()
        rows = torch.arange(sum(blocks), device=counts_E.device).split(blocks)
        return torch.cat([block.repeat(self.etp) for block in rows])


def _by_expert(received_RE: Tensor) -> Tensor:
    """The order that sorts rows by expert, when they arrive by source rank, then expert."""
    ranks, local = received_RE.shape
    expert = torch.arange(local, device=received_RE.device).repeat(ranks)
    return expert.repeat_interleave(received_RE.flatten()).argsort(stable=True)

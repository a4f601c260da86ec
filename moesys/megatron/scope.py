"""Megatron-Core's process groups for this project's layer, and the distribution of a micro-batch over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.moe.routing import MicroBatch, Tokens
from moesys.parallel import comm


@dataclass(frozen=True)
class ProcessGroups:
    """The process groups that an MoE layer needs, by Megatron's names.

    `tp_ep` holds the ranks of an expert group: rank i · etp + j has slice j of the i-th share of the experts.
    """

    tp: dist.ProcessGroup
    ep: dist.ProcessGroup
    expt_tp: dist.ProcessGroup
    expt_dp: dist.ProcessGroup
    tp_ep: dist.ProcessGroup
    tp_cp: dist.ProcessGroup
    tp_dp_cp: dist.ProcessGroup

    @classmethod
    def of(cls, collection: Any = None) -> ProcessGroups:
        """The groups of a `ProcessGroupCollection`; `parallel_state`'s take the place of missing ones."""
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

        names = cls.__dataclass_fields__
        found: dict[str, Any] = {name: getattr(collection, name, None) for name in names}
        if None in found.values():
            default = get_default_pg_collection()
            found = {name: getattr(default, name) if group is None else group for name, group in found.items()}
        return cls(**found)


@dataclass(frozen=True)
class MegatronTokens(Tokens):
    """Tokens in Megatron's order: `sequences` B of them at each of S positions, T = S · B rows."""


class MegatronScope(MicroBatch):
    """A micro-batch with sequences that are split over the tensor and context ranks of `groups`."""

    def __init__(self, groups: ProcessGroups):
        self.groups, self.size = groups, groups.tp_cp.size()
        self.real: Tensor | int = 0
        """The number of real tokens in the last input of this rank."""
        self.sequences = 1
        """The number of its sequences."""

    def sum(self, x: Tensor) -> Tensor:
        """`x`, any shape, summed over tensor and context ranks."""
        return x if self.size == 1 else comm.all_reduce(x, self.groups.tp_cp)

    def sum_global(self, x: Tensor) -> Tensor:
        """`x`, any shape, summed over tensor, context and data ranks."""
        return x if self.groups.tp_dp_cp.size() == 1 else comm.all_reduce(x, self.groups.tp_dp_cp)

    def gather(self, x_T: Tensor) -> Tensor:
        """x_T [T, …] of all tensor and context ranks, one after another."""
        return x_T if self.size == 1 else comm.all_gather(x_T, self.groups.tp_cp)

    def mine(self, rows: int) -> slice:
        """The slice of gathered tokens that is this rank's, which has `rows`."""
        start = self.groups.tp_cp.rank() * rows
        return slice(start, start + rows)

    def mark(self, tokens: Tensor | None, batch: int, sequence: int, device: torch.device) -> MegatronTokens:
        """The tokens of an input [S, B, H] (`batch` is S here); `tokens` bool [S, B] says which are real."""
        rows = batch * sequence
        number_T = torch.arange(rows, device=device) + self.mine(rows).start
        real_T = None if tokens is None else tokens.reshape(-1)
        self.sequences, self.real = sequence, rows if real_T is None else real_T.sum()
        return MegatronTokens(number_T, sequence, real_T=real_T)

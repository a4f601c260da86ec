"""Dispatch in levels: a token is sent once to each node, then spread inside the node.

N nodes of L ranks each, T tokens, A assignments, H hidden, C chunks, D destinations of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from moesys.kernels.permute import permute, unpermute
from moesys.moe.dispatch import ExpertsFunction
from moesys.parallel import comm
from moesys.parallel.async_collectives import all_to_all_autograd
from moesys.parallel.comm import Tag
from moesys.parallel.dispatchers.base import ChunkSteps, ExpertParallelDispatcher, compute_experts, in_progress
from moesys.parallel.dispatchers.chunks import chunk_bounds, chunk_of
from moesys.parallel.dispatchers.exchange import IdCodec, LevelExchange, Sizes
from moesys.parallel.dispatchers.levels import Level


@dataclass(eq=False, repr=False)
class HierarchicalDispatcher(ExpertParallelDispatcher):
    """Sends a token once to each node, and there once to each rank, that holds any of its experts.

    Between nodes, ranks of equal place in their nodes exchange rows ("rail"); inside a node all ranks do. Combine sums
    over a rank's experts first, then over the ranks of the node, so that one row per token and node returns. Routing
    weights and expert ids are sent with the rows. After DeepSeek-V3's node-limited dispatch (arXiv 2412.19437) and
    Tutel's two-level all-to-all (arXiv 2206.03382), which sends every assignment.

    Args:
        levels: one or two, outermost first; together they reach every rank of `group` exactly once.
    """

    levels: Sequence[Level] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.levels = tuple(self.levels) or (Level("flat", self.group, tuple(range(self.group.size()))),)
        self._destinations: dict[str, Tensor] = {}
        self._path = torch.empty(0)

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
        self._remember(token_A.device)
        tokens = len(x_TH)
        sizes, assigned = self._sizes(token_A, place_A // self.local, tokens, chunks)
        parts = zip(
            pairwise(chunk_bounds(tokens, chunks)),
            token_A.split(assigned),
            place_A.split(assigned),
            [None] * chunks if weight_A is None else weight_A.split(assigned),
            sizes,
            strict=True,
        )
        return [
            self._chunk(x_TH[a:b], token - a, place, weight, self.levels, size, experts)
            for (a, b), token, place, weight, size in parts
        ]

    def _remember(self, device: torch.device) -> None:
        """Keep the destinations of every rank on the device: of each level, and of all levels as one number."""
        if self._path.device != device or not self._destinations:
            self._destinations = {level.name: torch.tensor(level.destination, device=device) for level in self.levels}
            path = torch.zeros(self.group.size(), dtype=torch.int64, device=device)
            for level in self.levels:
                path = path * level.group.size() + self._destinations[level.name]
            self._path = path

    def _sizes(self, token_A: Tensor, rank_A: Tensor, tokens: int, chunks: int) -> tuple[list[list[Sizes]], list[int]]:
        """Sizes of each chunk on each level, and its assignments: exchanged level by level, then read once."""
        tables = self._tables(token_A, self._path[rank_A], tokens, chunks)
        known, received = [tables[-1].flatten(1).sum(1, keepdim=True)], []
        for level in self.levels:
            arrived = _exchange(tables, level, self.tag("dispatch", level.name))
            received.append((arrived[0], _by_first(arrived[-1])))
            known += [tables[0], _by_first(tables[-1]), *received[-1]]
            # The next level sends on what this one received from all its ranks together.
            tables = [table.sum(1) for table in arrived[1:]]
        # The one synchronisation of the layer: split sizes are needed on the host.
        widths = [part.shape[1] for part in known]
        sizes, assigned = [], []
        ends = [0, *accumulate(widths)]
        for c, row in enumerate(torch.cat(known, 1).tolist()):
            (count,), *counts = (row[a:b] for a, b in pairwise(ends))
            assigned.append(count)
            levels = enumerate(received)
            sizes.append([Sizes.of(counts[4 * i : 4 * i + 4], rows[c], ids[c]) for i, (rows, ids) in levels])
        return sizes, assigned

    def _tables(self, token_A: Tensor, path_A: Tensor, tokens: int, chunks: int) -> list[Tensor]:
        """Counts by chunk and destinations: rows of each level [C, D₁], [C, D₁, D₂], …, then those of assignments."""
        ways = [level.group.size() for level in self.levels]
        chunk_T = chunk_of(torch.arange(tokens, device=token_A.device), tokens, chunks)
        tables = []
        for depth in range(1, len(ways) + 1):
            reach, rest = prod(ways[:depth]), prod(ways[depth:])
            wanted = torch.zeros(tokens * reach, dtype=torch.int64, device=token_A.device)
            wanted.index_fill_(0, token_A * reach + path_A // rest, 1)
            table = wanted.new_zeros(chunks, reach).index_add_(0, chunk_T, wanted.view(tokens, reach))
            tables.append(table.view(chunks, *ways[:depth]))
        key_A = chunk_of(token_A, tokens, chunks) * prod(ways) + path_A
        assigned = torch.zeros(chunks * prod(ways), dtype=torch.int64, device=token_A.device)
        assigned.scatter_add_(0, key_A, torch.ones_like(key_A))
        return [*tables, assigned.view(chunks, *ways)]

    def _chunk(
        self,
        x_TH: Tensor,
        token_A: Tensor,
        place_A: Tensor,
        weight_A: Tensor | None,
        levels: Sequence[Level],
        sizes: Sequence[Sizes],
        experts: ExpertsFunction,
    ) -> ChunkSteps:
        if not levels:
            return compute_experts(x_TH, token_A, place_A % self.local, weight_A, self.local, experts)
        level, size = levels[0], sizes[0]
        exchange = LevelExchange(level, size, token_A, self._destinations[level.name][place_A // self.local], len(x_TH))
        tag = self.tag("dispatch", level.name)
        rows = exchange.send(permute(x_TH, exchange.p), tag, self.codec(x_TH))
        ids = IdCodec(exchange.row_A * self.places + place_A[exchange.order_A])
        if weight_A is None:
            weight_A = torch.ones(len(place_A), device=place_A.device)
        weights = exchange.send_ids(weight_A.index_select(0, exchange.order_A), ids, tag)
        del x_TH  # its copies are sent: nobody keeps it meanwhile
        yield from in_progress(rows, weights)
        weight, packed = weights.wait(), ids.received
        row, place = exchange.rows_of(packed // self.places), packed % self.places
        sums = yield from self._chunk(rows.wait(), row, place, weight, levels[1:], sizes[1:], experts)
        back = all_to_all_autograd(
            sums, size.receive, size.send, level.group, "all_to_all", self.tag("combine", level.name)
        )
        yield from in_progress(back)
        return unpermute(back.wait(), exchange.p)


def _by_first(table: Tensor) -> Tensor:
    """The table [C, D, …] summed over all dims but the first two: [C, D]."""
    return table.flatten(2).sum(2) if table.dim() > 2 else table


def _exchange(tables: Sequence[Tensor], level: Level, tag: Tag) -> list[Tensor]:
    """The parts for this rank of every rank's tables [C, D, …], D destinations: [C, D, …], D sources."""
    moved = [table.movedim(1, 0) for table in tables]
    flat = torch.cat([table.flatten(1) for table in moved], 1)
    received = comm.start_all_to_all_counts(flat, level.group, tag).wait()
    parts = received.split([table[0].numel() for table in moved], 1)
    return [part.view(table.shape).movedim(0, 1) for part, table in zip(parts, moved, strict=True)]

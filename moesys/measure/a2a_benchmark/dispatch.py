"""Times dispatch and combine of real batches of tokens, with experts that return their rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.config.schema import Config
from moesys.kernels.permute import Permutation, permute, unpermute
from moesys.measure.a2a_benchmark.options import BenchmarkOptions
from moesys.measure.a2a_benchmark.result import CollectiveResult, RankTimes
from moesys.measure.a2a_benchmark.timing import timed
from moesys.measure.explain.link_load import limits
from moesys.moe.routing import Routing
from moesys.parallel import comm
from moesys.parallel.dispatchers.build import builder
from moesys.parallel.mesh import ParallelMesh


class DispatchCase:
    """One dispatcher, with tokens whose experts are drawn uniformly, or by Zipf's law with `options.skew`."""

    def __init__(self, kind: str, config: Config, mesh: ParallelMesh, dtype: torch.dtype, options: BenchmarkOptions):
        assert config.model.moe is not None
        self.kind, self.mesh, self.options, self.dtype = kind, mesh, options, dtype
        self.experts = config.model.moe.experts
        dispatch = config.parallel.dispatch.model_copy(update={"kind": kind})
        parallel = config.parallel.model_copy(update={"dispatch": dispatch})
        make = builder(config.model_copy(update={"parallel": parallel}), mesh)
        assert make is not None
        self.dispatcher = make(self.experts)
        draw = torch.Generator().manual_seed(mesh.rank)
        self.x_TH = torch.randn(options.tokens, options.hidden, generator=draw).to(mesh.device, dtype)
        self.routing = self._routing(draw)

    def _routing(self, draw: torch.Generator) -> Routing:
        o = self.options
        chance_E = 1 / torch.arange(1.0, self.experts + 1) ** (o.skew or 0.0)
        expert_A = torch.multinomial(chance_E.expand(o.tokens, -1), o.top_k, generator=draw).flatten()
        token_A = torch.arange(o.tokens).repeat_interleave(o.top_k)
        weight_A = torch.full((len(token_A),), 1 / o.top_k)
        device = self.mesh.device
        return Routing(token_A=token_A.to(device), expert_A=expert_A.to(device), weight_A=weight_A.to(device))

    def call(self) -> Tensor:
        """Send every token to its experts and back; returns the output [T, H]."""
        with torch.no_grad():
            return self.dispatcher(self.x_TH, self.routing, unchanged)

    def measure(self, on_host: dist.ProcessGroup, offset: float, nodes: list[str]) -> CollectiveResult | None:
        """Time the dispatcher on all ranks; the result on rank 0, else None.

        Its `bytes` are those that the busiest rank sends in all-to-alls. Its `limit` are the limiting bytes between
        nodes.
        """
        with comm.record() as events:
            out = self.call()
        wrong = int(((out - self.x_TH).abs() > 0.05 * self.x_TH.abs() + 1e-5).sum()) if self.options.check else 0
        sent = [0] * len(nodes)
        for event in events:
            for peer, size in zip(event.ranks, event.sent, strict=False):
                sent[peer] += size
        own, _ = timed(self.call, None, self.options, on_host, offset, self.mesh.device)
        everyone: list[Any] = [None] * len(nodes)
        dist.all_gather_object(everyone, (RankTimes(own, [], wrong), sent), group=on_host)
        if dist.get_rank() != 0:
            return None
        size = self.mesh.degrees.ep * self.mesh.degrees.etp
        groups = [list(range(i, i + size)) for i in range(0, len(nodes), size)]
        matrix = [row for _, row in everyone]
        name = str(self.dtype).removeprefix("torch.")
        return CollectiveResult.dispatch(
            self.kind, groups, name, matrix, [s for s, _ in everyone], limits(matrix, nodes)
        )


def unchanged(x: Tensor, counts_E: Tensor, weight: Tensor | None = None, p: Permutation | None = None, /) -> Tensor:
    """The rows [N, H] of experts that return their input, times `weight` [A] if given."""
    rows = x if p is None else permute(x, p)
    if weight is not None:
        rows = (rows * weight[:, None]).to(x.dtype)
    return rows if p is None else unpermute(rows, p)

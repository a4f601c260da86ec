"""What tests of dispatchers do in worker processes, importable by name."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesys.config.schema import DispatchConfig
from moesys.moe.layer import Lazy
from moesys.moe.routing import Routing
from moesys.parallel import comm
from moesys.parallel.dispatchers.base import ExpertParallelDispatcher
from moesys.parallel.dispatchers.kind import describe
from moesys.parallel.dispatchers.ranks import ExpertRanks

H, F, E = 16, 24, 8


def together(work: Callable[[int, Path], None], world: int, folder: Path) -> list:
    """Call `work(rank, folder)` in `world` connected processes; what each returned."""
    mp.start_processes(_enter, (work, world, folder), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _enter(rank: int, work: Callable, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=timedelta(seconds=600))
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def weights(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """fc1 [E, H, 1, F] and fc2 [E, F, H] of all experts."""
    g = torch.Generator().manual_seed(7)
    draw = [torch.randn(*shape, generator=g, dtype=torch.float64) / 5 for shape in ((E, H, 1, F), (E, F, H))]
    return draw[0].to(dtype), draw[1].to(dtype)


def tokens(rank: int, count: int) -> tuple[Tensor, Tensor]:
    """x [T, H] of a rank and the gradient of its result."""
    g = torch.Generator().manual_seed(rank)
    return tuple(torch.randn(count, H, generator=g, dtype=torch.float64) for _ in range(2))


def routing(rank: int, count: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """token_A, expert_A and weight_A of a rank: "top_k", "ragged" (0 to E per token) or "one" (expert 0)."""
    g = torch.Generator().manual_seed(100 + rank)
    score = torch.rand(count, E, generator=g)
    if kind == "top_k":
        chosen = torch.zeros(count, E, dtype=torch.bool).scatter_(1, score.topk(3).indices, True)
    elif kind == "ragged":
        chosen = score > 0.6
    else:
        chosen = torch.zeros(count, E, dtype=torch.bool)
        chosen[:, 0] = True
    token, expert = chosen.nonzero().unbind(1)
    return token, expert, torch.rand(len(token), generator=g, dtype=torch.float64)


def whole(world: int, count: int, kind: str) -> dict[str, Tensor]:
    """Results and all gradients by the definition, in float64: Σ weight · fc2(relu(fc1(x)))."""
    fc1, fc2 = (w.requires_grad_() for w in weights())
    result: dict[str, Tensor] = {}
    for rank in range(world):
        x, grad = tokens(rank, count)
        token, expert, weight = routing(rank, count, kind)
        x.requires_grad_(), weight.requires_grad_()
        out = 0 * x + 0 * weight.sum() + 0 * (fc1.sum() + fc2.sum())  # everything has a gradient
        for t, e, w in zip(token.tolist(), expert.tolist(), weight.unbind(), strict=True):
            y = torch.relu(x[t] @ fc1[e, :, 0]) @ fc2[e]
            out = out.index_add(0, torch.tensor([t]), (w * y)[None])
        out.backward(grad)
        result |= {f"out {rank}": out.detach(), f"x {rank}": x.grad, f"weight {rank}": weight.grad}
    return result | {"fc1": fc1.grad, "fc2": fc2.grad}


def make(kind: str, group: dist.ProcessGroup, ep: int, etp: int, nodes: str = "", **more) -> ExpertParallelDispatcher:
    node = nodes[group.rank()] if nodes else "0"
    ranks = ExpertRanks(group, ep, etp, torch.device("cpu"), timedelta(seconds=600), node)
    return describe(DispatchConfig(kind=kind, **more)).build(ranks)(E)


def slices(group_rank: int, ep: int, etp: int, dtype: torch.dtype) -> list[Tensor]:
    """This rank's slices of fc1 and fc2, leaves."""
    i, j = divmod(group_rank, etp)
    experts, inner = slice(i * E // ep, (i + 1) * E // ep), slice(j * F // etp, (j + 1) * F // etp)
    fc1, fc2 = weights(dtype)
    return [fc1[experts, :, :, inner].clone().requires_grad_(), fc2[experts, inner].clone().requires_grad_()]


class PlainExperts:
    """Experts by their definition, in any type."""

    def __init__(self, fc1: Tensor, fc2: Tensor):
        self.fc1, self.fc2, self.calls = fc1, fc2, 0

    def __call__(self, x, counts, weight=None, p=None):
        self.calls += 1
        rows = x if p is None else x[p.token_A]
        outs = []
        for r, fc1, fc2 in zip(rows.split(counts.tolist()), self.fc1, self.fc2, strict=True):
            outs.append(torch.relu(r @ fc1[:, 0]) @ fc2)
        out = torch.cat(outs)
        if weight is not None:
            out = out * weight.to(out.dtype)[:, None]
        return out if p is None else torch.zeros_like(x).index_add(0, p.token_A, out)


def one(
    rank: int, dispatcher: ExpertParallelDispatcher, count: int, kind: str, dtype=torch.float64
) -> dict[str, Tensor]:
    """This rank's results and gradients through `dispatcher`."""
    etp = dispatcher.etp
    fc1, fc2 = slices(dispatcher.group.rank(), dispatcher.ep, etp, dtype)
    x, grad = (t.to(dtype) for t in tokens(rank, count))
    token, expert, weight = routing(rank, count, kind)
    x.requires_grad_()
    weight = weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    out = dispatcher(x, Routing(token, expert, weight), PlainExperts(fc1, fc2))
    out.backward(grad)
    return {"out": out.detach(), "x": x.grad, "weight": weight.grad, "fc1": fc1.grad, "fc2": fc2.grad}


LAYOUTS = {
    "all_to_all": ("all_to_all", "", 4, 1),
    "all_to_all of slices": ("all_to_all", "", 2, 2),
    "all_gather": ("all_gather", "", 4, 1),
    "all_gather of slices": ("all_gather", "", 2, 2),
    "2 nodes of 2": ("hierarchical", "0011", 4, 1),
    "2 nodes of 2, placed in turn": ("hierarchical", "0110", 4, 1),
    "2 nodes of 2, slices": ("hierarchical", "0011", 2, 2),
    "slices on 2 nodes": ("hierarchical", "0101", 2, 2),
    "4 nodes": ("hierarchical", "0123", 4, 1),
    "1 node": ("hierarchical", "0000", 4, 1),
    "uneven nodes": ("hierarchical", "0001", 4, 1),
}
KINDS_OF_LAYOUTS = ("all_to_all", "all_gather", "2 nodes of 2")
TYPES = (torch.float32, torch.bfloat16)
ROUTINGS = [("top_k", 13), ("ragged", 13), ("one", 3), ("top_k", 1), ("ragged", 0)]


def dispatcher_of(name: str, **more) -> ExpertParallelDispatcher:
    kind, nodes, ep, etp = LAYOUTS[name]
    return make(kind, dist.group.WORLD, ep, etp, nodes, **more)


def collectives_of(name: str, dtype: torch.dtype = torch.float32, payload: str = "model") -> list[Sent]:
    """The collectives of one forward and backward pass."""
    with comm.record() as events:
        one(dist.get_rank(), dispatcher_of(name, payload=payload), 13, "top_k", dtype)
    return [Sent(event.kind, event.tag, event.ranks, event.sent) for event in events]


class Sent(NamedTuple):
    """A collective of one rank: bytes `sent` to each of `ranks`."""

    kind: str
    tag: comm.Tag
    ranks: tuple[int, ...]
    sent: tuple[int, ...]


class Timed(torch.autograd.Function):
    """Notes when it runs."""

    @staticmethod
    def forward(ctx, x, times):
        ctx.times = times
        times.append(perf_counter())
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.times.append(perf_counter())
        return grad * 2, None


def overlapped(name: str) -> dict:
    """When something beside the experts ran, with overlap and without, and what came of it."""
    found = {}
    for overlap in (True, False):
        dispatcher = dispatcher_of(name, overlap_shared=overlap)
        times: list[float] = []
        x, grad = tokens(dist.get_rank(), 13)
        x.requires_grad_()
        once = Lazy(lambda x=x, times=times: Timed.apply(x, times))
        dispatcher.overlapped_work = once
        token, expert, weight = routing(dist.get_rank(), 13, "top_k")
        with comm.record() as events:
            out = dispatcher(x, Routing(token, expert, weight), PlainExperts(*_mine(dispatcher))) + once()
            out.backward(grad)
        spans = [(event.kind, event.begin, event.waited) for event in events]
        found[overlap] = {"times": times, "spans": spans, "out": out.detach(), "x": x.grad}
    return found


def _mine(dispatcher: ExpertParallelDispatcher) -> list[Tensor]:
    return slices(dispatcher.group.rank(), dispatcher.ep, dispatcher.etp, torch.float64)


def recomputed(name: str) -> tuple[int, list[str], Tensor, Tensor]:
    """Chunks with full recomputation, which ends early: unwaited collectives, recorded ones, gradients."""
    dispatcher = dispatcher_of(name, chunks=3)
    x, grad = tokens(dist.get_rank(), 13)
    x.requires_grad_()
    token, expert, weight = routing(dist.get_rank(), 13, "top_k")
    experts = PlainExperts(*_mine(dispatcher))
    with comm.record() as events:
        out = checkpoint(lambda x: dispatcher(x, Routing(token, expert, weight), experts), x, use_reentrant=False)
        out.backward(grad)
    return torch._C._distributed_c10d._get_work_registry_size(), [e.kind for e in events], x.grad, experts.fc1.grad


def rounded(name: str) -> dict[str, dict[str, Tensor]]:
    """The same pass with rows in their own type and in eight bits."""
    rank = dist.get_rank()
    return {p: one(rank, dispatcher_of(name, payload=p), 13, "top_k", torch.float32) for p in ("model", "fp8")}


def everything(rank: int) -> dict:
    found: dict = {
        "events": {name: collectives_of(name) for name in LAYOUTS},
        "types": {(n, d, p): collectives_of(n, d, p) for n, d, p in product(KINDS_OF_LAYOUTS, TYPES, ("model", "fp8"))},
        "shared": {name: overlapped(name) for name in KINDS_OF_LAYOUTS},
        "unwaited": {name: recomputed(name) for name in KINDS_OF_LAYOUTS},
        "fp8": {name: rounded(name) for name in KINDS_OF_LAYOUTS},
    }
    for (name, (kind, nodes, ep, etp)), chunks in product(LAYOUTS.items(), (1, 3)):
        dispatcher = make(kind, dist.group.WORLD, ep, etp, nodes, chunks=chunks)
        for routing, count in ROUTINGS:
            found[name, chunks, routing, count] = one(rank, dispatcher, count, routing)
    return found

"""Any case of a dispatcher: what its ranks compute, and the definition that they must agree with.

T tokens of a rank, H hidden, E experts of inner size F, A assignments.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from dispatcher_ranks import PlainExperts
from torch import Tensor

from moesys.config.schema import DispatchConfig
from moesys.moe.routing import Routing
from moesys.parallel.dispatchers.base import ExpertParallelDispatcher
from moesys.parallel.dispatchers.kind import describe
from moesys.parallel.dispatchers.ranks import ExpertRanks

F = 8


@dataclass(frozen=True)
class Case:
    """A dispatcher and what it is given.

    `nodes`: the node of each rank, a letter each, for hierarchical dispatch. `choice`: which experts tokens
    choose, see `chosen`. `rows`: rows sorted by expert are given without weights, as gates without tokens do.
    """

    kind: str = "all_gather"
    nodes: str = "0011"
    ep: int = 4
    chunks: int = 1
    payload: str = "model"
    tokens: tuple[int, ...] = (3, 2, 3, 2)
    local: int = 2
    hidden: int = 8
    choice: str = "two"
    rows: bool = False
    seed: int = 0

    @property
    def etp(self) -> int:
        return len(self.tokens) // self.ep

    @property
    def experts(self) -> int:
        return self.ep * self.local


def generator(case: Case, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 * case.seed + rank)


def weights(case: Case) -> tuple[Tensor, Tensor]:
    """fc1 [E, H, 1, F] and fc2 [E, F, H], leaves."""
    g, sizes = generator(case, 99), ((case.hidden, 1, F), (F, case.hidden))
    fc1, fc2 = (torch.randn(case.experts, *size, generator=g, dtype=torch.float64) / 3 for size in sizes)
    return fc1.requires_grad_(), fc2.requires_grad_()


def given(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H] of a rank, the gradient of its result, and the weights of its assignments [A]."""
    g, (token, _) = generator(case, rank), chosen(case, rank)
    x, grad = (torch.randn(case.tokens[rank], case.hidden, generator=g, dtype=torch.float64) for _ in range(2))
    weight = torch.ones(len(token)) if case.rows else torch.rand(len(token), generator=g)
    return x.requires_grad_(), grad, weight.double().requires_grad_()


def chosen(case: Case, rank: int) -> tuple[Tensor, Tensor]:
    """token_A, ascending, and expert_A of a rank."""
    score = torch.rand(case.tokens[rank], case.experts, generator=generator(case, 50 + rank))
    choice = "one" if case.rows else case.choice
    if choice in ("one", "two"):
        mask = torch.zeros_like(score).scatter_(1, score.topk(("one", "two").index(choice) + 1).indices, 1)
    elif choice == "every expert":
        mask = torch.ones_like(score)
    elif choice == "the last expert":
        mask = torch.zeros_like(score)
        mask[:, -1:] = 1
    else:
        assert choice == "any number"
        mask = score > 0.6
    token, expert = mask.nonzero().unbind(1)
    return token, expert.sort().values if case.rows else expert


def rounded(x_TH: Tensor) -> Tensor:
    """x in float8 with a power of two per 128 elements; its gradient is that of x."""
    parts = []
    for block in x_TH.detach().split(128, 1):
        peak = block.abs().amax(1, keepdim=True)
        scale = torch.where(peak > 0, 2.0 ** (peak / 448).log2().ceil(), 1.0)
        parts.append((block / scale).to(torch.float8_e4m3fn).double() * scale)
    return x_TH + (torch.cat(parts, 1) - x_TH.detach())


def definition(case: Case) -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
    """Of each rank: its results Σ weight · fc2(relu(fc1(x))) and gradients; then the experts' gradients."""
    fc1, fc2 = weights(case)
    found = []
    for rank in range(len(case.tokens)):
        x, grad, weight = given(case, rank)
        seen = rounded(x) if case.payload == "fp8" else x
        token, expert = chosen(case, rank)
        out = 0 * x + 0 * weight.sum() + 0 * (fc1.sum() + fc2.sum())  # everything has a gradient
        for t, e, w in zip(token, expert, weight, strict=True):
            out = out.index_add(0, t, (w * torch.relu(seen[t] @ fc1[e, :, 0]) @ fc2[e])[None])
        out.backward(grad)
        found.append({"out": out.detach(), "x": x.grad, "weight": weight.grad})
    return found, fc1.grad, fc2.grad


def slices(case: Case, rank: int) -> tuple[slice, slice]:
    """Which experts, and what of their inner size, a rank holds."""
    i, j = divmod(rank, case.etp)
    return slice(i * case.local, (i + 1) * case.local), slice(j * F // case.etp, (j + 1) * F // case.etp)


def computed(rank: int, case: Case) -> dict[str, Tensor]:
    """The results and gradients of this rank."""
    fc1, fc2 = (w.detach() for w in weights(case))
    experts, inner = slices(case, rank)
    fc1, fc2 = fc1[experts, :, :, inner].clone().requires_grad_(), fc2[experts, inner].clone().requires_grad_()
    x, grad, weight = given(case, rank)
    token, expert = chosen(case, rank)
    if case.rows:
        out = dispatcher(case).run(x, expert.bincount(minlength=case.experts), PlainExperts(fc1, fc2))
    else:
        out = dispatcher(case)(x, Routing(token, expert, weight), PlainExperts(fc1, fc2))
    out.backward(grad)
    found = {"out": out.detach(), "x": x.grad, "fc1": fc1.grad, "fc2": fc2.grad}
    return found if case.rows else found | {"weight": weight.grad}


def dispatcher(case: Case) -> ExpertParallelDispatcher:
    dispatch = DispatchConfig(kind=case.kind, chunks=case.chunks, payload=case.payload)
    return describe(dispatch).build(ranks_of(case.nodes, case.ep, case.etp))(case.experts)


@cache
def ranks_of(nodes: str, ep: int, etp: int) -> ExpertRanks:
    """The ranks of all cases on the same nodes: they share groups."""
    group = dist.group.WORLD
    assert group is not None
    node = nodes[group.rank()] if nodes else "0"
    return ExpertRanks(group, ep, etp, torch.device("cpu"), timedelta(seconds=60), node)

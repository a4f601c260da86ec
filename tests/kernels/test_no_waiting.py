"""A dropless layer never waits for the device: the host runs ahead, and launches are hidden behind work.

On CPU there is nothing to wait for, so that the operations are looked at: those that would have to know a value,
or copy from the host. Zero-computation experts are not among the layers here: which assignments are theirs
decides how many rows there are.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesys.kernels import choose, expert_ffn
from moesys.moe import MoELayer
from moesys.moe.capacity import Capacity
from moesys.moe.experts import Experts
from moesys.moe.gates import TopKGate
from moesys.moe.gates.top_k import Groups, Randomness
from moesys.moe.losses import Balance

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.lift_fresh,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def waits(op, args: tuple, kwargs: dict) -> bool:
    """Whether on GPU the host would wait in `op`."""
    packet = op.overloadpacket
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if packet in INDEXING:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return packet in WAITING


WHOLE = {
    torch.ops.moesys.expert_ffn.default: expert_ffn._forward,
    torch.ops.moesys.expert_ffn_backward.default: expert_ffn._backward,
}
"""Operations that are made of others, which only show when they are called by what they do."""


class Spy(TorchDispatchMode):
    """Notes the operations that would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(op, args, kwargs):
            self.seen.append(str(op))
        if op not in WHOLE:
            return op(*args, **kwargs)
        with self:
            return WHOLE[op](*args, **kwargs)


@pytest.fixture
def device(triton_device, monkeypatch):
    """Where Triton runs, chosen for everything."""
    monkeypatch.setenv(choose.VARIABLE, "triton")
    choose.forget()
    yield triton_device
    choose.forget()


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.as_tensor(3) + x,
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64)),
        lambda x: bool((x > 0).all()),
    ],
)
def test_the_spy_sees(waiting):
    x = torch.ones(4)
    with Spy() as spy:
        waiting(x)
    assert spy.seen


GATES = {
    "plain": {},
    "all losses": {
        "balance": Balance(balance=0.1, sequence_balance=0.1, z=0.1, importance=0.1, global_balance=0.1),
    },
    "selection bias": {"bias_rate": 0.1, "score": "sigmoid"},
    "groups": {"groups": Groups(4, 2, "top2"), "score": "sigmoid"},
    "noise": {"randomness": Randomness(gaussian=True, jitter=0.1), "balance": Balance(load_loss=0.1)},
    "padded capacity": {"capacity": Capacity(1.0, pad=True)},
}
EXPERTS = {"swiglu": {}, "clipped_swiglu with biases": {"activation": "clipped_swiglu", "bias": True}}


@pytest.mark.parametrize(("gate", "experts"), [*((gate, "swiglu") for gate in GATES), ("plain", [*EXPERTS][1])])
def test_no_operation_waits(device, gate, experts):
    layer = MoELayer(TopKGate(16, 8, 2, **GATES[gate]), Experts(8, 16, 24, **EXPERTS[experts])).to(device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x: Tensor = torch.randn(1, 8, 16, device=device, requires_grad=True)
    with Spy() as spy:
        layer(x).square().sum().backward()
    assert not spy.seen
    assert x.grad is not None and x.grad.isfinite().all()
